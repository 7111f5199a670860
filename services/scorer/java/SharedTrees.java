package mojomesh;

import hex.genmodel.algos.tree.NaSplitDir;
import hex.genmodel.algos.tree.SharedTreeMojoModel;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.zip.ZipEntry;
import java.util.zip.ZipFile;

/**
 * The trees of GBM, DRF and isolation forest, read from the bytes that genmodel reads anew for every row.
 *
 * <p>Source: H2O-3 3.46, hex.genmodel.algos.tree.SharedTreeMojoModel.scoreTree and hex.genmodel.utils.GenmodelBitSet.
 */
final class SharedTrees {
  private static final int NO_COLUMN = 65535;
  private static final int LEFT_IS_LEAF = 48;

  private final ByteBuffer tree;
  private final int[] levels;

  private SharedTrees(byte[] tree, int[] levels) {
    this.tree = ByteBuffer.wrap(tree).order(ByteOrder.nativeOrder());
    this.levels = levels;
  }

  /** Lays out the trees of each class, in the order in which genmodel adds them up. */
  static void read(SharedTreeMojoModel model, ZipFile mojo, TreeLayout layout) throws IOException, NotUnpacked {
    if (model._mojo_version < 1.2) {
      throw new NotUnpacked("its trees are in the form of MOJO version " + model._mojo_version);
    }
    for (int k = 0; k < model.getNTreesPerGroup(); k++) {
      for (int t = 0; t < model.getNTreeGroups(); t++) {
        ZipEntry file = mojo.getEntry(String.format("trees/t%02d_%03d.bin", k, t));
        if (file != null) { // a class may have fewer trees
          layout.add(k, new SharedTrees(mojo.getInputStream(file).readAllBytes(), layout.levels).node(0, null));
        }
      }
    }
  }

  /** @param above the set of the nearest split of levels above: genmodel does not forget it at a split of missing against the rest */
  private Node node(int at, Levels above) throws NotUnpacked {
    tree.position(at);
    int type = tree.get();
    int column = tree.getChar();
    if (column == NO_COLUMN) {
      return Node.leaf(tree.getFloat());
    }
    int direction = tree.get();
    boolean missingAlone = direction == NaSplitDir.NAvsREST.value();
    boolean missingLeft = direction == NaSplitDir.NALeft.value() || direction == NaSplitDir.Left.value();
    boolean ofLevels = (type & 12) != 0;
    if (ofLevels && levels[column] < 0) {
      throw new NotUnpacked("a split of levels is of a number");
    }
    float below = Float.POSITIVE_INFINITY;
    Levels right = above;
    if (!missingAlone) {
      if (ofLevels) {
        right = Levels.read(tree, (type & 12) == 8);
      } else {
        below = tree.getFloat();
      }
    }
    Node[] children = children(type, right);
    if (levels[column] < 0) {
      return Node.numbers(column, below, missingLeft, children[0], children[1]);
    }
    int n = levels[column];
    int[] left = new int[n / 32 + 1];
    for (int level = 0; level <= n; level++) {
      boolean unknown = level == n || ofLevels && right != null && !right.holds(level);
      if (unknown ? missingLeft : missingAlone || !(ofLevels ? right.contains(level) : level >= below)) {
        left[level / 32] |= 1 << level;
      }
    }
    return Node.levels(column, left, children[0], children[1]);
  }

  private Node[] children(int type, Levels above) throws NotUnpacked {
    int at = tree.position();
    int sizeBytes = type & 51; // of what follows the left subtree's size, less one; unless the left child is a leaf
    if (sizeBytes == LEFT_IS_LEAF) {
      Node left = Node.leaf(tree.getFloat());
      return new Node[] {left, right(type, at + 4, above)};
    }
    int start = at + sizeBytes + 1;
    int size = 0;
    for (int i = 0; i <= sizeBytes; i++) {
      size |= (tree.get() & 0xff) << 8 * i;
    }
    Node left = node(start, above);
    return new Node[] {left, right(type, start + size, above)};
  }

  private Node right(int type, int at, Levels above) throws NotUnpacked {
    return (type & 64) != 0 ? Node.leaf(tree.getFloat(at)) : node(at, above);
  }

  /** The levels that a split sends right, as far as the set reaches. */
  private record Levels(byte[] bits, int first, int n) {
    static Levels read(ByteBuffer tree, boolean small) {
      int first = small ? 0 : tree.getChar();
      int n = small ? 32 : tree.getInt();
      byte[] bits = new byte[(n - 1 >> 3) + 1];
      tree.get(bits);
      return new Levels(bits, first, n);
    }

    boolean holds(int level) {
      return level >= first && level - first < n;
    }

    boolean contains(int level) {
      int place = level - first;
      return (bits[place >> 3] >> (place & 7) & 1) != 0;
    }
  }
}
