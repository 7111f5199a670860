"""What is found, as the JSON of an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mojomesh_chassis.errors import TransientError
from mojomesh_store.online import AsOf, Entity, OnlineRow, moment
from mojomesh_store.vectors import Vector


def row_answer(entity: Entity, row: OnlineRow) -> bytes:
    """A row by itself."""
    return orjson.dumps(_row(entity, row))


def rows_answer(asked: Sequence[AsOf], found: Mapping[AsOf, OnlineRow | None]) -> bytes:
    """Rows in the order in which they were asked for; null where there is none."""
    rows = [(entity, found[entity, at]) for entity, at in asked]
    return orjson.dumps({"rows": [None if row is None else _row(entity, row) for entity, row in rows]})


def vectors_answer(spine: str, asked: Sequence[tuple[str, int]], vectors: Sequence[Vector | TransientError | None]) -> bytes:
    """Vectors in the order in which they were asked for, by entity_id and event time; in the place of one that is not there, why."""
    return orjson.dumps({"rows": [_vector(spine, *pair, vector) for pair, vector in zip(asked, vectors, strict=True)]})


def _row(entity: Entity, row: OnlineRow) -> dict[str, Any]:
    reported_at = moment(row.reported_us)
    return {**_key(entity, row), "reported_at": reported_at, "values": orjson.Fragment(row.vector)}


def _key(entity: Entity, row: OnlineRow) -> dict[str, Any]:
    event_time, created_at = moment(row.event_us), moment(row.created_us)
    return {"feature_set": entity[0], "entity_id": entity[1], "event_time": event_time, "created_at": created_at, "seq": row.seq}


def _used(entity: Entity, row: OnlineRow) -> orjson.Fragment:
    if row.key_json is None:
        row.key_json = orjson.dumps(_key(entity, row))
    return orjson.Fragment(row.key_json)


def _vector(spine: str, entity_id: str, at: int, vector: Vector | TransientError | None) -> dict[str, Any]:
    if isinstance(vector, TransientError):
        return {"away": str(vector)}
    if vector is None:
        return {"error": f"'{spine}' has no row of '{entity_id}' at {moment(at).isoformat()}"}
    if vector.too_old:
        return {"refused": "; ".join(vector.too_old)}
    return {"values": vector.values, "used": [_used(*used) for used in vector.used.items()], "ages_ms": vector.ages_ms}
