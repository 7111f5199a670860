"""From a short request's bytes to its answer's, if Redis knows all of it for certain.

Nothing is refused or loaded here: what is not plain and right, or not in Redis, is left to the application's routes, which do it or say
what is wrong with it. So both ways give the same answers (docs/decisions/0021-online-answers.md).
"""

import asyncio
import re
import time
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated

import msgspec

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.fast_lane import Answer, Headers
from mojomesh_contracts.storable import NUL, is_in_calendar
from mojomesh_features.answers import rows_answer, vectors_answer
from mojomesh_features.retiring import Retired
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.online import AsOf, OnlineRow, OnlineStore, microseconds
from mojomesh_store.vectors import Plans, vectors

MOST_ROWS = 100  # in one question to Redis, and in a request: one with more takes the long way

EntityId = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Asked = Sequence[tuple[str, int]]
"""Entity_ids, and the event times in microseconds since 1970 as of which they are asked for."""


class _AskedVector(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    entity_id: EntityId
    event_time: str | None = None


class _AskedVectors(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    model: str
    rows: Annotated[list[_AskedVector], msgspec.Meta(max_length=MOST_ROWS)]


class _AskedRow(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    entity_id: EntityId
    at: str | None = None


class _AskedRows(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    rows: Annotated[list[_AskedRow], msgspec.Meta(max_length=MOST_ROWS)]
    snapshot_time: None = None


_read_vectors = msgspec.json.Decoder(_AskedVectors).decode
_read_rows = msgspec.json.Decoder(_AskedRows).decode
_is_plain_time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII).fullmatch


class ShortAnswers:
    """Answers what it can; see `fast_lane.Route`."""

    def __init__(self, online: OnlineStore, definitions: Definitions, retired: Retired) -> None:
        self._online = online
        self._definitions = definitions
        self._retired = retired
        self._plans = Plans(definitions)
        self._of_models: dict[str, _Together] = {}
        self._of_sets: dict[str, _Together] = {}

    def route(self, url: bytes, headers: Headers) -> Answer | None:
        """What may answer requests of this path."""
        if (b"content-type", b"application/json") not in headers:
            return None
        if url == b"/v1/features:lookup":
            return self._look_up
        if url.startswith(b"/v1/features/") and url.endswith(b":batch"):
            return partial(self._read_batch, url[13:-6].decode("latin-1"))
        return None

    def _look_up(self, body: bytes) -> "Future[bytes | None] | None":
        try:
            asked = _read_vectors(body)
            pairs = [_as_of(row.entity_id, row.event_time) for row in asked.rows]
            plan = self._plans.of(asked.model)
        except (msgspec.DecodeError, ValueError, NotFound, UnusableDefinition):
            return None
        if plan.has_aggregates:
            return None
        if (together := self._of_models.get(asked.model)) is None:
            together = self._of_models[asked.model] = _Together(partial(self._vectors, asked.model))
        return together.ask(pairs)

    def _read_batch(self, feature_set: str, body: bytes) -> "Future[bytes | None] | None":
        try:
            pairs = [_as_of(row.entity_id, row.at) for row in _read_rows(body).rows]
        except (msgspec.DecodeError, ValueError):
            return None
        if feature_set not in self._definitions.feature_sets:
            return None
        if (together := self._of_sets.get(feature_set)) is None:
            together = self._of_sets[feature_set] = _Together(partial(self._rows, feature_set))
        return together.ask(pairs)

    async def _vectors(self, model: str, questions: Sequence[Asked]) -> list[bytes | None]:
        plan = self._plans.of(model)
        found = await vectors(plan, [pair for asked in questions for pair in asked], self._rows_at)
        answers: list[bytes | None] = []
        first = 0
        for asked in questions:
            places = range(first, first := first + len(asked))
            answers.append(
                vectors_answer(plan.model.spine, asked, [found[place] for place in places]) if found.keys() >= set(places) else None
            )
        return answers

    async def _rows(self, feature_set: str, questions: Sequence[Asked]) -> list[bytes | None]:
        wanted: list[list[AsOf]] = [[((feature_set, entity_id), at) for entity_id, at in asked] for asked in questions]
        found = await self._rows_at([as_of for as_ofs in wanted for as_of in as_ofs])
        return [rows_answer(as_ofs, found) if found.keys() >= set(as_ofs) else None for as_ofs in wanted]

    async def _rows_at(self, asked: Sequence[AsOf]) -> Mapping[AsOf, OnlineRow | None]:
        return await self._online.rows_at([as_of for as_of in asked if not self._retired.reaches(as_of[0][0], as_of[1])])


class _Together:
    """Gathers what is asked while an answer is under way into the next question: few wait for nobody, many share the costs."""

    def __init__(self, answers: Callable[[Sequence[Asked]], Awaitable[Sequence[bytes | None]]]) -> None:
        self._answers = answers
        self._waiting: deque[tuple[Asked, Future[bytes | None]]] = deque()
        self._asking: asyncio.Task[None] | None = None

    def ask(self, asked: Asked) -> "Future[bytes | None]":
        """The answer to come."""
        answer: Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return answer

    async def _ask(self) -> None:
        some, n_rows = [], 0
        while self._waiting and n_rows < MOST_ROWS:
            some.append(self._waiting.popleft())
            n_rows += len(some[-1][0])
        answers: Sequence[bytes | None] = [None] * len(some)
        try:
            answers = await self._answers([asked for asked, _ in some])
        finally:
            for (_, waiting), answer in zip(some, answers, strict=True):
                if not waiting.done():  # cancelled: who asked has gone
                    waiting.set_result(answer)
            self._asking = asyncio.create_task(self._ask()) if self._waiting else None


def _as_of(entity_id: str, event_time: str | None) -> tuple[str, int]:
    if NUL in entity_id:
        raise ValueError(entity_id)
    if event_time is None:
        return entity_id, time.time_ns() // 1000
    if not _is_plain_time(event_time):
        raise ValueError(event_time)  # which Pydantic may read all the same
    at = datetime.fromisoformat(event_time)
    if not is_in_calendar(at):
        raise ValueError(event_time)
    return entity_id, microseconds(at)
