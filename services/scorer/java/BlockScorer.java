package mojomesh;

import hex.ModelCategory;
import hex.genmodel.MojoModel;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.DoubleBuffer;
import java.util.zip.ZipFile;

/**
 * Scores blocks of rows with one MOJO, without allocating per row: by its trees, unpacked, if it has any and they score as genmodel
 * does to the last bit, else by genmodel row by row.
 *
 * <p>Rows and scores lie in two direct buffers that Python sees as numpy arrays, so one call crosses the border whatever the size of
 * the block. One object belongs to one thread, and owns its model: some MOJOs keep state between rows.
 */
public final class BlockScorer {
  private static final int PAUSE_EVERY = 256; // some 1 ms of work

  private final String mojo;
  private final MojoModel model;
  private final int columns;
  private final int outputs;
  private final int labels;
  private final double[] row;
  private final double[] predictions;
  private TreeModel trees; // null: genmodel scores
  private DoubleBuffer in;
  private DoubleBuffer out;

  public BlockScorer(String mojo) throws IOException {
    this.mojo = mojo;
    model = MojoModel.load(mojo);
    columns = model.nfeatures();
    row = new double[columns];
    predictions = new double[model.getPredsSize(model.getModelCategory())];
    // The first prediction of a classifier is the label, and of an isolation forest that flags anomalies the flag: no scores.
    labels = model.isClassifier() || model.getModelCategory() == ModelCategory.AnomalyDetection && predictions.length == 3 ? 1 : 0;
    outputs = model.isClassifier() ? model.nclasses() : 1; // genmodel wants room for two predictions of a regression, and fills one
  }

  /** Names of the inputs in scoring order. */
  public String[] columns() {
    String[] names = new String[columns];
    System.arraycopy(model.getNames(), 0, names, 0, columns);
    return names;
  }

  /** Levels of an input as the MOJO numbers them; null for a number. */
  public String[] levels(int column) {
    return model.getDomainValues(column);
  }

  /** Classes in the order of the scores; null for a regression. */
  public String[] classes() {
    return model.isClassifier() ? model.getDomainValues(model.getResponseIdx()) : null;
  }

  /** Gives the object its buffers, both in the machine's byte order: rows come row by row in the first, scores go to the second. */
  public void attach(ByteBuffer rows, ByteBuffer scores) {
    in = rows.order(ByteOrder.nativeOrder()).asDoubleBuffer();
    out = scores.order(ByteOrder.nativeOrder()).asDoubleBuffer();
  }

  /**
   * Unpacks the trees, and lets them score from now on if they score the first rows of the buffer, and rows made from them, as genmodel.
   *
   * @return why genmodel goes on scoring; null if the trees do
   */
  public String unpack(int rows) throws IOException {
    double[][] given = new double[rows][columns];
    for (int i = 0; i < rows; i++) {
      in.get(i * columns, given[i]);
    }
    try (ZipFile archive = new ZipFile(mojo)) {
      trees = TreeModel.unpack(model, archive, given);
      return null;
    } catch (NotUnpacked reason) {
      return reason.getMessage();
    }
  }

  /** Scores the first rows of the buffer. Returns nothing: a returned int costs JPype 32 bytes for ever. */
  public void score(int rows) {
    if (trees == null) {
      for (int i = 0; i < rows; i++) {
        in.get(i * columns, row); // a copy, since some models fill in the row's missing values
        model.score0(row, predictions);
        out.put(i * outputs, predictions, labels, outputs);
      }
      return;
    }
    for (int from = 0; from < rows; from += FlatTrees.BLOCK) {
      int n = Math.min(FlatTrees.BLOCK, rows - from);
      for (int i = 0; i < n; i++) {
        in.get((from + i) * columns, row);
        trees.encode(row, i);
      }
      trees.addUp(n);
      for (int i = 0; i < n; i++) {
        trees.predict(i, predictions);
        out.put((from + i) * outputs, predictions, labels, outputs);
      }
    }
  }

  /**
   * Scores the first rows of the buffer again and again, one at a time and as a block, until the machine has compiled what scores. In
   * one call and with pauses: a loop in Python would fight over its lock with the requests that are answered meanwhile.
   */
  public void warm(int rows, int times) throws InterruptedException {
    for (int time = 1; time <= times; time++) {
      score(1);
      if (time % rows == 0) {
        score(rows);
      }
      if (time % PAUSE_EVERY == 0) {
        Thread.sleep(1);
      }
    }
  }
}
