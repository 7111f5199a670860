"""Forgetting an entity everywhere: each package erases what is its own, here they take turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_features import tables
from mojomesh_features.erasing import Eraser
from mojomesh_features.work_folder import open_work_folder
from mojomesh_ingest import quarantine
from mojomesh_store import erasure
from mojomesh_store.online import OnlineStore
from mojomesh_store.shards import FeatureStore

MEMORY_LIMIT = "2GB"  # DuckDB's, for one segment


@dataclass
class Forgotten:
    """What was erased."""

    rows: dict[str, int] = field(default_factory=dict)
    segments: int = 0
    snapshots: int = 0
    predictions: int = 0
    held_events: int = 0


@dataclass(frozen=True)
class Places:
    """Where entities are known: the feature store opened with the owner's URLs, Redis, the object store, what features is at."""

    feature_store: FeatureStore
    online: OnlineStore
    objects: Objects
    work_folder: Path


async def forget(places: Places, definitions: Definitions, entity_id: str, feature_sets: Sequence[str]) -> Forgotten:
    """Erase an entity of these feature sets, and what was made of it. Killed anywhere, the next call finishes it.

    Raises:
        TransientError: A server does not answer; what is left is done by another call.
    """
    forgotten = Forgotten()
    models = [model for model in definitions.models.values() if model.spine in feature_sets]
    joined_by = {
        model.name
        for model in definitions.models.values()
        if any(source.join and source.feature_set in feature_sets for source in model.features)
    }
    own = places.feature_store.shards[0]
    async with own.begin() as db:
        held = await quarantine.held_of(db, entity_id, feature_sets)
    for shard in places.feature_store.shards:  # first, so that it does not matter who lets them go
        async with shard.begin() as db:
            await erasure.forget_events(db, held)
    async with own.begin() as db:
        forgotten.held_events = await quarantine.forget(db, entity_id, feature_sets)
    with open_work_folder(places.work_folder) as folder:
        eraser = Eraser(places.feature_store, places.objects, folder, MEMORY_LIMIT)
        for feature_set in feature_sets:
            forgotten.rows[feature_set], n_segments = await eraser.forget(feature_set, entity_id)
            forgotten.segments += n_segments
        await places.online.forget([(feature_set, entity_id) for feature_set in feature_sets])
        async with own.begin() as db:
            forgotten.predictions = await tables.forget_predictions(db, entity_id, feature_sets, [model.name for model in models])
        forgotten.snapshots = await eraser.forget_snapshots(entity_id, joined_by)
    return forgotten
