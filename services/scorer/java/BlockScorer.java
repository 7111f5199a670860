package mojomesh;

import hex.genmodel.MojoModel;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.DoubleBuffer;

/**
 * Scores blocks of rows with one MOJO, without allocating per row.
 *
 * <p>Rows and scores lie in two direct buffers that Python sees as numpy arrays, so one call crosses the border whatever the size of
 * the block. One object belongs to one thread, and owns its model: some MOJOs keep state between rows.
 */
public final class BlockScorer {
  private final MojoModel model;
  private final int columns;
  private final int outputs;
  private final int labels;
  private final double[] row;
  private final double[] predictions;
  private DoubleBuffer in;
  private DoubleBuffer out;

  public BlockScorer(String mojo) throws IOException {
    model = MojoModel.load(mojo);
    columns = model.nfeatures();
    row = new double[columns];
    predictions = new double[model.getPredsSize(model.getModelCategory())];
    labels = model.isClassifier() ? 1 : 0; // a classifier's first prediction is the label, which is not a score
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

  /** Scores the first rows of the buffer. Returns nothing: a returned int costs JPype 32 bytes for ever. */
  public void score(int rows) {
    for (int i = 0; i < rows; i++) {
      in.get(i * columns, row); // a copy, since some models fill in the row's missing values
      model.score0(row, predictions);
      out.put(i * outputs, predictions, labels, outputs);
    }
  }
}
