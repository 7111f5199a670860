"""What people and programs are told of models and versions."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_contracts.bundles import Manifest
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.traffic import BUCKETS
from mojomesh_registry import applying
from mojomesh_registry.tables import AppliedDefinition, Deployment, Fold, Promotion, RegisteredModel, Traffic, Version
from mojomesh_registry.traffic import challengers_of, traffic_of

Json = dict[str, Any]
State = Literal["champion", "retired", "rejected"]


class ChampionInfo(BaseModel):
    """Who serves. `promotion` is what a caller sends back as `expected_promotion`."""

    version: int
    bundle_digest: str
    promotion: int


class PromotionInfo(BaseModel):
    """One change of champion."""

    promotion: int
    version: int
    previous_version: int | None
    cause: str
    caused_by: UUID
    reason: str | None
    forced: bool
    promoted_at: datetime


class VersionInfo(BaseModel):
    """One version in short. `reasons` are the gate's, in words; none when it passed `judged_against` the champion of then."""

    version: int
    state: State
    bundle_digest: str
    run_id: UUID
    cause: Json
    snapshot_time: datetime
    metrics: Json
    comparison: Json | None
    judged_against: int | None
    reasons: list[str]
    registered_at: datetime


class ChallengerInfo(BaseModel):
    """A version beside the champion: its share of the entities, None for a shadow."""

    version: int
    bundle_digest: str
    share: float | None


class ModelSummary(BaseModel):
    """A model in one line."""

    model: str
    definition_version: int
    champion: ChampionInfo | None
    n_versions: int


class ModelInfo(BaseModel):
    """A model, its definition in short and its versions, newest first."""

    model: str
    definition: Json
    champion: ChampionInfo | None
    challengers: list[ChallengerInfo]
    versions: list[VersionInfo]
    promotions: list[PromotionInfo]


class VersionLineage(VersionInfo):
    """A version and where it comes from: cause, run, folds with their jobs, and where it was deployed."""

    model: str
    manifest: Json
    folds: list[Json]
    promotions: list[PromotionInfo]
    deployments: list[Json]


async def model_summaries(db: AsyncSession) -> list[ModelSummary]:
    """Every defined model, by name."""
    defined = [row for identity, row in (await applying.in_force(db)).items() if identity.startswith("Model/")]
    summaries = []
    for row in defined:
        name = row.definition_id.removeprefix("Model/")
        versions = await _versions(db, name)
        summaries.append(
            ModelSummary(
                model=name,
                definition_version=row.version,
                champion=_champion(await db.get(RegisteredModel, name), versions),
                n_versions=len(versions),
            )
        )
    return summaries


async def model_info(db: AsyncSession, name: str) -> ModelInfo:
    """One model.

    Raises:
        NotFound: It is not defined.
    """
    definition, row = await applying.model_in_force(db, name)
    registered = await db.get(RegisteredModel, name)
    versions, promotions = await _versions(db, name), await _promotions(db, name)
    ever = {promotion.version for promotion in promotions}
    champion = _champion(registered, versions)
    return ModelInfo(
        model=name,
        definition=_definition_summary(definition, row),
        champion=champion,
        challengers=challenger_infos(await traffic_of(db, name)),
        versions=[_version_info(version, champion, ever) for version in versions],
        promotions=[_promotion_info(promotion) for promotion in promotions],
    )


async def version_lineage(db: AsyncSession, version: Version) -> VersionLineage:
    """One version and everything that led to it and came of it."""
    promotions = await _promotions(db, version.model)
    champion = _champion(await db.get(RegisteredModel, version.model), [version])
    folds = await db.scalars(select(Fold).where(Fold.run_id == version.run_id).order_by(Fold.fold))
    deployed = select(Deployment).where(Deployment.model == version.model, Deployment.version == version.version)
    deployments = await db.scalars(deployed.order_by(Deployment.switched_at))
    return VersionLineage(
        **_version_info(version, champion, {promotion.version for promotion in promotions}).model_dump(),
        model=version.model,
        manifest=version.manifest,
        folds=[fold.event for fold in folds],
        promotions=[_promotion_info(promotion) for promotion in promotions if promotion.version == version.version],
        deployments=[deployment.event for deployment in deployments],
    )


def _definition_summary(definition: Model, row: AppliedDefinition) -> Json:
    return {
        "version": row.version,
        "applied_at": row.applied_at,
        "spine": definition.spine,
        "label": definition.label.model_dump(mode="json"),
        "feature_sets": [source.feature_set for source in definition.features],
        "algorithm": definition.algorithm.model_dump(mode="json"),
        "gate": definition.gate.model_dump(mode="json"),
    }


def _version_info(version: Version, champion: ChampionInfo | None, ever_promoted: set[int]) -> VersionInfo:
    manifest = Manifest.model_validate(version.manifest)
    state: State = "retired" if version.version in ever_promoted else "rejected"
    return VersionInfo(
        version=version.version,
        state="champion" if champion and champion.version == version.version else state,
        bundle_digest=version.bundle_digest,
        run_id=version.run_id,
        cause=manifest.cause.model_dump(mode="json"),
        snapshot_time=manifest.snapshot_time,
        metrics=manifest.metrics.model_dump(mode="json"),
        comparison=manifest.comparison.model_dump(mode="json") if manifest.comparison else None,
        judged_against=version.champion_then,
        reasons=version.refusals,
        registered_at=version.registered_at,
    )


def _champion(registered: RegisteredModel | None, versions: list[Version]) -> ChampionInfo | None:
    if registered is None:
        return None
    serving = [version for version in versions if version.version == registered.champion_version]
    return (
        ChampionInfo(version=serving[0].version, bundle_digest=serving[0].bundle_digest, promotion=registered.promotion)
        if serving
        else None
    )


def challenger_infos(traffic: Traffic | None) -> list[ChallengerInfo]:
    """Who scores beside a champion."""
    return [
        ChallengerInfo(version=one.version, bundle_digest=one.bundle_digest, share=len(one.buckets) / BUCKETS if one.buckets else None)
        for one in challengers_of(traffic)
    ]


def _promotion_info(promotion: Promotion) -> PromotionInfo:
    return PromotionInfo.model_validate(promotion, from_attributes=True)


async def _versions(db: AsyncSession, name: str) -> list[Version]:
    return list(await db.scalars(select(Version).where(Version.model == name).order_by(Version.version.desc())))


async def _promotions(db: AsyncSession, name: str) -> list[Promotion]:
    return list(await db.scalars(select(Promotion).where(Promotion.model == name).order_by(Promotion.promotion)))
