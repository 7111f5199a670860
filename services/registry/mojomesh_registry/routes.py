"""The HTTP door of registry. What changes something needs the token."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.database import Database
from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.faults import fault
from mojomesh_chassis.http import Protected
from mojomesh_chassis.outbox import Relay, save_events
from mojomesh_contracts.definitions import DefinitionError, FeatureSet, Model, parse_definition, parse_definitions
from mojomesh_contracts.events import LeftOut, TrainingRequested
from mojomesh_contracts.storable import Text, Time
from mojomesh_registry import applying, lineage, shadows
from mojomesh_registry.errors import ChampionChanged, WrongDefinitions, WrongTraffic
from mojomesh_registry.tables import OUTBOX, AppliedDefinition, Follower, RegisteredModel, Traffic, Version
from mojomesh_registry.traffic import followers_of, traffic_of
from mojomesh_registry.versions import Cause, before_champion, challenge, promote_by_hand, registered_model, version_of

router = APIRouter(prefix="/v1")


def _database(request: Request) -> Database:
    database: Database = request.state.database
    return database


def _relay(request: Request) -> Relay:
    relay: Relay = request.state.relay
    return relay


VersionNumber = Annotated[int, Field(ge=1, lt=2**31)]  # as PostgreSQL's integer
InDatabase = Annotated[Database, Depends(_database)]
ToOutbox = Annotated[Relay, Depends(_relay)]


class Asked(BaseModel):
    """A request body; a misspelt field is an error."""

    model_config = ConfigDict(extra="forbid")


class TrainingAsked(Asked):
    """Body of `:train`."""

    reason: Text = Field(default="asked for by hand", min_length=1, max_length=1000)
    snapshot_time: Time | None = None


class PromotionAsked(Asked):
    """Body of `:promote`. With `expected_promotion`, nothing happens if somebody else was promoted since the caller looked."""

    force: bool = False
    reason: Text | None = Field(default=None, max_length=1000)
    expected_promotion: int | None = None


class RollbackAsked(Asked):
    """Body of `:rollback`."""

    reason: Text | None = Field(default=None, max_length=1000)
    expected_promotion: int | None = None


class ChallengerAsked(Asked):
    """A version to score beside the champion."""

    version: VersionNumber
    share: Decimal | None = Field(default=None, gt=0, decimal_places=3, description="Of the entities; without one it is a shadow")


class TrafficAsked(Asked):
    """Body of `PUT traffic`: all versions beside the champion; those not named any more leave."""

    challengers: list[ChallengerAsked]
    reason: Text | None = Field(default=None, max_length=1000)


class FollowerInfo(BaseModel):
    """What a scorer replica made of the last setting that it heard of."""

    model_config = ConfigDict(from_attributes=True)

    replica: str
    setting: int
    followed_at: datetime
    left_out: list[LeftOut]


class TrafficInfo(BaseModel):
    """Who scores beside the champion, by which setting; 0 when there never was one."""

    model: str
    champion: int | None
    setting: int
    challengers: list[lineage.ChallengerInfo]
    followers: list[FollowerInfo] = Field(description="A replica whose setting is lower has not followed yet, or is gone")


class Promoted(BaseModel):
    """Who is champion now, and by which promotion."""

    model: str
    version: int
    promotion: int


class DefinitionInfo(BaseModel):
    """A definition in force."""

    definition_id: str
    version: int
    applied_at: datetime
    definition: dict[str, Any]


@router.put("/definitions", dependencies=[Protected])
async def put_definitions(request: Request, database: InDatabase, relay: ToOutbox) -> dict[str, list[applying.Applied]]:
    """Apply documents, all or none: a YAML stream, or as `application/json` one document or an array of them."""
    documents = _read(await request.body(), request.headers.get("content-type", ""))
    async with database.begin() as db:
        applied = await applying.apply_definitions(db, documents, datetime.now(UTC))
    relay.wake()
    return {"applied": applied}


@router.get("/definitions")
async def get_definitions(database: InDatabase) -> dict[str, list[DefinitionInfo]]:
    """Every definition in force."""
    async with database.begin() as db:
        return {"definitions": [_definition_info(row) for row in (await applying.in_force(db)).values()]}


@router.get("/definitions/{kind}/{name}")
async def get_definition(kind: Literal["FeatureSet", "Model"], name: str, database: InDatabase) -> DefinitionInfo:
    """One definition in force."""
    async with database.begin() as db:
        rows = await applying.in_force(db)
    if (row := rows.get(f"{kind}/{name}")) is None:
        raise NotFound(f"no definition {kind}/{name}; there are: {', '.join(rows) or 'none, apply some first'}")
    return _definition_info(row)


@router.get("/models")
async def get_models(database: InDatabase) -> dict[str, list[lineage.ModelSummary]]:
    """Every defined model, with its champion."""
    async with database.begin() as db:
        return {"models": await lineage.model_summaries(db)}


@router.get("/models/{model}")
async def get_model(model: Text, database: InDatabase) -> lineage.ModelInfo:
    """One model with its versions, newest first."""
    async with database.begin() as db:
        return await lineage.model_info(db, model)


@router.get("/models/{model}/versions/{version}")
async def get_version(model: Text, version: VersionNumber, database: InDatabase) -> lineage.VersionLineage:
    """One version with its manifest and lineage."""
    async with database.begin() as db:
        return await lineage.version_lineage(db, await version_of(db, model, version))


@router.post("/models/{model}:train", status_code=202, dependencies=[Protected])
async def train(model: Text, asked: TrainingAsked, database: InDatabase, relay: ToOutbox) -> TrainingRequested:
    """Ask trainer for a new version; the answer is the event, whose id the run names as its cause."""
    async with database.begin() as db:
        await applying.model_in_force(db, model)
        event = TrainingRequested(
            event_id=uuid4(), model=model, reason=asked.reason, requested_at=datetime.now(UTC), snapshot_time=asked.snapshot_time
        )
        await save_events(db, OUTBOX, [event])
    fault("registry.committed")
    relay.wake()
    return event


@router.post("/models/{model}/versions/{version}:promote", dependencies=[Protected])
async def promote(model: Text, version: VersionNumber, asked: PromotionAsked, database: InDatabase, relay: ToOutbox) -> Promoted:
    """Make a version the champion by hand."""
    if asked.force and not asked.reason:
        raise WrongDefinitions("a forced promotion needs a reason, which is kept with it")
    async with database.begin() as db:
        wanted = await version_of(db, model, version)
        registered = await _expected(db, model, asked.expected_promotion)
        cause = Cause("hand", uuid4(), datetime.now(UTC), asked.reason, asked.force and bool(wanted.refusals))
        promoted = await _promote(db, registered, wanted, cause)
    fault("registry.committed")
    relay.wake()
    return promoted


@router.post("/models/{model}:rollback", dependencies=[Protected])
async def rollback(model: Text, asked: RollbackAsked, database: InDatabase, relay: ToOutbox) -> Promoted:
    """Return to the version that was champion before the present one."""
    async with database.begin() as db:
        registered = await _expected(db, model, asked.expected_promotion)
        wanted = await before_champion(db, registered)
        # It served before, so what the gate once said of it does not hold it up.
        promoted = await _promote(
            db, registered, wanted, Cause("rollback", uuid4(), datetime.now(UTC), asked.reason, bool(wanted.refusals))
        )
    fault("registry.committed")
    relay.wake()
    return promoted


@router.put("/models/{model}/traffic", dependencies=[Protected])
async def put_traffic(model: Text, asked: TrafficAsked, database: InDatabase, relay: ToOutbox) -> TrafficInfo:
    """Let versions score beside the champion: a challenger its share of the entities, a shadow what the champion answered."""
    wanted = {one.version: one.share for one in asked.challengers}
    if len(wanted) < len(asked.challengers):
        raise WrongTraffic("a version is named twice")
    async with database.begin() as db:
        registered = await registered_model(db, model)
        traffic = await challenge(db, registered, wanted, asked.reason, datetime.now(UTC))
        info = _traffic_info(registered, traffic, await followers_of(db, model))
    fault("registry.committed")
    relay.wake()
    return info


@router.get("/models/{model}/traffic")
async def get_traffic(model: Text, database: InDatabase) -> TrafficInfo:
    """Who scores beside the champion."""
    async with database.begin() as db:
        return _traffic_info(await registered_model(db, model), await traffic_of(db, model), await followers_of(db, model))


@router.get("/models/{model}/shadows")
async def get_shadows(model: Text, database: InDatabase) -> dict[str, list[shadows.ShadowInfo]]:
    """What shadows made of rows that champions answered."""
    async with database.begin() as db:
        return {"shadows": await shadows.shadow_infos(db, model)}


def _traffic_info(model: RegisteredModel, traffic: Traffic | None, followers: list[Follower]) -> TrafficInfo:
    return TrafficInfo(
        model=model.model,
        champion=model.champion_version,
        setting=traffic.setting if traffic else 0,
        challengers=lineage.challenger_infos(traffic),
        followers=[FollowerInfo.model_validate(follower) for follower in followers],
    )


async def _promote(db: AsyncSession, model: RegisteredModel, version: Version, cause: Cause) -> Promoted:
    promotion = await promote_by_hand(db, model, version, cause)
    return Promoted(model=model.model, version=version.version, promotion=promotion)


async def _expected(db: AsyncSession, name: str, expected_promotion: int | None) -> RegisteredModel:
    model = await registered_model(db, name)
    if expected_promotion is not None and expected_promotion != model.promotion:
        raise ChampionChanged(
            f"you looked at promotion {expected_promotion} of '{name}'; "
            f"meanwhile promotion {model.promotion} made version {model.champion_version} the champion"
        )
    return model


def _read(body: bytes, content_type: str) -> list[FeatureSet | Model]:
    try:
        if not content_type.startswith("application/json"):
            documents = list(parse_definitions(body.decode()))
        else:
            content = orjson.loads(body)
            documents = [parse_definition(document) for document in (content if isinstance(content, list) else [content])]
    except (DefinitionError, orjson.JSONDecodeError, UnicodeDecodeError) as error:
        raise WrongDefinitions(f"nothing was applied: {error}") from error
    if not documents:
        raise WrongDefinitions("nothing was applied: the body holds no document")
    return documents


def _definition_info(row: AppliedDefinition) -> DefinitionInfo:
    return DefinitionInfo(definition_id=row.definition_id, version=row.version, applied_at=row.applied_at, definition=row.document)
