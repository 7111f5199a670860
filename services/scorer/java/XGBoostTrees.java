package mojomesh;

import biz.k11i.xgboost.Predictor;
import biz.k11i.xgboost.gbm.Dart;
import biz.k11i.xgboost.gbm.GBTree;
import biz.k11i.xgboost.tree.RegTree;
import biz.k11i.xgboost.tree.RegTreeNode;
import hex.genmodel.algos.xgboost.XGBoostJavaMojoModel;
import hex.genmodel.algos.xgboost.XGBoostMojoModel;
import java.io.IOException;
import java.util.zip.ZipFile;

/**
 * The trees of XGBoost, whose splits of one-hot columns become splits of levels. Boosters of before XGBoost 1.3 add the base score
 * last; {@link SelfCheck} sees that they score otherwise.
 *
 * <p>Source: hex.genmodel.algos.xgboost.XGBoostJavaMojoModel of H2O-3 3.46, and biz.k11i.xgboost of h2oai/xgboost-predictor 0.3.20.
 */
final class XGBoostTrees {
  private final XGBoostMojoModel model;
  private final OneHot oneHot;
  private final int[][] hot; // by category column and level, missing last: the one-hot column that is 1

  private XGBoostTrees(XGBoostMojoModel model, int[] levels) {
    this.model = model;
    oneHot = new OneHot(model);
    hot = new int[model._cats][];
    double[] row = new double[levels.length];
    for (int column = 0; column < hot.length; column++) {
      hot[column] = new int[levels[column] + 1];
      for (int level = 0; level < hot[column].length; level++) {
        row[column] = level < levels[column] ? level : Double.NaN;
        hot[column][level] = oneHot.set(row)[column];
      }
    }
  }

  /** The booster as genmodel reads it, which keeps its own to itself. */
  static Predictor open(ZipFile mojo) throws IOException {
    return XGBoostJavaMojoModel.makePredictor(mojo.getInputStream(mojo.getEntry("boosterBytes")).readAllBytes(), null);
  }

  /** Lays out the trees of each class, a leaf of DART's weighted as it is added. */
  static void read(XGBoostMojoModel model, Predictor predictor, TreeLayout layout) throws NotUnpacked {
    if (!(predictor.getBooster() instanceof GBTree booster)) {
      throw new NotUnpacked("its booster is " + model._boosterType + ", which is no tree");
    }
    XGBoostTrees reader = new XGBoostTrees(model, layout.levels);
    RegTree[][] groups = booster.getGroupedTrees();
    for (int k = 0; k < groups.length; k++) {
      for (int t = 0; t < groups[k].length; t++) {
        layout.add(k, reader.node(groups[k][t].getNodes(), 0, booster instanceof Dart dart ? dart.weight(t) : 1));
      }
    }
  }

  private Node node(RegTreeNode[] tree, int at, float weight) {
    RegTreeNode node = tree[at];
    if (node.isLeaf()) {
      return Node.leaf(weight * node.getLeafValue());
    }
    Node left = node(tree, node.getLeftChildIndex(), weight);
    Node right = node(tree, node.getRightChildIndex(), weight);
    float below = node.getSplitCondition();
    int index = node.getSplitIndex();
    int column = oneHot.columnOf(index);
    if (column >= model._cats) {
      return Node.numbers(column, below, node.default_left(), left, right);
    }
    boolean coldLeft = model._sparse ? node.default_left() : 0 < below;
    int[] leftLevels = new int[(hot[column].length + 31) / 32];
    for (int level = 0; level < hot[column].length; level++) {
      if (hot[column][level] == index ? 1 < below : coldLeft) {
        leftLevels[level / 32] |= 1 << level;
      }
    }
    return Node.levels(column, leftLevels, left, right);
  }
}
