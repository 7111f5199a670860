"""What features does when something happened elsewhere."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_contracts.events import DriftDetected, Event, FeaturesWritten, ModelPromoted, PredictionsMade
from mojomesh_features import tables
from mojomesh_features.champions import ChampionBundles, Champions
from mojomesh_features.watching import measure_windows
from mojomesh_store.online import OnlineRow, OnlineStore

router = MeshRouter("features")
subscribe_definitions(router)


@router.broadcast(ModelPromoted)
async def on_models_promoted(events: Sequence[ModelPromoted], champions: Champions) -> list[Event]:
    """Know the champions."""
    for event in events:
        champions.put(event)
    return []


@router.work(FeaturesWritten, batch=2_000)
async def on_features_written(events: Sequence[FeaturesWritten], online: OnlineStore) -> list[Event]:
    """Let online reads know of new rows."""
    await online.merge(((event.feature_set, event.entity_id), OnlineRow.of(event)) for event in events)
    return []


@router.work(PredictionsMade, batch=200)
async def on_predictions_made(
    events: Sequence[PredictionsMade], database: Database, champions: Champions, bundles: ChampionBundles, definitions: Definitions
) -> list[DriftDetected]:
    """Keep receipts and measure drift in one transaction: what is counted is stored, and counted once.

    An alert is announced whenever the block is delivered that it was raised for.
    """
    promoted = await champions.of(events)
    baselines = {model: await bundles.of(champion) for model, champion in promoted.items()}
    async with database.begin() as db:
        for model in sorted({event.model for event in events}):
            blocks = [event for event in events if event.model == model]
            await tables.lock_model(db, model)
            await tables.save_predictions(db, blocks)
            if (champion := promoted.get(model)) is None:
                continue
            await tables.count_predictions(db, champion, [block for block in blocks if champions.made(block)])
            if (bundle := baselines[model]) is not None:
                definition = definitions.models.get(model) or bundle.manifest.definition
                await measure_windows(db, champion, bundle, definition.drift, cause=blocks[-1])
        return await tables.alerts_caused_by(db, events)
