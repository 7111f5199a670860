"""What the supervisor does when it hears of something."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_contracts.events import Event, ModelPromoted, TrafficSet
from mojomesh_scorer.swaps import Swaps

router = MeshRouter("scorer")


@router.broadcast(ModelPromoted)
async def on_models_promoted(events: Sequence[ModelPromoted], swaps: Swaps) -> list[Event]:
    """Serve the newest promotion of each model; say of each whether it came to that."""
    newest = {event.model: event for event in sorted(events, key=lambda event: event.promotion)}
    certificates = [await swaps.follow(event) for event in newest.values()]
    return [certificate for certificate in certificates if certificate is not None]


@router.broadcast(TrafficSet)
async def on_traffic_set(events: Sequence[TrafficSet], swaps: Swaps) -> list[Event]:
    """Let the versions of the newest setting of each model score beside its champion; say which are left out."""
    newest = {event.model: event for event in sorted(events, key=lambda event: event.setting)}
    followed = [await swaps.surround(event) for event in newest.values()]
    return [event for event in followed if event is not None]
