"""What features answers over HTTP."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import text

from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import NotFound, PermanentError
from mojomesh_chassis.http import Protected
from mojomesh_contracts.bundles import SnapshotQuery, SnapshotTaken
from mojomesh_contracts.storable import EntityId, Text, Time
from mojomesh_features import tables
from mojomesh_features.answers import row_answer, rows_answer, vectors_answer
from mojomesh_features.judging import windows_of
from mojomesh_features.nearest import Neighbours
from mojomesh_features.reading import FeatureReader
from mojomesh_features.sealing import Sealer
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_store import embeddings
from mojomesh_store.online import AsOf, OnlineRow, microseconds, moment
from mojomesh_store.shards import FeatureStore
from mojomesh_store.vectors import plan_of

router = APIRouter()

MOST_ROWS = 10_000  # a request
MAX_SEQ = 2**63 - 1  # of PostgreSQL's bigint


def _resource(name: str) -> Any:
    async def of(request: Request) -> Any:
        return getattr(request.state, name)

    return Depends(of)


ADatabase = Annotated[Database, _resource("database")]
AFeatureStore = Annotated[FeatureStore, _resource("feature_store")]
AReader = Annotated[FeatureReader, _resource("reader")]
SomeNeighbours = Annotated[Neighbours, _resource("neighbours")]
SomeDefinitions = Annotated[Definitions, _resource("definitions")]
ASealer = Annotated[Sealer, _resource("sealer")]
SomeSnapshots = Annotated[Snapshots, _resource("snapshots")]


class Asked(BaseModel):
    """An entity, as of an event time; by default now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entity_id: EntityId
    at: Time | None = None


class AskedBatch(BaseModel):
    """Rows of one feature set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[Asked] = Field(max_length=MOST_ROWS)
    snapshot_time: Time | None = Field(default=None, description="As the mesh knew it then; by default as it knows it now")


class AskedNearest(BaseModel):
    """Rows by the nearness of a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature: str = Field(description="Of type `vector(n)`")
    vector: list[float]
    k: int = Field(default=10, ge=1, le=500)
    at: Time | None = Field(default=None, description="Rows that were true then; by default now")
    snapshot_time: Time | None = Field(default=None, description="As the mesh knew them then; by default as it knows them now")
    exact: bool = Field(default=False, description="Compare all vectors instead of those that the index leads to")


class AskedVector(BaseModel):
    """An entity of the spine, as of an event time; by default now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entity_id: EntityId
    event_time: Time | None = None


class AskedVectors(BaseModel):
    """Vectors of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    rows: list[AskedVector] = Field(max_length=MOST_ROWS)


@router.get("/v1/features")
async def stored_rows(feature_store: AFeatureStore, definitions: SomeDefinitions) -> dict[str, dict[str, int]]:
    """How many rows each feature set has, in PostgreSQL or only in segments."""
    counts = dict.fromkeys(definitions.feature_sets, 0)
    for shard in feature_store.shards:
        async with shard.begin() as db:
            for feature_set, n in await db.execute(
                text("""
                SELECT feature_set, count(*) FROM (
                    SELECT feature_set FROM store.feature_rows UNION ALL
                    SELECT feature_set FROM store.retired_events WHERE NOT forgotten
                ) AS stored GROUP BY feature_set
            """)
            ):
                counts[feature_set] = counts.get(feature_set, 0) + n
    return {"rows": counts}


@router.post("/v1/features:lookup")
async def model_vectors(asked: AskedVectors, reader: AReader, definitions: SomeDefinitions) -> Response:
    """A model's inputs for each entity, joined as of its event time: what a scorer asks."""
    if asked.model not in definitions.models:
        await definitions.caught_up()
    plan = plan_of(definitions.model(asked.model), definitions)
    now = microseconds(datetime.now(UTC))
    pairs = [(row.entity_id, now if row.event_time is None else microseconds(row.event_time)) for row in asked.rows]
    vectors = await reader.vectors(plan, pairs)
    return _answer(vectors_answer(plan.model.spine, pairs, vectors))


@router.post("/v1/features/{feature_set}:batch")
async def latest_rows(feature_set: str, asked: AskedBatch, reader: AReader, definitions: SomeDefinitions) -> Response:
    """The rows of many entities, each as of its event time, in their order; null where there is none."""
    name = definitions.feature_set(feature_set).name
    now = microseconds(datetime.now(UTC))
    as_ofs = [((name, row.entity_id), now if row.at is None else microseconds(row.at)) for row in asked.rows]
    found = await _read(reader, as_ofs, asked.snapshot_time)
    return _answer(rows_answer(as_ofs, found))


@router.post("/v1/features/{feature_set}:nearest")
async def nearest_rows(feature_set: str, asked: AskedNearest, neighbours: SomeNeighbours, definitions: SomeDefinitions) -> Response:
    """The rows with the vectors nearest to one, among those true at an event time as the mesh knew them at `snapshot_time`."""
    found = definitions.feature_set(feature_set)
    declared = found.vectors.get(asked.feature)
    if declared is None:
        raise NotFound(f"'{feature_set}' has no vector '{asked.feature}'; it has {', '.join(found.vectors) or 'none'}")
    if problem := declared.problem(asked.vector):
        raise PermanentError(f"the vector {problem}")
    now = datetime.now(UTC)
    at, snapshot_time = asked.at or now, asked.snapshot_time or datetime.max.replace(tzinfo=UTC)
    which = embeddings.Asked(found.name, asked.feature, declared, asked.vector, asked.k, at, snapshot_time)
    near = await neighbours.nearest(which, asked.snapshot_time is not None, asked.exact)
    return _json({"rows": [{"feature_set": found.name, **row._asdict()} for row in near]})


@router.get("/v1/features/{feature_set}/{entity_id:path}")
async def latest_row(
    feature_set: str,
    entity_id: EntityId,
    reader: AReader,
    definitions: SomeDefinitions,
    at: Time | None = None,
    snapshot_time: Time | None = None,
) -> Response:
    """The row that was true of an entity at an event time (by default now), as the mesh knew it at `snapshot_time` (by default now)."""
    entity = (definitions.feature_set(feature_set).name, entity_id)
    as_of = (entity, microseconds(at or datetime.now(UTC)))
    row = (await _read(reader, [as_of], snapshot_time))[as_of]
    if row is None:
        raise NotFound(f"'{feature_set}' has no row of '{entity_id}' at {moment(as_of[1]).isoformat()}")
    return _answer(row_answer(entity, row))


@router.post("/v1/snapshots")
async def take_snapshot(query: SnapshotQuery, definitions: SomeDefinitions, snapshots: SomeSnapshots) -> SnapshotTaken:
    """The training rows of a model as the mesh knew them at a time, as Parquet in the object store."""
    await definitions.caught_up()
    plan = plan_of(query.model, definitions)
    return await snapshots.take(plan, label_of(query.model.label, definitions), query.snapshot_time)


@router.post("/v1/snapshots:erasures")
async def snapshot_erasures(query: SnapshotQuery, definitions: SomeDefinitions, snapshots: SomeSnapshots) -> dict[str, list[datetime]]:
    """When facts were erased that a snapshot had or would have had: taken before, it was another."""
    return {"erasures": await snapshots.erasures(plan_of(query.model, definitions), query.snapshot_time)}


@router.post("/v1/segments:seal", dependencies=[Protected])
async def seal(definitions: SomeDefinitions, sealer: ASealer) -> dict[str, Any]:
    """Seal every row that is known now, of all feature sets; the new segments. What another process is sealing is left to it."""
    sealed = await sealer.seal(definitions)
    return {"segments": [{"feature_set": new.feature_set, "path": new.path, "n_rows": new.n_rows} for new in sealed]}


@router.get("/v1/drift/{model}")
async def drift(
    model: str, database: ADatabase, definitions: SomeDefinitions, limit: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> Response:
    """The last windows of a model against its champions' baselines, and the alerts they led to."""
    definitions.model(model)  # refuses a name that nobody defined
    async with database.begin() as db:
        windows, alerts = await tables.drift_of(db, model, limit)
    return _json({"model": model, "windows": windows, "alerts": alerts})


@router.get("/v1/quality/{feature_set}")
async def quality(
    feature_set: str, database: ADatabase, definitions: SomeDefinitions, limit: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> Response:
    """What came in of a feature set, window by window, and what of it was not as its definition expects."""
    definitions.feature_set(feature_set)  # refuses a name that nobody defined
    async with database.begin() as db:
        windows = await windows_of(db, feature_set, limit)
    return _json({"feature_set": feature_set, "windows": windows})


@router.get("/v1/predictions/{prediction_id}")
async def prediction(prediction_id: UUID, database: ADatabase) -> Response:
    """The receipt of a prediction."""
    async with database.begin() as db:
        found = await tables.prediction_of(db, prediction_id)
    if found is None:
        raise NotFound(f"no prediction {prediction_id}; receipts arrive within a second of the answer")
    return _json(found)


@router.get("/v1/predictions")
async def predictions(
    database: ADatabase,
    model: Text,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 1000,
) -> Response:
    """Receipts of a model in the order of their arrival; ask again with `after` set to the `next` of the answer."""
    async with database.begin() as db:
        found = await tables.predictions_after(db, model, after, limit)
    return await asyncio.to_thread(_json, {"predictions": found, "next": found[-1]["seq"] if found else after})


async def _read(reader: FeatureReader, asked: Sequence[AsOf], snapshot_time: datetime | None) -> dict[AsOf, OnlineRow | None]:
    return await (reader.at(asked) if snapshot_time is None else reader.known_at(asked, snapshot_time))


def _json(answer: Any) -> Response:
    return _answer(orjson.dumps(answer, default=_uuid))


def _answer(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _uuid(value: object) -> str:
    if isinstance(value, UUID):  # asyncpg's is a subclass, which orjson does not know
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
