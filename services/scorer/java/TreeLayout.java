package mojomesh;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.stream.Stream;

/** Lays trees out as {@link FlatTrees} walks them, one by one, so that no more than one is ever held as nodes. */
final class TreeLayout {
  /**
   * A tree laid out.
   *
   * @param nodes level by level, so that the first steps of all rows share cache lines
   * @param sets the levels that go left at splits of levels: a bit for each and one for missing, 32 an int
   */
  record Tree(long[] nodes, int[] sets, int depth) {}

  // A node, from its lowest bit: split 32, left child's place 20, column 11, and one that says that levels are split.
  static final int CHILD_AT = 32;
  static final int CHILD = (1 << 20) - 1;
  static final int COLUMN_AT = 52;
  static final int COLUMN = (1 << 11) - 1;
  static final long OF_LEVELS = 1L << 63;

  /** By the model's column: how many levels it has, or -1 for a number. */
  final int[] levels;

  /** The trees of each class, in the order in which they are added up. */
  final List<List<Tree>> classes;

  /** Where each of the model's columns is split, if it is a number. */
  final List<TreeSet<Float>> splits;

  private final Map<Integer, Integer> columns = new HashMap<>();

  TreeLayout(int[] levels, int classes) {
    this.levels = levels;
    this.classes = Stream.generate(() -> (List<Tree>) new ArrayList<Tree>()).limit(classes).toList();
    splits = Stream.generate(TreeSet<Float>::new).limit(levels.length).toList();
  }

  /**
   * Adds the next tree of a class.
   *
   * @throws NotUnpacked if it needs more columns or more room than a node has bits for
   */
  void add(int ofClass, Node root) throws NotUnpacked {
    List<Node> nodes = new ArrayList<>(List.of(root));
    int room = 0;
    for (int at = 0; at < nodes.size(); at++) {
      Node node = nodes.get(at);
      if (!node.isLeaf()) {
        nodes.add(node.right());
        nodes.add(node.left());
        room += node.leftLevels() == null ? 0 : node.leftLevels().length;
      }
    }
    if (nodes.size() > CHILD) {
      throw new NotUnpacked("a tree has more than " + CHILD + " nodes");
    }
    Tree tree = new Tree(new long[nodes.size()], new int[Math.max(1, room)], root.depth());
    int child = 1;
    room = 0;
    for (int at = 0; at < nodes.size(); at++) {
      Node node = nodes.get(at);
      if (node.isLeaf()) {
        tree.nodes[at] = (long) at << CHILD_AT | Integer.toUnsignedLong(Float.floatToRawIntBits(node.below()));
        continue;
      }
      long place = (long) encoded(node) << COLUMN_AT | (long) child << CHILD_AT;
      child += 2;
      if (node.leftLevels() == null) {
        tree.nodes[at] = place | Integer.toUnsignedLong(ordered(node.below()));
      } else {
        tree.nodes[at] = OF_LEVELS | place | room;
        System.arraycopy(node.leftLevels(), 0, tree.sets, room, node.leftLevels().length);
        room += node.leftLevels().length;
      }
    }
    classes.get(ofClass).add(tree);
  }

  /** The encoded column that a node looks at. A number has two: missing is low in one and high in the other. */
  private int encoded(Node node) throws NotUnpacked {
    boolean ofLevels = node.leftLevels() != null;
    if (!ofLevels && Float.isFinite(node.below())) {
      splits.get(node.column()).add(node.below());
    }
    int place = columns.computeIfAbsent(2 * node.column() + (ofLevels || node.missingLeft() ? 0 : 1), absent -> 1 + columns.size());
    if (place > COLUMN) {
      throw new NotUnpacked("its trees split more than " + COLUMN + " columns");
    }
    return place;
  }

  /** By encoded column: twice the model's column, and one more where missing is high. The first is none: leaves look there. */
  int[] encodedColumns() {
    int[] encoded = new int[1 + columns.size()];
    columns.forEach((column, place) -> encoded[place] = column);
    return encoded;
  }

  /** Ints in the order of the floats; both zeros are one. */
  static int ordered(float value) {
    int bits = Float.floatToRawIntBits(value);
    return bits < 0 ? Integer.MIN_VALUE - bits : bits;
  }
}
