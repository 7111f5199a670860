"""The native door: predictions by values or by entity, in JSON that reads well."""

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.doors import Doors, doors_of
from mojomesh_scorer.scoring import MAX_ROWS, Row, Scored

router = APIRouter(prefix="/v1/models", tags=["scoring"])
OpenDoors = Annotated[Doors, Depends(doors_of)]


class RowAsked(BaseModel):
    """One row: its values by column (an absent one is missing), or an entity whose features are looked up as of `event_time`.

    With both, the values are scored and the entity is kept in the receipt.
    """

    model_config = ConfigDict(extra="forbid")

    values: dict[str, FeatureValue] | None = None
    entity_id: str | None = Field(default=None, min_length=1, max_length=512)
    event_time: AwareDatetime | None = Field(default=None, description="By default now")

    @property
    def row(self) -> Row:
        return Row(self.values, self.entity_id, self.event_time)

    @property
    def empty(self) -> bool:
        return self.values is None and self.entity_id is None


class ScoreAsked(RowAsked):
    """One row, or `rows`."""

    rows: list[RowAsked] | None = Field(default=None, min_length=1, max_length=MAX_ROWS)

    @model_validator(mode="after")
    def _one_or_many(self) -> "ScoreAsked":
        if self.rows is not None and not (self.empty and self.event_time is None):
            raise ValueError("give rows, or values or entity_id of one row, not both")
        if any(row.empty for row in ([self] if self.rows is None else self.rows)):
            raise ValueError("a row needs values, or an entity_id to look its features up")
        return self


@router.get("")
async def models(doors: OpenDoors) -> list[dict[str, Any]]:
    """The models that are served, and what they take."""
    return [
        {
            "model": served.name,
            "version": served.version,
            "bundle_digest": served.digest,
            "columns": [column.model_dump(exclude_none=True) for column in served.schema.columns],
            "classes": served.schema.classes,
        }
        for served in doors.scoring.models.serving
    ]


@router.post("/{model}:score")
async def score(
    doors: OpenDoors,
    model: str,
    asked: ScoreAsked,
    durable: Annotated[bool, Query(description="Answer only after Kafka has the receipt")] = False,
) -> Response:
    """Predict for one row, or for many: then the predictions come in a list, in the order of the rows.

    `score` is the second class's probability of two classes, the likeliest class's of more, or the predicted number.
    """
    with doors.scoring.admitted():
        rows = [asked.row] if asked.rows is None else [row.row for row in asked.rows]
        scored = await doors.scoring.score_rows(model, rows)
        await doors.keep_receipt(scored, durable)
    head = {"model": model, "version": scored.model.version, "bundle_digest": scored.model.digest}
    predictions = _shown(scored)
    content = {**head, **predictions[0]} if asked.rows is None else {**head, "predictions": predictions}
    return Response(orjson.dumps(content), media_type="application/json")


def _shown(scored: Scored) -> list[dict[str, Any]]:
    classes = scored.model.schema.classes
    return [
        {
            "prediction_id": prediction_id,
            "entity_id": row.entity_id,
            "event_time": row.event_time or scored.made_at,
            "score": scores[-1] if len(scores) <= 2 else max(scores),
            "scores": dict(zip(classes, scores, strict=True)) if classes else None,
            "feature_age_ms": found.ages_ms if found else {},
        }
        for prediction_id, row, scores, found in zip(scored.prediction_ids, scored.rows, scored.scores.tolist(), scored.found, strict=True)
    ]
