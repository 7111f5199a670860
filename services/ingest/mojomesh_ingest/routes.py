"""Ingest over HTTP: the door for clients that do not speak Kafka."""

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import PermanentError, TooLarge, faults_of
from mojomesh_chassis.http import Protected, read_body
from mojomesh_chassis.outbox import Relay
from mojomesh_chassis.publishing import Publisher
from mojomesh_contracts.events import EventReceived
from mojomesh_contracts.storable import Text
from mojomesh_contracts.validation import problem_of
from mojomesh_ingest import quarantine
from mojomesh_ingest.errors import EventsRefused, Refusal

MAX_EVENTS = 5_000
MAX_BODY_BYTES = 16 * 2**20

router = APIRouter(prefix="/v1")


class Accepted(BaseModel):
    """Kafka has acknowledged the events; they will be stored, each once, however often they are sent."""

    accepted: int


_EVENT = EventReceived.model_json_schema()
_MANY = {"type": "object", "required": ["events"], "properties": {"events": {"type": "array", "items": _EVENT, "maxItems": MAX_EVENTS}}}
# Events are parsed one by one, so that each gets its own reason; FastAPI cannot know.
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": [_EVENT, _MANY]}}}}}


@router.post("/events", status_code=202, openapi_extra=_BODY)
async def receive_events(request: Request) -> Accepted:
    """Take in one event, or `{"events": [...]}`: all of them, or none and 422 with the reason for each that is wrong."""
    definitions: Definitions = request.state.definitions
    publisher: Publisher = request.state.publisher
    sent = _sent(await read_body(request, MAX_BODY_BYTES))
    events, refusals = _parsed(sent)
    if any(event.feature_set not in definitions.feature_sets for event in events.values()):
        await definitions.caught_up()
    now = datetime.now(UTC)
    for index, event in events.items():
        if problem := problem_of(event, definitions.feature_sets.get(event.feature_set), now):
            refusals.append(Refusal(index=index, event_id=str(event.event_id), reason=problem))
    if refusals:
        raise EventsRefused(sorted(refusals, key=lambda refusal: refusal.index), len(sent))
    await publisher.publish(list(events.values()))
    return Accepted(accepted=len(sent))


class Release(BaseModel):
    """Which events to let go: those with these ids, or all; of one feature set, or of every one."""

    model_config = ConfigDict(extra="forbid")

    event_ids: list[UUID] | None = Field(default=None, min_length=1, max_length=MAX_EVENTS)
    feature_set: Text | None = None


@router.get("/quarantine")
async def held_events(
    request: Request, feature_set: Text | None = None, limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100
) -> dict[str, list[dict[str, Any]]]:
    """What is held back because it is not as its definition expects, oldest first."""
    database: Database = request.state.database
    async with database.begin() as db:
        held = await quarantine.held(db, feature_set, limit)
    return {"events": [{**event.model_dump(mode="json"), "problems": problems, "held_at": held_at} for event, problems, held_at in held]}


@router.post("/quarantine:release", dependencies=[Protected])
async def release_events(request: Request, asked: Release) -> dict[str, list[UUID]]:
    """Let held events go: they are sent again and stored, whatever their values. What was let go before is left out, so repeat at will."""
    database: Database = request.state.database
    relay: Relay = request.state.relay
    async with database.begin() as db:
        released = await quarantine.release(db, asked.feature_set, asked.event_ids, MAX_EVENTS)
    relay.wake()
    return {"released": [event.event_id for event in released]}


def _sent(body: bytes) -> list[Any]:
    """The events of a request as they came."""
    try:
        document = from_json(body)
    except ValueError as error:
        raise PermanentError(f"the body is not JSON: {error}") from None
    sent = document["events"] if isinstance(document, dict) and "events" in document else [document]
    if not isinstance(sent, list) or not sent:
        raise PermanentError("'events' must be a list of at least one event")
    if len(sent) > MAX_EVENTS:
        raise TooLarge(f"a request may bring {MAX_EVENTS} events, this one has {len(sent)}; send them in several")
    return sent


def _parsed(sent: list[Any]) -> tuple[dict[int, EventReceived], list[Refusal]]:
    """The events by index, and why the others are none."""
    events, refusals = {}, []
    for index, item in enumerate(sent):
        try:
            events[index] = EventReceived.model_validate(item)
        except ValidationError as error:
            event_id = item.get("event_id") if isinstance(item, dict) else None
            refusals.append(Refusal(index=index, event_id=None if event_id is None else str(event_id), reason=faults_of(error)))
    return events, refusals
