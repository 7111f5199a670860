"""The feature store's tables, as `migrations` creates them."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, MetaData, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from mojomesh_contracts.events import FeatureValue, RowKey

_METADATA = MetaData(schema="store")

feature_rows = Table(
    "feature_rows",
    _METADATA,
    Column("feature_set", Text, primary_key=True),
    Column("entity_id", Text, nullable=False),
    Column("event_time", DateTime(timezone=True), primary_key=True),
    Column("reported_at", DateTime(timezone=True), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event_id", Uuid, primary_key=True),
    Column("values", JSONB, nullable=False),
)


class FeatureRow(NamedTuple):
    """An event as stored, in the order of the table's columns."""

    feature_set: str
    entity_id: str
    event_time: datetime  # when it was true
    reported_at: datetime  # when its source knew it
    created_at: datetime  # when the mesh knew it, by the database's clock
    seq: int  # of rows with one event_time the later (created_at, seq) wins
    event_id: UUID
    values: dict[str, FeatureValue]

    @property
    def key(self) -> RowKey:
        """What a receipt keeps of the row."""
        return RowKey(
            feature_set=self.feature_set,
            entity_id=self.entity_id,
            event_time=self.event_time,
            created_at=self.created_at,
            seq=self.seq,
        )
