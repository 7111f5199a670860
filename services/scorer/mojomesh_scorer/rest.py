"""The Open Inference Protocol V2 over REST, with its binary tensor data extension."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mojomesh_chassis.errors import MeshError, TransientError
from mojomesh_chassis.http import read_body
from mojomesh_scorer.doors import MAX_BINARY_BYTES, MAX_JSON_BYTES, Doors, doors_of, within
from mojomesh_scorer.errors import BadTensor, NotServed
from mojomesh_scorer.open_inference import (
    EXTENSIONS,
    PLATFORM,
    SERVER,
    TensorSpec,
    answer,
    entity_asked,
    inputs_of,
    n_rows_of,
    outputs_of,
    timeout_s_of,
    version_asked,
)
from mojomesh_scorer.tensors import Tensor, from_bytes, from_values, to_bytes

LARGE_BYTES = 64 * 1024  # a body that is read in a thread, so that nobody waits behind it

HEADER_LENGTH = "inference-header-content-length"
"""Where the JSON ends and the binary tensors begin."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class _Input(_Part):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class _Output(_Part):
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class _InferRequest(_Part):
    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[_Input]
    outputs: list[_Output] = Field(default_factory=list)


class _V2Route(APIRoute):
    """Answers errors as the protocol has them: `{"error": text}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_v2(request: Request) -> Response:
            try:
                return await handle(request)
            except MeshError as error:
                headers = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, TransientError) else None
                return _json({"error": str(error)}, error.status, headers)

        return handle_v2


router = APIRouter(prefix="/v2", route_class=_V2Route, tags=["Open Inference Protocol V2"])
OpenDoors = Annotated[Doors, Depends(doors_of)]


@router.get("")
async def server_metadata() -> Response:
    """What this server is."""
    return _json({"name": SERVER, "version": "2", "extensions": EXTENSIONS})


@router.get("/health/live")
async def server_live() -> Response:
    """The worker answers."""
    return _json({"live": True})


@router.get("/health/ready")
async def server_ready(doors: OpenDoors) -> Response:
    """Whether this worker takes requests; it speaks for itself, the admin port for all."""
    return _json({"ready": doors.ready}, 200 if doors.ready else 503)


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(doors: OpenDoors, model: str, version: str = "") -> Response:
    """The model's inputs and outputs."""
    served = doors.scoring.models.find(model, version_asked(version))
    inputs, outputs = _specs(inputs_of(served)), _specs(outputs_of(served))
    versions = [str(one.version) for one in doors.scoring.models.versions(model)]
    return _json({"name": model, "versions": versions, "platform": PLATFORM, "inputs": inputs, "outputs": outputs})


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(doors: OpenDoors, model: str, version: str = "") -> Response:
    """Whether this worker serves the model."""
    try:
        doors.scoring.models.find(model, version_asked(version))
    except NotServed:
        return _json({"name": model, "ready": False}, 503)
    return _json({"name": model, "ready": doors.ready}, 200 if doors.ready else 503)


@router.post("/models/{model}/infer")
@router.post("/models/{model}/versions/{version}/infer")
async def model_infer(request: Request, doors: OpenDoors, model: str, version: str = "", durable: bool = False) -> Response:
    """Score one tensor a column, each of shape [n] or [n, 1].

    Parameters of the request: `binary_data_output`, `explain`, `entity_id`, and `timeout` in microseconds.
    """
    with doors.scoring.admitted():
        header_length = request.headers.get(HEADER_LENGTH)
        body = await read_body(request, MAX_JSON_BYTES if header_length is None else MAX_BINARY_BYTES)
        asked, tensors = await asyncio.to_thread(_parse, body, header_length) if len(body) > LARGE_BYTES else _parse(body, header_length)
        async with within(timeout_s_of(asked.parameters.get("timeout"))):
            entity_id = entity_asked(asked.parameters.get("entity_id"))
            scored = await doors.scoring.score_tensors(model, tensors, n_rows_of(tensors), version_asked(version), entity_id)
            outputs = await answer(scored, [output.name for output in asked.outputs], bool(asked.parameters.get("explain")))
            await doors.keep_receipt(scored, durable)
    binary_default = bool(asked.parameters.get("binary_data_output", False))
    binary = {output.name: bool(output.parameters.get("binary_data", binary_default)) for output in asked.outputs}
    head: dict[str, object] = {"model_name": model, "model_version": str(scored.model.version)}
    if asked.id:
        head["id"] = asked.id
    return _format(head, outputs, [binary.get(output.name, binary_default) for output in outputs])


def _parse(body: bytes, header_length: str | None) -> tuple[_InferRequest, list[Tensor]]:
    if header_length is not None and not (header_length.isdecimal() and int(header_length) <= len(body)):
        raise BadTensor(f"Inference-Header-Content-Length is {header_length!r}, the body has {len(body)} bytes")
    n_json = int(header_length) if header_length is not None else len(body)
    try:
        asked = _InferRequest.model_validate(_loads(body[:n_json]))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors()[:5])
        raise BadTensor(f"not an inference request: {faults}") from None
    return asked, list(_tensors(asked.inputs, memoryview(body)[n_json:]))


def _tensors(inputs: Sequence[_Input], content: memoryview) -> list[Tensor]:
    tensors, at = [], 0
    for given in inputs:
        size = given.parameters.get("binary_data_size")
        if size is None:
            tensors.append(from_values(given.name, given.datatype, given.shape, given.data or []))
            continue
        if not isinstance(size, int) or not 0 <= size <= len(content) - at:
            raise BadTensor(f"input '{given.name}' has binary_data_size {size!r}, {len(content) - at} bytes are left")
        tensors.append(from_bytes(given.name, given.datatype, given.shape, content[at : at + size]))
        at += size
    return tensors


def _loads(text: bytes) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass  # perhaps a bare NaN, which tritonclient writes and orjson refuses
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadTensor(f"the body is not JSON: {error}") from None


def _format(head: dict[str, object], outputs: Sequence[Tensor], binary: Sequence[bool]) -> Response:
    shown: list[dict[str, object]] = []
    content: list[bytes] = []
    for output, as_bytes in zip(outputs, binary, strict=True):
        if as_bytes:
            content.append(to_bytes(output))
            size = {"binary_data_size": len(content[-1])}
            shown.append({"name": output.name, "datatype": output.datatype, "shape": output.shape, "parameters": size})
        else:
            shown.append(described(output))
    text = dumps({**head, "outputs": shown})
    if not content:
        return Response(text, media_type="application/json")
    return Response(b"".join([text, *content]), headers={HEADER_LENGTH: str(len(text))}, media_type="application/octet-stream")


def described(output: Tensor) -> dict[str, object]:
    """An output with its elements, to be written by `dumps`."""
    data = output.data if isinstance(output.data, list) else output.data.ravel()
    return {"name": output.name, "datatype": output.datatype, "shape": output.shape, "data": data}


def dumps(content: object) -> bytes:
    """As JSON; arrays are written as they lie in memory."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _specs(specs: Sequence[TensorSpec]) -> list[dict[str, object]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(content), status, headers, media_type="application/json")
