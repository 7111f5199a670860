"""The one way from a request to its predictions, under HTTP, gRPC and Kafka alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from prometheus_client import Counter

from mojomesh_chassis.errors import Busy, PermanentError, TooLarge
from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.encoding import Encoded, Encoder
from mojomesh_scorer.errors import RowsRefused, StaleFeatures, UnknownEntity
from mojomesh_scorer.identity import PredictionIds
from mojomesh_scorer.lookups import EntityAt, FeatureLookup, Found
from mojomesh_scorer.models import LoadedModel, Models
from mojomesh_scorer.shadows import Shadowing
from mojomesh_scorer.tallies import Tallies
from mojomesh_scorer.tensors import Tensor

MAX_ROWS = 10_000
"""Most rows of one request."""

_REFUSED = Counter("mojomesh_scorer_refused_total", "Requests refused because too many were in flight")
_FAILED = Counter("mojomesh_scorer_failed_total", "Requests that failed, refusals and faults of the client left out")


class Row(NamedTuple):
    """One row to score: by its values, or by an entity whose features are looked up as of `event_time` (by default now)."""

    values: Mapping[str, FeatureValue] | None = None
    entity_id: str | None = None
    event_time: datetime | None = None
    prediction_id: str | None = None
    request_id: UUID | None = None


NO_ROW = Row()
"""Of which nothing is known but its values."""
NAMES_NO_ROW = "a row needs values, or an entity_id to look its features up"


@dataclass(slots=True)  # not frozen: that takes longer to make than a prediction
class Scored:
    """A block of predictions of exactly one model version."""

    model: LoadedModel
    inputs: list[list[float]]  # encoded rows in the order of the schema's columns; NaN is missing
    scores: list[list[float]]  # class probabilities in the order of the schema's classes, or one number
    rows: Sequence[Row] | None  # None when all came as tensors: nothing is known but their values
    found: Sequence[Found | None] | None  # what was looked up, by row
    prediction_ids: list[str]
    made_at: datetime
    places: Sequence[int] = (0,)  # of its rows in the request


def score_of(scores: Sequence[float]) -> float:
    """The one number that people ask for: the second class's probability of two, the likeliest class's of more, or the predicted number."""
    return scores[-1] if len(scores) <= 2 else max(scores)


class Scoring:
    """The core of one worker."""

    def __init__(self, models: Models, lookup: FeatureLookup, shadowing: Shadowing, max_in_flight: int) -> None:
        self.models = models
        self._shadowing = shadowing
        self.tallies = Tallies()
        self._ids = PredictionIds()
        self.failed_requests = 0
        self._lookup = lookup
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one of the places for requests in flight, to the end of the answer.

        Raises:
            Busy: All are taken; refused at once, rather than answered too late.
        """
        if self._in_flight >= self._max_in_flight:
            _REFUSED.inc()
            raise Busy(f"{self._in_flight} requests are in flight in this worker; try again in a second")
        self._in_flight += 1
        began = time.perf_counter()
        try:
            yield
            self.tallies.note_request(time.perf_counter() - began)
        except PermanentError:
            raise
        except Exception:
            self.failed_requests += 1
            _FAILED.inc()
            raise
        finally:
            self._in_flight -= 1

    async def score_rows(self, name: str, rows: Sequence[Row], version: int | None = None) -> list[Scored]:
        """Score rows of values or entities: each by the version that serves its entity, so there may be a block for each version.

        Raises:
            NotServed: The model, or this version of it, is not served.
            RowsRefused: Some rows do not fit the model, or name entities without features (UnknownEntity) or with too old ones
                (StaleFeatures).
            FeaturesFailed: Features fails over the question.
            TransientError: Features does not answer.
        """
        self.models.find(name, version)
        now = datetime.now(UTC)
        asked = [row for row in rows if row.values is None]
        vectors = await self._lookup.vectors(name, [EntityAt(row.entity_id or "", row.event_time or now) for row in asked]) if asked else []
        arriving = iter(vectors)
        found = [next(arriving) if row.values is None else None for row in rows]
        if unknown := {place: f"{rows[place].entity_id}: {vector.error}" for place, vector in enumerate(found) if vector and vector.error}:
            raise UnknownEntity(unknown, len(rows))
        if stale := {place: vector.refused for place, vector in enumerate(found) if vector and vector.refused}:
            raise StaleFeatures(stale, len(rows))

        with ExitStack() as leases:
            places = self.models.split(name, [row.entity_id for row in rows], version)
            for model in places:
                leases.enter_context(model.leased())
            return [await self._score_places(model, places[model], rows, found, now) for model in places]

    async def _score_places(
        self, model: LoadedModel, places: Sequence[int], all_rows: Sequence[Row], all_found: Sequence[Found | None], now: datetime
    ) -> Scored:
        rows, found = [all_rows[place] for place in places], [all_found[place] for place in places]

        def encode(encoder: Encoder) -> Encoded:
            encoder.check_rows([row.values or {} for row in rows])  # what features sends may be more than this version takes
            return encoder.encode_rows([vector.values if vector else row.values or {} for row, vector in zip(rows, found, strict=True)])

        try:
            return await self._score(model, places, encode, now, rows, found)
        except RowsRefused as refused:
            raise RowsRefused({places[row]: reason for row, reason in refused.reasons.items()}, len(all_rows)) from None

    async def score_tensors(
        self, name: str, tensors: Sequence[Tensor], n_rows: int, version: int | None = None, entity_id: str | None = None
    ) -> Scored:
        """Score one tensor a column; all rows are the entity's, if one is named.

        Raises:
            NotServed: The model, or this version of it, is not served.
            SchemaMismatch: The tensors do not fit the model.
        """
        rows = [Row(entity_id=entity_id)] * n_rows if entity_id is not None else None
        model = self.models.find(name, version, entity_id)
        with model.leased():
            return await self._score(model, range(n_rows), lambda encoder: encoder.encode_tensors(tensors, n_rows), datetime.now(UTC), rows)

    def score_row(self, model: LoadedModel, row: list[float], unknown: Mapping[str, int]) -> Scored:
        """Score one row that is encoded already, now."""
        scores = model.score_row(row)
        self.tallies.note_row(model, row, unknown)
        if shadows := self.models.shadows.get(model):
            self._shadowing.add(model, shadows, [row], [scores])
        return Scored(model, [row], [scores], None, None, self._ids.take(1), datetime.now(UTC))

    async def _score(
        self,
        model: LoadedModel,
        places: Sequence[int],
        encode: Callable[[Encoder], Encoded],
        now: datetime,
        rows: Sequence[Row] | None = None,
        found: Sequence[Found | None] | None = None,
    ) -> Scored:
        if (n_rows := len(places)) > MAX_ROWS:
            raise TooLarge(f"{n_rows} rows; at most {MAX_ROWS} a request")
        encoded, scores = await model.score(n_rows, encode)
        self.tallies.note_block(model, encoded.matrix, encoded.unknown_levels)
        ids = self._ids.take(n_rows)
        if rows is not None:
            ids = [row.prediction_id or new for row, new in zip(rows, ids, strict=True)]
        scored = Scored(model, encoded.matrix.tolist(), scores.tolist(), rows, found, ids, now, places)
        if shadows := self.models.shadows.get(model):
            self._shadowing.add(model, shadows, scored.inputs, scored.scores)
        return scored
