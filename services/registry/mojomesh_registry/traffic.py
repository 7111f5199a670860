"""Who scores beside a champion: challengers with a share of its entities, and shadows. All in the caller's transaction."""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from itertools import islice
from uuid import NAMESPACE_OID, uuid5

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.outbox import save_events
from mojomesh_contracts.bundles import BundleSchema
from mojomesh_contracts.events import Challenger, TrafficSet
from mojomesh_contracts.traffic import BUCKETS
from mojomesh_registry.errors import WrongTraffic
from mojomesh_registry.tables import OUTBOX, Follower, Traffic, Version

MAX_CHALLENGERS = 3
MAX_SHARE = Decimal("0.9")


def allot(before: Mapping[int, list[int]], wanted: Mapping[int, int]) -> dict[int, list[int]]:
    """Buckets for each version, as many as wanted.

    Each keeps what it had before as far as that goes; what it needs beyond comes from the champion, and what it has too many goes back
    there. So no entity moves from one challenger to another, unless the champion had too few for those that grow.
    """
    kept = {version: before.get(version, [])[:n] for version, n in wanted.items()}
    taken, challenged = ({bucket for buckets in of.values() for bucket in buckets} for of in (kept, before))
    free = (bucket for bucket in sorted(range(BUCKETS), key=challenged.__contains__) if bucket not in taken)
    return {version: kept[version] + list(islice(free, n - len(kept[version]))) for version, n in wanted.items()}


async def traffic_of(db: AsyncSession, model: str) -> Traffic | None:
    """The setting in force."""
    return await db.scalar(select(Traffic).where(Traffic.model == model).order_by(Traffic.setting.desc()).limit(1))


async def followers_of(db: AsyncSession, model: str) -> list[Follower]:
    """The last word of each scorer replica on the model's traffic."""
    return list(await db.scalars(select(Follower).where(Follower.model == model).order_by(Follower.replica)))


async def set_traffic(
    db: AsyncSession,
    champion: Version,
    wanted: Mapping[int, Decimal | None],
    versions: Mapping[int, Version],
    reason: str | None,
    now: datetime,
) -> Traffic:
    """Give each version its share of the entities, None makes it a shadow; whoever calls holds the lock on the model.

    Raises:
        WrongTraffic: The champion is among them, they are too many or ask too much, or one does not fit (`misfit`).
    """
    if champion.version in wanted:
        raise WrongTraffic(f"version {champion.version} is the champion: it has what the others leave")
    if len(wanted) > MAX_CHALLENGERS:
        raise WrongTraffic(f"{len(wanted)} versions beside the champion; every worker holds each in memory, so at most {MAX_CHALLENGERS}")
    if (total := sum(share for share in wanted.values() if share)) > MAX_SHARE:
        raise WrongTraffic(f"the shares sum up to {total}; leave the champion at least {1 - MAX_SHARE}")
    for version, share in wanted.items():
        if why := misfit(champion, versions[version], shadow=share is None):
            raise WrongTraffic(f"version {version} cannot be a {'challenger' if share else 'shadow'} of version {champion.version}: {why}")
    last = await traffic_of(db, champion.model)
    before = {one.version: one.buckets for one in challengers_of(last)}
    buckets = allot(before, {version: int((share or 0) * BUCKETS) for version, share in wanted.items()})
    challengers = [Challenger(version=one, bundle_digest=versions[one].bundle_digest, buckets=buckets[one]) for one in wanted]
    return await _save(db, champion.model, last, challengers, "hand", reason, now)


async def settle(db: AsyncSession, champion: Version, now: datetime) -> None:
    """After a promotion: the new champion is no challenger any more, and those that do not fit it end."""
    last = await traffic_of(db, champion.model)
    beside = challengers_of(last)
    going_on = []
    for one in beside:
        version = await db.get_one(Version, (champion.model, one.version))
        if one.version != champion.version and not misfit(champion, version, shadow=not one.buckets):
            going_on.append(one)
    if going_on != beside:
        await _save(db, champion.model, last, going_on, "promotion", f"version {champion.version} is the champion", now)


def misfit(champion: Version, other: Version, *, shadow: bool) -> str | None:
    """Why a version cannot score beside the champion; None when it can. Levels may differ: they have names.

    A shadow scores the champion's rows, so the champion must have its columns. A challenger must have the champion's: the clients of its
    entities go on sending them by value, and would be refused.
    """
    having, needing = (champion, other) if shadow else (other, champion)
    known, needed = (BundleSchema.model_validate(version.bundle_schema) for version in (having, needing))
    if known.classes != needed.classes:
        return f"version {having.version} has the classes {known.classes}, version {needing.version} {needed.classes}"
    types = {column.name: column.type for column in known.columns}
    if missing := [column.name for column in needed.columns if types.get(column.name) != column.type]:
        return f"version {having.version} does not have version {needing.version}'s column {', '.join(missing)}"
    return None


def challengers_of(traffic: Traffic | None) -> list[Challenger]:
    """Who scores beside the champion."""
    return [Challenger.model_validate(one) for one in traffic.challengers] if traffic else []


async def _save(
    db: AsyncSession, model: str, last: Traffic | None, challengers: list[Challenger], cause: str, reason: str | None, now: datetime
) -> Traffic:
    setting = (last.setting if last else 0) + 1
    documents = [one.model_dump(mode="json") for one in challengers]
    row = Traffic(model=model, setting=setting, challengers=documents, cause=cause, reason=reason, set_at=now)
    db.add(row)
    event_id = uuid5(NAMESPACE_OID, f"traffic {setting} of {model}")
    await save_events(db, OUTBOX, [TrafficSet(event_id=event_id, model=model, setting=setting, set_at=now, challengers=challengers)])
    return row
