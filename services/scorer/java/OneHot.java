package mojomesh;

import biz.k11i.xgboost.util.FVec;
import hex.genmodel.GenModel;
import hex.genmodel.algos.xgboost.XGBoostMojoModel;

/**
 * A row as XGBoost's trees take it: a column for each level of a category and one for its missing, then the numbers.
 *
 * <p>Source: hex.genmodel.algos.xgboost.OneHotEncoderFactory of H2O-3 3.46.
 */
final class OneHot implements FVec {
  private final XGBoostMojoModel model;
  private final int[] columnOf;
  private final int[] hot; // by category column: the one-hot column that is 1
  private double[] row;

  OneHot(XGBoostMojoModel model) {
    this.model = model;
    hot = new int[model._cats];
    int nLevels = model._cats == 0 ? 0 : model._catOffsets[model._cats];
    columnOf = new int[nLevels + model._nums];
    for (int index = 0, column = 0; index < columnOf.length; index++) {
      while (column < model._cats && model._catOffsets[column + 1] <= index) {
        column++;
      }
      columnOf[index] = index < nLevels ? column : model._cats + index - nLevels;
    }
  }

  int width() {
    return columnOf.length;
  }

  /** The model's column that a one-hot column is of. */
  int columnOf(int index) {
    return columnOf[index];
  }

  /** The one-hot column that is 1, by category column, of a row. */
  int[] set(double[] row) {
    this.row = row;
    GenModel.setCats(row, hot, model._cats, model._catOffsets, model._useAllFactorLevels);
    return hot;
  }

  @Override
  public float fvalue(int index) {
    int column = columnOf[index];
    float value = column < model._cats ? (hot[column] == index ? 1 : 0) : (float) row[column];
    return model._sparse && value == 0 ? Float.NaN : value;
  }
}
