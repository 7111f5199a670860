package mojomesh;

/**
 * A node of a tree as its algorithm has it: a leaf, a split of numbers or a split of levels.
 *
 * @param column the model's column that is split, or -1 for a leaf
 * @param below numbers below this go left; a leaf's value
 * @param missingLeft whether a missing number goes left
 * @param leftLevels the levels that go left, a bit for each and, after the last, one for missing; null if numbers are split
 */
record Node(int column, float below, boolean missingLeft, int[] leftLevels, Node left, Node right) {
  static Node leaf(float value) {
    return new Node(-1, value, false, null, null, null);
  }

  static Node numbers(int column, float below, boolean missingLeft, Node left, Node right) {
    return new Node(column, below, missingLeft, null, left, right);
  }

  static Node levels(int column, int[] leftLevels, Node left, Node right) {
    return new Node(column, Float.NaN, false, leftLevels, left, right);
  }

  boolean isLeaf() {
    return column < 0;
  }

  /** Steps to the deepest leaf. */
  int depth() {
    return isLeaf() ? 0 : 1 + Math.max(left.depth(), right.depth());
  }
}
