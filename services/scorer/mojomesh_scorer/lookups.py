"""The vectors of entities: from Redis, and from the features service what Redis does not know for certain."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import httpx
from pydantic import Field, ValidationError

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import NotFound, PermanentError, TransientError
from mojomesh_contracts.events import FeatureValue, Frozen, RowKey
from mojomesh_scorer.errors import FeaturesFailed
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.online import Breaker, OnlineStore, microseconds
from mojomesh_store.vectors import Plans, Vector, vectors

FEW_ROWS = 16  # more than these are a call of their own


@dataclass(frozen=True, slots=True)
class EntityAt:
    """An entity, as of a time."""

    entity_id: str
    event_time: datetime


class Found(Frozen):
    """A joined vector, the rows it was made of, and how old each set's row was at the event time; or why there is none."""

    values: dict[str, FeatureValue] = Field(default={})
    used: list[RowKey] = Field(default=[])
    ages_ms: dict[str, int] = Field(default={})
    error: str | None = Field(default=None, description="The entity has no row")
    refused: str | None = Field(default=None, description="A row is older than the model takes")
    away: str | None = Field(default=None, description="A row is on a shard that is away")

    @classmethod
    def of(cls, spine: str, entity: EntityAt, vector: Vector | None) -> "Found":
        """What a vector is to a request."""
        if vector is None:
            return cls(error=f"'{spine}' has no row of '{entity.entity_id}' at {entity.event_time.isoformat()}")
        if vector.too_old:
            return cls(refused="; ".join(vector.too_old))
        used = [row.key(of) for of, row in vector.used.items()]
        return cls.model_construct(values=vector.values, used=used, ages_ms=vector.ages_ms)


class _Answer(Frozen):
    rows: list[Found]


@dataclass
class _Together:
    """What will be asked in one call."""

    entities: list[EntityAt]
    asking: "asyncio.Task[list[Found]]"


class FeatureLookup:
    """Reads an entity's rows as of its event time from Redis, in two round trips at most, and asks the features service for the others.

    A call costs for one row nearly what it costs for twenty (measured of the service: 5 ms of CPU here and there). So while a call is
    under way, what is asked meanwhile about the same model goes together in the next: nobody waits when little is asked, and calls grow
    with the load. Redis that does not answer is left alone for a while, and so is the service: then a look-up fails at once.

    A row that could not be merged into Redis, because Redis did not answer, is missed here until it answered again and was told: seconds.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, online: OnlineStore, definitions: Definitions) -> None:
        self._client = client
        self._url = f"{url}/v1/features:lookup"
        self._online = online
        self._plans = Plans(definitions)
        self._breaker = Breaker()
        self._next: dict[str, _Together] = {}
        self._under_way: dict[str, asyncio.Task[list[Found]]] = {}

    async def vectors(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        """The model's vector of each entity as of its event time, in their order.

        Raises:
            NotFound: Features does not know the model.
            PermanentError: It refuses the question.
            FeaturesFailed: It fails over the question.
            TransientError: It does not answer, or rows that are needed are on a shard that is away.
        """
        if len(entities) > FEW_ROWS:
            return _none_away(await self._find(model, entities))
        if (together := self._next.get(model)) is None:
            together = self._next[model] = _Together([], asyncio.create_task(self._ask_next(model)))
        start = len(together.entities)
        together.entities += entities
        try:
            found = await asyncio.shield(together.asking)  # a caller that goes away must not take the others' answer with it
        except (PermanentError, FeaturesFailed):
            if len(together.entities) == len(entities):
                raise
            return _none_away(await self._find(model, entities))  # it may be another's fault
        return _none_away(found[start : start + len(entities)])

    async def _ask_next(self, model: str) -> list[Found]:
        if (before := self._under_way.get(model)) is not None:
            await asyncio.wait([before])
        together = self._next.pop(model)
        self._under_way[model] = together.asking
        return await self._find(model, together.entities)

    async def _find(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        found = await self._read(model, entities)
        if missed := [place for place in range(len(entities)) if place not in found]:
            answers = await self._ask(model, [entities[place] for place in missed])
            found |= dict(zip(missed, answers, strict=True))
        return [found[place] for place in range(len(entities))]

    async def _read(self, model: str, entities: Sequence[EntityAt]) -> dict[int, Found]:
        """What Redis knows for certain, by the entity's place."""
        try:
            plan = self._plans.of(model)
        except (NotFound, UnusableDefinition):
            return {}  # features says what is wrong, or knows a definition that has not come here yet
        if plan.has_aggregates:
            return {}  # they are computed from PostgreSQL's rows
        asked = [(entity.entity_id, microseconds(entity.event_time)) for entity in entities]
        known = await vectors(plan, asked, self._online.rows_at)
        return {place: Found.of(plan.model.spine, entities[place], vector) for place, vector in known.items()}

    async def _ask(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        if self._breaker.is_open:
            raise TransientError(f"features at {self._url} did not answer; it is asked again within {self._breaker.open_s:g} s")
        self._breaker.try_now()
        rows = [{"entity_id": entity.entity_id, "event_time": entity.event_time.isoformat()} for entity in entities]
        try:
            reply = await self._client.post(self._url, json={"model": model, "rows": rows})
        except httpx.HTTPError as error:
            self._breaker.failed()
            raise TransientError(f"features at {self._url} does not answer: {error!r}") from error
        self._breaker.succeeded()
        if reply.status_code != 200:
            answer = f"features at {self._url} answered {reply.status_code}: {reply.text[:500]}"
            if reply.status_code == 404:
                raise NotFound(answer)
            if reply.status_code == 500:
                raise FeaturesFailed(answer)
            # To wait would not help with any other fault of ours, and would hold up a partition for ever.
            raise PermanentError(answer) if reply.is_client_error and reply.status_code != 429 else TransientError(answer)
        try:
            found = _Answer.model_validate_json(reply.content).rows
        except ValidationError as error:
            raise TransientError(f"features at {self._url} answered something else: {error}") from error
        if len(found) != len(entities):
            raise TransientError(f"features at {self._url} answered {len(found)} rows for {len(entities)}")
        return found


def _none_away(found: list[Found]) -> list[Found]:
    if away := next((each.away for each in found if each.away), None):
        raise TransientError(away)
    return found
