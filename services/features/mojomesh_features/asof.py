"""Which of a feature set's rows count as of a time: looked up in rows that lie in the order of entity, event time and created_at.

Sealed segments are sorted so, which spares what a join spends most on. A batch of rows after the other is read; in each an entity's rows
are one run and a time is found by bisection, for all who ask at once. A batch that is not in order is sorted first.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mojomesh_features.aggregating import Integers

_FAR_US = 2**62  # of no row, and no difference to one overflows


class Block(NamedTuple):
    """Rows in order. A run of them is of one entity."""

    runs: pa.RunEndEncodedArray
    event_us: Integers
    created_us: Integers
    usable_us: Integers  # from when on it counts

    @property
    def ends(self) -> Integers:
        """Of each run, the row after its last."""
        return np.asarray(self.runs.run_ends).astype(np.int64)


class Choice(NamedTuple):
    """Which row counts: in a block, and of those that blocks offer the one of the greatest or least event time, last version."""

    keys: str  # to read, in SQL
    in_block: Callable[[Block, Integers, Integers, Integers], Integers]
    event_sign: int  # 1: the greatest, -1: the least
    n_keys: int = 3


def _last(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=True) - 1
    return np.where(row >= first, row, -1)


def _last_reported(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    runs = np.repeat(np.arange(len(block.ends)), np.diff(block.ends, prepend=0))
    jumbled = np.zeros(len(block.ends), dtype=bool)  # of these runs an earlier row was reported after a later one
    jumbled[runs[1:][(np.diff(block.usable_us) < 0) & (np.diff(runs) == 0)]] = True
    rows = np.flatnonzero(jumbled[runs])
    order = np.arange(len(runs))
    order[rows] = rows[np.lexsort((block.usable_us[rows], runs[rows]))]
    row = _bisect(block.usable_us[order], first, end, at_us, after=True) - 1
    # Of an entity's rows that could be used by then the one that is last in order; rows of entities before it are less.
    return np.where(row >= first, np.maximum.accumulate(order)[row], -1)


def _next(block: Block, first: Integers, end: Integers, at_us: Integers) -> Integers:
    row = _bisect(block.event_us, first, end, at_us, after=False)
    its_us = block.event_us.take(row, mode="clip")
    return np.where(row < end, _bisect(block.event_us, row, end, its_us, after=True) - 1, -1)


_KEYS = "entity_id, event_us, created_us"

LAST = Choice(_KEYS, _last, 1)
"""The last row not after the time, in its last version."""
LAST_REPORTED = Choice(f"{_KEYS}, greatest(event_us, reported_us) AS usable_us", _last_reported, 1, 4)
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
        numbers[ascending], numbers[-1] = np.arange(len(ascending)), len(ascending)  # none comes last
        entities = numbers[np.asarray(pc.fill_null(encoded.indices, -1))]
        order = np.lexsort((entities.astype(np.uint16), (entities >> 16).astype(np.uint16)))  # numpy sorts 16 bits by radix
        self._order = order[: np.searchsorted(entities, len(ascending), sorter=order)]
        self._entities = entities[self._order]
        self._at_us = at_us[self._order]
        self._n = len(at_us)

    @property
    def extent(self) -> tuple[str, str]:
        """The first and the last of the entities, in the order of their texts; of none, texts that no entity is between."""
        return (self._entity_ids[0].as_py(), self._entity_ids[-1].as_py()) if len(self._entity_ids) else ("", "")

    def find(self, choice: Choice, readers: Iterable[pa.RecordBatchReader]) -> pa.Table:
        """The row that counts for each pair, of rows with `choice.keys` first: event_us and what follows the keys; nulls for none."""
        n = len(self._order)
        places = np.full(n, -1)  # in what was taken
        event_us, created_us = np.full(n, -choice.event_sign * _FAR_US), np.zeros(n, dtype=np.int64)
        taken: list[pa.Table] = []
        n_taken = 0
        for reader in readers:
            answer = [1, *range(choice.n_keys, len(reader.schema))]
            taken.append(reader.schema.empty_table().select(answer))
            for batch in reader:
                rows, block = _in_order(batch, choice.n_keys)
                pairs, row = self._offered(choice, block, event_us)
                later = (block.event_us[row] - event_us[pairs]) * choice.event_sign
                better = (later > 0) | ((later == 0) & (block.created_us[row] > created_us[pairs]))
                pairs, row = pairs[better], row[better]
                places[pairs] = n_taken + np.arange(len(pairs))
                event_us[pairs], created_us[pairs] = block.event_us[row], block.created_us[row]
                taken.append(pa.Table.from_batches([rows.select(answer).take(pa.array(row))]))
                n_taken += len(pairs)
                if n_taken > 2 * n:  # of most a better one was found
                    found = np.flatnonzero(places >= 0)
                    taken = [pa.concat_tables(taken).take(pa.array(places[found]))]
                    places[found], n_taken = np.arange(len(found)), len(found)
        answers = np.full(self._n, -1)
        answers[self._order] = places
        return pa.concat_tables(taken).take(pa.array(answers, mask=answers < 0))

    def _offered(self, choice: Choice, block: Block, found_us: Integers) -> tuple[Integers, Integers]:
        """Pairs for which the block may have a better row than was found, and for each the row of it that would count."""
        entities = self._numbers(block.runs.values)
        runs = np.flatnonzero(entities >= 0)
        if not len(runs):
            return runs, runs
        lowest, highest = entities[runs[0]], entities[runs[-1]]
        run_of = np.full(highest - lowest + 1, -1)
        run_of[entities[runs] - lowest] = runs
        begin, end = np.searchsorted(self._entities, (lowest, highest + 1))
        worst_us, best_us = (block.event_us.min(), block.event_us.max())[:: choice.event_sign]
        may_count = (self._at_us[begin:end] - worst_us) * choice.event_sign >= 0
        may_count &= (best_us - found_us[begin:end]) * choice.event_sign >= 0
        pairs = begin + np.flatnonzero(may_count)
        run = run_of[self._entities[pairs] - lowest]
        pairs, run = pairs[run >= 0], run[run >= 0]
        starts = np.concatenate([[0], block.ends[:-1]])
        row = choice.in_block(block, starts[run], block.ends[run], self._at_us[pairs])
        return pairs[row >= 0], row[row >= 0]

    def _numbers(self, entity_ids: pa.StringArray) -> Integers:
        """The numbers of entities in ascending order; -1 for those that are not asked for."""
        # A hash table of those between alone: all blocks together are to look at each entity about once.
        begin = bisect_left(self._entity_ids, entity_ids[0].as_py(), key=pa.StringScalar.as_py) if len(entity_ids) else 0
        end = bisect_right(self._entity_ids, entity_ids[-1].as_py(), key=pa.StringScalar.as_py) if len(entity_ids) else 0
        numbers = pc.index_in(entity_ids, value_set=self._entity_ids.slice(begin, end - begin))
        return np.asarray(pc.fill_null(pc.add(numbers.cast(pa.int64()), begin), -1))


def _in_order(rows: pa.RecordBatch, n_keys: int) -> tuple[pa.RecordBatch, Block]:
    block = _block(*rows.columns[:n_keys])
    if not _is_in_order(block):
        rows = rows.sort_by([(name, "ascending") for name in rows.schema.names[:3]])
        block = _block(*rows.columns[:n_keys])
    return rows, block


def _block(entity_id: pa.StringArray, event_us: pa.Array, created_us: pa.Array, usable_us: pa.Array | None = None) -> Block:
    return Block(pc.run_end_encode(entity_id), *map(np.asarray, (event_us, created_us, event_us if usable_us is None else usable_us)))


def _is_in_order(block: Block) -> bool:
    entity_ids, event_step = block.runs.values, np.diff(block.event_us)
    ascending = (event_step > 0) | ((event_step == 0) & (np.diff(block.created_us) > 0))
    ascending[block.ends[:-1] - 1] = True
    return bool(ascending.all()) and pc.all(pc.less(entity_ids[:-1], entity_ids[1:])).as_py()


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
