"""Steady HTTP load on the scorer, and the client's own log of it: what a swap is judged by is written down here, not in the mesh."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlparse

MODEL = "flight-delay"
TIMEOUT_S = 10.0
TICK_S = 0.01

KEEP_S = 2.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Door = Literal["native", "v2"]
Choose = Callable[[random.Random], "Asked | None"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A flight to ask about, with the columns the model would see (only the V2 door sends them)."""

    entity_id: str
    event_time: str
    columns: Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request as its client saw it. Latency counts from when it was due, so a server that stalls cannot hide it."""

    due_at: float
    door: Door
    entity_id: str
    status: int | None  # None: no answer
    latency_ms: float
    prediction_id: str | None
    version: int | None
    score: float | None

    @property
    def failed(self) -> bool:
        return self.status != 200 or self.prediction_id is None


def failures(calls: Iterable[Call]) -> dict[str, int]:
    """How many failed, by HTTP status or for want of an answer."""
    return dict(Counter(str(call.status or "no answer") for call in calls if call.failed))


class Load:
    """Asks at a rate, whatever the answers take (open loop). Every fourth request goes through the V2 door, with values."""

    def __init__(self, url: str, rate: float, choose: Choose) -> None:
        parsed = urlparse(url)
        self._host, self._port = parsed.hostname or "127.0.0.1", parsed.port or 80
        self.rate = rate  # requests a second; may be changed while it runs
        self._choose = choose
        self._random = random.Random(2013)
        self._idle: list[tuple[float, Connection]] = []  # since when, the longest first
        self._running: set[asyncio.Task[None]] = set()
        self.calls: list[Call] = []

    async def run(self) -> None:
        """Until cancelled; then what is under way is answered first."""
        try:
            due = time.time()
            while True:
                due += 1 / self.rate
                if (ahead := due - time.time()) > TICK_S:
                    await asyncio.sleep(ahead)
                if (asked := self._choose(self._random)) is not None:
                    door: Door = "v2" if self._random.random() < 0.25 else "native"
                    task = asyncio.create_task(self._ask(door, asked, min(due, time.time())))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
        finally:
            await asyncio.gather(*self._running)
            for _, (_, writer) in self._idle:
                writer.close()

    async def _ask(self, door: Door, asked: Asked, due: float) -> None:
        status, answer = None, None
        # No answer at all is a failure of the mesh like any other, and is logged as one.
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(TIMEOUT_S):
                status, answer = await self._post(*_request(door, asked))
        latency_ms = (time.time() - due) * 1000
        receipt = _receipt(door, answer) if status == 200 and answer is not None else (None, None, None)
        self.calls.append(Call(due, door, asked.entity_id, status, latency_ms, *receipt))

    async def _post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """One request on a kept connection. A hundred lines of a client library would cost more than the score does."""
        reader, writer = self._kept() or await asyncio.open_connection(self._host, self._port)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            answer = json.loads(await reader.readexactly(int(headers["content-length"])))
        except BaseException:
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((time.monotonic(), (reader, writer)))
        return int(lines[0].split()[1]), answer

    def _kept(self) -> Connection | None:
        """An open connection that the server will not close just now: it does so after some seconds without a request."""
        while self._idle and time.monotonic() - self._idle[0][0] > KEEP_S:
            self._idle.pop(0)[1][1].close()
        return self._idle.pop()[1] if self._idle else None


def _request(door: Door, asked: Asked) -> tuple[str, bytes]:
    if door == "native":
        return f"/v1/models/{MODEL}:score", json.dumps({"entity_id": asked.entity_id, "event_time": asked.event_time}).encode()
    inputs = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [value or ""]}
        if isinstance(value, str)
        else {"name": name, "shape": [1], "datatype": "FP64", "data": [value if value is not None else float("nan")]}
        for name, value in asked.columns().items()
    ]
    return f"/v2/models/{MODEL}/infer", json.dumps({"inputs": inputs}).encode()


def _receipt(door: Door, answer: dict[str, Any]) -> tuple[str | None, int | None, float | None]:
    if door == "native":
        return answer["prediction_id"], int(answer["version"]), float(answer["score"])
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    return outputs["prediction_id"][0], int(answer["model_version"]), float(outputs["score"][0])
