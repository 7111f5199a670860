package mojomesh;

import ai.h2o.algos.tree.INode;
import ai.h2o.algos.tree.INodeStat;
import biz.k11i.xgboost.Predictor;
import biz.k11i.xgboost.gbm.Dart;
import biz.k11i.xgboost.gbm.GBTree;
import biz.k11i.xgboost.tree.RegTree;
import biz.k11i.xgboost.util.FVec;
import hex.genmodel.MojoModel;
import hex.genmodel.algos.drf.DrfMojoModel;
import hex.genmodel.algos.gbm.GbmMojoModel;
import hex.genmodel.algos.tree.SharedTreeMojoModel;
import hex.genmodel.algos.tree.SharedTreeSubgraph;
import hex.genmodel.algos.xgboost.XGBoostJavaMojoModel;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.DoubleBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.function.Consumer;
import java.util.zip.ZipFile;

/**
 * What each column adds to the raw score of a row: SHAP values from the MOJO's trees. With the bias they sum to the score before the link.
 *
 * <p>One object belongs to one thread. Rows and contributions lie in two direct buffers, as with {@link BlockScorer}; a row has a
 * contribution for each column and then the bias.
 */
public final class Contributions {
  private final int columns;
  private final double[] row;
  private final double[] contributions;
  private final Consumer<double[]> explain; // a row, into `contributions`
  private DoubleBuffer in;
  private DoubleBuffer out;

  /** @throws UnsupportedOperationException if a model of this kind has no contributions; the message says which have */
  public Contributions(String mojo) throws IOException {
    MojoModel model = MojoModel.load(mojo);
    columns = model.nfeatures();
    row = new double[columns];
    contributions = new double[columns + 1];
    boolean additive = model.nclasses() <= 2;
    if (additive && model instanceof GbmMojoModel gbm) {
      explain = ofSharedTrees(gbm, 1, gbm._init_f);
    } else if (additive && model instanceof DrfMojoModel drf && !drf.isBinomialDoubleTrees()) {
      // The trees of two classes average to the first one's probability; explained is the second's.
      boolean classes = model.nclasses() == 2;
      explain = ofSharedTrees(drf, (classes ? -1.0 : 1.0) / drf.getNTreeGroups(), classes ? 1 : 0);
    } else if (additive && model instanceof XGBoostJavaMojoModel boosted && !boosted._boosterType.equals("gblinear")) {
      explain = ofXGBoost(boosted, mojo);
    } else {
      throw new UnsupportedOperationException(
          "a " + model._algoName + " model of category " + model.getModelCategory() + " has no contributions; gbm, drf (without"
              + " binomial_double_trees) and xgboost (with trees) have, of regression and of two classes");
    }
  }

  private Consumer<double[]> ofSharedTrees(SharedTreeMojoModel model, double factor, double start) {
    List<TreeShap<double[]>> trees = new ArrayList<>();
    double bias = start;
    for (SharedTreeSubgraph tree : model.computeGraph(-1).subgraphArray) {
      TreeShap<double[]> shap = new TreeShap<>(tree.getNodes(), tree.getNodes(), factor);
      trees.add(shap);
      bias += shap.mean();
    }
    double total = bias;
    return cells -> {
      Arrays.fill(contributions, 0);
      trees.forEach(tree -> tree.add(cells, contributions));
      contributions[columns] = total;
    };
  }

  private Consumer<double[]> ofXGBoost(XGBoostJavaMojoModel model, String mojo) throws IOException {
    Predictor predictor;
    try (ZipFile archive = new ZipFile(mojo)) {
      predictor = XGBoostTrees.open(archive);
    }
    OneHot oneHot = new OneHot(model);
    GBTree booster = (GBTree) predictor.getBooster();
    List<TreeShap<FVec>> trees = new ArrayList<>();
    double bias = predictor.getBaseScore();
    for (RegTree tree : booster.getGroupedTrees()[0]) {
      INode<FVec>[] nodes = tree.getNodes();
      INodeStat[] stats = tree.getStats();
      TreeShap<FVec> shap = new TreeShap<>(nodes, stats, booster instanceof Dart dart ? dart.weight(trees.size()) : 1);
      trees.add(shap);
      bias += shap.mean();
    }
    double total = bias;
    double[] ofOneHot = new double[oneHot.width()];
    return cells -> {
      oneHot.set(cells);
      Arrays.fill(ofOneHot, 0);
      trees.forEach(tree -> tree.add(oneHot, ofOneHot));
      Arrays.fill(contributions, 0);
      for (int index = 0; index < ofOneHot.length; index++) {
        contributions[oneHot.columnOf(index)] += ofOneHot[index];
      }
      contributions[columns] = total;
    };
  }

  /** Gives the object its buffers, both in the machine's byte order. */
  public void attach(ByteBuffer rows, ByteBuffer contributions) {
    in = rows.order(ByteOrder.nativeOrder()).asDoubleBuffer();
    out = contributions.order(ByteOrder.nativeOrder()).asDoubleBuffer();
  }

  /** Explains the first rows of the buffer. */
  public void explain(int rows) {
    for (int i = 0; i < rows; i++) {
      in.get(i * columns, row);
      explain.accept(row);
      out.put(i * contributions.length, contributions);
    }
  }
}
