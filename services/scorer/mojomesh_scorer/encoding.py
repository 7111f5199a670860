"""Feature values to the numbers that a MOJO scores."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.errors import RowsRefused, SchemaMismatch
from mojomesh_scorer.tensors import Tensor

NAN = float("nan")
MAX = sys.float_info.max
BY_COLUMN_ROWS = 16
"""From this many rows on, encoding column by column is the cheaper way."""
_TYPES: dict[str, set[type]] = {"category": {str, NoneType}, "number": {float, int, NoneType}, "boolean": {bool, NoneType}}
Matrix = NDArray[np.float64]


class Encoded:
    """A block of encoded rows, shape (n_rows, n_columns), columns in scoring order, and what was odd about it.

    A categorical cell holds its level's index. A missing value or a level unseen in training is NaN, which trees send down their NA
    branch, as `hex.genmodel.easy.EasyPredictModelWrapper` does when told to convert unknown levels.
    """

    __slots__ = ("matrix", "unknown_levels")

    def __init__(self, matrix: Matrix, unknown_levels: dict[str, int]) -> None:
        self.matrix = matrix
        self.unknown_levels = unknown_levels


class Encoder:
    """Encodes rows for one bundle's schema."""

    def __init__(self, schema: BundleSchema) -> None:
        self._columns = schema.columns
        self.places = {column.name: place for place, column in enumerate(schema.columns)}
        self.levels = [
            {level: float(number) for number, level in enumerate(column.levels or ())} if column.type == "category" else None
            for column in schema.columns
        ]
        """By place: the number of each level, None for a column that is no category."""
        self.blank = [NAN] * len(schema.columns)

    def encode_row(self, row: Mapping[str, FeatureValue], unknown: dict[str, int]) -> list[float]:
        """Encode one row as `encode_rows` does; adds to the tally of unknown levels.

        Raises:
            SchemaMismatch: A value is not of its column's type.
        """
        cells = self.blank.copy()
        for name, value in row.items():
            place = self.places.get(name)
            if place is None or value is None:
                continue
            levels = self.levels[place]
            if levels is None:
                cells[place] = self._number(self._columns[place], value)
            elif isinstance(value, str):
                cells[place] = levels[value] if value in levels else self._unknown(name, unknown)
            else:
                raise SchemaMismatch(f"column '{name}' must be a text (category), is {value!r}")
        return cells

    def check_rows(self, rows: Sequence[Mapping[str, FeatureValue]]) -> None:
        """Refuse rows with a column that the model does not have.

        Raises:
            RowsRefused: Some do.
        """
        if any(not row.keys() <= self.places.keys() for row in rows):
            raise RowsRefused(_reasons(rows, self._check_names), len(rows))

    def _check_names(self, names: Mapping[str, object]) -> None:
        if unknown := [name for name in names if name not in self.places]:
            raise SchemaMismatch(f"the model has no column {', '.join(map(repr, unknown))}; its columns are {', '.join(self.places)}")

    def encode_rows(self, rows: Sequence[Mapping[str, FeatureValue]]) -> Encoded:
        """Encode rows by column name; an absent column or None is missing, names that the model does not have are passed over.

        Raises:
            RowsRefused: A value is not of its column's type.
        """
        unknown: dict[str, int] = {}
        if len(rows) >= BY_COLUMN_ROWS and (matrix := self._encode_columns(rows, unknown)) is not None:
            return Encoded(matrix, unknown)
        unknown.clear()
        try:
            cells = [self.encode_row(row, unknown) for row in rows]
        except SchemaMismatch:
            raise RowsRefused(_reasons(rows, lambda row: self.encode_row(row, {})), len(rows)) from None
        return Encoded(np.array(cells, dtype=np.float64).reshape(len(rows), len(self.blank)), unknown)

    def _encode_columns(self, rows: Sequence[Mapping[str, FeatureValue]], unknown: dict[str, int]) -> Matrix | None:
        """The same in a third of the time; None when some value is not of its column's type: row by row it is found which."""
        matrix: Matrix = np.empty((len(rows), len(self.blank)))
        for place, column in enumerate(self._columns):
            cells: list[Any] = [row.get(column.name) for row in rows]
            if not _TYPES[column.type].issuperset(map(type, cells)):
                return None
            if (levels := self.levels[place]) is not None:
                n_missing = cells.count(None)
                cells = [levels.get(level) for level in cells]
                if n_unknown := cells.count(None) - n_missing:
                    unknown[column.name] = n_unknown
            try:
                matrix[:, place] = np.array(cells, dtype=np.float64)  # None becomes NaN
            except OverflowError:
                return None
        return None if np.isinf(matrix).any() else matrix

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
        unknown: dict[str, int] = {}
        matrix: Matrix = np.full((n_rows, len(self.blank)), NAN)
        for name, tensor in by_name.items():
            place = self.places[name]
            levels = self.levels[place]
            if levels is not None and not isinstance(tensor.data, list) and np.isnan(tensor.data).all():
                continue  # what a client sends for a missing value whose type it does not know
            if (levels is not None) != (tensor.datatype == "BYTES"):
                wanted = "BYTES" if levels is not None else "a numeric datatype"
                raise SchemaMismatch(f"column '{name}' is a {self._columns[place].type}: send it as {wanted}, not {tensor.datatype}")
            if levels is not None:
                matrix[:, place] = [
                    levels[text] if text in levels else self._unknown(name, unknown) if text else NAN for text in tensor.data
                ]
            else:
                matrix[:, place] = tensor.data
                if np.isinf(matrix[:, place]).any():
                    raise SchemaMismatch(f"column '{name}' must be finite; a missing value is NaN")
        return Encoded(matrix, unknown)

    def _number(self, column: Column, value: FeatureValue) -> float:
        if column.type == "boolean":
            if isinstance(value, bool):
                return float(value)
            raise SchemaMismatch(f"column '{column.name}' must be true or false, is {value!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX:
            raise SchemaMismatch(f"column '{column.name}' must be a finite number, is {value!r}")
        return float(value)

    def _unknown(self, name: str, unknown: dict[str, int]) -> float:
        unknown[name] = unknown.get(name, 0) + 1
        return NAN


def recoder(champion: BundleSchema, shadow: BundleSchema) -> Callable[[Matrix], Matrix]:
    """Takes rows that are encoded for one model to how another one takes them; a category's level by its name.

    A level that only the shadow knows was lost when the row was encoded first, so the shadow sees it as missing.

    Raises:
        SchemaMismatch: The shadow has a column that the champion does not have.
    """
    known = {column.name: (place, column) for place, column in enumerate(champion.columns)}
    sources: list[tuple[int, Matrix | None]] = []
    for column in shadow.columns:
        place, source = known.get(column.name, (0, None))
        if source is None or source.type != column.type:
            raise SchemaMismatch(f"the champion does not have the shadow's column '{column.name}'")
        levels = {level: float(number) for number, level in enumerate(column.levels or ())}
        by_level = np.array([levels.get(level, NAN) for level in source.levels or ()] + [NAN]) if column.type == "category" else None
        sources.append((place, by_level))

    def recode(matrix: Matrix) -> Matrix:
        recoded = np.empty((len(matrix), len(sources)))
        for to, (place, by_level) in enumerate(sources):
            cells = matrix[:, place]
            recoded[:, to] = cells if by_level is None else by_level[np.where(np.isnan(cells), -1, cells).astype(np.intp)]
        return recoded

    return recode


def _reasons(rows: Sequence[Mapping[str, FeatureValue]], check: Callable[[Mapping[str, FeatureValue]], object]) -> dict[int, str]:
    reasons = {}
    for place, row in enumerate(rows):
        try:
            check(row)
        except SchemaMismatch as error:
            reasons[place] = str(error)
    return reasons
