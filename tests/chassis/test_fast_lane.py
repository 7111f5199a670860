"""The fast lane with answers that come later: whatever a client does meanwhile, it gets the answers that the application would give."""

import asyncio
from asyncio import Future, StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import APIRouter, Request, Response

from mojomesh_chassis.fast_lane import SHORT_BYTES, TRACED, Answer, Headers, Lane
from tests.serving import Serving, app_with, serving

router = APIRouter()


@router.post("/{path:path}")
async def long_way(request: Request) -> Response:
    return Response(b"long " + await request.body())


class Desk:
    """Answers `now` at once, and `later` when told to."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[tuple[bytes, Future[bytes | None]]] = asyncio.Queue()

    def route(self, url: bytes, headers: Headers) -> Answer | None:
        if url == b"/now":
            return self._now
        return self._later if url == b"/later" else None

    async def answer(self, content: bytes | None = b"short ") -> None:
        """Answer who has waited longest."""
        async with asyncio.timeout(5):
            body, answer = await self.waiting.get()
        answer.set_result(content and content + body)

    def _now(self, body: bytes) -> bytes:
        return b"short " + body

    def _later(self, body: bytes) -> "Future[bytes | None]":
        answer: Future[bytes | None] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((body, answer))
        return answer


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def server(desk: Desk) -> AsyncIterator[Serving]:
    async with serving(app_with(router, {"lane": Lane(desk.route)})) as server:
        yield server


@asynccontextmanager
async def connected(server: Serving) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # whatever is still to be sent


def request_of(path: str, body: bytes, head: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: mesh\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def read_answer(reader: StreamReader) -> tuple[bytes, dict[bytes, bytes]]:
    """The body and the headers of the next answer."""
    async with asyncio.timeout(5):
        assert b" 200 " in await reader.readline()
        headers = {}
        while (line := await reader.readline()) != b"\r\n":
            name, _, value = line.strip().lower().partition(b": ")
            headers[name] = value
        return await reader.readexactly(int(headers[b"content-length"])), headers


async def test_answers_come_at_once_or_later_and_heads_are_remembered(server: Serving, desk: Desk) -> None:
    async with connected(server) as (reader, writer):
        for n in range(5):
            writer.write(request_of("/now", b"%d" % n))
            assert (await read_answer(reader))[0] == b"short %d" % n
            writer.write(request_of("/later", b"%d" % n))
            await desk.answer()
            assert (await read_answer(reader))[0] == b"short %d" % n


async def test_what_the_lane_has_no_answer_for_later_is_answered_by_the_application(server: Serving, desk: Desk) -> None:
    async with connected(server) as (reader, writer):
        for answer in (None, b"short ", None, None, b"short "):  # before and after its head is known
            writer.write(request_of("/later", b"x"))
            await desk.answer(answer)
            assert (await read_answer(reader))[0] == (answer or b"long ") + b"x"


async def test_a_request_in_pieces_gets_its_answer(server: Serving, desk: Desk) -> None:
    async with connected(server) as (reader, writer):
        for answer in (b"short ", None):
            request = request_of("/later", b"0123456789")
            for piece in (request[:-10], request[-10:-3], request[-3:]):
                writer.write(piece)
                await asyncio.sleep(0.05)  # so that the rest arrives by itself
            await desk.answer(answer)
            assert (await read_answer(reader))[0] == (answer or b"long ") + b"0123456789"


@pytest.mark.parametrize("answer", [b"short ", None])
async def test_requests_that_come_meanwhile_are_answered_in_their_order(server: Serving, desk: Desk, answer: bytes | None) -> None:
    async with connected(server) as (reader, writer):
        for body in (b"first", b"second", b"third"):
            writer.write(request_of("/later", body))
            await asyncio.sleep(0.05)
        writer.write(request_of("/now", b"fourth") + request_of("/now", b"fifth"))
        await asyncio.sleep(0.05)

        assert desk.waiting.qsize() == 1
        answering = asyncio.create_task(answer_all(desk, answer))
        bodies = [(await read_answer(reader))[0] for _ in range(5)]
        answering.cancel()

    assert [body.split()[1] for body in bodies] == [b"first", b"second", b"third", b"fourth", b"fifth"]
    assert bodies[0] == (answer or b"long ") + b"first"


async def answer_all(desk: Desk, answer: bytes | None) -> None:
    while True:
        await desk.answer(answer)


async def test_of_requests_in_one_piece_each_is_answered_in_its_turn(server: Serving, desk: Desk) -> None:
    """The lane could only answer the last one later."""
    async with connected(server) as (reader, writer):
        writer.write(b"".join(request_of(path, path.encode()) for path in ("/now", "/later", "/now", "/later")))

        assert [(await read_answer(reader))[0] for _ in range(4)] == [b"short /now", b"long /later", b"long /now", b"long /later"]


@pytest.mark.parametrize("answer", [b"short ", None])
async def test_the_server_stops_when_an_answer_that_is_to_come_has_been_given(server: Serving, desk: Desk, answer: bytes | None) -> None:
    async with connected(server) as (reader, writer):
        writer.write(request_of("/later", b"x"))
        while desk.waiting.empty():
            await asyncio.sleep(0.01)
        server.should_exit = True
        await asyncio.sleep(0.3)
        await desk.answer(answer)

        body, headers = await read_answer(reader)
        assert body == (answer or b"long ") + b"x"
        assert headers[b"connection"] == b"close" or answer is None
        assert await reader.read() == b""


@pytest.mark.parametrize(("path", "answer"), [("/now", b"short x"), ("/later", b"long x")])
async def test_who_asks_to_close_is_answered_and_let_go(server: Serving, path: str, answer: bytes) -> None:
    async with connected(server) as (reader, writer):
        writer.write(request_of(path, b"x", "Connection: close\r\n"))
        body, headers = await read_answer(reader)
        assert (body, headers[b"connection"]) == (answer, b"close")
        assert await reader.read() == b""


async def test_an_answer_is_not_worked_on_for_who_has_gone(server: Serving, desk: Desk) -> None:
    async with connected(server) as (_, writer):
        writer.write(request_of("/later", b"x"))
        _, answer = await desk.waiting.get()
    async with asyncio.timeout(5):
        while not answer.cancelled():
            await asyncio.sleep(0.01)


async def test_a_connection_is_not_closed_as_idle_while_it_waits(desk: Desk) -> None:
    async with serving(app_with(router, {"lane": Lane(desk.route)}), timeout_keep_alive=1) as server, connected(server) as (reader, writer):
        for wait_s in (0, 2.2, 0):
            writer.write(request_of("/later", b"x"))
            await asyncio.sleep(wait_s)
            await desk.answer()
            assert (await read_answer(reader))[0] == b"short x"
        assert await asyncio.wait_for(reader.read(), 5) == b""  # the control: it is closed when it is idle


async def test_one_of_a_thousand_and_what_is_not_short_takes_the_long_way(server: Serving, desk: Desk) -> None:
    async with connected(server) as (reader, writer):
        found = []
        for _ in range(2 * TRACED):
            writer.write(request_of("/now", b"x"))
            found.append((await read_answer(reader))[0])
        assert found.count(b"long x") == 2
        for path in ("/now", "/later"):
            writer.write(request_of(path, b"x" * (SHORT_BYTES + 1)))
            assert (await read_answer(reader))[0].startswith(b"long ")
            writer.write(request_of(path, b"x", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"))
            assert (await read_answer(reader))[0] == b"long x"
    assert desk.waiting.empty()


async def test_who_does_not_read_answers_is_not_read_from(server: Serving) -> None:
    """Else its answers would fill this process's memory."""
    requests = request_of("/now", b"x" * 10_000) * 100
    async with connected(server) as (_, writer):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                for _ in range(2**28 // len(requests)):
                    writer.write(requests)
                    await writer.drain()
        assert max(connection.transport.get_write_buffer_size() for connection in server.server_state.connections) < 2**22
