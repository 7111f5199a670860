import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from mojomesh_flights.load import Asked, Load

Answer = Callable[[str, dict[str, object]], Awaitable[tuple[int, dict[str, object]] | None]]
ASKED = Asked("UA1", "2013-05-01T10:00:00Z", lambda: {"carrier": "UA", "hour": 5, "planes.seats": None})


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """A scorer as simple as can be: `answer` gets path and body; None closes the connection without a word."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split()[1].decode()
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            answered = await answer(path, json.loads(await reader.readexactly(length)))
            if answered is None:
                break
            content = json.dumps(answered[1]).encode()
            writer.write(f"HTTP/1.1 {answered[0]} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        writer.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await converse(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def run(url: str, n: int) -> Load:
    load = Load(url, rate=500, choose=lambda _: ASKED)
    task = asyncio.create_task(load.run())
    while len(load.calls) < n:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    return load


async def well(path: str, body: dict[str, object]) -> tuple[int, dict[str, object]]:
    if path.endswith(":score"):
        assert body == {"entity_id": "UA1", "event_time": "2013-05-01T10:00:00Z"}
        return 200, {"prediction_id": "a", "version": 3, "score": 0.25}
    inputs = {tensor["name"]: tensor["data"][0] for tensor in body["inputs"]}  # type: ignore[attr-defined]
    assert inputs["carrier"] == "UA"
    assert inputs["planes.seats"] != inputs["planes.seats"]  # NaN: missing
    return 200, {"model_version": "3", "outputs": [{"name": "score", "data": [0.25]}, {"name": "prediction_id", "data": ["a"]}]}


async def test_both_doors_are_logged_alike() -> None:
    async with serving(well) as url:
        load = await run(url, 40)

    assert {call.door for call in load.calls} == {"native", "v2"}
    assert {(call.prediction_id, call.version, call.score, call.failed) for call in load.calls} == {("a", 3, 0.25, False)}


async def test_a_refusal_and_a_silence_are_failures() -> None:
    answers = iter(range(1_000))

    async def sometimes(path: str, body: dict[str, object]) -> tuple[int, dict[str, object]] | None:
        match next(answers) % 3:
            case 0:
                return 503, {"detail": "busy"}
            case 1:
                return None
        return await well(path, body)

    async with serving(sometimes) as url:
        load = await run(url, 60)

    assert {call.status for call in load.calls} == {200, 503, None}
    assert all(call.failed == (call.status != 200) for call in load.calls)


async def test_a_stalled_server_does_not_slow_the_asking() -> None:
    stalled = asyncio.Event()
    asked = 0

    async def stalls(path: str, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        nonlocal asked
        asked += 1
        if asked >= 50:
            stalled.set()
        await stalled.wait()
        return await well(path, body)

    async with serving(stalls) as url:
        load = await run(url, 50)

    assert asked >= 50  # all of them were asked before the first was answered
    assert not any(call.failed for call in load.calls)


async def test_nothing_is_asked_before_there_is_something_to_ask() -> None:
    async with serving(well) as url:
        load = Load(url, rate=1_000, choose=lambda chance: None if chance.random() >= 0 else ASKED)
        task = asyncio.create_task(load.run())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])

    assert load.calls == []
