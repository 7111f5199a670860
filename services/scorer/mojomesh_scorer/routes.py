"""The native door: predictions by values or by entity, in JSON that reads well."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from mojomesh_chassis.http import read_body
from mojomesh_contracts.events import FeatureValue
from mojomesh_contracts.storable import EntityId, Time
from mojomesh_scorer.doors import MAX_JSON_BYTES, Doors, doors_of, within
from mojomesh_scorer.scoring import MAX_ROWS, NAMES_NO_ROW, NO_ROW, Row, Scored, score_of

router = APIRouter(prefix="/v1/models", tags=["scoring"])
OpenDoors = Annotated[Doors, Depends(doors_of)]


class RowAsked(BaseModel):
    """One row: its values by column (an absent one is missing), or an entity whose features are looked up as of `event_time`.

    With both, the values are scored and the entity is kept in the receipt.
    """

    model_config = ConfigDict(extra="forbid")

    values: dict[str, FeatureValue] | None = None
    entity_id: EntityId | None = None
    event_time: Time | None = Field(default=None, description="By default now")

    @property
    def row(self) -> Row:
        return Row(self.values, self.entity_id, self.event_time)

    @property
    def empty(self) -> bool:
        return self.values is None and self.entity_id is None


class ScoreAsked(RowAsked):
    """One row, or `rows`."""

    rows: Annotated[list[RowAsked] | None, WithJsonSchema({"type": "array", "items": RowAsked.model_json_schema()})] = Field(
        default=None, min_length=1, max_length=MAX_ROWS
    )

    @model_validator(mode="after")
    def _one_or_many(self) -> "ScoreAsked":
        if self.rows is not None and not (self.empty and self.event_time is None):
            raise ValueError("give rows, or values or entity_id of one row, not both")
        if any(row.empty for row in ([self] if self.rows is None else self.rows)):
            raise ValueError(NAMES_NO_ROW)
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
            "beside": [beside.version for beside in doors.scoring.models.versions(served.name)[1:]],
        }
        for served in doors.scoring.models.serving
    ]


# Read by hand, since FastAPI takes a body of any size, and its way through `json` costs more than the scoring.
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": ScoreAsked.model_json_schema()}}}}


@router.post("/{model}:score", openapi_extra=_BODY)
async def score(
    doors: OpenDoors,
    model: str,
    request: Request,
    durable: Annotated[bool, Query(description="Answer only after Kafka has the receipt")] = False,
    timeout_ms: Annotated[float | None, Query(gt=0, description="Give up after this time, with 504")] = None,
    explain: Annotated[bool, Query(description="Say what each column adds to the raw score, which the bias completes")] = False,
) -> Response:
    """Predict for one row, or for many: then the predictions come in a list, in the order of the rows, each with its version.

    Rows of entities that belong to a challenger are scored by it; `version` is null above predictions of several versions.

    `score` is the second class's probability of two classes, the likeliest class's of more, or the predicted number.
    """
    with doors.scoring.admitted():
        asked = _asked(await read_body(request, MAX_JSON_BYTES))
        rows = [asked.row] if asked.rows is None else [row.row for row in asked.rows]
        async with within(timeout_ms and timeout_ms / 1000):
            blocks = await doors.scoring.score_rows(model, rows)
            predictions = await _in_order(blocks, explain)
            for scored in blocks:
                await doors.keep_receipt(scored, durable)
    content = predictions[0] if asked.rows is None else {"predictions": predictions}
    above = head(blocks[0]) if len(blocks) == 1 else {"model": model, "version": None, "bundle_digest": None}
    return Response(orjson.dumps({**above, **content}), media_type="application/json")


async def _in_order(blocks: Sequence[Scored], explain: bool) -> list[dict[str, Any]]:
    predictions: dict[int, dict[str, Any]] = {}
    for scored in blocks:
        reasons = await reasons_of(scored) if explain else [{} for _ in scored.places]
        for place, prediction, reason in zip(scored.places, shown(scored), reasons, strict=True):
            predictions[place] = {"version": scored.model.version, **prediction, **reason}
    return [predictions[place] for place in range(len(predictions))]


def _asked(body: bytes) -> ScoreAsked:
    try:
        return ScoreAsked.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def head(scored: Scored) -> dict[str, Any]:
    """What an answer says of the model that gave it."""
    return {"model": scored.model.name, "version": scored.model.version, "bundle_digest": scored.model.digest}


async def reasons_of(scored: Scored) -> list[dict[str, Any]]:
    """What an answer says of the reasons of each prediction.

    Raises:
        NotExplained: The model is of a kind that has none.
        TooLarge: More rows than a request may have explained.
    """
    names = [column.name for column in scored.model.schema.columns]
    found = (await scored.model.explain(scored.inputs)).tolist()
    return [{"contributions": dict(zip(names, row[:-1], strict=True)), "bias": row[-1]} for row in found]


def shown(scored: Scored) -> Iterator[dict[str, Any]]:
    """What an answer says of each prediction."""
    classes = scored.model.schema.classes
    for n, (prediction_id, scores) in enumerate(zip(scored.prediction_ids, scored.scores, strict=True)):
        row = scored.rows[n] if scored.rows else NO_ROW
        found = scored.found[n] if scored.found else None
        yield {
            "prediction_id": prediction_id,
            "entity_id": row.entity_id,
            "event_time": row.event_time or scored.made_at,
            "score": score_of(scores),
            "scores": dict(zip(classes, scores, strict=True)) if classes else None,
            "feature_age_ms": found.ages_ms if found else {},
        }
