"""Clients that ask at fixed times, whatever became of their requests before, and the log that they keep."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import orjson
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from tests.scorer.making import Row, Scorer

N_CONNECTIONS, N_CHANNELS = 32, 4
GRPC_EVERY = 5  # of five requests one goes over gRPC
N_ROWS = 100


@dataclass(frozen=True, slots=True)
class Answered:
    """One prediction as its client got it, and which versions may have made it."""

    door: str
    row: int
    version: int
    score: float
    prediction_id: str
    acknowledged: int
    """The last version whose certificate was seen before the request began."""
    promoted: int
    """The last version that was promoted when the answer was there."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A request without an answer."""

    door: str
    began: float
    """Seconds of `time.monotonic`."""
    local_port: int | None
    """Of its connection, over HTTP."""
    reason: str


class AnswerLost(Exception):
    """The connection ended before the answer."""


@dataclass
class Paced:
    """The log; `retrying` clients ask once more, at once, when a request broke.

    Whoever promotes writes down the version before, in `promoted`, and when its certificate was seen, in `acknowledged`.
    """

    scorer: Scorer
    model: str
    retrying: bool
    acknowledged: int = 1
    promoted: int = 1
    answered: list[Answered] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    failed: list[Broken] = field(default_factory=list)
    """Requests that stayed without an answer: the second time too, when clients retry."""

    async def at_least(self, n: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answered) + n
        while len(self.answered) < wanted:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def paced(scorer: Scorer, model: str, rows: Sequence[Row], rate: int, retrying: bool = False) -> AsyncIterator[Paced]:
    """`rate` requests a second over HTTP and gRPC; all that were begun are waited for at the end."""
    log = Paced(scorer, model, retrying)
    over_grpc = [_GrpcDoor(scorer.grpc_port, model, rows) for _ in range(N_CHANNELS)]
    over_http = _HttpDoor(scorer.http_port, model, rows)
    under_way: set[asyncio.Task[None]] = set()
    await over_http.connect()

    async def pace() -> None:
        started, number = time.monotonic(), 0
        while True:
            while number < (time.monotonic() - started) * rate:
                door = over_http if number % GRPC_EVERY else over_grpc[number // GRPC_EVERY % N_CHANNELS]
                task = asyncio.create_task(_ask(log, door, number % N_ROWS))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                number += 1
            await asyncio.sleep(0.001)

    pacing = asyncio.create_task(pace())
    try:
        yield log
        assert not pacing.done(), pacing
    finally:
        pacing.cancel()
        await asyncio.gather(pacing, return_exceptions=True)
        await asyncio.gather(*under_way)
        over_http.close()
        for door in over_grpc:
            await door.close()


async def _ask(log: Paced, door: "_HttpDoor | _GrpcDoor", row: int) -> None:
    for attempt in range(2 if log.retrying else 1):
        acknowledged, began = log.acknowledged, time.monotonic()
        try:
            version, score, prediction_id = await door.score(row, again=attempt > 0)
        except AnswerLost as lost:
            broken = Broken(door.name, began, lost.args[1], lost.args[0])
            log.broken.append(broken)
        else:
            log.answered.append(Answered(door.name, row, version, score, prediction_id, acknowledged, log.promoted))
            return
    log.failed.append(broken)


class _HttpDoor:
    """`:score` over connections that stay; plain HTTP/1.1, since a client library takes more time than the scorer."""

    name = "http"

    def __init__(self, port: int, model: str, rows: Sequence[Row]) -> None:
        self._port = port
        self._idle: deque[_Connection] = deque()
        self._free = asyncio.Semaphore(N_CONNECTIONS)
        self._requests = []
        for row in rows[:N_ROWS]:
            body = orjson.dumps({"values": row})
            head = [f"POST /v1/models/{model}:score HTTP/1.1", "Host: scorer", "Content-Type: application/json"]
            self._requests.append("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)

    async def score(self, row: int, again: bool = False) -> tuple[int, float, str]:
        """Version, score and prediction id; `again` over a new connection, since others that lie idle may be to the same dead worker.

        Raises:
            AnswerLost: No answer, or another than 200; with the local port.
        """
        async with self._free:
            connection = await self._connection(new=again)
            try:
                status, body = await connection.ask(self._requests[row])
            except (OSError, asyncio.IncompleteReadError) as error:
                connection.close()
                raise AnswerLost(repr(error), connection.local_port) from error
            self._idle.append(connection)
        if status != 200:
            raise AnswerLost(f"{status} {body!r}", connection.local_port)
        answer = orjson.loads(body)
        return answer["version"], answer["score"], answer["prediction_id"]

    async def connect(self) -> None:
        """Open connections, so many that every worker has some."""
        self._idle += [await self._connection(new=True) for _ in range(N_CONNECTIONS // 2)]

    async def _connection(self, new: bool) -> "_Connection":
        while self._idle and not new:
            connection = self._idle.popleft()
            if not connection.ended:
                return connection
            connection.close()
        try:
            return _Connection(*await asyncio.open_connection("127.0.0.1", self._port))
        except OSError as error:
            raise AnswerLost(repr(error), None) from error

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.local_port: int = writer.get_extra_info("sockname")[1]

    @property
    def ended(self) -> bool:
        """Whether the server has closed it."""
        return self._reader.at_eof() or self._reader.exception() is not None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


class _GrpcDoor:
    """V2 over one channel that stays."""

    name = "grpc"

    def __init__(self, port: int, model: str, rows: Sequence[Row]) -> None:
        self._port = port
        self._channel = self._connect()
        self._free = asyncio.Semaphore(N_CONNECTIONS)
        self._requests = [_infer_request(model, row) for row in rows[:N_ROWS]]

    async def score(self, row: int, again: bool = False) -> tuple[int, float, str]:
        """Version, score and prediction id; `again` over a channel of its own, since this one may give the call to a connection whose end
        it has not noticed: it learns of that in a thread of its own, after the call that broke.

        Raises:
            AnswerLost: An error instead of an answer.
        """
        try:
            async with self._free, self._connect() if again else nullcontext(self._channel) as channel:
                reply = await pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(self._requests[row], timeout=30)
        except grpc.aio.AioRpcError as error:
            raise AnswerLost(f"{error.code()} {error.details()}", None) from error
        raw = dict(zip((output.name for output in reply.outputs), reply.raw_output_contents, strict=True))
        return int(reply.model_version), float(np.frombuffer(raw["score"])[0]), raw["prediction_id"][4:].decode()

    def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=[("grpc.use_local_subchannel_pool", 1)])

    async def close(self) -> None:
        await self._channel.close()


def _infer_request(model: str, row: Row) -> Any:
    request = pb.ModelInferRequest(model_name=model)
    for name, value in row.items():
        if name in ("carrier", "origin"):
            request.inputs.add(name=name, datatype="BYTES", shape=[1], contents={"bytes_contents": [(value or "").encode()]})
        else:
            number = float("nan") if value is None else float(value)
            request.inputs.add(name=name, datatype="FP64", shape=[1], contents={"fp64_contents": [number]})
    return request
