"""What each worker does with its share of the requests on Kafka."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_contracts.events import Event, ScoreRequested
from mojomesh_scorer.receipts import blocks_of
from mojomesh_scorer.scoring import Row, Scoring

router = MeshRouter("scorer")


@router.work(ScoreRequested, batch=500)
async def on_scores_requested(events: Sequence[ScoreRequested], scoring: Scoring, replica: str) -> list[Event]:
    """Predict, one block a model; the id of a prediction follows from its request's, so that a repeat is known."""
    asked: dict[str, list[ScoreRequested]] = {}
    for event in events:
        asked.setdefault(event.model, []).append(event)
    scored = [await scoring.score_rows(model, [_row(event) for event in of_model]) for model, of_model in asked.items()]
    return list(blocks_of(scored, replica))


def _row(event: ScoreRequested) -> Row:
    return Row(event.values, event.entity_id, event.event_time, prediction_id=event.derive_id("prediction"), request_id=event.event_id)
