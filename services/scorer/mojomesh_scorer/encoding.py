"""Feature values to the numbers that a MOJO scores."""

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.errors import RowsRefused, SchemaMismatch
from mojomesh_scorer.tensors import Tensor

NAN = float("nan")
MAX = sys.float_info.max
Matrix = NDArray[np.float64]


class Encoded:
    """A block of encoded rows, shape (n_rows, n_columns), columns in scoring order, and what was odd about it.

    A categorical cell holds its level's index. A missing value or a level unseen in training is NaN, which trees send down their NA
    branch, as `hex.genmodel.easy.EasyPredictModelWrapper` does when told to convert unknown levels.
    """

    def __init__(self, n_rows: int, columns: list[Column]) -> None:
        self.matrix: Matrix = np.full((n_rows, len(columns)), NAN)
        self.unknown_levels: dict[str, int] = {}
        self._columns = columns

    def missing(self) -> dict[str, int]:
        """Cells without a value, by column; columns that have none are left out. Unknown levels are not missing."""
        n_nan = np.isnan(self.matrix).sum(axis=0).tolist()
        missing = {column.name: n - self.unknown_levels.get(column.name, 0) for column, n in zip(self._columns, n_nan, strict=True) if n}
        return {name: n for name, n in missing.items() if n}


class Encoder:
    """Encodes rows for one bundle's schema."""

    def __init__(self, schema: BundleSchema) -> None:
        self._columns = schema.columns
        self._places = {column.name: place for place, column in enumerate(schema.columns)}
        self._levels = [{level: float(number) for number, level in enumerate(column.levels or ())} for column in schema.columns]

    def check_rows(self, rows: Sequence[Mapping[str, FeatureValue]]) -> None:
        """Refuse rows with a column that the model does not have.

        Raises:
            RowsRefused: Some do.
        """
        if reasons := _reasons(rows, self._check_names):
            raise RowsRefused(reasons, len(rows))

    def _check_names(self, names: Mapping[str, object]) -> None:
        if unknown := [name for name in names if name not in self._places]:
            raise SchemaMismatch(f"the model has no column {', '.join(map(repr, unknown))}; its columns are {', '.join(self._places)}")

    def encode_rows(self, rows: Sequence[Mapping[str, FeatureValue]]) -> Encoded:
        """Encode rows by column name; an absent column or None is missing, names that the model does not have are passed over.

        Raises:
            RowsRefused: A value is not of its column's type.
        """
        try:
            return self._encode_rows(rows)
        except SchemaMismatch:
            raise RowsRefused(_reasons(rows, lambda row: self._encode_rows([row])), len(rows)) from None

    def _encode_rows(self, rows: Sequence[Mapping[str, FeatureValue]]) -> Encoded:
        encoded = Encoded(len(rows), self._columns)
        for place, column in enumerate(self._columns):
            name = column.name
            for number, row in enumerate(rows):
                value = row.get(name)
                if value is not None:
                    encoded.matrix[number, place] = self._cell(encoded, place, value)
        return encoded

    def encode_tensors(self, tensors: Sequence[Tensor], n_rows: int) -> Encoded:
        """Encode one tensor a column, each of `n_rows` elements; an absent one is missing in every row.

        Missing is NaN, or "" in a BYTES tensor; a boolean that may be missing comes as a float tensor.

        Raises:
            SchemaMismatch: A tensor is not a column of the model, comes twice, or is not of its type.
        """
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) < len(tensors):
            raise SchemaMismatch("an input tensor comes twice")
        self._check_names(by_name)
        encoded = Encoded(n_rows, self._columns)
        for name, tensor in by_name.items():
            place = self._places[name]
            column = self._columns[place]
            if column.type == "category" and not isinstance(tensor.data, list) and np.isnan(tensor.data).all():
                continue  # what a client sends for a missing value whose type it does not know
            if (column.type == "category") != (tensor.datatype == "BYTES"):
                wanted = "BYTES" if column.type == "category" else "a numeric datatype"
                raise SchemaMismatch(f"column '{name}' is a {column.type}: send it as {wanted}, not {tensor.datatype}")
            if isinstance(tensor.data, list):
                encoded.matrix[:, place] = [self._level(encoded, place, text) if text else NAN for text in tensor.data]
            else:
                encoded.matrix[:, place] = tensor.data
                if np.isinf(encoded.matrix[:, place]).any():
                    raise SchemaMismatch(f"column '{name}' must be finite; a missing value is NaN")
        return encoded

    def _cell(self, encoded: Encoded, place: int, value: FeatureValue) -> float:
        column = self._columns[place]
        if column.type == "category":
            if isinstance(value, str):
                return self._level(encoded, place, value)
            raise SchemaMismatch(f"column '{column.name}' must be a text (category), is {value!r}")
        if column.type == "boolean":
            if isinstance(value, bool):
                return float(value)
            raise SchemaMismatch(f"column '{column.name}' must be true or false, is {value!r}")
        if isinstance(value, bool | str) or value is None or abs(value) > MAX:
            raise SchemaMismatch(f"column '{column.name}' must be a finite number, is {value!r}")
        return float(value)

    def _level(self, encoded: Encoded, place: int, text: str) -> float:
        number = self._levels[place].get(text)
        if number is not None:
            return number
        name = self._columns[place].name
        encoded.unknown_levels[name] = encoded.unknown_levels.get(name, 0) + 1
        return NAN


def _reasons(rows: Sequence[Mapping[str, FeatureValue]], check: Callable[[Mapping[str, FeatureValue]], object]) -> dict[int, str]:
    reasons = {}
    for place, row in enumerate(rows):
        try:
            check(row)
        except SchemaMismatch as error:
            reasons[place] = str(error)
    return reasons
