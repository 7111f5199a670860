package mojomesh;

import biz.k11i.xgboost.Predictor;
import biz.k11i.xgboost.learner.ObjFunction;
import hex.genmodel.MojoModel;
import hex.genmodel.algos.tree.SharedTreeMojoModel;
import hex.genmodel.algos.xgboost.XGBoostJavaMojoModel;
import hex.genmodel.algos.xgboost.XGBoostMojoModel;
import java.io.IOException;
import java.util.Arrays;
import java.util.zip.ZipFile;

/** A model of trees, unpacked: the trees, and what is made of their sums, which is left to genmodel. */
final class TreeModel {
  private interface Link {
    void apply(int row, double[] predictions);
  }

  private final FlatTrees trees;
  private final Link link;

  private TreeModel(FlatTrees trees, Link link) {
    this.trees = trees;
    this.link = link;
  }

  /**
   * Reads the trees of a model, and scores some rows with them.
   *
   * @param mojo the archive that the model was loaded from
   * @param rows to be scored as genmodel scores them, to the last bit
   * @throws NotUnpacked if it has no trees, or none that can be laid out, or they score otherwise
   */
  static TreeModel unpack(MojoModel model, ZipFile mojo, double[][] rows) throws IOException, NotUnpacked {
    int[] levels = new int[model.nfeatures()];
    for (int column = 0; column < levels.length; column++) {
      String[] domain = model.getDomainValues(column);
      levels[column] = domain == null ? -1 : domain.length;
    }
    TreeLayout layout;
    TreeModel unpacked;
    if (model instanceof SharedTreeMojoModel shared) {
      layout = new TreeLayout(levels, shared.getNTreesPerGroup());
      SharedTrees.read(shared, mojo, layout);
      unpacked = of(shared, new FlatTrees(layout, FlatTrees.Rounding.DOWN, 0, false));
    } else if (model instanceof XGBoostJavaMojoModel boosted) {
      Predictor predictor = XGBoostTrees.open(mojo);
      layout = new TreeLayout(levels, boosted.getNTreesPerGroup());
      XGBoostTrees.read(boosted, predictor, layout);
      FlatTrees.Rounding rounding = boosted._sparse ? FlatTrees.Rounding.NEAREST_WITHOUT_ZERO : FlatTrees.Rounding.NEAREST;
      unpacked = of(boosted, predictor.getObjName(), new FlatTrees(layout, rounding, predictor.getBaseScore(), true));
    } else {
      throw new NotUnpacked("it has no trees");
    }
    new SelfCheck(model, layout).check(unpacked, rows);
    return unpacked;
  }

  private static TreeModel of(SharedTreeMojoModel model, FlatTrees trees) {
    int first = model.nclasses() == 1 ? 0 : 1;
    return new TreeModel(trees, (row, predictions) -> {
      Arrays.fill(predictions, 0);
      for (int k = 0; k < trees.classes(); k++) {
        predictions[first + k] = trees.sum(k, row);
      }
      model.unifyPreds(null, 0, predictions); // the row would only decide which of two equal classes is the label
    });
  }

  private static TreeModel of(XGBoostMojoModel model, String objectiveName, FlatTrees trees) {
    ObjFunction objective = ObjFunction.fromName(objectiveName);
    float[] sums = new float[trees.classes()];
    return new TreeModel(trees, (row, predictions) -> {
      for (int k = 0; k < sums.length; k++) {
        sums[k] = (float) trees.sum(k, row);
      }
      float[] scores = objective.predTransform(sums);
      XGBoostMojoModel.toPreds(null, scores, predictions, model._nclasses, model._priorClassDistrib, model._defaultThreshold);
    });
  }

  /** Takes in a row as the given one of the next block, which has at most {@link FlatTrees#BLOCK}. */
  void encode(double[] values, int row) {
    trees.encode(values, row);
  }

  /** Walks the block's first rows through all trees. */
  void addUp(int rows) {
    trees.addUp(rows);
  }

  /** A row's predictions, as genmodel's score0 has them, but for the label. */
  void predict(int row, double[] predictions) {
    link.apply(row, predictions);
  }
}
