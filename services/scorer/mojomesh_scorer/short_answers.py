"""From a short request's bytes to its answer's: one row, by its values, on the V2 door or the native one.

Nothing is refused here: what is not plain and right, or has to wait for something, is left to the application's routes, which do it or say
what is wrong with it. So both ways give the same answers (docs/decisions/0009-fast-lane.md).
"""

import time
from typing import Any

import numpy as np
import orjson

from mojomesh_scorer.doors import Doors
from mojomesh_scorer.encoding import Encoder
from mojomesh_scorer.errors import RowsRefused, SchemaMismatch
from mojomesh_scorer.open_inference import outputs_of, values_of
from mojomesh_scorer.routes import head, shown
from mojomesh_scorer.scoring import Scored

MAX_FP32 = float(np.finfo(np.float32).max)

Read = tuple[list[float], dict[str, int]]
"""An encoded row and the unknown levels in it."""


class ShortAnswers:
    """Answers what it can; see `fast_lane.Answer`."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def __call__(self, url: bytes, body: bytes | bytearray) -> bytes | None:
        began = time.perf_counter()
        if url.startswith(b"/v2/models/") and url.endswith(b"/infer"):
            read, write = _read_tensors, _write_tensors
        elif url.startswith(b"/v1/models/") and url.endswith(b":score"):
            read, write = _read_values, _write_values
        else:
            return None
        scoring = self._doors.scoring
        if (model := scoring.models.serving_now(url[11:-6].decode("latin-1"))) is None:
            return None
        try:
            asked = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if (encoded := read(model.encoder, asked) if type(asked) is dict else None) is None:
            return None
        scored = scoring.score_row(model, *encoded)
        self._doors.receipts.add(scored)
        content = write(scored, asked)
        scoring.tallies.note_request(time.perf_counter() - began)
        return content


def _read_tensors(encoder: Encoder, asked: dict[str, Any]) -> Read | None:
    """One element a tensor, and nothing else asked for."""
    if not asked.keys() <= {"inputs", "id"} or type(asked.get("id", "")) is not str or not asked.get("inputs"):
        return None
    cells, unknown, places, all_levels = encoder.blank.copy(), {}, encoder.places.copy(), encoder.levels
    try:
        for tensor in asked["inputs"]:
            name, shape, datatype, data = tensor["name"], tensor["shape"], tensor["datatype"], tensor["data"]
            if len(tensor) != 4 or type(data) is not list or (shape != [1] and shape != [1, 1]):
                return None
            (value,) = data
            if type(value) is list:
                (value,) = value
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
    if datatype == "FP64" and (type(value) is float or type(value) is int):
        return value
    if datatype == "FP32" and (type(value) is float or type(value) is int) and -MAX_FP32 < value < MAX_FP32:
        return float(np.float32(value))
    if datatype == "BOOL" and type(value) is bool:
        return float(value)
    return None


def _write_tensors(scored: Scored, asked: dict[str, Any]) -> bytes:
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


def _read_values(encoder: Encoder, asked: dict[str, Any]) -> Read | None:
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
