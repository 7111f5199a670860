"""A snapshot's rows as trainer needs them beside H2O: times to cut folds by, and encoded rows to check the MOJO with."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mojomesh_contracts.bundles import BundleSchema, FoldPlan
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import FeatureValue
from mojomesh_trainer.folds import from_ms, scored_from, to_ms
from mojomesh_trainer.metrics import Floats

USUAL_DELAY = 0.99
"""Share of labels that come within the label delay; rows that take longer are left out of a test by their event time."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's Parquet, read."""

    table: pa.Table

    @classmethod
    def read(cls, path: str) -> "Snapshot":
        """Read it from where the object store keeps it."""
        with duckdb.connect() as db:
            return cls(db.read_parquet(path).to_arrow_table())

    @property
    def event_ms(self) -> Floats:
        return self._numbers("event_time")

    @property
    def label_ms(self) -> Floats:
        return self._numbers("label_time")

    @property
    def label_delay(self) -> timedelta:
        """How long labels usually take to become known."""
        return timedelta(milliseconds=float(np.quantile(self.label_ms - self.event_ms, USUAL_DELAY)))

    def tested(self, plan: FoldPlan, model: Model) -> "Snapshot":
        """The rows that a fold is tested on, in the snapshot's order."""
        wanted = (self.label_ms >= to_ms(plan.test_from)) & (self.label_ms < to_ms(plan.test_to))
        if (start := scored_from(plan, model.walk_forward)) is not None:
            wanted &= self.event_ms >= to_ms(start)
        return Snapshot(self.table.filter(pa.array(wanted)))

    def known_since(self, time: datetime) -> "Snapshot":
        """The rows whose label became known at `time` or later."""
        return Snapshot(self.table.filter(pa.array(self.label_ms >= to_ms(time))))

    def encode(self, schema: BundleSchema) -> Floats:
        """The rows as a MOJO takes them, shape (n_rows, n_columns): a level's index, NaN for missing and for levels it does not know."""
        encoded = np.empty((self.table.num_rows, len(schema.columns)))
        for place, column in enumerate(schema.columns):
            cells = self.table[column.name].combine_chunks()
            if column.levels is not None:
                cells = pc.index_in(cells.cast(pa.string()), pa.array(column.levels))
            encoded[:, place] = cells.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return encoded

    def example(self, schema: BundleSchema) -> dict[str, FeatureValue]:
        """The values of the last row, by column name."""
        row = self.table.slice(self.table.num_rows - 1).select([column.name for column in schema.columns]).to_pylist()[0]
        return {
            column.name: bool(value) if column.type == "boolean" and (value := row[column.name]) is not None else row[column.name]
            for column in schema.columns
        }

    def span(self) -> str:
        """From when to when labels became known, in words."""
        return f"{from_ms(int(self.label_ms.min())):%Y-%m-%d %H:%M} to {from_ms(int(self.label_ms.max())):%Y-%m-%d %H:%M}"

    def _numbers(self, name: str) -> Floats:
        numbers: Floats = self.table[name].combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False)
        return numbers
