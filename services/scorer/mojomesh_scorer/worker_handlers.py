"""What each worker does with its share of the requests on Kafka."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import msgspec
from pydantic import AwareDatetime, TypeAdapter

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.definitions import subscribe_definitions
from mojomesh_chassis.errors import PermanentError, Rejected
from mojomesh_chassis.publishing import EncodedEvent
from mojomesh_contracts.events import ScoreRequested, derived_id
from mojomesh_scorer.errors import RowsRefused
from mojomesh_scorer.receipts import blocks_of
from mojomesh_scorer.scoring import Row, Scored, Scoring


class Request(NamedTuple):
    """A row to score, and by which model."""

    model: str
    row: Row


class _Body(msgspec.Struct, gc=False):
    """`ScoreRequested` as most clients send it."""

    event_id: UUID
    model: str
    entity_id: str | None = None
    values: dict[str, bool | int | float | str | None] | None = None
    event_time: str | None = None


_decode_body = msgspec.json.Decoder(_Body).decode
_read_time = TypeAdapter(AwareDatetime).validate_python


def read_request(value: bytes) -> Request:
    """A `ScoreRequested` in JSON as what is scored, at half of what Pydantic costs, which decides on all that is out of the ordinary.

    Raises:
        ValidationError: It is none.
    """
    try:
        body = _decode_body(value.decode())
        event_time = None if body.event_time is None else _read_time(body.event_time)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        event = ScoreRequested.model_validate_json(value)
        return _request(event, event.event_time)
    return _request(body, event_time)


def _request(asked: _Body | ScoreRequested, event_time: datetime | None) -> Request:
    prediction_id = derived_id(asked.event_id, "prediction")
    return Request(asked.model, Row(asked.values, asked.entity_id, event_time, prediction_id, asked.event_id))


router = MeshRouter("scorer")
subscribe_definitions(router)


@router.work(ScoreRequested, batch=500, read=read_request, members=2)
async def on_scores_requested(requests: Sequence[Request], scoring: Scoring, replica: str) -> list[EncodedEvent]:
    """Predict; the id of a prediction follows from its request's, so that a repeat is known."""
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
        except PermanentError as error:
            reasons |= dict.fromkeys(of_model, str(error))
    if reasons:
        raise Rejected(reasons)
    return list(blocks_of(scored, replica))
