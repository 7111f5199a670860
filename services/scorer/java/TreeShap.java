package mojomesh;

import ai.h2o.algos.tree.INode;
import ai.h2o.algos.tree.INodeStat;

/**
 * The SHAP values of one tree, in double precision: genmodel's own are floats, whose sums drift from the score.
 *
 * <p>Source: S. Lundberg, G. Erion, S. Lee, "Consistent Individualized Feature Attribution for Tree Ensembles" (2018), algorithm 2.
 *
 * @param <R> a row as the tree's nodes take it
 */
final class TreeShap<R> {
  private final INode<R>[] nodes;
  private final double[] share; // of a parent's training rows, by node
  private final double factor;
  private final double mean;
  private final Path[] paths; // one a step, allocated once

  /** The features met on the way to a node, each with the share of rows that go on with it unknown and known, and the subsets' weights. */
  private static final class Path {
    final int[] feature;
    final double[] unknown;
    final double[] known;
    final double[] weight;
    int length;

    Path(int room) {
      feature = new int[room];
      unknown = new double[room];
      known = new double[room];
      weight = new double[room];
    }

    void copy(Path other) {
      length = other.length;
      System.arraycopy(other.feature, 0, feature, 0, length);
      System.arraycopy(other.unknown, 0, unknown, 0, length);
      System.arraycopy(other.known, 0, known, 0, length);
      System.arraycopy(other.weight, 0, weight, 0, length);
    }

    void extend(int ofFeature, double shareUnknown, double shareKnown) {
      int last = length++;
      feature[last] = ofFeature;
      unknown[last] = shareUnknown;
      known[last] = shareKnown;
      weight[last] = last == 0 ? 1 : 0;
      for (int i = last - 1; i >= 0; i--) {
        weight[i + 1] += shareKnown * weight[i] * (i + 1) / (last + 1);
        weight[i] = shareUnknown * weight[i] * (last - i) / (last + 1);
      }
    }

    int placeOf(int ofFeature) {
      for (int i = 1; i < length; i++) {
        if (feature[i] == ofFeature) {
          return i;
        }
      }
      return -1;
    }

    void unwind(int place) {
      int last = --length;
      double next = weight[last];
      for (int i = last - 1; i >= 0; i--) {
        if (known[place] != 0) {
          double before = weight[i];
          weight[i] = next * (last + 1) / ((i + 1) * known[place]);
          next = before - weight[i] * unknown[place] * (last - i) / (last + 1);
        } else {
          weight[i] = weight[i] * (last + 1) / (unknown[place] * (last - i));
        }
      }
      for (int i = place; i < last; i++) {
        feature[i] = feature[i + 1];
        unknown[i] = unknown[i + 1];
        known[i] = known[i + 1];
      }
    }

    double sumUnwound(int place) {
      int last = length - 1;
      double next = weight[last];
      double total = 0;
      for (int i = last - 1; i >= 0; i--) {
        if (known[place] != 0) {
          double unwound = next * (last + 1) / ((i + 1) * known[place]);
          total += unwound;
          next = weight[i] - unwound * unknown[place] * (last - i) / (last + 1);
        } else {
          total += weight[i] * (last + 1) / (unknown[place] * (last - i));
        }
      }
      return total;
    }
  }

  /**
   * Prepares a tree.
   *
   * @param stats how many training rows came to each node
   * @param factor what its leaves are multiplied by
   */
  TreeShap(INode<R>[] nodes, INodeStat[] stats, double factor) {
    this.nodes = nodes;
    this.factor = factor;
    share = new double[nodes.length];
    for (INode<R> node : nodes) {
      if (!node.isLeaf()) {
        double left = stats[node.getLeftChildIndex()].getWeight();
        double right = stats[node.getRightChildIndex()].getWeight();
        // Of the children's own sum: what is kept of the parent's is rounded apart.
        share[node.getLeftChildIndex()] = left + right > 0 ? left / (left + right) : 0.5;
        share[node.getRightChildIndex()] = 1 - share[node.getLeftChildIndex()];
      }
    }
    mean = mean(0);
    paths = new Path[depth(0) + 1];
    for (int i = 0; i < paths.length; i++) {
      paths[i] = new Path(paths.length + 1);
    }
  }

  private int depth(int at) {
    INode<R> node = nodes[at];
    return node.isLeaf() ? 0 : 1 + Math.max(depth(node.getLeftChildIndex()), depth(node.getRightChildIndex()));
  }

  private double mean(int at) {
    INode<R> node = nodes[at];
    if (node.isLeaf()) {
      return factor * node.getLeafValue();
    }
    int left = node.getLeftChildIndex();
    int right = node.getRightChildIndex();
    return share[left] * mean(left) + share[right] * mean(right);
  }

  /** The tree's mean over the training rows. */
  double mean() {
    return mean;
  }

  /** Adds each feature's contribution to the difference between the row's leaf and the mean. */
  void add(R row, double[] contributions) {
    paths[0].length = 0;
    descend(row, contributions, 0, 0, -1, 1, 1);
  }

  private void descend(R row, double[] contributions, int at, int step, int feature, double unknown, double known) {
    if (unknown == 0 && known == 0) {
      return; // nobody comes here
    }
    Path path = paths[step];
    if (step > 0) {
      path.copy(paths[step - 1]);
    }
    path.extend(feature, unknown, known);
    INode<R> node = nodes[at];
    if (node.isLeaf()) {
      for (int i = 1; i < path.length; i++) {
        double difference = path.known[i] - path.unknown[i];
        contributions[path.feature[i]] += path.sumUnwound(i) * difference * factor * node.getLeafValue();
      }
      return;
    }
    double unknownBefore = 1;
    double knownBefore = 1;
    int place = path.placeOf(node.getSplitIndex());
    if (place >= 0) { // a feature counts once
      unknownBefore = path.unknown[place];
      knownBefore = path.known[place];
      path.unwind(place);
    }
    int taken = node.next(row);
    int other = taken == node.getLeftChildIndex() ? node.getRightChildIndex() : node.getLeftChildIndex();
    descend(row, contributions, taken, step + 1, node.getSplitIndex(), unknownBefore * share[taken], knownBefore);
    descend(row, contributions, other, step + 1, node.getSplitIndex(), unknownBefore * share[other], 0);
  }
}
