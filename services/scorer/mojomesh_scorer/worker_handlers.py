"""What each worker does with its share of the requests on Kafka."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, NamedTuple
from uuid import UUID

import msgspec
from pydantic import TypeAdapter, model_validator

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.definitions import subscribe_definitions
from mojomesh_chassis.errors import NotFound, Rejected
from mojomesh_chassis.publishing import EncodedEvent
from mojomesh_contracts.events import ScoreRequested, derived_id
from mojomesh_contracts.storable import NUL, EntityId, Time
from mojomesh_scorer.errors import RowsRefused
from mojomesh_scorer.receipts import blocks_of
from mojomesh_scorer.scoring import NAMES_NO_ROW, Row, Scored, Scoring


class Request(NamedTuple):
    """A row to score, and by which model."""

    model: str
    row: Row


class Answerable(ScoreRequested):
    """What of `ScoreRequested` can be scored and have a receipt; the contract promises clients more."""

    entity_id: EntityId | None = None
    event_time: Time | None = None

    @model_validator(mode="after")
    def _names_a_row(self) -> "Answerable":
        if self.values is None and self.entity_id is None:
            raise ValueError(NAMES_NO_ROW)
        return self


class _Body(msgspec.Struct, gc=False):
    """`Answerable` as most clients send it."""

    event_id: UUID
    model: str
    entity_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | None = None
    values: dict[str, bool | int | float | str | None] | None = None
    event_time: str | None = None

    def __post_init__(self) -> None:
        if (self.values is None and self.entity_id is None) or NUL in (self.entity_id or ""):
            raise ValueError("Pydantic says what is wrong")


_decode_body = msgspec.json.Decoder(_Body).decode
_read_time = TypeAdapter(Time).validate_python


def read_request(value: bytes) -> Request:
    """A `ScoreRequested` in JSON as what is scored, at half of what Pydantic costs, which decides on all that is out of the ordinary.

    Raises:
        ValidationError: It is none, or cannot be answered.
    """
    try:
        body = _decode_body(value.decode())
        event_time = None if body.event_time is None else _read_time(body.event_time)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        event = Answerable.model_validate_json(value)
        return _request(event, event.event_time)
    return _request(body, event_time)


def _request(asked: _Body | Answerable, event_time: datetime | None) -> Request:
    prediction_id = derived_id(asked.event_id, "prediction")
    return Request(asked.model, Row(asked.values, asked.entity_id, event_time, prediction_id, asked.event_id))


router = MeshRouter("scorer")
subscribe_definitions(router)


@router.work(ScoreRequested, batch=500, read=read_request, members=2)
async def on_scores_requested(requests: Sequence[Request], scoring: Scoring, replica: str) -> list[EncodedEvent]:
    """Predict; the id of a prediction follows from its request's, so that a repeat is known.

    Raises:
        Rejected: Some rows cannot be scored, or their models are not served.
        PermanentError: Features refuses a row and does not say which: it is found by halving the batch.
        FeaturesFailed: The same of one that it fails over, after a few tries.
    """
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(request.model, []).append(place)
    scored: list[Scored] = []
    reasons: dict[int, str] = {}
    for model, of_model in places.items():
        try:
            scored += await scoring.score_rows(model, [requests[place].row for place in of_model])
        except RowsRefused as refused:
            reasons |= {of_model[row]: reason for row, reason in refused.reasons.items()}
        except NotFound as error:
            reasons |= dict.fromkeys(of_model, str(error))
    if reasons:
        raise Rejected(reasons)
    return list(blocks_of(scored, replica))
