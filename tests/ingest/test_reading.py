"""Events on Kafka as ingest reads and announces them: exactly as Pydantic would, only sooner."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mojomesh_contracts.events import Arrival, EventReceived, FeaturesWritten, FeatureValue
from mojomesh_ingest.handlers import announcement
from mojomesh_ingest.reading import event_of, read_event
from mojomesh_store.tables import FeatureRow

ID = "0b0e51a0-5a44-4b5c-8d5e-3c2f5d5a7a11"
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.lists(st.none())
ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=-5))])
TIMES = st.datetimes(timezones=ZONES).map(str) | st.integers() | st.text()
TIMES |= st.sampled_from(
    [
        "2013-05-01T12:00:00Z",
        "2013-05-01T12:00:00.1234567+02:00",
        "2013-05-01T12:00:00.9999999Z",
        "2013-05-01 12:00:00z",
        "2013-05-01",
        "1367409600",
        "20130501T120000Z",
    ]
)
NAMES = st.text() | st.sampled_from(["", "f", "f" * 63, "f" * 64, "é" * 512, "é" * 513, "\x00"])
NUMBERS = st.lists(st.floats() | st.integers() | st.booleans() | st.none(), max_size=3)
BODIES = st.fixed_dictionaries(
    {
        "event_id": st.uuids().map(str) | st.uuids().map(lambda made: made.hex) | st.integers(),
        "feature_set": NAMES,
        "entity_id": NAMES | st.integers(),
        "event_time": TIMES,
        "values": st.dictionaries(st.text(), ODD),
    },
    optional={"reported_at": st.none() | TIMES, "vectors": st.none() | st.dictionaries(st.text(), NUMBERS | ODD), "later": ODD},
)
FIRST = b'{"event_id": "%b", "feature_set": "f", "entity_id": "e", "event_time": "2013-05-01T12:00:00Z", "values": ' % ID.encode()


def told(read: Callable[[bytes], Arrival], value: bytes) -> str:
    """What is made of a record, or of its refusal; as text, since NaN is no equal of itself."""
    try:
        event = event_of(read(value))
    except ValidationError as error:
        return str(error)
    times = {"event_time": event.event_time.isoformat(), "reported_at": event.reported_at and event.reported_at.isoformat()}
    return repr(event.__dict__ | times)


@given(BODIES)
def test_an_event_is_read_as_pydantic_reads_it(body: dict[str, Any]) -> None:
    value = json.dumps(body).encode()

    assert told(read_event, value) == told(EventReceived.model_validate_json, value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"{}",
        FIRST + b"{}}",
        FIRST + b"null}",
        FIRST + b'{}, "entity_id": "f"}',
        FIRST + b'{"a": 1e400, "b": NaN}}',
        FIRST + b'{"a": -0, "b": 18446744073709551616, "c": 1E2, "d": 1e-400}}',
        FIRST + b'{"a": 1, "a": "2"}}',
        FIRST + b'{"a": "\\ud800"}}',
        FIRST + b'{}, "later": "\xff"}',
        FIRST + b'{}, "later": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        FIRST + b"{}} x",
        FIRST + b'{}, "vectors": {"v": [1, 2.5, 18446744073709551616, 1e400]}}',
        FIRST + b'{}, "vectors": {"v": [true]}}',
        FIRST + b'{}, "reported_at": "2013-05-01T12:00:00.9999999Z"}',
        FIRST + b'{}, "reported_at": "2013-05-01T12:00:00"}',
        FIRST + b'{}, "reported_at": "2013-05-01T12:00:00.5+23:59"}',
        FIRST + b'{}, "reported_at": "0001-01-01T00:00:00+05:00"}',
        FIRST + b'{}, "reported_at": "\\u0032013-05-01T12:00:00Z"}',
        FIRST + b'{}, "reported_at": 1367409600}',
        FIRST + b'{}, "reported_at": null}',
        FIRST + b'{}, "reported_at": ""}',
        b"\xef\xbb\xbf" + FIRST + b"{}}",
    ],
)
def test_what_is_out_of_the_ordinary_is_read_or_refused_as_pydantic_does(value: bytes) -> None:
    assert told(read_event, value) == told(EventReceived.model_validate_json, value)


@given(st.uuids(), st.text(min_size=1), st.datetimes(timezones=ZONES.filter(bool)), st.dictionaries(st.text(), st.integers() | st.text()))
def test_an_announcement_is_the_event_that_the_contract_declares(
    event_id: UUID, entity_id: str, at: datetime, values: dict[str, FeatureValue]
) -> None:
    row = FeatureRow("flights", entity_id, at, at, at, 7, event_id, {**values, "long": 10**30, "part": 0.1, "yes": True, "none": None})

    encoded = announcement(row)

    cause = EventReceived(event_id=event_id, feature_set="flights", entity_id=entity_id, event_time=at, values={})
    event = FeaturesWritten.model_validate_json(encoded.value)
    assert event.event_id == cause.derive_id(f"features.written flights {at.isoformat()}")
    assert (event.topic, event.partition_key) == (encoded.topic, encoded.partition_key)
    assert FeatureRow(**{name: getattr(event, name) for name in FeatureRow._fields if name != "event_id"}, event_id=event_id) == row
