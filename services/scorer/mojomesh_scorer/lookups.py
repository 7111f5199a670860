"""Asking features for the vectors of entities."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import httpx
from pydantic import Field, ValidationError

from mojomesh_chassis.errors import NotFound, PermanentError, TransientError
from mojomesh_contracts.events import FeatureValue, Frozen, RowKey

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
    error: str | None = None


class _Answer(Frozen):
    rows: list[Found]


@dataclass
class _Together:
    """What will be asked in one call."""

    entities: list[EntityAt]
    asking: "asyncio.Task[list[Found]]"


class FeatureLookup:
    """The features service, by HTTP.

    A call for one row costs both processes as much as a call for twenty (measured: 5 ms of CPU here and there). So while a call is under
    way, what is asked meanwhile about the same model goes together in the next: nobody waits when little is asked, and calls grow with
    the load.
    """

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = f"{url}/v1/features:lookup"
        self._next: dict[str, _Together] = {}
        self._under_way: dict[str, asyncio.Task[list[Found]]] = {}

    async def vectors(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        """The model's vector of each entity as of its event time, in their order.

        Raises:
            NotFound: Features does not know the model.
            PermanentError: It refuses the question.
            TransientError: It does not answer.
        """
        if len(entities) > FEW_ROWS:
            return await self._ask(model, entities)
        if (together := self._next.get(model)) is None:
            together = self._next[model] = _Together([], asyncio.create_task(self._ask_next(model)))
        start = len(together.entities)
        together.entities += entities
        try:
            found = await asyncio.shield(together.asking)  # a caller that goes away must not take the others' answer with it
        except PermanentError:
            if len(together.entities) == len(entities):
                raise
            return await self._ask(model, entities)  # it may be another's fault
        return found[start : start + len(entities)]

    async def _ask_next(self, model: str) -> list[Found]:
        if (before := self._under_way.get(model)) is not None:
            await asyncio.wait([before])
        together = self._next.pop(model)
        self._under_way[model] = together.asking
        return await self._ask(model, together.entities)

    async def _ask(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        rows = [{"entity_id": entity.entity_id, "event_time": entity.event_time.isoformat()} for entity in entities]
        try:
            reply = await self._client.post(self._url, json={"model": model, "rows": rows})
        except httpx.HTTPError as error:
            raise TransientError(f"features at {self._url} does not answer: {error!r}") from error
        if reply.status_code != 200:
            answer = f"features at {self._url} answered {reply.status_code}: {reply.text[:500]}"
            if reply.status_code == 404:
                raise NotFound(answer)
            # To wait would not help with any other fault of ours, and would hold up a partition for ever.
            raise PermanentError(answer) if reply.is_client_error and reply.status_code != 429 else TransientError(answer)
        try:
            found = _Answer.model_validate_json(reply.content).rows
        except ValidationError as error:
            raise TransientError(f"features at {self._url} answered something else: {error}") from error
        if len(found) != len(entities):
            raise TransientError(f"features at {self._url} answered {len(found)} rows for {len(entities)}")
        return found
