package mojomesh;

import java.util.Arrays;

/**
 * Trees laid out for the processor: walked one after the other over a block of rows, without a branch that depends on the data.
 *
 * <p>A node is one long: the column to look at, the place of its two children, which are neighbours, and what decides between them:
 * the lowest number that goes right, or where the set of the levels that go left lies. A leaf is its own child, so that every row
 * takes as many steps as the tree is deep, and four take them side by side, each while the others wait for memory.
 *
 * <p>Cells become ints first. A number becomes an int that is ordered as the numbers are; since splits are floats, no more is needed.
 * Missing is the lowest or the highest int. A level is its number, missing the number after the last.
 */
final class FlatTrees {
  /** How a double is made to the float that splits are compared with. */
  enum Rounding {
    /** Down, so that comparing it with a float gives what the double would have given. */
    DOWN,
    /** To the nearest. */
    NEAREST,
    /** To the nearest, and zero is missing. */
    NEAREST_WITHOUT_ZERO
  }

  /** Rows that are walked through one tree before the next. Measured: 64, 256 and 1,024 are alike. */
  static final int BLOCK = 64;

  private final TreeLayout.Tree[][] classes;
  private final int[] levels;
  private final int[] encoded;
  private final Rounding rounding;
  private final double start;
  private final boolean single;
  private final int[] cells; // of a block, row by row
  private final double[][] sums; // by class and row of the block

  /**
   * Takes over what was laid out.
   *
   * @param start what the sums begin with
   * @param single whether they are added up in single precision
   */
  FlatTrees(TreeLayout layout, Rounding rounding, double start, boolean single) {
    classes = layout.classes.stream().map(trees -> trees.toArray(new TreeLayout.Tree[0])).toArray(TreeLayout.Tree[][]::new);
    levels = layout.levels;
    encoded = layout.encodedColumns();
    this.rounding = rounding;
    this.start = start;
    this.single = single;
    cells = new int[BLOCK * encoded.length];
    for (int row = 0; row < BLOCK; row++) {
      cells[row * encoded.length] = Integer.MAX_VALUE; // less than no split: a leaf goes to its left child, which is itself
    }
    sums = new double[classes.length][BLOCK];
  }

  int classes() {
    return classes.length;
  }

  /** Takes in a row as the given one of the block. */
  void encode(double[] values, int row) {
    int at = row * encoded.length;
    for (int place = 1; place < encoded.length; place++) {
      int column = encoded[place] >> 1;
      int n = levels[column];
      cells[at + place] = n < 0 ? number(values[column], (encoded[place] & 1) != 0) : level(values[column], n);
    }
  }

  private int number(double value, boolean missingHigh) {
    float rounded = (float) value;
    if (rounding == Rounding.DOWN && rounded > value) {
      rounded = Math.nextDown(rounded);
    }
    if (rounded != rounded || rounded == 0 && rounding == Rounding.NEAREST_WITHOUT_ZERO) {
      return missingHigh ? Integer.MAX_VALUE : Integer.MIN_VALUE;
    }
    return TreeLayout.ordered(rounded);
  }

  private static int level(double value, int n) {
    return value >= 0 && value < n ? (int) value : n;
  }

  /** Adds up the leaves of the block's first rows, class by class and tree by tree. */
  void addUp(int rows) {
    for (int k = 0; k < classes.length; k++) {
      Arrays.fill(sums[k], 0, rows, start);
      for (TreeLayout.Tree tree : classes[k]) {
        walk(tree.nodes(), tree.sets(), tree.depth(), sums[k], rows);
      }
    }
  }

  private void walk(long[] nodes, int[] sets, int depth, double[] sums, int rows) {
    int width = encoded.length;
    int row = 0;
    for (; row + 4 <= rows; row += 4) {
      int cell = row * width;
      int a = 0;
      int b = 0;
      int c = 0;
      int d = 0;
      for (int step = 0; step < depth; step++) {
        a = child(nodes[a], cell, sets);
        b = child(nodes[b], cell + width, sets);
        c = child(nodes[c], cell + 2 * width, sets);
        d = child(nodes[d], cell + 3 * width, sets);
      }
      add(sums, row, nodes[a]);
      add(sums, row + 1, nodes[b]);
      add(sums, row + 2, nodes[c]);
      add(sums, row + 3, nodes[d]);
    }
    for (; row < rows; row++) {
      int at = 0;
      for (int step = 0; step < depth; step++) {
        at = child(nodes[at], row * width, sets);
      }
      add(sums, row, nodes[at]);
    }
  }

  private int child(long node, int firstCell, int[] sets) {
    int cell = cells[firstCell + ((int) (node >>> TreeLayout.COLUMN_AT) & TreeLayout.COLUMN)];
    int split = (int) node;
    int ofLevels = (int) (node >> 63); // all bits, or none
    int set = sets[split + (cell >> 5) & ofLevels];
    int less = (int) ((long) cell - split >>> 63);
    int left = (set >>> cell & ofLevels | less & ~ofLevels) & 1;
    return ((int) (node >>> TreeLayout.CHILD_AT) & TreeLayout.CHILD) + left;
  }

  private void add(double[] sums, int row, long leaf) {
    double sum = sums[row] + Float.intBitsToFloat((int) leaf);
    sums[row] = single ? (float) sum : sum; // which is what adding two floats gives
  }

  /** Where {@link #addUp} leaves the sum of a row of the block. */
  double sum(int ofClass, int row) {
    return sums[ofClass][row];
  }
}
