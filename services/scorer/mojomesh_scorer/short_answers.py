"""From a short request's bytes to its answer's: one row, by its values, on the V2 door or the native one.

Nothing is refused here: what is not plain and right, or has to wait for something, is left to the application's routes, which do it or say
what is wrong with it. So both ways give the same answers (docs/decisions/0009-fast-lane.md).
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson

from mojomesh_scorer.doors import Doors
from mojomesh_scorer.encoding import MAX, Encoder
from mojomesh_scorer.errors import RowsRefused, SchemaMismatch
from mojomesh_scorer.models import LoadedModel
from mojomesh_scorer.open_inference import outputs_of, values_of
from mojomesh_scorer.routes import head, shown
from mojomesh_scorer.scoring import Scored

MAX_FP32 = float(np.finfo(np.float32).max)

Element = tuple[str, str, object]
"""Name, datatype and only element of a V2 tensor."""

Row = tuple[list[float], dict[str, int]]
"""An encoded row and the unknown levels in it."""


class ShortAnswers:
    """Answers what it can; see `fast_lane.Answer`."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def __call__(self, url: bytes, body: bytes | bytearray) -> bytes | None:
        began = time.perf_counter()
        if url.startswith(b"/v2/models/") and url.endswith(b"/infer"):
            read, write = _read_inputs, _write_outputs
        elif url.startswith(b"/v1/models/") and url.endswith(b":score"):
            read, write = _read_values, _write_values
        else:
            return None
        if (model := self._doors.scoring.models.serving_now(url[11:-6].decode("latin-1"))) is None:
            return None
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if (row := read(model.encoder, asked) if type(asked) is dict else None) is None:
            return None
        scored = self._score(model, row, began)
        return write(scored, asked)

    def infer(self, name: str, elements: Iterable[Element]) -> Scored | None:
        """Score a row of V2 tensors of one element each; None when it is not plain."""
        began = time.perf_counter()
        if (model := self._doors.scoring.models.serving_now(name)) is None:
            return None
        row = _read_elements(model.encoder, elements)
        return None if row is None else self._score(model, row, began)

    def _score(self, model: LoadedModel, row: Row, began: float) -> Scored:
        scored = self._doors.scoring.score_row(model, *row)
        self._doors.receipts.add(scored)
        self._doors.scoring.tallies.note_request(time.perf_counter() - began)
        return scored


def _read_inputs(encoder: Encoder, asked: dict[str, Any]) -> Row | None:
    if not asked.keys() <= {"inputs", "id"} or type(asked.get("id", "")) is not str or not asked.get("inputs"):
        return None  # it asks for something else too
    return _read_elements(encoder, _elements(asked["inputs"]))


def _elements(inputs: list[Any]) -> Iterator[Element]:
    for tensor in inputs:
        shape, data = tensor["shape"], tensor["data"]
        if len(tensor) != 4 or type(data) is not list or (shape != [1] and shape != [1, 1]):
            raise ValueError("not plain")
        (value,) = data
        if type(value) is list:
            (value,) = value
        yield tensor["name"], tensor["datatype"], value


def _read_elements(encoder: Encoder, elements: Iterable[Element]) -> Row | None:
    unknown: dict[str, int] = {}
    cells, places, all_levels = encoder.blank.copy(), encoder.places.copy(), encoder.levels
    try:
        for name, datatype, value in elements:
            place = places.pop(name)  # each column once
            levels = all_levels[place]
            if levels is None:
                if (number := _number(datatype, value)) is None:
                    return None
                cells[place] = number
            elif datatype != "BYTES" or type(value) is not str:
                return None
            elif value in levels:
                cells[place] = levels[value]
            elif value:
                unknown[name] = 1
    except (TypeError, KeyError, ValueError):
        return None
    return cells, unknown


def _number(datatype: object, value: object) -> float | None:
    if datatype == "FP64" and (type(value) is float or type(value) is int) and -MAX <= value <= MAX:
        return value
    if datatype == "FP32" and (type(value) is float or type(value) is int) and -MAX_FP32 < value < MAX_FP32:
        return float(np.float32(value))
    if datatype == "BOOL" and type(value) is bool:
        return float(value)
    return None


def _write_outputs(scored: Scored, asked: dict[str, Any]) -> bytes:
    values = values_of(scored)
    outputs = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": [1, *spec.shape[1:]],
            "data": values[spec.name] if len(spec.shape) == 1 else values[spec.name][0],
        }
        for spec in outputs_of(scored.model)
    ]
    answer = {"model_name": scored.model.name, "model_version": str(scored.model.version), "outputs": outputs}
    return orjson.dumps({**answer, "id": asked["id"]} if asked.get("id") else answer)


def _read_values(encoder: Encoder, asked: dict[str, Any]) -> Row | None:
    unknown: dict[str, int] = {}
    values = asked.get("values")
    if type(values) is not dict or len(asked) != 1:
        return None
    try:
        encoder.check_rows([values])
        return encoder.encode_row(values, unknown), unknown
    except (RowsRefused, SchemaMismatch):
        return None


def _write_values(scored: Scored, asked: dict[str, Any]) -> bytes:
    return orjson.dumps({**head(scored), **next(shown(scored))})
