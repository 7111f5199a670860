"""Whether events are as their feature set expects: what is held back goes to quarantine, what is only odd is stored and counted."""

from collections.abc import Mapping, Sequence

from prometheus_client import Counter

from mojomesh_contracts.definitions import FeatureSet, Quality
from mojomesh_contracts.events import Arrival
from mojomesh_ingest import quarantine
from mojomesh_store import embeddings, rows, tallies
from mojomesh_store.rows import RowId, row_id
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.tables import FeatureRow
from mojomesh_store.tallies import Tally

_HELD = Counter("mojomesh_events_held_total", "Events that went to quarantine", ["feature_set"])

Problems = dict[RowId, dict[str, str]]


def problems_of(events: Sequence[Arrival], feature_sets: Mapping[str, FeatureSet]) -> Problems:
    """What is not as expected of events, by feature; of those where something is."""
    found = ((row_id(event), quality.problems(event.values)) for event in events if (quality := feature_sets[event.feature_set].quality))
    return {key: problems for key, problems in found if problems}


async def hold_back(
    events: Sequence[Arrival], problems: Problems, feature_sets: Mapping[str, FeatureSet], feature_store: FeatureStore
) -> set[RowId]:
    """Put into quarantine what is to be held back, unless it was let go or is stored already; those that are not to be stored now."""
    if not problems:
        return set()
    bad: dict[RowId, tuple[Arrival, dict[str, str]]] = {}
    for event in events:
        key = row_id(event)
        quality = feature_sets[event.feature_set].quality
        if quality and any(quality.features[name].otherwise == "hold" for name in problems.get(key, ())):
            bad.setdefault(key, (event, problems[key]))
    if not bad:
        return set()
    let_go = await _settled([event for event, _ in bad.values()], feature_store)
    counts: dict[str, Tally] = {}
    async with feature_store.shards[0].begin() as db:
        created_at = await rows.write_time(db)
        let_go |= await quarantine.released(db, list(bad))
        for key in let_go & bad.keys():
            del bad[key], problems[key]  # somebody has seen to it
        for key in await quarantine.hold(db, bad) if bad else ():
            tally = counts.setdefault(key[0], Tally())
            tally.n_held += 1
            tally.count_odd(problems[key], key[2])
        await tallies.save(db, counts, created_at)
    for feature_set, tally in counts.items():
        _HELD.labels(feature_set).inc(tally.n_held)
    return set(bad)


async def _settled(events: Sequence[Arrival], feature_store: FeatureStore) -> set[RowId]:
    found: set[RowId] = set()
    n_placed = feature_store.n_placed
    for shard, part in feature_store.split(events):
        async with shard.begin() as db:
            found |= await rows.settled(db, part)
            await feature_store.check_reading(db, shard, n_placed)
    return found


async def append(
    feature_store: FeatureStore,
    n_placed: int,
    shard: Shard,
    events: Sequence[Arrival],
    problems: Problems,
    feature_sets: Mapping[str, FeatureSet],
) -> list[FeatureRow]:
    """Store events of one shard, and count what is new of the feature sets that something is expected of."""
    async with shard.begin() as db:
        created_at = await feature_store.begin_writing(db, shard, n_placed)
        stored, new = await rows.append_at(db, events, created_at)
        await embeddings.save(db, events, new, feature_sets)
        counts: dict[str, Tally] = {}
        for key, row in new.items():
            if quality := feature_sets[row.feature_set].quality:
                _count(counts.setdefault(row.feature_set, Tally()), row, quality, problems.get(key, {}))
        await tallies.save(db, counts, created_at)
    return stored


def _count(tally: Tally, row: FeatureRow, quality: Quality, problems: Mapping[str, str]) -> None:
    tally.n_rows += 1
    tally.see(row.event_time)
    tally.count_odd(problems, row.event_id)
    for name, expected in quality.features.items():
        if expected.missing is not None and row.values.get(name) is None:
            tally.missing[name] = tally.missing.get(name, 0) + 1
