"""What supervisor and worker say to each other: JSON lines over a socket pair, a question and its answer joined by a number."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from mojomesh_chassis.errors import MeshError
from mojomesh_contracts.events import Challenger, Frozen, ScoredBy
from mojomesh_scorer.errors import LoadFailed, WorkerLost

LINE_BYTES = 2**20


class Load(Frozen):
    """Load a version beside the one that serves, and score its golden rows."""

    do: Literal["load"] = "load"
    model: str
    version: int
    digest: str
    folder: Path


class Loaded(Frozen):
    """The version is staged."""

    golden_rows: int
    max_golden_difference: float
    scored_by: ScoredBy


class Commit(Frozen):
    """Let the staged version serve from now on."""

    do: Literal["commit"] = "commit"
    model: str
    digest: str


class Committed(Frozen):
    """The reference is switched."""

    in_flight: int = Field(description="Requests that the version before is answering")


class Discard(Frozen):
    """Forget a version that is staged."""

    do: Literal["discard"] = "discard"
    model: str
    digest: str


class Surround(Frozen):
    """Let these versions, all of them staged, score beside the champion from now on, and no others."""

    do: Literal["surround"] = "surround"
    model: str
    challengers: list[Challenger]


class Drain(Frozen):
    """Wait for the requests that the version before is answering."""

    do: Literal["drain"] = "drain"
    model: str
    timeout_s: float


class Drained(Frozen):
    """They ended, or not in time."""

    in_time: bool


class OpenDoors(Frozen):
    """Listen on the ports and consume; a worker begins with its doors closed."""

    do: Literal["open_doors"] = "open_doors"
    slot: int = Field(description="Tells it apart from the other workers; its replacement has the same one")


class Count(Frozen):
    """Say how many requests failed since the worker's start, and how long the others took."""

    do: Literal["count"] = "count"


class Counted(Frozen):
    """Requests since the worker's start."""

    failed_requests: int = Field(description="Answered with a 5xx")
    latencies: list[int] = Field(description="Answered with predictions, by bucket of `latencies.BOUNDS_S`")


class Done(Frozen):
    """Nothing to tell."""


Command = Load | Commit | Surround | Discard | Drain | OpenDoors | Count
Reply = Loaded | Committed | Drained | Counted | Done
AnyReply = TypeVar("AnyReply", bound=Frozen)
Obey = Callable[[Command], Awaitable[Reply]]


class _Question(Frozen):
    number: int
    command: Annotated[Command, Field(discriminator="do")]


class _Answer(Frozen):
    number: int
    reply: dict[str, Any] | None = None
    refusal: str | None = None


class Asking:
    """The supervisor's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}
        self._reading = asyncio.create_task(self._read(reader))

    async def ask(self, command: Command, reply: type[AnyReply], timeout_s: float) -> AnyReply:
        """The worker's answer to a command.

        Raises:
            LoadFailed: The worker refuses, and says why.
            WorkerLost: It died first, or takes too long.
        """
        question = _Question(number=next(self._numbers), command=command)
        answered = asyncio.get_running_loop().create_future()
        if self._reading.done():
            raise WorkerLost("the worker is gone")
        self._waiting[question.number] = answered
        try:
            self._writer.write(question.model_dump_json().encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                answer: _Answer = await answered
        except TimeoutError:
            raise WorkerLost(f"the worker did not answer '{command.do}' within {timeout_s:g} s") from None
        finally:
            del self._waiting[question.number]
        if answer.refusal is not None:
            raise LoadFailed(answer.refusal)
        return reply.model_validate(answer.reply)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = _Answer.model_validate_json(line)
                if (waiting := self._waiting.get(answer.number)) is not None and not waiting.done():
                    waiting.set_result(answer)
        except ConnectionError:
            pass  # as at the end of the stream: the worker is gone
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(WorkerLost("the worker died"))

    def close(self) -> None:
        """Stop listening to the worker."""
        self._reading.cancel()
        self._writer.close()


async def open_asking(end: socket.socket) -> Asking:
    """The supervisor's end of a socket pair."""
    reader, writer = await asyncio.open_unix_connection(sock=end, limit=LINE_BYTES)
    return Asking(reader, writer)


async def obey(end: socket.socket, do: Obey) -> None:
    """The worker's end: carry out commands, several at a time, until the supervisor closes its end.

    A command that raises a `MeshError` is refused with its text; any other error ends the worker.
    """
    reader, writer = await asyncio.open_unix_connection(sock=end, limit=LINE_BYTES)

    async def answer(asked: _Question) -> None:
        try:
            answer = _Answer(number=asked.number, reply=(await do(asked.command)).model_dump(mode="json"))
        except MeshError as error:
            answer = _Answer(number=asked.number, refusal=str(error))
        writer.write(answer.model_dump_json().encode() + b"\n")

    async with asyncio.TaskGroup() as answering:
        while line := await reader.readline():
            answering.create_task(answer(_Question.model_validate_json(line)))
