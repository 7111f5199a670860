"""What features does when something happened elsewhere."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_chassis.errors import Rejected
from mojomesh_contracts.events import Event, FeaturesWritten, FeatureValue, ModelPromoted, Prediction, PredictionsMade
from mojomesh_contracts.storable import NUL, is_in_calendar
from mojomesh_features import tables
from mojomesh_features.champions import ChampionBundles, Champions
from mojomesh_features.watching import measure_windows
from mojomesh_store.online import Entity, OnlineRow, OnlineStore

Time = Annotated[datetime, msgspec.Meta(tz=True)]

router = MeshRouter("features")
subscribe_definitions(router)


@router.broadcast(ModelPromoted)
async def on_models_promoted(events: Sequence[ModelPromoted], champions: Champions) -> list[Event]:
    """Know the champions."""
    for event in events:
        champions.put(event)
    return []


class _Written(msgspec.Struct, gc=False):
    """What the online store needs of a `FeaturesWritten`."""

    feature_set: str
    entity_id: str
    event_time: Time
    reported_at: Time
    created_at: Time
    seq: int
    values: dict[str, FeatureValue]


_decode = msgspec.json.Decoder(_Written).decode


def read_written(value: bytes) -> tuple[Entity, OnlineRow]:
    """A written row of an entity, at a quarter of what Pydantic costs, which decides on all that is out of the ordinary.

    Raises:
        ValidationError: It is no `FeaturesWritten`.
    """
    written: _Written | FeaturesWritten
    try:
        written = _decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        written = FeaturesWritten.model_validate_json(value)
    return (written.feature_set, written.entity_id), OnlineRow.of(written)


@router.work(FeaturesWritten, batch=2_000, read=read_written, pace_s=0.03)
async def on_features_written(written: Sequence[tuple[Entity, OnlineRow]], online: OnlineStore) -> list[Event]:
    """Let online reads know of new rows."""
    await online.merge(written)
    return []


@router.work(PredictionsMade, batch=200)
async def on_predictions_made(
    events: Sequence[PredictionsMade], database: Database, champions: Champions, bundles: ChampionBundles, definitions: Definitions
) -> list[Event]:
    """Keep receipts and measure drift in one transaction: what is counted is stored, and counted once.

    An alert is announced whenever the block is delivered that it was raised for. Receipts that cannot be stored are sent on as a block of
    their own, so that they are dead-lettered without the others.

    Raises:
        Rejected: Some blocks have no other receipts.
    """
    events, apart = _parted(events)
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
        return [*await tables.alerts_caused_by(db, events), *apart]


def _parted(blocks: Sequence[PredictionsMade]) -> tuple[list[PredictionsMade], list[PredictionsMade]]:
    """The blocks with the receipts that can be stored, and blocks of the others."""
    kept: list[PredictionsMade] = []
    apart: list[PredictionsMade] = []
    reasons: dict[int, str] = {}
    for place, block in enumerate(blocks):
        if not (odd := [one for one in block.predictions if not _is_storable(one)]):
            kept.append(block)
        elif len(odd) == len(block.predictions):
            reasons[place] = "entity_id contains a NUL character, or event_time lies outside the years 1 to 9999 in UTC"
        else:
            kept.append(block.model_copy(update={"predictions": [one for one in block.predictions if _is_storable(one)]}))
            apart.append(block.model_copy(update={"event_id": block.derive_id("unstorable"), "predictions": odd}))
    if reasons:
        raise Rejected(reasons)
    return kept, apart


def _is_storable(prediction: Prediction) -> bool:
    return NUL not in (prediction.entity_id or "") and is_in_calendar(prediction.event_time)
