"""The tables of schema `registry`; only this service reads or writes them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, ForeignKeyConstraint, MetaData, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mojomesh_chassis.outbox import outbox_table

Json = dict[str, Any]


class Base(DeclarativeBase):
    """Texts are Text, times know their zone."""

    metadata = MetaData(schema="registry")
    type_annotation_map = {str: Text, datetime: DateTime(timezone=True), Json: JSONB, list[Json]: JSONB, list[str]: ARRAY(Text)}  # noqa: RUF012


class AppliedDefinition(Base):
    """One version of a definition; the highest is in force."""

    __tablename__ = "definitions"

    definition_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[UUID]
    document: Mapped[Json]
    applied_at: Mapped[datetime]


class RegisteredModel(Base):
    """Who is champion. `promotion` counts the promotions and is what a compare-and-set compares."""

    __tablename__ = "models"

    model: Mapped[str] = mapped_column(primary_key=True)
    champion_version: Mapped[int | None]
    promotion: Mapped[int]


class Version(Base):
    """A registered bundle. `refusals` are the gate's reasons, in words; without any it was promoted at once."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("model", "bundle_digest"),)

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    bundle_digest: Mapped[str]
    run_id: Mapped[UUID]
    ready_event_id: Mapped[UUID]
    manifest: Mapped[Json]
    bundle_schema: Mapped[Json]
    refusals: Mapped[list[str]]
    champion_then: Mapped[int | None] = mapped_column(comment="the champion the gate judged it against")
    registered_at: Mapped[datetime]


class Promotion(Base):
    """A change of champion. The rows of a model are its history; nothing is ever changed in them."""

    __tablename__ = "promotions"
    __table_args__ = (ForeignKeyConstraint(["model", "version"], [Version.model, Version.version]),)

    model: Mapped[str] = mapped_column(primary_key=True)
    promotion: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]
    previous_version: Mapped[int | None]
    cause: Mapped[str] = mapped_column(comment="gate, hand or rollback")
    caused_by: Mapped[UUID]
    reason: Mapped[str | None] = mapped_column(comment="what the person said who asked for it")
    forced: Mapped[bool] = mapped_column(comment="past the gate's refusals")
    promoted_at: Mapped[datetime]


class Traffic(Base):
    """Who scores beside a champion; the highest setting is in force. Nothing is ever changed in them."""

    __tablename__ = "traffic"

    model: Mapped[str] = mapped_column(primary_key=True)
    setting: Mapped[int] = mapped_column(primary_key=True)
    challengers: Mapped[list[Json]] = mapped_column(comment="`events.Challenger`")
    cause: Mapped[str] = mapped_column(comment="hand, or promotion: of one of them, or of a champion that one does not fit")
    reason: Mapped[str | None]
    set_at: Mapped[datetime]


class Shadow(Base):
    """The last word of one worker on one shadow: models.shadowed counts on from event to event."""

    __tablename__ = "shadows"

    counter: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str]
    n_rows: Mapped[int] = mapped_column(BigInteger)
    event: Mapped[Json]


class Follower(Base):
    """What a scorer replica made of the last setting of a model's traffic that it heard of."""

    __tablename__ = "followers"

    model: Mapped[str] = mapped_column(primary_key=True)
    replica: Mapped[str] = mapped_column(primary_key=True)
    setting: Mapped[int]
    followed_at: Mapped[datetime]
    left_out: Mapped[list[Json]] = mapped_column(comment="`events.LeftOut`")


class Fold(Base):
    """One window of a run's walk-forward validation, as folds.trained told it last: a retried fold replaces its first try."""

    __tablename__ = "folds"

    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    fold: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str]
    event: Mapped[Json]


class Deployment(Base):
    """The swap certificate of one scorer replica."""

    __tablename__ = "deployments"

    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str]
    version: Mapped[int]
    succeeded: Mapped[bool]
    switched_at: Mapped[datetime]
    event: Mapped[Json]


OUTBOX = outbox_table(Base.metadata)
