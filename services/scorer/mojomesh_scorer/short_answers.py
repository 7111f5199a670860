"""From a short request's bytes to its answer's: one row, by its values, on the V2 door or the native one.

Nothing is refused here: what is not plain and right, or has to wait for something, is left to the application's routes, which do it or say
what is wrong with it. So both ways give the same answers (docs/decisions/0009-fast-lane.md).
"""

import re
import time
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Annotated

import msgspec
import numpy as np
import orjson

from mojomesh_chassis.fast_lane import Answer, Headers
from mojomesh_scorer.doors import Doors
from mojomesh_scorer.encoding import MAX, Encoder
from mojomesh_scorer.errors import RowsRefused, SchemaMismatch
from mojomesh_scorer.models import LoadedModel
from mojomesh_scorer.open_inference import n_classes_of, outputs_with
from mojomesh_scorer.routes import head, shown
from mojomesh_scorer.scoring import Scored, score_of

MAX_FP32 = float(np.finfo(np.float32).max)

Row = tuple[list[float], dict[str, int]]
"""An encoded row and the unknown levels in it."""


class Element(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A V2 tensor of one element."""

    name: str
    datatype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=1, le=1)]]
    data: tuple[float | str | bool]


class _Output(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    name: str


class _InferRequest(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    inputs: Annotated[list[Element], msgspec.Meta(min_length=1)]
    outputs: list[_Output] = []
    id: str = ""


class _ScoreRequest(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    values: dict[str, bool | int | float | str | None]


_read_infer = msgspec.json.Decoder(_InferRequest).decode
_read_score = msgspec.json.Decoder(_ScoreRequest).decode


class ShortAnswers:
    """Answers what it can; see `fast_lane.Route`."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def route(self, url: bytes, headers: Headers) -> Answer | None:
        """What may answer requests of this path."""
        if any(name == b"inference-header-content-length" for name, _ in headers):
            return None
        if url.startswith(b"/v2/models/") and url.endswith(b"/infer"):
            return partial(self._answer_v2, url[11:-6].decode("latin-1"))
        if url.startswith(b"/v1/models/") and url.endswith(b":score"):
            return partial(self._answer_native, url[11:-6].decode("latin-1"))
        return None

    def score(self, model: LoadedModel, elements: Iterable[Element], began: float) -> Scored | None:
        """Score a row of V2 tensors, of a request that `began` then by `time.perf_counter`; None when it is not plain."""
        row = _read_elements(model.encoder, elements)
        return None if row is None else self._score(model, row, began)

    def _answer_v2(self, name: str, body: bytes) -> bytes | None:
        began = time.perf_counter()
        try:
            asked = _read_infer(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if (model := self._doors.scoring.models.serving_now(name)) is None:
            return None
        wanted = tuple([output.name for output in asked.outputs])
        template = _template(name, model.version, n_classes_of(model), wanted)
        if template is None or (scored := self.score(model, asked.inputs, began)) is None:
            return None
        return _filled(template, scored, asked.id)

    def _answer_native(self, name: str, body: bytes) -> bytes | None:
        began = time.perf_counter()
        if (model := self._doors.scoring.models.serving_now(name)) is None:
            return None
        unknown: dict[str, int] = {}
        try:
            values = _read_score(body).values
            model.encoder.check_rows([values])
            row = model.encoder.encode_row(values, unknown)
        except (msgspec.DecodeError, UnicodeDecodeError, RowsRefused, SchemaMismatch):
            return None
        scored = self._score(model, (row, unknown), began)
        return orjson.dumps({**head(scored), **next(shown(scored))})

    def _score(self, model: LoadedModel, row: Row, began: float) -> Scored:
        scored = self._doors.scoring.score_row(model, *row)
        self._doors.receipts.add(scored)
        self._doors.scoring.tallies.note_request(time.perf_counter() - began)
        return scored


def _read_elements(encoder: Encoder, elements: Iterable[Element]) -> Row | None:
    unknown: dict[str, int] = {}
    cells, places, all_levels = encoder.blank.copy(), encoder.places.copy(), encoder.levels
    try:
        for element in elements:
            (value,) = element.data
            place = places.pop(element.name)  # each column once
            levels = all_levels[place]
            if levels is None:
                if (number := _number(element.datatype, value)) is None:
                    return None
                cells[place] = number
            elif element.datatype != "BYTES" or type(value) is not str:
                return None
            elif value in levels:
                cells[place] = levels[value]
            elif value:
                unknown[element.name] = 1
    except (KeyError, ValueError):
        return None
    return cells, unknown


def _number(datatype: str, value: object) -> float | None:
    if type(value) is float:
        if datatype == "FP64" and -MAX <= value <= MAX:
            return value
        if datatype == "FP32" and -MAX_FP32 < value < MAX_FP32:
            return float(np.float32(value))
    elif datatype == "BOOL" and type(value) is bool:
        return float(value)
    return None


@lru_cache(maxsize=256)
def _template(name: str, version: int, n_classes: int, wanted: tuple[str, ...]) -> bytes | None:
    """A V2 answer with holes where rows differ, and its last bracket missing; None when such outputs are not to be had."""
    try:
        specs = outputs_with(n_classes, wanted)
    except KeyError:
        return None
    outputs = [{"name": spec.name, "datatype": spec.datatype, "shape": [1, *spec.shape[1:]], "data": f"%({spec.name})b"} for spec in specs]
    text = orjson.dumps({"model_name": name, "model_version": str(version), "outputs": outputs})[:-1]
    return re.sub(rb'"(%\(\w+\)b)"', rb"\1", text)


def _filled(template: bytes, scored: Scored, request_id: str) -> bytes:
    (scores,) = scored.scores
    values = {
        b"score": b"[%b]" % orjson.dumps(score_of(scores)),
        b"probabilities": orjson.dumps(scores),
        b"prediction_id": orjson.dumps(scored.prediction_ids),
    }
    return b'%b,"id":%b}' % (template % values, orjson.dumps(request_id)) if request_id else template % values + b"}"
