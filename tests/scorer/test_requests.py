"""Requests on Kafka as the scorer reads them: exactly as Pydantic would, only sooner."""

import json
from datetime import UTC, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mojomesh_contracts.events import ScoreRequested, derived_id
from mojomesh_scorer.worker_handlers import Answerable, read_request

ID = "0b0e51a0-5a44-4b5c-8d5e-3c2f5d5a7a11"
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.lists(st.none())
ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=-5))])
TIMES = st.datetimes(timezones=ZONES).map(str) | st.integers() | st.text()
TIMES |= st.just("0001-01-01T00:00:00+05:00")
TIMES |= st.sampled_from(["2013-05-01T12:00:00Z", "2013-05-01T12:00:00.1234567+02:00", "2013-05-01", "1367409600", "20130501T120000Z"])
BODIES = st.fixed_dictionaries(
    {
        "event_id": st.uuids().map(str) | st.uuids().map(lambda made: made.hex) | st.uuids().map(lambda made: made.urn),
        "model": st.just("m"),
    },
    optional={
        "entity_id": st.none() | st.text() | st.integers(),
        "values": st.none() | st.dictionaries(st.text(), VALUES),
        "event_time": st.none() | TIMES,
        "later": VALUES,
    },
)


def as_pydantic_reads(value: bytes) -> Any:
    """What `read_request` must make of a record, or the text of its refusal."""
    try:
        event = Answerable.model_validate_json(value)
    except ValidationError as error:
        return str(error)
    return event.model, event.values, event.entity_id, event.event_time, str(event.derive_id("prediction")), event.event_id


def as_it_is_read(value: bytes) -> Any:
    try:
        request = read_request(value)
    except ValidationError as error:
        return str(error)
    return (request.model, *request.row)


@given(BODIES)
def test_a_request_is_read_as_pydantic_reads_it(body: dict[str, Any]) -> None:
    value = json.dumps(body).encode()

    assert repr(as_it_is_read(value)) == repr(as_pydantic_reads(value))  # as text, since NaN is no equal of itself


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"event_id": "%b"}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "model": "n"}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "values": {"a": 1e400, "b": NaN}}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "values": {"a": -0, "b": 18446744073709551616, "c": 1E2}}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "values": {"a": "\\ud800"}}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "later": "\xff"}' % ID.encode(),
        b'{"event_id": "%b", "model": "m", "later": ' % ID.encode() + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"event_id": "%b", "model": "m"} x' % ID.encode(),
        b'{"event_id": "{%b}", "model": "m"}' % ID.encode(),
        b'{"event_id": 7, "model": "m"}',
        b'\xef\xbb\xbf{"event_id": "%b", "model": "m"}' % ID.encode(),
    ],
)
def test_what_is_out_of_the_ordinary_is_read_or_refused_as_pydantic_does(value: bytes) -> None:
    assert repr(as_it_is_read(value)) == repr(as_pydantic_reads(value))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "a row needs values, or an entity_id"),
        ({"entity_id": ""}, "at least 1 character"),
        ({"entity_id": "x" * 513, "values": {}}, "at most 512 characters"),
        ({"entity_id": "a\0", "values": {}}, "contains a NUL character"),
        ({"values": {}, "event_time": "0001-01-01T00:00:00+05:00"}, "lies outside the years 1 to 9999 in UTC"),
        ({"values": {}, "event_time": "9999-12-31T23:59:59-05:00"}, "lies outside the years 1 to 9999 in UTC"),
    ],
)
def test_what_cannot_be_answered_is_refused(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        read_request(json.dumps({"event_id": ID, "model": "m", **asked}).encode())


@given(st.uuids(), st.text(st.characters(codec="utf-8")))
def test_a_derived_id_is_the_one_that_the_contract_gives(event_id: UUID, cause: str) -> None:
    request = ScoreRequested(event_id=event_id, model="m")

    assert derived_id(event_id, cause) == str(request.derive_id(cause))
    assert derived_id(event_id, cause) != derived_id(uuid4(), cause)
