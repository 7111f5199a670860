"""The prediction log, the drift windows counted from it and the alerts they led to: schema `features`, all append-only.

Whoever adds to a model's rows holds the model's lock from `lock_model` until the end of the transaction: rows become visible in the order
of their seq, and every counted prediction has its place in exactly one window, however many replicas count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
from pydantic import TypeAdapter
from sqlalchemy import ARRAY, BigInteger, Column, DateTime, Double, Identity, Integer, MetaData, RowMapping, Table, Text, Uuid, select, text
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_contracts.events import DriftDetected, ModelPromoted, PredictionsMade
from mojomesh_features.drift import Measured

_MEASURED = TypeAdapter(dict[str, Measured])
_METADATA = MetaData(schema="features")

predictions = Table(
    "predictions",
    _METADATA,
    Column("prediction_id", Uuid, primary_key=True),
    Column("seq", BigInteger, Identity(always=True)),
    Column("model", Text),
    Column("version", Integer),
    Column("bundle_digest", Text),
    Column("replica", Text),
    Column("entity_id", Text),
    Column("event_time", DateTime(timezone=True)),
    Column("made_at", DateTime(timezone=True)),
    Column("inputs", ARRAY(Double)),
    Column("scores", ARRAY(Double)),
    Column("rows", JSONB),
    Column("request_id", Uuid),
    Column("forgotten_at", DateTime(timezone=True)),
)

_COUNT = text("""
    INSERT INTO features.counted (model, entity_id, event_time, promotion, arrival, prediction_id)
    SELECT :model, entity_id, event_time, :promotion, row_number() OVER (ORDER BY n) + (
        SELECT coalesce(max(arrival), -1) FROM features.counted WHERE model = :model AND promotion = :promotion
    ), prediction_id
    FROM (
        SELECT DISTINCT ON (entity_id, event_time) *
        FROM unnest(CAST(:entity_ids AS text[]), CAST(:event_times AS timestamptz[]), CAST(:prediction_ids AS uuid[]))
            WITH ORDINALITY AS made (entity_id, event_time, prediction_id, n)
        WHERE NOT EXISTS (
            SELECT FROM features.predictions AS known WHERE known.prediction_id = made.prediction_id AND known.forgotten_at IS NOT NULL
        )
        ORDER BY entity_id, event_time, n
    ) AS firsts
    WHERE NOT EXISTS (
        SELECT FROM features.counted
        WHERE model = :model AND counted.entity_id = firsts.entity_id AND counted.event_time = firsts.event_time
    )
""")

_UNMEASURED = text("""
    SELECT counted.arrival, counted.event_time, predictions.inputs, predictions.scores
    FROM features.counted JOIN features.predictions USING (prediction_id)
    WHERE counted.model = :model AND counted.promotion = :promotion AND counted.arrival > :after
        AND predictions.forgotten_at IS NULL
    ORDER BY counted.arrival
    LIMIT :n
""")


@dataclass(frozen=True)
class DriftWindow:
    """One window as measured; its number counts the windows since the promotion."""

    number: int
    first_arrival: int
    last_arrival: int
    window_from: datetime  # least and greatest event time
    window_to: datetime
    middle: datetime  # median event time: the window's place in time, whatever time a single request claims
    columns: dict[str, Measured]


@dataclass(frozen=True)
class CountedPrediction:
    """One prediction that drift is counted on."""

    arrival: int
    event_time: datetime
    inputs: list[float | None]
    scores: list[float]


async def lock_model(db: AsyncSession, model: str) -> None:
    """Be the only one who adds to the model's rows, until the end of the transaction."""
    await db.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('mojomesh.features.' || :model, 0))"), {"model": model})


async def save_predictions(db: AsyncSession, blocks: Sequence[PredictionsMade]) -> None:
    """Keep each prediction once."""
    made = [
        {
            "prediction_id": prediction.prediction_id,
            "model": block.model,
            "version": block.version,
            "bundle_digest": block.bundle_digest,
            "replica": block.replica,
            "entity_id": prediction.entity_id,
            "event_time": prediction.event_time,
            "made_at": prediction.made_at,
            "inputs": prediction.inputs,
            "scores": prediction.scores,
            "rows": [row.model_dump(mode="json") for row in prediction.rows],
            "request_id": prediction.request_id,
        }
        for block in blocks
        for prediction in block.predictions
    ]
    if made:
        await db.execute(insert(predictions).on_conflict_do_nothing(), made)


async def count_predictions(db: AsyncSession, champion: ModelPromoted, blocks: Sequence[PredictionsMade]) -> None:
    """Give each new pair of entity and event_time among the champion's predictions the next place in the order of arrival.

    What was counted before, under whichever version, is not counted again, nor what names no entity: load tests are no live data. Nor is
    what was forgotten: a block that is delivered again names its entity.
    """
    named = [prediction for block in blocks for prediction in block.predictions if prediction.entity_id is not None]
    if named:
        await db.execute(
            _COUNT,
            {
                "model": champion.model,
                "promotion": champion.promotion,
                "entity_ids": [prediction.entity_id for prediction in named],
                "event_times": [prediction.event_time for prediction in named],
                "prediction_ids": [prediction.prediction_id for prediction in named],
            },
        )


async def unmeasured(db: AsyncSession, champion: ModelPromoted, after: int, n: int) -> list[CountedPrediction]:
    """The first `n` predictions counted after the arrival `after`, in order; fewer if there are fewer."""
    found = await db.execute(_UNMEASURED, {"model": champion.model, "promotion": champion.promotion, "after": after, "n": n})
    return [CountedPrediction(*row) for row in found]


async def windows_of(db: AsyncSession, model: str, promotion: int) -> list[DriftWindow]:
    """The windows since a promotion, oldest first."""
    found = await db.execute(
        text("""
            SELECT number, first_arrival, last_arrival, window_from, window_to, middle, columns
            FROM features.drift_windows WHERE model = :model AND promotion = :promotion ORDER BY number
        """),
        {"model": model, "promotion": promotion},
    )
    return [DriftWindow(**row | {"columns": _MEASURED.validate_python(row["columns"])}) for row in map(dict, found.mappings())]


async def save_window(db: AsyncSession, champion: ModelPromoted, window: DriftWindow) -> None:
    """Keep a window."""
    await db.execute(
        text("""
            INSERT INTO features.drift_windows
                (model, promotion, number, version, bundle_digest, first_arrival, last_arrival, window_from, window_to, middle, columns)
            VALUES (:model, :promotion, :number, :version, :bundle_digest, :first_arrival, :last_arrival, :window_from, :window_to, :middle,
                CAST(:columns AS jsonb))
        """),
        {
            "model": champion.model,
            "promotion": champion.promotion,
            "version": champion.version,
            "bundle_digest": champion.bundle_digest,
            **{name: value for name, value in vars(window).items() if name != "columns"},
            "columns": _MEASURED.dump_json(window.columns).decode(),
        },
    )


async def last_alert_at(db: AsyncSession, model: str) -> datetime | None:
    """Event time of the model's last alert, under whichever promotion."""
    found = await db.execute(text("SELECT max(middle) FROM features.alerts WHERE model = :model"), {"model": model})
    at: datetime | None = found.scalar_one()
    return at


async def save_alert(db: AsyncSession, champion: ModelPromoted, window: DriftWindow, caused_by: UUID, alert: DriftDetected) -> None:
    """Keep an alert with the block of predictions that it is announced for, again whenever that block is delivered again."""
    await db.execute(
        text("""
            INSERT INTO features.alerts (event_id, model, promotion, number, middle, caused_by, event)
            VALUES (:event_id, :model, :promotion, :number, :middle, :caused_by, CAST(:event AS jsonb))
        """),
        {
            "event_id": alert.event_id,
            "model": champion.model,
            "promotion": champion.promotion,
            "number": window.number,
            "middle": window.middle,
            "caused_by": caused_by,
            "event": alert.model_dump_json(),
        },
    )


async def alerts_caused_by(db: AsyncSession, blocks: Sequence[PredictionsMade]) -> list[DriftDetected]:
    """The alerts to announce for `blocks`, whether they are new or not."""
    found = await db.scalars(
        text("SELECT event FROM features.alerts WHERE caused_by = ANY(:blocks) ORDER BY middle"),
        {"blocks": [block.event_id for block in blocks]},
    )
    return [DriftDetected.model_validate(event) for event in found]


async def prediction_of(db: AsyncSession, prediction_id: UUID) -> dict[str, Any] | None:
    """The receipt of a prediction, by column name."""
    found = (await db.execute(select(predictions).where(predictions.c.prediction_id == prediction_id))).mappings().first()
    return None if found is None else _by_name(found)


async def predictions_after(db: AsyncSession, model: str, after: int, limit: int) -> list[dict[str, Any]]:
    """Receipts of a model with a seq above `after`, in its order, each with its `seq`. Going on from the last one misses none."""
    log = predictions.c
    found = await db.execute(select(predictions).where(log.model == model, log.seq > after).order_by(log.seq).limit(limit))
    return [_by_name(row) for row in found.mappings()]


@dataclass(frozen=True)
class LoggedVector:
    """What a champion was given for an entity whose features were looked up."""

    seq: int
    prediction_id: UUID
    entity_id: str
    event_time: datetime
    made_at: datetime
    inputs: list[float | None]


async def vectors_to_compare(
    db: AsyncSession, champion: ModelPromoted, after: int, min_age: timedelta, span: timedelta, limit: int
) -> list[LoggedVector]:
    """The champion's newest vectors with a seq above `after` that are at least so old and were made within one `span`, in order of seq."""
    found = await db.execute(
        text("""
            WITH newest AS (
                SELECT * FROM features.predictions WHERE model = :model AND seq > :after ORDER BY seq DESC LIMIT :looked_at
            ), sample AS (
                SELECT *, max(made_at) OVER () AS last_at FROM newest
                WHERE bundle_digest = :digest AND entity_id IS NOT NULL AND rows <> '[]'
                    AND made_at <= clock_timestamp() - CAST(:min_age AS interval)
                ORDER BY seq DESC LIMIT :limit
            )
            SELECT seq, prediction_id, entity_id, event_time, made_at, inputs FROM sample
            WHERE made_at >= last_at - CAST(:span AS interval) ORDER BY seq
        """),
        {
            "model": champion.model,
            "after": after,
            "looked_at": 20 * limit,  # a log of predictions by values has none
            "digest": champion.bundle_digest,
            "min_age": min_age,
            "span": span,
            "limit": limit,
        },
    )
    return [LoggedVector(*row) for row in found]


async def forget_predictions(db: AsyncSession, entity_id: str, feature_sets: Sequence[str], models: Sequence[str]) -> int:
    """Empty the receipts of `models` for an entity, and those of any model that used its rows of these feature sets; how many.

    As the owner. Ids stay, so that a block of predictions that is delivered again does not bring them back.
    """
    emptied = await db.scalars(
        text("""
            UPDATE features.predictions
            SET entity_id = NULL, inputs = '{}', scores = '{}', rows = '[]', request_id = NULL, forgotten_at = clock_timestamp()
            WHERE (entity_id = :entity_id AND model = ANY(:models)) OR rows @> ANY(CAST(:used AS jsonb[]))
            RETURNING prediction_id
        """),
        {
            "entity_id": entity_id,
            "models": list(models),
            "used": [orjson.dumps([{"feature_set": name, "entity_id": entity_id}]).decode() for name in feature_sets],
        },
    )
    n_emptied = len(emptied.all())
    own = {"entity_id": entity_id, "models": list(models)}
    # One that has been given its new name before was counted again since, as it was until forgotten predictions were left out.
    await db.execute(
        text("""
            DELETE FROM features.counted AS again USING features.counted AS renamed
            WHERE again.entity_id = :entity_id AND again.model = ANY(:models)
                AND renamed.entity_id = 'forgotten/' || again.prediction_id AND renamed.model = again.model
        """),
        own,
    )
    renamed = "UPDATE features.counted SET entity_id = 'forgotten/' || prediction_id WHERE entity_id = :entity_id AND model = ANY(:models)"
    await db.execute(text(renamed), own)
    return n_emptied


async def drift_of(db: AsyncSession, model: str, limit: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The last windows of a model over all its promotions, and its alerts; both oldest first."""
    windows = await db.execute(
        text("""
            SELECT promotion, number, version, bundle_digest, last_arrival - first_arrival + 1 AS n_rows, window_from, window_to, columns,
                counted_at
            FROM features.drift_windows WHERE model = :model ORDER BY promotion DESC, number DESC LIMIT :limit
        """).columns(columns=JSONB),
        {"model": model, "limit": limit},
    )
    alerts = await db.scalars(
        text("SELECT event FROM features.alerts WHERE model = :model ORDER BY middle").columns(event=JSONB), {"model": model}
    )
    return [_by_name(window) for window in windows.mappings()][::-1], list(alerts)


def _by_name(row: RowMapping) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}  # SQLAlchemy's names are a str of their own, which orjson refuses
