"""The one way from a request to its predictions, under HTTP, gRPC and Kafka alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from prometheus_client import Counter

from mojomesh_chassis.errors import Busy, PermanentError
from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.encoding import Encoded, Encoder, Matrix
from mojomesh_scorer.errors import TooManyRows, UnknownEntity
from mojomesh_scorer.identity import new_prediction_ids
from mojomesh_scorer.lookups import EntityAt, FeatureLookup, Found
from mojomesh_scorer.models import LoadedModel, Models
from mojomesh_scorer.tensors import Tensor

MAX_ROWS = 10_000
"""Most rows of one request."""

_PREDICTIONS = Counter("mojomesh_scorer_predictions_total", "Predictions made", ["model", "version"])
_MISSING = Counter("mojomesh_scorer_missing_values_total", "Inputs that came without a value", ["model", "column"])
_UNKNOWN = Counter("mojomesh_scorer_unknown_levels_total", "Inputs with a level that training never saw", ["model", "column"])
_REFUSED = Counter("mojomesh_scorer_refused_total", "Requests refused because too many were in flight")
_FAILED = Counter("mojomesh_scorer_failed_total", "Requests that failed, refusals and faults of the client left out")


@dataclass(frozen=True, slots=True)
class Row:
    """One row to score: by its values, or by an entity whose features are looked up as of `event_time` (by default now)."""

    values: Mapping[str, FeatureValue] | None = None
    entity_id: str | None = None
    event_time: datetime | None = None
    prediction_id: UUID | None = None
    request_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A block of predictions of exactly one model version."""

    model: LoadedModel
    inputs: Matrix
    scores: Matrix
    rows: Sequence[Row]
    found: Sequence[Found | None]
    prediction_ids: list[UUID]
    made_at: datetime


class Scoring:
    """The core of one worker."""

    def __init__(self, models: Models, lookup: FeatureLookup, max_in_flight: int) -> None:
        self.models = models
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
        try:
            yield
        except PermanentError:
            raise
        except Exception:
            self.failed_requests += 1
            _FAILED.inc()
            raise
        finally:
            self._in_flight -= 1

    async def score_rows(self, name: str, rows: Sequence[Row], version: int | None = None) -> Scored:
        """Score rows of values or entities.

        Raises:
            NotServed: The model, or this version of it, is not served.
            RowsRefused: Some rows do not fit the model, or name entities without features (UnknownEntity).
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

        def encode(encoder: Encoder) -> Encoded:
            encoder.check_rows([row.values or {} for row in rows])  # what features sends may be more than this version takes
            return encoder.encode_rows([vector.values if vector else row.values or {} for row, vector in zip(rows, found, strict=True)])

        return await self._score(name, version, rows, found, now, encode)

    async def score_tensors(self, name: str, tensors: Sequence[Tensor], n_rows: int, version: int | None = None) -> Scored:
        """Score one tensor a column.

        Raises:
            NotServed: The model, or this version of it, is not served.
            SchemaMismatch: The tensors do not fit the model.
        """
        nothing: list[Found | None] = [None] * n_rows
        now = datetime.now(UTC)
        return await self._score(name, version, [_NO_ROW] * n_rows, nothing, now, lambda encoder: encoder.encode_tensors(tensors, n_rows))

    async def _score(
        self,
        name: str,
        version: int | None,
        rows: Sequence[Row],
        found: Sequence[Found | None],
        now: datetime,
        encode: Callable[[Encoder], Encoded],
    ) -> Scored:
        if len(rows) > MAX_ROWS:
            raise TooManyRows(f"{len(rows)} rows; at most {MAX_ROWS} a request")
        model = self.models.find(name, version)
        with model.leased():
            encoded, scores = await model.score(len(rows), encode)
        _PREDICTIONS.labels(name, model.version).inc(len(rows))
        for counter, tally in ((_MISSING, encoded.missing()), (_UNKNOWN, encoded.unknown_levels)):
            for column, n in tally.items():
                counter.labels(name, column).inc(n)
        new_ids = new_prediction_ids(len(rows))
        ids = [row.prediction_id or new for row, new in zip(rows, new_ids, strict=True)]
        return Scored(model, encoded.matrix, scores, rows, found, ids, now)


_NO_ROW = Row()
