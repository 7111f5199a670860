"""Definitions: what is in force, and putting documents in force, all or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.outbox import save_events
from mojomesh_contracts.definitions import FeatureSet, Model, definition_id, incompatible_changes, parse_definition, problems_among
from mojomesh_contracts.events import DefinitionApplied
from mojomesh_registry.errors import WrongDefinitions
from mojomesh_registry.tables import OUTBOX, AppliedDefinition


@dataclass(frozen=True)
class Applied:
    """What became of one document."""

    definition_id: str
    version: int
    outcome: Literal["created", "changed", "unchanged"]


async def in_force(db: AsyncSession) -> dict[str, AppliedDefinition]:
    """The newest version of every definition, by its id."""
    newest = select(AppliedDefinition).ext(distinct_on(AppliedDefinition.definition_id))
    rows = await db.scalars(newest.order_by(AppliedDefinition.definition_id, AppliedDefinition.version.desc()))
    return {row.definition_id: row for row in rows}


async def definitions(db: AsyncSession) -> dict[str, FeatureSet | Model]:
    """The same, read."""
    return {identity: parse_definition(row.document) for identity, row in (await in_force(db)).items()}


async def model_in_force(db: AsyncSession, name: str) -> tuple[Model, AppliedDefinition]:
    """The definition of a model.

    Raises:
        NotFound: Nobody applied one; the text lists those there are.
    """
    rows = await in_force(db)
    row = rows.get(f"Model/{name}")
    model = parse_definition(row.document) if row else None
    if row is None or not isinstance(model, Model):
        known = [identity.removeprefix("Model/") for identity in rows if identity.startswith("Model/")]
        raise NotFound(f"no model '{name}' is defined; there are: {', '.join(known) or 'none, apply some first'}")
    return model, row


async def apply_definitions(db: AsyncSession, documents: Sequence[FeatureSet | Model], now: datetime) -> list[Applied]:
    """Put documents in force. One that is in force already makes no new version, and is announced again all the same.

    Raises:
        WrongDefinitions: Something is wrong with one of them or between them; nothing is applied.
    """
    # One at a time: what is checked together must be in force together.
    await db.execute(select(func.pg_advisory_xact_lock(func.hashtext("registry.definitions"))))
    before = await in_force(db)
    wanted = {definition_id(document): document for document in documents}
    if problems := _problems(documents, before):
        raise WrongDefinitions("nothing was applied: " + "; ".join(problems))
    return [await _apply(db, identity, document, before.get(identity), now) for identity, document in wanted.items()]


def _problems(documents: Sequence[FeatureSet | Model], before: dict[str, AppliedDefinition]) -> list[str]:
    identities = [definition_id(document) for document in documents]
    problems = [f"{identity} comes more than once" for identity in sorted({name for name in identities if identities.count(name) > 1})]
    parsed = {identity: parse_definition(row.document) for identity, row in before.items()}
    for document in documents:
        old = parsed.get(definition_id(document))
        if isinstance(document, FeatureSet) and isinstance(old, FeatureSet):
            problems += [f"feature set '{document.name}': {problem}" for problem in incompatible_changes(old, document)]
    return problems + problems_among(parsed | dict(zip(identities, documents, strict=True)))


async def _apply(db: AsyncSession, identity: str, document: FeatureSet | Model, before: AppliedDefinition | None, now: datetime) -> Applied:
    content = document.model_dump(mode="json", exclude_unset=True) | {"kind": document.kind}
    unchanged = before is not None and parse_definition(before.document) == document
    if before is not None and unchanged:
        row = before
    else:
        version = before.version + 1 if before else 1
        row = AppliedDefinition(definition_id=identity, version=version, event_id=uuid4(), document=content, applied_at=now)
        db.add(row)
    await save_events(db, OUTBOX, [announcement(row)])
    return Applied(identity, row.version, "unchanged" if unchanged else "changed" if before else "created")


def announcement(row: AppliedDefinition) -> DefinitionApplied:
    """The event of a definition: the same one each time it is announced."""
    event_id: UUID = row.event_id
    return DefinitionApplied(event_id=event_id, definition_id=row.definition_id, version=row.version, definition=row.document)
