import hex.genmodel.MojoModel;
import java.io.IOException;

/** What the block scorer is measured against: genmodel's score0 in a loop of Java alone, arrays allocated once. */
public final class Score0Loop {
  private final MojoModel model;
  private final double[][] rows;
  private final double[] row;
  private final double[] predictions;

  public Score0Loop(String mojo, double[][] rows) throws IOException {
    model = MojoModel.load(mojo);
    this.rows = rows;
    row = new double[model.nfeatures()];
    predictions = new double[model.getPredsSize(model.getModelCategory())];
  }

  /** Scores all rows again and again until the time is over. */
  public double rowsPerSecond(double seconds) {
    long start = System.nanoTime();
    long end = start + (long) (seconds * 1e9);
    long n = 0;
    while (System.nanoTime() < end) {
      for (double[] cells : rows) {
        System.arraycopy(cells, 0, row, 0, row.length); // some models fill in what is missing
        model.score0(row, predictions);
      }
      n += rows.length;
    }
    return n * 1e9 / (System.nanoTime() - start);
  }

  /** All predictions, the label first. */
  public double[][] predictions() {
    double[][] all = new double[rows.length][];
    for (int i = 0; i < rows.length; i++) {
      all[i] = model.score0(rows[i].clone(), new double[predictions.length]);
    }
    return all;
  }
}
