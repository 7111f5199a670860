import hex.genmodel.MojoModel;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.DoubleBuffer;
import java.nio.file.Files;
import java.nio.file.Path;

/** Rows a second of genmodel's score0 in a plain loop, arrays made once. Arguments: MOJO, rows (big-endian doubles), seconds. */
public final class Score0Loop {
  public static void main(String[] arguments) throws IOException {
    MojoModel model = MojoModel.load(arguments[0]);
    int width = model.nfeatures();
    DoubleBuffer stored = ByteBuffer.wrap(Files.readAllBytes(Path.of(arguments[1]))).asDoubleBuffer();
    int rows = stored.remaining() / width;
    double[] block = new double[rows * width];
    stored.get(block);
    double[] row = new double[width];
    double[] predictions = new double[3];
    double[] scores = new double[rows];
    double seconds = Double.parseDouble(arguments[2]);
    double best = 0;
    for (int round = 0; round < 6; round++) { // the first of them warm the compiler up
      long scored = 0;
      long start = System.nanoTime();
      double took;
      do {
        for (int i = 0; i < rows; i++) {
          System.arraycopy(block, i * width, row, 0, width);
          model.score0(row, predictions);
          scores[i] = predictions[2];
        }
        scored += rows;
        took = (System.nanoTime() - start) * 1e-9;
      } while (took < seconds / 6);
      best = Math.max(best, scored / took);
    }
    System.out.println(best);
  }
}
