"""Model versions: registering, judging, promoting. Everything here happens in the caller's transaction."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID, uuid5

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.bundles import Bundle
from mojomesh_chassis.errors import BadBundle
from mojomesh_chassis.outbox import save_events
from mojomesh_contracts.bundles import BundleSchema
from mojomesh_contracts.definitions import FeatureSet, Model
from mojomesh_contracts.events import ModelPromoted, ModelReady
from mojomesh_registry import applying
from mojomesh_registry.errors import ChampionChanged, NotPromotable, UnknownVersion, WrongTraffic
from mojomesh_registry.gate import Champion, refusals, schema_problems
from mojomesh_registry.tables import OUTBOX, Promotion, RegisteredModel, Traffic, Version
from mojomesh_registry.traffic import set_traffic, settle


@dataclass(frozen=True)
class Cause:
    """Why a version is promoted."""

    kind: str
    caused_by: UUID
    at: datetime
    reason: str | None = None
    forced: bool = False


async def register(db: AsyncSession, ready: ModelReady, bundle: Bundle, now: datetime) -> Version:
    """Make a verified bundle the next version of its model and promote it, if the gate lets it through.

    A bundle that is registered already stays the version it is; if that one is champion, it is announced again.

    Raises:
        BadBundle: It is another model's.
    """
    if bundle.manifest.model != ready.model:
        raise BadBundle(f"bundle {bundle.digest} is of the model '{bundle.manifest.model}', it was offered as '{ready.model}'")
    model = await _take_turn(db, ready.model)
    known = await db.scalar(select(Version).where(Version.model == ready.model, Version.bundle_digest == bundle.digest))
    if known is not None:
        if model.champion_version == known.version:
            await announce_champion(db, model)
        return known
    highest = await db.scalar(select(func.max(Version.version)).where(Version.model == ready.model))
    version = Version(
        model=ready.model,
        version=(highest or 0) + 1,
        bundle_digest=bundle.digest,
        run_id=ready.run_id,
        ready_event_id=ready.event_id,
        manifest=bundle.manifest.model_dump(mode="json"),
        bundle_schema=bundle.schema.model_dump(mode="json"),
        refusals=await _refusals(db, model, bundle),
        champion_then=model.champion_version,
        registered_at=now,
    )
    db.add(version)
    await db.flush()
    if not version.refusals:
        await promote(db, model, version, Cause("gate", ready.event_id, now))
    return version


async def promote(db: AsyncSession, model: RegisteredModel, version: Version, cause: Cause) -> int:
    """Make `version` the champion if nobody was promoted since `model` was read; the number of the promotion.

    Raises:
        ChampionChanged: Somebody was.
    """
    promotion = model.promotion + 1
    swapped = await db.scalar(
        update(RegisteredModel)
        .where(RegisteredModel.model == model.model, RegisteredModel.promotion == model.promotion)
        .values(champion_version=version.version, promotion=promotion)
        .returning(RegisteredModel.promotion)
        .execution_options(synchronize_session=False)
    )
    if swapped is None:
        raise ChampionChanged(f"another version of '{model.model}' was promoted meanwhile; look at it, then ask again if you still want to")
    row = Promotion(
        model=model.model,
        promotion=promotion,
        version=version.version,
        previous_version=model.champion_version,
        cause=cause.kind,
        caused_by=cause.caused_by,
        reason=cause.reason,
        forced=cause.forced,
        promoted_at=cause.at,
    )
    db.add(row)
    await save_events(db, OUTBOX, [_announcement(row, version.bundle_digest)])
    await settle(db, version, cause.at)
    return promotion


async def promote_by_hand(db: AsyncSession, model: RegisteredModel, version: Version, cause: Cause) -> int:
    """Promote a version that passed the gate, or any other if `cause` says that it is forced; what is champion already is announced again.

    Raises:
        NotPromotable: The gate refused it and it is not forced, or the live feature sets cannot feed it, which no force helps.
        ChampionChanged: See `promote`.
    """
    if model.champion_version == version.version:
        await announce_champion(db, model)
        return model.promotion
    await _check_servable(db, version)
    if version.refusals and not cause.forced:
        raise NotPromotable(
            f"version {version.version} did not pass the gate: {'; '.join(version.refusals)}. To promote it all the same, force it "
            "and give a reason"
        )
    return await promote(db, model, version, cause)


async def challenge(
    db: AsyncSession, model: RegisteredModel, wanted: Mapping[int, Decimal | None], reason: str | None, now: datetime
) -> Traffic:
    """Let versions score beside the champion, each its share of the entities or, with None, as a shadow; instead of those before.

    One that the gate refused may be tried, that is what challenges are for.

    Raises:
        UnknownVersion: There is none of a number.
        NotPromotable: The live feature sets cannot feed one.
        WrongTraffic: There is no champion, or see `set_traffic`.
    """
    if model.champion_version is None:
        raise WrongTraffic(f"'{model.model}' has no champion; promote a version first")
    versions = {number: await version_of(db, model.model, number) for number in wanted}
    for version in versions.values():
        await _check_servable(db, version)
    return await set_traffic(db, await version_of(db, model.model, model.champion_version), wanted, versions, reason, now)


async def before_champion(db: AsyncSession, model: RegisteredModel) -> Version:
    """The version a rollback returns to: who was champion when the present one was promoted, rollbacks not counted.

    Raises:
        NotPromotable: There was none.
    """
    rose = select(Promotion).where(Promotion.model == model.model, Promotion.version == model.champion_version)
    last = await db.scalar(rose.where(Promotion.cause != "rollback").order_by(Promotion.promotion.desc()).limit(1))
    if last is None or last.previous_version is None:
        raise NotPromotable(f"there is nothing to roll '{model.model}' back to: no version was champion before the present one")
    return await version_of(db, model.model, last.previous_version)


async def announce_champion(db: AsyncSession, model: RegisteredModel) -> None:
    """Send the present promotion again. Never an older one: the topic is compacted, and the last record would be stale."""
    promotion = await db.get_one(Promotion, (model.model, model.promotion))
    version = await version_of(db, model.model, promotion.version)
    await save_events(db, OUTBOX, [_announcement(promotion, version.bundle_digest)])


async def registered_model(db: AsyncSession, name: str) -> RegisteredModel:
    """The model's champion pointer, locked until the transaction ends.

    So what is announced again is still the newest promotion when it is committed: a later one would be overtaken in the outbox.

    Raises:
        UnknownVersion: Nothing was ever registered of it.
    """
    model = await db.get(RegisteredModel, name, with_for_update=True)
    if model is None:
        raise UnknownVersion(f"the model '{name}' has no version yet; train it first")
    return model


async def version_of(db: AsyncSession, model: str, version: int) -> Version:
    """One version.

    Raises:
        UnknownVersion: There is none of that number; the text says which there are.
    """
    found = await db.get(Version, (model, version))
    if found is None:
        highest = await db.scalar(select(func.max(Version.version)).where(Version.model == model))
        known = f"it has 1 to {highest}" if highest else "it has none yet; train it first"
        raise UnknownVersion(f"the model '{model}' has no version {version}; {known}")
    return found


async def _take_turn(db: AsyncSession, name: str) -> RegisteredModel:
    """The champion pointer, locked: versions of one model are registered one after the other."""
    new = insert(RegisteredModel).values(model=name, champion_version=None, promotion=0)
    await db.execute(new.on_conflict_do_nothing())
    return (await db.scalars(select(RegisteredModel).where(RegisteredModel.model == name).with_for_update())).one()


async def _refusals(db: AsyncSession, model: RegisteredModel, bundle: Bundle) -> list[str]:
    definitions = await applying.definitions(db)
    definition = definitions.get(f"Model/{model.model}")
    if not isinstance(definition, Model):
        return [f"the model '{model.model}' is not defined here; apply its definition and train again"]
    champion = None
    if model.champion_version is not None:
        serving = await version_of(db, model.model, model.champion_version)
        champion = Champion(serving.version, serving.bundle_digest)
    problems = schema_problems(bundle.schema, _feature_sets(definitions))
    return problems + refusals(definition.gate, bundle.manifest, champion)


async def _check_servable(db: AsyncSession, version: Version) -> None:
    feature_sets = _feature_sets(await applying.definitions(db))
    if problems := schema_problems(BundleSchema.model_validate(version.bundle_schema), feature_sets):
        raise NotPromotable(f"version {version.version} cannot be served: " + "; ".join(problems))


def _feature_sets(definitions: dict[str, FeatureSet | Model]) -> dict[str, FeatureSet]:
    return {definition.name: definition for definition in definitions.values() if isinstance(definition, FeatureSet)}


def _announcement(promotion: Promotion, bundle_digest: str) -> ModelPromoted:
    return ModelPromoted(
        event_id=uuid5(promotion.caused_by, f"promotion {promotion.promotion} of {promotion.model}"),
        model=promotion.model,
        version=promotion.version,
        bundle_digest=bundle_digest,
        promotion=promotion.promotion,
        promoted_at=promotion.promoted_at,
        cause=promotion.cause,
        caused_by=promotion.caused_by,
    )
