import json
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

import mojomesh_flights
from mojomesh_contracts.definitions import FeatureSet, definition_id, parse_definitions, problems_among
from mojomesh_contracts.events import EventReceived
from mojomesh_flights.dataset import Year, read_year

DEFINITIONS = {
    definition_id(definition): definition
    for path in Path(mojomesh_flights.__file__).parents[1].glob("*.yaml")
    for definition in parse_definitions(path.read_text())
}


def of_set(year: Year, name: str) -> int:
    return int(pc.sum(pc.equal(year.facts["feature_set"], name)).as_py())


def test_the_definitions_fit_together() -> None:
    assert problems_among(DEFINITIONS) == []
    assert set(DEFINITIONS) == {
        *(f"FeatureSet/{name}" for name in ("flights", "weather", "planes", "arrivals")),
        "Model/flight-delay",
    }


def test_the_year_is_complete(year: Year) -> None:
    assert {name: of_set(year, name) for name in ("flights", "weather", "planes", "arrivals")} == {
        "flights": 336_776,
        "weather": 26_115,
        "planes": 3_322,
        "arrivals": 327_346,
    }


def test_facts_come_in_the_order_in_which_they_became_true(year: Year) -> None:
    assert bool(np.all(np.diff(year.facts["event_ms"].to_numpy()) >= 0))


def test_all_but_one_of_the_facts_are_what_the_definitions_ask_for(year: Year) -> None:
    wrong = []
    for fact in year.facts_from(0, year.facts.num_rows):
        feature_set = DEFINITIONS[f"FeatureSet/{fact.feature_set}"]
        assert isinstance(feature_set, FeatureSet)
        wrong += feature_set.problems(json.loads(fact.values))
    assert wrong == ["'wind_speed' is 1048.36058, more than the maximum 250"]


def test_a_fact_is_an_event_with_the_same_id_whenever_it_is_told(year: Year) -> None:
    facts = list(year.facts_from(300_000, 300_500))

    events = [EventReceived.model_validate_json(fact.json) for fact in facts]

    assert [event.event_id for event in events] == [fact.event_id for fact in year.facts_from(300_000, 300_500)]
    assert len({event.event_id for event in events}) == 500
    assert [(event.feature_set, event.entity_id) for event in events] == [(fact.feature_set, fact.entity_id) for fact in facts]


def test_arrivals_follow_departures_and_cancelled_flights_never_arrive(year: Year) -> None:
    scheduled, arrived = year.flights["event_ms"].to_numpy(), year.flights["label_ms"].cast("float64").to_numpy()
    landed = ~np.isnan(arrived)

    hours = (arrived - scheduled)[landed] / 3_600_000

    assert int((~landed).sum()) == 336_776 - 327_346
    assert hours.min() > 0.25
    assert np.median(hours) < 4
    assert year.flights["late"].null_count == int((~landed).sum())


def test_times_are_utc_whatever_the_clocks_at_the_destination(year: Year) -> None:
    rows = {row["entity_id"]: row for row in year.flights.slice(0, 1_000).to_pylist()}

    flight = rows["UA1545-EWR-20130101T1015Z"]  # left at 05:17 in New York, landed at 08:30 in Houston

    assert datetime.fromtimestamp(flight["event_ms"] / 1000, UTC) == datetime(2013, 1, 1, 10, 15, tzinfo=UTC)
    assert datetime.fromtimestamp(flight["label_ms"] / 1000, UTC) == datetime(2013, 1, 1, 14, 30, tzinfo=UTC)


def test_weather_older_than_three_hours_is_missing(year: Year) -> None:
    last = year.flights.filter(pc.greater(year.flights["event_ms"], round(datetime(2013, 12, 31, 12, tzinfo=UTC).timestamp() * 1000)))

    assert last["weather.temp"].null_count == len(last)  # the last report of the year is of 30 December


def test_a_part_of_the_year_is_the_beginning_of_the_whole(year: Year) -> None:
    until = datetime(2013, 2, 1, tzinfo=UTC)

    part = read_year(until)

    assert part.facts.equals(year.facts.slice(0, part.facts.num_rows))
    assert part.facts["event_ms"][-1].as_py() < until.timestamp() * 1000 <= year.facts["event_ms"][part.facts.num_rows].as_py()
    assert all(a <= b for a, b in pairwise(part.flights["event_ms"].to_pylist()))
