"""The Open Inference Protocol V2 over gRPC, with the standard health and reflection services."""

import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace

from mojomesh_chassis.errors import Busy, MeshError, NotFound, PermanentError, TransientError
from mojomesh_chassis.fast_lane import TRACED
from mojomesh_chassis.telemetry import carried_trace, log, tracer
from mojomesh_scorer import open_inference_pb2 as pb
from mojomesh_scorer import open_inference_pb2_grpc as pb_grpc
from mojomesh_scorer.doors import Doors, within
from mojomesh_scorer.errors import BadTensor, DeadlineMissed, NotServed
from mojomesh_scorer.open_inference import (
    EXTENSIONS,
    PLATFORM,
    SERVER,
    TensorSpec,
    answer,
    entity_asked,
    inputs_of,
    n_classes_of,
    n_rows_of,
    outputs_of,
    outputs_with,
    timeout_s_of,
    version_asked,
)
from mojomesh_scorer.scoring import Scored, score_of
from mojomesh_scorer.short_answers import Element, ShortAnswers
from mojomesh_scorer.tensors import DTYPES, Tensor, from_bytes, from_values, to_bytes

MAX_MESSAGE_BYTES = 64 * 2**20
GRACE_S = 10.0
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

_RAW: dict[str, Callable[[Scored], bytes]] = {
    "score": lambda scored: struct.pack("<d", score_of(scored.scores[0])),
    "probabilities": lambda scored: struct.pack(f"<{len(scored.scores[0])}d", *scored.scores[0]),
    "prediction_id": lambda scored: struct.pack("<I", len(scored.prediction_ids[0])) + scored.prediction_ids[0].encode(),
}
"""A row's outputs in the binary form, as `tensors.to_bytes` has those of many."""

Context = grpc.aio.ServicerContext[Any, Any]


class Inference(pb_grpc.GRPCInferenceServiceServicer):
    """The protocol's operations, over the same core as the other doors."""

    def __init__(self, doors: Doors, short: ShortAnswers) -> None:
        self._doors = doors
        self._short = short
        self._n_infer = 0

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._doors.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=SERVER, version="2", extensions=EXTENSIONS)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            self._doors.scoring.models.find(request.name, version_asked(request.version))
        except NotServed:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._doors.ready)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        async with _answering(context, "ModelMetadata"):
            served = self._doors.scoring.models.find(request.name, version_asked(request.version))
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(one.version) for one in self._doors.scoring.models.versions(request.name)],
            platform=PLATFORM,
            inputs=map(_described, inputs_of(served)),
            outputs=map(_described, outputs_of(served)),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        if (response := self._answer_short(request, context)) is not None:
            return response
        async with _answering(context, "ModelInfer"):
            with self._doors.scoring.admitted():
                tensors = list(_tensors(request))
                version = version_asked(request.model_version)
                entity_id = entity_asked(request.parameters["entity_id"].string_param)
                async with within(timeout_s_of(request.parameters["timeout"].int64_param)):
                    scored = await self._doors.scoring.score_tensors(request.model_name, tensors, n_rows_of(tensors), version, entity_id)
                    wanted = [output.name for output in request.outputs]
                    outputs = await answer(scored, wanted, request.parameters["explain"].bool_param)
                    await self._doors.keep_receipt(scored, durable=request.parameters["durable"].bool_param)
        return _response(request, scored, outputs)

    def _answer_short(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse | None:
        """A single row by value, as on the fast lane of HTTP: nothing else is asked for, and no trace is carried."""
        began = time.perf_counter()
        self._n_infer += 1
        if request.parameters or request.model_version or self._n_infer % TRACED == 0:
            return None
        if any(key == "traceparent" for key, _ in context.invocation_metadata() or ()):
            return None
        if any(output.parameters for output in request.outputs):
            return None
        if (model := self._doors.scoring.models.serving_now(request.model_name)) is None:
            return None
        blank = _blank(model.name, model.version, n_classes_of(model), tuple([output.name for output in request.outputs]))
        if blank is None or (scored := self._short.score(model, _elements(request), began)) is None:
            return None
        response = pb.ModelInferResponse(id=request.id)
        response.MergeFrom(blank)
        response.raw_output_contents.extend([_RAW[output.name](scored) for output in blank.outputs])
        return response


@lru_cache(maxsize=256)
def _blank(name: str, version: int, n_classes: int, wanted: tuple[str, ...]) -> pb.ModelInferResponse | None:
    """An answer of one row without what differs from row to row; None when such outputs are not to be had."""
    try:
        specs = outputs_with(n_classes, wanted)
    except KeyError:
        return None
    shaped = [pb.ModelInferResponse.InferOutputTensor(name=spec.name, datatype=spec.datatype, shape=[1, *spec.shape[1:]]) for spec in specs]
    return pb.ModelInferResponse(model_name=name, model_version=str(version), outputs=shaped)


def _response(request: pb.ModelInferRequest, scored: Scored, outputs: Sequence[Tensor]) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(
        model_name=request.model_name,
        model_version=str(scored.model.version),
        id=request.id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(name=output.name, datatype=output.datatype, shape=output.shape) for output in outputs
        ],
        raw_output_contents=[to_bytes(output) for output in outputs],
    )


def _elements(request: pb.ModelInferRequest) -> Iterator[Element]:
    """Of tensors with one element each.

    Raises:
        ValueError: One has another shape, or a form that is left to `_tensors`.
    """
    raw = request.raw_input_contents
    if len(raw) not in (0, len(request.inputs)) or not request.inputs:
        raise ValueError("not plain")
    for number, given in enumerate(request.inputs):
        if list(given.shape) not in ([1], [1, 1]):
            raise ValueError("not a single row")
        if raw:
            value = _element(given.datatype, raw[number])
        else:
            (value,) = getattr(given.contents, _CONTENTS[given.datatype])
            value = value.decode() if given.datatype == "BYTES" else value
        yield Element(given.name, given.datatype, (1,), (value,))


def _element(datatype: str, content: bytes) -> float | str | bool:
    if datatype == "BYTES":
        if int.from_bytes(content[:4], "little") != len(content) - 4:
            raise ValueError("not a single text")
        return content[4:].decode()
    (value,) = np.frombuffer(content, DTYPES[datatype]).tolist()
    element: float | bool = value
    return element


def _tensors(request: pb.ModelInferRequest) -> Iterator[Tensor]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadTensor(f"{len(request.inputs)} inputs and {len(raw)} raw_input_contents")
    for number, given in enumerate(request.inputs):
        if raw:
            yield from_bytes(given.name, given.datatype, given.shape, raw[number])
            continue
        if given.datatype not in _CONTENTS:
            raise BadTensor(f"input '{given.name}' has the datatype {given.datatype!r}; known are {', '.join(_CONTENTS)}")
        values = list(getattr(given.contents, _CONTENTS[given.datatype]))
        texts = [value.decode("utf-8", "replace") for value in values] if given.datatype == "BYTES" else values
        yield from_values(given.name, given.datatype, given.shape, texts)


def _described(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


@asynccontextmanager
async def _answering(context: Context, operation: str) -> AsyncIterator[None]:
    """A span that continues the caller's trace, and a status for each kind of error."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    parent = carried_trace(metadata)
    within = trace.set_span_in_context(trace.NonRecordingSpan(parent)) if parent.is_valid else None
    with tracer.start_as_current_span(f"grpc {operation}", context=within, kind=trace.SpanKind.SERVER):
        with _mapped() as failure:
            yield
        if failure:
            await context.abort(*failure[0])


@contextmanager
def _mapped() -> Iterator[list[tuple[grpc.StatusCode, str]]]:
    failure: list[tuple[grpc.StatusCode, str]] = []
    try:
        yield failure
    except MeshError as error:
        failure.append((_status_of(error), str(error)))


def _status_of(error: MeshError) -> grpc.StatusCode:
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


_STATUSES: tuple[tuple[type[MeshError], grpc.StatusCode], ...] = (
    (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineMissed, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TransientError, grpc.StatusCode.UNAVAILABLE),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (PermanentError, grpc.StatusCode.INVALID_ARGUMENT),
)


@asynccontextmanager
async def serving_grpc(doors: Doors, short: ShortAnswers, host: str, port: int) -> AsyncIterator[None]:
    """Serve on a port that other workers share; at the end calls in flight finish."""
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    server = grpc.aio.server(options=options)
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(Inference(doors, short), server)  # type: ignore[no-untyped-call]
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    server.add_insecure_port(f"{host}:{port}")
    await server.start()
    for name in ("", SERVICE):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield
    finally:
        await healthy.enter_graceful_shutdown()
        await server.stop(GRACE_S)
        log.info("grpc_stopped")
