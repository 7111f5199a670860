"""Asking features for the vectors of entities."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import httpx
from pydantic import Field, ValidationError

from mojomesh_chassis.errors import NotFound, PermanentError, TransientError
from mojomesh_contracts.events import FeatureValue, Frozen, RowKey


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


class FeatureLookup:
    """The features service, by HTTP."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = f"{url}/v1/features:lookup"

    async def vectors(self, model: str, entities: Sequence[EntityAt]) -> list[Found]:
        """The model's vector of each entity as of its event time, in their order.

        Raises:
            NotFound: Features does not know the model.
            PermanentError: It refuses the question.
            TransientError: It does not answer.
        """
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
