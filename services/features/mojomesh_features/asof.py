"""Which of a feature set's rows count as of a time: looked up in rows that lie in the order of entity, event time and created_at.

Sealed segments are sorted so, which spares what a join spends most on. A block of rows after the other is read; in each an entity's rows
are found by counting and a time by bisection, for all who ask at once. A block that is not in order is sorted first.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mojomesh_features.aggregating import Integers


class Block(NamedTuple):
    """Rows in order. A run of them is of one entity."""

    entities: Integers  # of each run the number of its entity, -1 if nobody asks for it
    ends: Integers  # of each run, the row after its last
    places: Integers  # of each row among all that are read
    event_us: Integers
    created_us: Integers
    usable_us: Integers  # from when on it counts


class Choice(NamedTuple):
    """Which row counts: in a block, and of those that blocks offer the one of the greatest or least event time, last version."""

    keys: str  # to read
    in_block: Callable[[Block, Integers, Integers, Integers], Integers]
    event_sign: int  # 1: the greatest, -1: the least


class Found(NamedTuple):
    """For each pair the place of its row among all that are read, -1 for none, and the row's event time in microseconds since 1970."""

    places: Integers
    event_us: Integers


def _last(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=True) - 1
    return np.where(row >= first, row, -1)


def _last_reported(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    runs = np.repeat(np.arange(len(block.ends)), np.diff(block.ends, prepend=0))
    order = np.lexsort((block.usable_us, runs))
    row = _bisect(block.usable_us[order], first, end, at_us, after=True) - 1
    # Of an entity's rows that could be used by then the one that is last in order; rows of entities before it are less.
    return np.where(row >= first, np.maximum.accumulate(order)[row], -1)


def _next(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=False)
    its_us = block.event_us[np.minimum(row, len(block.event_us) - 1)]
    return np.where(row < end, _bisect(block.event_us, row, end, its_us, after=True) - 1, -1)


_KEYS = "entity_id, event_us, created_us"

LAST = Choice(_KEYS, _last, 1)
"""The last row not after the time, in its last version."""
LAST_REPORTED = Choice(f"{_KEYS}, greatest(event_us, reported_us)", _last_reported, 1)
"""The last row not after the time, in its last version, of those that had been reported by then."""
NEXT = Choice(_KEYS, _next, -1)
"""The first row not before the time, in its last version."""


class AsOf:
    """Pairs of an entity and a time (microseconds since 1970), for which rows are looked up; without an entity there is none."""

    def __init__(self, entity_ids: pa.StringArray, at_us: Integers) -> None:
        encoded = entity_ids.dictionary_encode()
        ascending = np.asarray(pc.array_sort_indices(encoded.dictionary))
        self._entity_ids = encoded.dictionary.take(ascending)
        numbers = np.empty(len(ascending) + 1, dtype=np.int64)
        numbers[ascending], numbers[-1] = np.arange(len(ascending)), -1
        entities = numbers[np.asarray(pc.fill_null(encoded.indices, -1))]
        order = np.argsort(entities)
        self._order = order[np.searchsorted(entities, 0, sorter=order) :]
        self._entities = entities[self._order]
        self._at_us = at_us[self._order]
        self._n = len(at_us)

    @property
    def extent(self) -> tuple[str, str]:
        """The first and the last of the entities, in the order of their texts; of none, texts that no entity is between."""
        return (self._entity_ids[0].as_py(), self._entity_ids[-1].as_py()) if len(self._entity_ids) else ("", "")

    def find(self, choice: Choice, readers: Iterable[pa.RecordBatchReader]) -> Found:
        """The row that counts for each pair, of rows with `choice.keys`."""
        places = np.full(len(self._order), -1)
        event_us, created_us = np.zeros_like(places), np.zeros_like(places)
        for block in self._blocks(readers):
            runs = np.flatnonzero(block.entities >= 0)
            if not len(runs):
                continue
            asked = block.entities[runs]
            run_of = np.full(asked[-1] - asked[0] + 1, -1)
            run_of[asked - asked[0]] = runs
            begin, end = np.searchsorted(self._entities, (asked[0], asked[-1] + 1))
            run = run_of[self._entities[begin:end] - asked[0]]
            pairs, run = begin + np.flatnonzero(run >= 0), run[run >= 0]
            starts = np.concatenate([[0], block.ends[:-1]])
            row = choice.in_block(block, starts[run], block.ends[run], self._at_us[pairs])
            pairs, row = pairs[row >= 0], row[row >= 0]
            event, created = block.event_us[row], block.created_us[row]
            later = (event - event_us[pairs]) * choice.event_sign
            better = (places[pairs] < 0) | (later > 0) | ((later == 0) & (created > created_us[pairs]))
            pairs, row = pairs[better], row[better]
            places[pairs], event_us[pairs], created_us[pairs] = block.places[row], event[better], created[better]
        return Found(self._as_asked(places, -1), self._as_asked(event_us, 0))

    def _as_asked(self, found: Integers, missing: int) -> Integers:
        answers = np.full(self._n, missing)
        answers[self._order] = found
        return answers

    def _blocks(self, readers: Iterable[pa.RecordBatchReader]) -> Iterator[Block]:
        begin = 0
        for batch in chain.from_iterable(readers):
            rows = batch.append_column("place", pa.array(begin + np.arange(len(batch))))
            begin += len(batch)
            runs = pc.run_end_encode(rows[0])
            if not _in_order(rows, runs):
                rows = rows.sort_by([(name, "ascending") for name in rows.schema.names[:3]])
                runs = pc.run_end_encode(rows[0])
            event_us, created_us, *usable_us, places = map(np.asarray, rows.columns[1:])
            yield Block(self._numbers(runs.values), _ends(runs), places, event_us, created_us, *(usable_us or [event_us]))

    def _numbers(self, entity_ids: pa.StringArray) -> Integers:
        """The numbers of entities; -1 for those that are not asked for."""
        if not len(entity_ids):
            return np.empty(0, dtype=np.int64)
        extent = pc.min_max(entity_ids).as_py()
        # A hash table of those between alone: all batches together are to look at each entity about once.
        begin = bisect_left(self._entity_ids, extent["min"], key=pa.StringScalar.as_py)
        end = bisect_right(self._entity_ids, extent["max"], key=pa.StringScalar.as_py)
        numbers = pc.index_in(entity_ids, value_set=self._entity_ids.slice(begin, end - begin))
        return np.asarray(pc.fill_null(pc.add(numbers.cast(pa.int64()), begin), -1))


def values_at(places: Integers, readers: Iterable[pa.RecordBatchReader]) -> pa.Table:
    """The rows at `places`, in their order, of rows that are read as they were for `AsOf.find`; nulls for -1."""
    order = np.argsort(places)
    n_missing = np.count_nonzero(places < 0)
    wanted = places[order[n_missing:]]
    begin = 0
    found: list[pa.Table] = []
    for reader in readers:
        found.append(reader.schema.empty_table())
        for batch in reader:
            first, last = np.searchsorted(wanted, (begin, begin + len(batch)))
            found.append(pa.Table.from_batches([batch.take(pa.array(wanted[first:last] - begin))]))
            begin += len(batch)
    rows = pa.concat_tables(found).combine_chunks()
    numbers = np.empty(len(places), dtype=np.int64)
    numbers[order] = np.arange(len(places)) - n_missing
    return rows.take(pa.array(numbers, mask=places < 0))


def _ends(runs: pa.RunEndEncodedArray) -> Integers:
    return np.asarray(runs.run_ends).astype(np.int64)


def _in_order(rows: pa.RecordBatch, runs: pa.RunEndEncodedArray) -> bool:
    event_step, created_step = (np.diff(np.asarray(column)) for column in rows.columns[1:3])
    ordered = (event_step > 0) | ((event_step == 0) & (created_step > 0))
    ordered[_ends(runs)[:-1] - 1] = True
    return bool(ordered.all()) and pc.all(pc.less(runs.values[:-1], runs.values[1:])).as_py()


def _bisect(ascending: Integers, first: Integers, end: Integers, at: Integers, *, after: bool) -> Integers:
    """Where between `first` and `end` each of `at` has its place among ascending numbers, before or after its equals."""
    low = first.copy()
    most = int((end - first).max(initial=0))
    for step in (1 << bit for bit in reversed(range(most.bit_length()))):
        beyond = low + step
        there = ascending.take(beyond - 1, mode="clip")
        passed = (beyond <= end) & (there <= at if after else there < at)
        low = np.where(passed, beyond, low)
    return low
