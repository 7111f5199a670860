import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import com.fasterxml.jackson.databind.ObjectWriter;
import hex.genmodel.MojoModel;
import io.undertow.Undertow;
import io.undertow.server.HttpServerExchange;
import io.undertow.util.Headers;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** The least that serves the model in Java: Undertow, Jackson and genmodel, scoring on the I/O threads. Arguments: port, MOJO. */
public final class UndertowServer {
  @JsonIgnoreProperties(ignoreUnknown = true)
  public record Tensor(String name, Object[] data) {}

  @JsonIgnoreProperties(ignoreUnknown = true)
  public record Request(String id, List<Tensor> inputs) {}

  public record Output(String name, String datatype, int[] shape, double[] data) {}

  public record Reply(String model_name, String model_version, String id, List<Output> outputs) {}

  private final MojoModel model;
  private final Map<String, Integer> columns = new HashMap<>();
  private final Map<Integer, Map<String, Double>> levels = new HashMap<>();
  private final ObjectReader reader = new ObjectMapper().readerFor(Request.class);
  private final ObjectWriter writer = new ObjectMapper().writerFor(Reply.class);

  private UndertowServer(String mojo) throws IOException {
    model = MojoModel.load(mojo);
    for (int column = 0; column < model.nfeatures(); column++) {
      columns.put(model.getNames()[column], column);
      String[] domain = model.getDomainValues(column);
      if (domain == null) continue;
      Map<String, Double> numbers = new HashMap<>();
      for (int level = 0; level < domain.length; level++) numbers.put(domain[level], (double) level);
      levels.put(column, numbers);
    }
  }

  private byte[] infer(byte[] body) throws IOException {
    Request request = reader.readValue(body);
    int rows = request.inputs().get(0).data().length;
    int width = model.nfeatures();
    double[] block = new double[rows * width];
    for (Tensor tensor : request.inputs()) {
      int column = columns.get(tensor.name());
      Map<String, Double> numbers = levels.get(column);
      Object[] data = tensor.data();
      for (int row = 0; row < rows; row++) {
        block[row * width + column] =
            numbers == null ? ((Number) data[row]).doubleValue() : numbers.getOrDefault((String) data[row], Double.NaN);
      }
    }
    double[] values = new double[width];
    double[] predictions = new double[3];
    double[] scores = new double[rows];
    for (int row = 0; row < rows; row++) {
      System.arraycopy(block, row * width, values, 0, width);
      model.score0(values, predictions);
      scores[row] = predictions[2];
    }
    Output output = new Output("score", "FP64", new int[] {rows}, scores);
    return writer.writeValueAsBytes(new Reply("gbm", "1", request.id(), List.of(output)));
  }

  private void handle(HttpServerExchange exchange) {
    if (exchange.getRequestMethod().toString().equals("GET")) {
      exchange.getResponseSender().send("ready");
      return;
    }
    exchange
        .getRequestReceiver()
        .receiveFullBytes(
            (received, body) -> {
              try {
                byte[] reply = infer(body);
                received.getResponseHeaders().put(Headers.CONTENT_TYPE, "application/json");
                received.getResponseSender().send(ByteBuffer.wrap(reply));
              } catch (IOException | RuntimeException error) {
                received.setStatusCode(400).getResponseSender().send(error.toString());
              }
            });
  }

  public static void main(String[] arguments) throws IOException {
    UndertowServer server = new UndertowServer(arguments[1]);
    Undertow.builder().addHttpListener(Integer.parseInt(arguments[0]), "127.0.0.1").setIoThreads(2).setHandler(server::handle).build().start();
  }
}
