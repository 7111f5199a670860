"""Asking features for the vectors of entities."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import httpx
from pydantic import Field, ValidationError

from mojomesh_chassis.errors import TransientError
from mojomesh_contracts.events import FeatureValue, Frozen, RowKey
from mojomesh_scorer.errors import UnknownEntity


@dataclass(frozen=True, slots=True)
class EntityAt:
    """An entity, as of a time."""

    entity_id: str
    event_time: datetime


class Found(Frozen):
    """A joined vector, the rows it was made of, and how old each set's row was at the event time."""

    values: dict[str, FeatureValue] = Field(default={})
    used: list[RowKey] = Field(default=[])
    ages_ms: dict[str, int] = Field(default={})
    error: str | None = None


class _Answer(Frozen):
    rows: list[Found]


class FeatureLookup:
    """The features service, by HTTP."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = f"{url}/v1/features:lookup"

    async def vectors(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        """The model's vector of each entity as of its event time, in their order.

        Raises:
            UnknownEntity: Features has nothing about one of them.
            TransientError: Features does not answer.
        """
        rows = [{"entity_id": entity.entity_id, "event_time": entity.event_time.isoformat()} for entity in entities]
        try:
            reply = await self._client.post(self._url, json={"model": model, "rows": rows})
        except httpx.HTTPError as error:
            raise TransientError(f"features at {self._url} does not answer: {error!r}") from error
        if reply.status_code == 404:
            raise UnknownEntity(f"features knows nothing about model '{model}': {reply.text}")
        if reply.status_code != 200:
            raise TransientError(f"features at {self._url} answered {reply.status_code}: {reply.text[:200]}")
        try:
            found = _Answer.model_validate_json(reply.content).rows
        except ValidationError as error:
            raise TransientError(f"features at {self._url} answered something else: {error}") from error
        if len(found) != len(entities):
            raise TransientError(f"features at {self._url} answered {len(found)} rows for {len(entities)}")
        if faults := [f"{entity.entity_id}: {row.error}" for entity, row in zip(entities, found, strict=True) if row.error]:
            raise UnknownEntity(f"no features for {'; '.join(faults[:10])}")
        return found
