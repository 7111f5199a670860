"""What each worker does with its share of the requests on Kafka."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.definitions import subscribe_definitions
from mojomesh_chassis.errors import PermanentError, Rejected
from mojomesh_chassis.publishing import EncodedEvent
from mojomesh_contracts.events import ScoreRequested
from mojomesh_scorer.errors import RowsRefused
from mojomesh_scorer.receipts import blocks_of
from mojomesh_scorer.scoring import Row, Scored, Scoring

router = MeshRouter("scorer")
subscribe_definitions(router)


@router.work(ScoreRequested, batch=500)
async def on_scores_requested(events: Sequence[ScoreRequested], scoring: Scoring, replica: str) -> list[EncodedEvent]:
    """Predict; the id of a prediction follows from its request's, so that a repeat is known."""
    places: dict[str, list[int]] = {}
    for place, event in enumerate(events):
        places.setdefault(event.model, []).append(place)
    scored: list[Scored] = []
    reasons: dict[int, str] = {}
    for model, of_model in places.items():
        try:
            scored += await scoring.score_rows(model, [_row(events[place]) for place in of_model])
        except RowsRefused as refused:
            reasons |= {of_model[row]: reason for row, reason in refused.reasons.items()}
        except PermanentError as error:
            reasons |= dict.fromkeys(of_model, str(error))
    if reasons:
        raise Rejected(reasons)
    return list(blocks_of(scored, replica))


def _row(event: ScoreRequested) -> Row:
    return Row(event.values, event.entity_id, event.event_time, prediction_id=event.derive_id("prediction"), request_id=event.event_id)
