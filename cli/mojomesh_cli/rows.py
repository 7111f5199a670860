"""Rows of a file, and how one becomes an event."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID, uuid5

import orjson
import pyarrow.parquet as pq
from pyarrow import ArrowInvalid
from pydantic import ValidationError

from mojomesh_chassis.errors import PermanentError, faults_of
from mojomesh_contracts.definitions import Feature, FeatureSet
from mojomesh_contracts.events import EventReceived, FeatureValue
from mojomesh_contracts.validation import problem_of

_CONTENT = UUID("6f2b1f0c-6c1e-5d6b-9a55-0d2a1f6f7c11")  # namespace of the ids that come from content
_TRUTHS = {"true": True, "t": True, "yes": True, "1": True, "false": False, "f": False, "no": False, "0": False}

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which column of a file is what; None: there is none."""

    entity: str
    time: str
    event_id: str | None
    reported: str | None


@dataclass(frozen=True)
class Table:
    """A file's columns and its rows, each with its place in words."""

    columns: list[str]
    rows: Iterator[tuple[str, Row]]


def read_table(file: Path, missing: frozenset[str]) -> Table:
    """The rows of a CSV, JSONL (either may be gzipped) or Parquet file, read as they are asked for.

    Args:
        missing: Texts of a CSV that mean that there is no value.

    Raises:
        PermanentError: It is none of these.
    """
    kind = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    if kind == [".csv"]:
        return _read_csv(file, missing)
    if kind in ([".jsonl"], [".ndjson"]):
        return _read_jsonl(file)
    if kind == [".parquet"]:
        return _read_parquet(file)
    raise PermanentError(f"{file.name} is not a .csv, .jsonl or .parquet file (the first two may end in .gz)")


def settle_columns(table: Table, wanted: Columns, feature_set: FeatureSet, file_name: str) -> Columns:
    """`wanted` where the file has it.

    Raises:
        PermanentError: The file lacks the entity, the time, or every feature.
    """
    there = ", ".join(table.columns)
    for column, option in ((wanted.entity, "--entity-column"), (wanted.time, "--time-column")):
        if column not in table.columns:
            raise PermanentError(f"{file_name} has no column '{column}'; name the right one by {option}. It has: {there}")
    if not set(table.columns) & (feature_set.features.keys() | feature_set.vectors.keys()):
        raise PermanentError(f"{file_name} has no feature of '{feature_set.name}' ({', '.join(feature_set.features)}). It has: {there}")
    event_id, reported = (name if name in table.columns else None for name in (wanted.event_id, wanted.reported))
    return Columns(wanted.entity, wanted.time, event_id, reported)


def make_event(row: Row, columns: Columns, feature_set: FeatureSet) -> EventReceived:
    """The event that a row tells of. Without an id of its own it gets one from its content, the same each time.

    Raises:
        PermanentError: It cannot be one; the text says why.
    """
    fields = {
        "feature_set": feature_set.name,
        "entity_id": "" if (entity := row.get(columns.entity)) is None else str(entity),
        "event_time": _as_time(row.get(columns.time), columns.time),
        "values": {name: _as_feature(row[name], feature) for name, feature in feature_set.features.items() if row.get(name) is not None},
        "reported_at": _as_time(row[columns.reported], columns.reported) if columns.reported and row.get(columns.reported) else None,
    }
    if vectors := {name: _as_vector(row[name], name) for name in feature_set.vectors if row.get(name) is not None}:
        fields["vectors"] = vectors
    event_id = row.get(columns.event_id) if columns.event_id else None
    content = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z, default=str).decode()
    try:
        event = EventReceived.model_validate({**fields, "event_id": event_id or uuid5(_CONTENT, content)})
    except ValidationError as error:
        raise PermanentError(faults_of(error)) from None
    if problem := problem_of(event, feature_set, datetime.now(UTC)):
        raise PermanentError(problem)
    return event


def _as_time(value: object, column: str) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise PermanentError(f"'{column}' must be a time like 2013-01-31T17:05:00Z, is {value!r}") from None
    if not isinstance(value, datetime):
        raise PermanentError(f"'{column}' must be a time, is {value!r}")
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)


def _as_feature(value: object, feature: Feature) -> FeatureValue:
    """A cell as the feature's type, where that is what it says; any other as it is, for the feature set to refuse."""
    if feature.type == "number" and isinstance(value, str | Decimal):
        return _as_number(str(value))
    if feature.type == "boolean" and isinstance(value, str | int):
        return _TRUTHS.get(str(value).strip().lower(), value)
    if feature.type == "category" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value  # type: ignore[return-value]


def _as_number(text: str) -> float | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _read_csv(file: Path, missing: frozenset[str]) -> Table:
    def rows() -> Iterator[tuple[str, Row]]:
        with _open(file) as text:
            reader = csv.DictReader(text)
            for row in reader:
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if name and value not in missing}

    with _open(file) as text:
        return Table(list(csv.DictReader(text).fieldnames or []), rows())


def _read_jsonl(file: Path) -> Table:
    def rows() -> Iterator[tuple[str, Row]]:
        with _open(file) as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield f"line {number}", _parsed(line, number)

    columns: dict[str, None] = {}
    for number, (_, row) in enumerate(rows()):
        columns |= dict.fromkeys(row)
        if number == 1_000:  # a later row may have more, but not all of them are needed
            break
    return Table(list(columns), rows())


def _parsed(line: str, number: int) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise PermanentError(f"line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise PermanentError(f"line {number} is not a JSON object")
    return row


def _read_parquet(file: Path) -> Table:
    try:
        parquet = pq.ParquetFile(file)
    except ArrowInvalid as error:
        raise PermanentError(f"{file.name} is not Parquet: {error}") from None

    def rows() -> Iterator[tuple[str, Row]]:
        number = 0
        for batch in parquet.iter_batches(batch_size=5_000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row

    return Table(list(parquet.schema_arrow.names), rows())


def _as_vector(value: Any, name: str) -> list[Any]:
    """A vector: a list, or in a CSV its JSON."""
    try:
        found = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, list):
        raise PermanentError(f"'{name}' must be a list of numbers, as in [0.1, 0.2], is {str(value)[:40]!r}")
    return found
