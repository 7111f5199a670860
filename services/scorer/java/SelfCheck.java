package mojomesh;

import hex.genmodel.MojoModel;
import java.util.Random;
import java.util.TreeSet;

/** Compares unpacked trees with genmodel: on given rows, and on rows made from them that try every kind of cell. */
final class SelfCheck {
  private static final int MADE_ROWS = 1000;
  private static final int MOST_SPLITS = 100; // of a column that are tried, taken evenly

  private final MojoModel model;
  private final double[][] tried; // by the model's column: the values to try

  SelfCheck(MojoModel model, TreeLayout layout) {
    this.model = model;
    tried = new double[layout.levels.length][];
    for (int column = 0; column < tried.length; column++) {
      int n = layout.levels[column];
      tried[column] = n < 0 ? aroundSplits(layout.splits.get(column)) : allLevels(n);
    }
  }

  /**
   * Scores the rows and {@value #MADE_ROWS} made from them by both.
   *
   * @throws NotUnpacked if a score differs in a single bit; the label is no score
   */
  void check(TreeModel trees, double[][] rows) throws NotUnpacked {
    int firstScore = model.isClassifier() ? 1 : 0;
    double[] wanted = new double[model.getPredsSize(model.getModelCategory())];
    double[] found = wanted.clone();
    Random random = new Random(rows.length); // the same rows on every load
    for (int i = 0; i < rows.length + MADE_ROWS; i++) {
      double[] row = i < rows.length ? rows[i] : vary(rows[i % rows.length], random);
      trees.encode(row, 0);
      trees.addUp(1);
      trees.predict(0, found);
      model.score0(row.clone(), wanted); // some models fill in what is missing
      for (int score = firstScore; score < wanted.length; score++) {
        if (Double.compare(wanted[score], found[score]) != 0) {
          throw new NotUnpacked("its trees score a row " + found[score] + ", genmodel " + wanted[score]);
        }
      }
    }
  }

  private double[] vary(double[] row, Random random) {
    double[] made = row.clone();
    for (int column = 0; column < made.length; column++) {
      if (random.nextInt(3) == 0) {
        made[column] = tried[column][random.nextInt(tried[column].length)];
      }
    }
    return made;
  }

  private static double[] aroundSplits(TreeSet<Float> splits) {
    Float[] all = splits.toArray(new Float[0]);
    int n = Math.min(all.length, MOST_SPLITS);
    double[] values = new double[2 + 5 * n];
    values[0] = Double.NaN;
    for (int i = 0; i < n; i++) {
      float split = all[(int) ((long) i * all.length / n)];
      double[] around = {split, Math.nextDown((double) split), Math.nextUp((double) split), Math.nextDown(split), -split};
      System.arraycopy(around, 0, values, 2 + 5 * i, around.length);
    }
    return values;
  }

  private static double[] allLevels(int n) {
    double[] values = new double[n + 2];
    for (int level = 0; level <= n; level++) {
      values[level] = level; // the last was never seen in training
    }
    values[n + 1] = Double.NaN;
    return values;
  }
}
