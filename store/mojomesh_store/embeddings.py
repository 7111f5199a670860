"""Vectors, beside the rows that they are part of, and which of them are nearest to one.

A vector counts as of a time while its row does: a correction, or a later row, without it takes it away.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import orjson
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_contracts.definitions import FeatureSet, VectorFeature
from mojomesh_contracts.events import Arrival, FeatureValue
from mojomesh_store.rows import RowId, row_id
from mojomesh_store.tables import FeatureRow

MOST_CANDIDATES = 1000  # pgvector's bound of hnsw.ef_search
LEAST_CANDIDATES = 100

_OPERATORS = {"cosine": ("vector_cosine_ops", "<=>"), "l2": ("vector_l2_ops", "<->"), "inner": ("vector_ip_ops", "<#>")}

_SAVE = text("""
    INSERT INTO store.embeddings (feature, entity_id, event_time, created_at, seq, event_id, embedding)
    SELECT :feature, entity_id, event_time, created_at, seq, event_id, embedding::vector
    FROM unnest(
        CAST(:entity_ids AS text[]), CAST(:event_times AS timestamptz[]), CAST(:created_ats AS timestamptz[]), CAST(:seqs AS bigint[]),
        CAST(:event_ids AS uuid[]), CAST(:embeddings AS text[])
    ) AS arrived (entity_id, event_time, created_at, seq, event_id, embedding)
    ORDER BY event_time, event_id
    ON CONFLICT DO NOTHING
""")


class Near(NamedTuple):
    """A row whose vector is near the one asked for."""

    distance: float  # 1 - cosine, Euclidean, or the negative inner product
    entity_id: str
    event_time: datetime
    created_at: datetime
    seq: int
    reported_at: datetime
    values: dict[str, FeatureValue]


async def save(
    db: AsyncSession, events: Iterable[Arrival], new: Mapping[RowId, FeatureRow], feature_sets: Mapping[str, FeatureSet]
) -> None:
    """Keep the vectors of rows that are new in this transaction."""
    arrived: dict[tuple[str, str], dict[RowId, list[float]]] = {}
    for event in events:
        if event.vectors and (key := row_id(event)) in new:
            for feature, vector in event.vectors.items():
                arrived.setdefault((event.feature_set, feature), {}).setdefault(key, vector)
    for (feature_set, feature), vectors in sorted(arrived.items()):
        declared = feature_sets[feature_set].vectors[feature]
        name = _name(feature_set, feature)
        await db.execute(
            text("SELECT store.add_embeddings(:feature, :n, :operators)"),
            {"feature": name, "n": declared.n_dimensions, "operators": _OPERATORS[declared.distance][0]},
        )
        rows = [new[key] for key in vectors]
        await db.execute(
            _SAVE,
            {
                "feature": name,
                "entity_ids": [row.entity_id for row in rows],
                "event_times": [row.event_time for row in rows],
                "created_ats": [row.created_at for row in rows],
                "seqs": [row.seq for row in rows],
                "event_ids": [row.event_id for row in rows],
                "embeddings": [orjson.dumps(vector).decode() for vector in vectors.values()],
            },
        )


class Asked(NamedTuple):
    """Which vectors: those of a feature that are nearest to one, among the rows true at a time as known at another."""

    feature_set: str
    feature: str
    declared: VectorFeature
    vector: Sequence[float]
    k: int
    at: datetime
    snapshot_time: datetime


async def nearest(db: AsyncSession, asked: Asked, exact: bool = False) -> list[Near]:
    """The `k` nearest of this shard, nearest first; all there are if there are fewer.

    By the HNSW index, which is read on until enough vectors have passed the filter; where it ends before (`hnsw.max_scan_tuples`), and if
    `exact`, all of them are compared.
    """
    await db.execute(text(f"SET LOCAL hnsw.ef_search = {min(MOST_CANDIDATES, max(LEAST_CANDIDATES, 2 * asked.k))}"))
    await db.execute(text("SET LOCAL hnsw.iterative_scan = relaxed_order"))
    found = [] if exact else await _nearest(db, asked)
    return found if len(found) == asked.k else await _nearest(db, asked, by_index=False)


async def _nearest(db: AsyncSession, asked: Asked, by_index: bool = True) -> list[Near]:
    name = _name(asked.feature_set, asked.feature)
    # The planner takes the as-of probe for a filter that leaves one row, and would rather sort all than read a few from the index.
    await db.execute(text(f"SET LOCAL enable_sort = {'off' if by_index else 'on'}"))
    _, operator = _OPERATORS[asked.declared.distance]
    distance = f"(embedding::vector({asked.declared.n_dimensions}) {operator} CAST(CAST(:vector AS text) AS vector))"
    # The feature's name stands in the text, so that the plan is of its partition and can use its index.
    found = await db.execute(
        text(f"""
            WITH near AS MATERIALIZED (
                SELECT {distance} AS distance, event_time, event_id FROM store.embeddings AS candidate
                WHERE feature = '{name}' AND event_time <= :at AND created_at <= :snapshot_time AND seq = (
                    SELECT row.seq FROM store.feature_rows AS row
                    WHERE row.feature_set = '{asked.feature_set}' AND row.entity_id = candidate.entity_id
                        AND row.event_time <= :at AND row.created_at <= :snapshot_time
                    ORDER BY row.event_time DESC, row.created_at DESC, row.seq DESC
                    LIMIT 1
                )
                ORDER BY {distance} {"" if by_index else "+ 0"} LIMIT :k
            )
            SELECT distance, entity_id, event_time, created_at, seq, reported_at, "values"
            FROM near JOIN store.feature_rows AS row USING (event_time, event_id) WHERE row.feature_set = '{asked.feature_set}'
            ORDER BY distance + 0, entity_id  -- the scan is nearly in order, and the planner believes it to be in order
        """).columns(values=JSONB),
        {"vector": orjson.dumps(list(asked.vector)).decode(), "k": asked.k, "at": asked.at, "snapshot_time": asked.snapshot_time},
    )
    return [Near(*row) for row in found]


def _name(feature_set: str, feature: str) -> str:
    """Of a feature among those of all sets; names are letters, digits, `_` and `-`."""
    return f"{feature_set}.{feature}"
