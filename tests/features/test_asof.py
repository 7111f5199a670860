"""Which rows count as of a time: what `asof` finds in batches of any cut and order is what the words say, a row at a time."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mojomesh_features import asof
from mojomesh_features.asof import LAST, LAST_REPORTED, NEXT, AsOf, Choice


class Row(NamedTuple):
    entity_id: str
    event_us: int
    created_us: int
    usable_us: int


ENTITIES = ["A", "B", "ab", "Ä\n", "日"]  # in the order of their UTF-8
SCHEMA = pa.schema([("entity_id", pa.string()), *((name, pa.int64()) for name in (*Row._fields[1:], "row"))])

entities = st.sampled_from(ENTITIES)
rows = st.lists(
    st.tuples(entities, st.integers(-3, 3), st.integers(0, 9), st.integers(0, 4)).map(lambda row: Row(*row[:3], row[1] + row[3])),
    unique_by=lambda row: row[:3],
    max_size=40,
)
cuts = st.lists(st.integers(0, 40), max_size=4)
pairs = st.lists(st.tuples(st.none() | entities | st.just("not there"), st.integers(-4, 8)), max_size=20)


def last(rows: list[Row], at: int) -> Row | None:
    return max((row for row in rows if row.event_us <= at), key=lambda row: row[1:3], default=None)


def last_reported(rows: list[Row], at: int) -> Row | None:
    return last([row for row in rows if row.usable_us <= at], at)


def following(rows: list[Row], at: int) -> Row | None:
    first = min((row.event_us for row in rows if row.event_us >= at), default=None)
    return max((row for row in rows if row.event_us == first), default=None)


MEANINGS = [(LAST, last), (LAST_REPORTED, last_reported), (NEXT, following)]


def readers(rows: list[Row], cuts: list[int], n_keys: int) -> list[pa.RecordBatchReader]:
    """The rows in their order, in batches; every second batch begins a reader of its own."""
    schema = pa.schema([*list(SCHEMA)[:n_keys], SCHEMA.field("row")])
    numbered = [row._asdict() | {"row": n} for n, row in enumerate(rows, start=1)]
    batches = [pa.RecordBatch.from_pylist(numbered[a:b], schema) for a, b in pairwise(sorted({0, *cuts, len(rows)}))]
    return [pa.RecordBatchReader.from_batches(schema, batches[n : n + 2]) for n in range(0, max(len(batches), 1), 2)]


def found(choice: Choice, asked: list[tuple[str | None, int]], rows: list[Row], cuts: list[int]) -> list[Row | None]:
    entity_ids, times = pa.array([pair[0] for pair in asked], pa.string()), np.array([pair[1] for pair in asked], dtype=np.int64)
    answers = AsOf(entity_ids, times).find(choice, readers(rows, cuts, choice.n_keys)).to_pylist()
    assert [answer["event_us"] for answer in answers] == [answer["row"] and rows[answer["row"] - 1].event_us for answer in answers]
    return [None if answer["row"] is None else rows[answer["row"] - 1] for answer in answers]


@pytest.mark.parametrize(("choice", "meaning"), MEANINGS)
@given(rows=rows, cuts=cuts, asked=pairs, in_order=st.booleans())
def test_the_row_that_counts_is_found(
    choice: Choice, meaning: Callable[..., Any], rows: list[Row], cuts: list[int], asked: list[tuple[str | None, int]], in_order: bool
) -> None:
    if in_order:
        rows = sorted(rows)

    assert found(choice, asked, rows, cuts) == [meaning([row for row in rows if row.entity_id == name], at) for name, at in asked]


def test_a_batch_in_no_order_is_sorted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its control: taken for one in order, it hides a row."""
    jumbled = [Row("B", 2, 1, 2), Row("A", 2, 2, 2), Row("A", 1, 1, 1)]
    asked: list[tuple[str | None, int]] = [("A", 1), ("A", 2)]
    assert found(LAST, asked, jumbled, []) == [jumbled[2], jumbled[1]]

    monkeypatch.setattr(asof, "_is_in_order", lambda *_: True)
    assert found(LAST, asked, jumbled, []) != [jumbled[2], jumbled[1]]


def test_nothing_is_found_in_nothing() -> None:
    assert found(NEXT, [], [], []) == []
    assert found(LAST, [(None, 0), ("A", 0)], [], []) == [None, None]
