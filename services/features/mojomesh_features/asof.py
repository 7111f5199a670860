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
    """Rows of asked entities, in order."""

    places: Integers  # of each row among all that are read
    entities: Integers  # the number of its entity
    event_us: Integers
    created_us: Integers
    usable_us: Integers  # from when on it counts


class Choice(NamedTuple):
    """Which row counts: in a block, and of those that blocks offer the one with the greatest event time and created_at, or the least."""

    keys: str  # to read
    in_block: Callable[[Block, Integers, Integers, Integers], Integers]
    event_sign: int
    created_sign: int


class Found(NamedTuple):
    """For each pair the place of its row among all that are read, -1 for none, and the row's event time in microseconds since 1970."""

    places: Integers
    event_us: Integers


def _last(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=True) - 1
    return np.where(row >= first, row, -1)


def _last_reported(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    order = np.lexsort((block.usable_us, block.entities))
    row = _bisect(block.usable_us[order], first, end, at_us, after=True) - 1
    # Of an entity's rows that could be used by then the one that is last in order; rows of entities before it are less.
    return np.where(row >= first, np.maximum.accumulate(order)[row], -1)


def _next(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=False)
    its_us = block.event_us[np.minimum(row, len(block.event_us) - 1)]
    return np.where(row < end, _bisect(block.event_us, row, end, its_us, after=True) - 1, -1)


def _original(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=False)
    its_us = block.event_us[np.minimum(row, len(block.event_us) - 1)]
    return np.where((row < end) & (its_us == at_us), row, -1)


_KEYS = "entity_id, event_us, created_us"

LAST = Choice(_KEYS, _last, 1, 1)
"""The last row not after the time, in its last version."""
LAST_REPORTED = Choice(f"{_KEYS}, greatest(event_us, reported_us)", _last_reported, 1, 1)
"""The last row not after the time, in its last version, of those that had been reported by then."""
NEXT = Choice(_KEYS, _next, -1, 1)
"""The first row not before the time, in its last version."""
ORIGINAL = Choice(_KEYS, _original, 1, -1)
"""The row of that time, in its first version."""


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
            lowest = block.entities[0]
            counts = np.bincount(block.entities - lowest)
            ends = np.cumsum(counts)
            begin, end = np.searchsorted(self._entities, (lowest, lowest + len(counts)))
            pairs = begin + np.flatnonzero(counts[self._entities[begin:end] - lowest])
            numbers = self._entities[pairs] - lowest
            row = choice.in_block(block, (ends - counts)[numbers], ends[numbers], self._at_us[pairs])
            pairs, row = pairs[row >= 0], row[row >= 0]
            event, created = block.event_us[row], block.created_us[row]
            later = (event - event_us[pairs]) * choice.event_sign
            later_known = (created - created_us[pairs]) * choice.created_sign
            better = (places[pairs] < 0) | (later > 0) | ((later == 0) & (later_known > 0))
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
            entity_id, *times = batch.columns
            runs = pc.run_end_encode(entity_id)
            entities = np.repeat(self._numbers(runs.values), np.diff(np.asarray(runs.run_ends), prepend=0))
            event_us, created_us, *usable_us = map(np.asarray, times)
            block = Block(begin + np.arange(len(batch)), entities, event_us, created_us, *(usable_us or [event_us]))
            begin += len(batch)
            if entities.min(initial=0) < 0:
                block = _of(block, entities >= 0)
            if not _in_order(block):
                block = _of(block, np.lexsort((block.created_us, block.event_us, block.entities)))
            if len(block.places):
                yield block

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


def _of(block: Block, rows: np.ndarray) -> Block:
    return Block(*(column[rows] for column in block))


def _in_order(block: Block) -> bool:
    ordered = np.ones(max(len(block.places) - 1, 0), dtype=bool)
    for column in (block.created_us, block.event_us, block.entities):
        step = np.diff(column)
        ordered = (step > 0) | ((step == 0) & ordered)
    return bool(ordered.all())


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
