"""A way around ASGI for short requests, under the same port as the application (docs/decisions/0009-fast-lane.md)."""

import asyncio
from asyncio import Future
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

SHORT_BYTES = 16 * 1024
TRACED = 1_000  # one request of so many without a trace of its own takes the long way, which begins one
MOST_HEADS, HEAD_BYTES = 1_000, 2_048  # that are remembered; a client sends a few, again and again

Headers = Sequence[tuple[bytes, bytes]]
"""Of a request; the names are in small letters."""

Answer = Callable[[bytes], "bytes | Future[bytes | None] | None"]
"""A request's body to its answer's, at once or later; None (at once or later) when the application must answer."""

Route = Callable[[bytes, Headers], Answer | None]
"""A request's path and headers to what may answer it."""


class _Head(NamedTuple):
    answer: Answer
    n_body: int


class Lane:
    """What all connections of a process share."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.heads: dict[bytes, _Head] = {}
        """By all bytes before a body: requests that begin like one that was parsed, and answered here, need no parsing."""
        self.n_requests = 1
        self._headers: list[tuple[bytes, bytes]] = []
        self._start = b""

    def learn(self, data: bytes, n_body: int, answer: Answer) -> None:
        """Remember the head of a request, which `data` is all of."""
        if (n_head := len(data) - n_body) <= HEAD_BYTES:
            if len(self.heads) >= MOST_HEADS:
                self.heads.clear()
            self.heads[data[:n_head]] = _Head(answer, n_body)

    def start(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """An answer's bytes up to its length; `headers` is another list whenever the time in it is."""
        if headers is not self._headers:
            lines = [b"%s: %s\r\n" % header for header in headers]
            self._headers, self._start = (
                headers,
                b"HTTP/1.1 200 OK\r\n%scontent-type: application/json\r\ncontent-length: " % b"".join(lines),
            )
        return self._start


def is_whole(data: bytes, n_body: int) -> bool:
    """Whether data that begins with a request whose body has `n_body` bytes ends with it."""
    return data.find(b"\r\n\r\n") + 4 + n_body == len(data)


class FastLane(HttpToolsProtocol):
    """uvicorn's protocol, with a way around ASGI for requests that the `lane` in the lifespan's state can answer."""

    _answer: Answer | None = None  # of a request that may take the fast lane
    _body: bytearray
    _data = b""  # all of the request so far, if it began with what came then
    _amid = False  # a request has begun and not ended
    _used = False  # since the keep-alive time began
    _later: "Future[bytes | None] | None" = None  # the answer to the request in `_data`, which is still to come
    _held = b""  # what came after that request
    _keep_alive = True  # after the answer
    _refused = False  # the request in `_data` was tried, and is the application's

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.lane: Lane = app_state["lane"]

    def data_received(self, data: bytes) -> None:
        if self._later is not None:
            self._held += data
            self.flow.pause_reading()
            return
        if not self._amid and not self.flow.write_paused and (self.cycle is None or self.cycle.response_complete):
            n_head = data.find(b"\r\n\r\n") + 4
            head = self.lane.heads.get(data[:n_head])
            if head is not None and len(data) - n_head == head.n_body and self.lane.n_requests % TRACED:
                if (content := head.answer(data[n_head:])) is not None:
                    self._used = True
                    self.lane.n_requests += 1
                    if isinstance(content, bytes):
                        start = self.lane.start(self.server_state.default_headers)
                        self.transport.write(b"%s%d\r\n\r\n%s" % (start, len(content), content))
                    else:
                        self._data, self._keep_alive = data, True
                        self._wait_for(content)
                    return
                del self.lane.heads[data[:n_head]]  # nor would it be answered here when it has been parsed
        if not self._amid:
            self._data = data
        else:
            self._data = self._data + data if self._answer is not None else b""
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._amid = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        plain = self.parser.get_method() == b"POST" and not self.expect_100_continue and not self.parser.should_upgrade()
        free = not self._refused and not self.flow.write_paused and (self.cycle is None or self.cycle.response_complete)
        if plain and free and not any(name in _LONG_WAY for name, _ in self.headers):
            self._answer = self.lane.route(self.url, self.headers)
        if self._answer is None:
            self._take_long_way()
        else:
            self._body = bytearray()

    def on_body(self, body: bytes) -> None:
        if self._answer is None:
            super().on_body(body)
            return
        self._body += body
        if len(self._body) > SHORT_BYTES:
            self._take_long_way()

    def on_message_complete(self) -> None:
        self._amid = False
        if (answer := self._answer) is not None:
            content = answer(bytes(self._body)) if self.lane.n_requests % TRACED else None
            self.lane.n_requests += 1
            self._keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
            plain = self._keep_alive and is_whole(self._data, len(self._body))
            if plain and content is not None:
                self.lane.learn(self._data, len(self._body), answer)
            if isinstance(content, bytes):
                self._answer = None
                self._write(content)
                return
            if content is not None and plain:
                self._answer = None
                self._wait_for(content)
                return
            if content is not None:
                content.cancel()  # should there be none, the request could not be parsed again
            self._take_long_way()
        super().on_message_complete()

    def shutdown(self) -> None:
        if self._later is not None:
            self._keep_alive = False
            return
        if self._answer is not None:
            self._take_long_way()  # which finishes what has begun
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._later is not None:
            later, self._later = self._later, None
            later.cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        if self._used or self._later is not None:  # a timer is not set anew for each request, which would cost as much as to read it
            self._used = False
            self._wait_for_next()
        else:
            super().timeout_keep_alive_handler()

    def _take_long_way(self) -> None:
        """Let ASGI have the request, as if it had had it from the beginning."""
        url, headers, expects, answer, self._answer = self.url, self.headers, self.expect_100_continue, self._answer, None
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()
        if answer is not None and self._body:
            super().on_body(bytes(self._body))

    def _wait_for(self, content: "Future[bytes | None]") -> None:
        self._later = content
        content.add_done_callback(self._come)

    def _come(self, later: "Future[bytes | None]") -> None:
        """The answer has come, or that there is none."""
        if self._later is not later:
            return  # the connection is lost
        self._later = None
        if (content := later.result()) is not None:
            self._write(content)
        else:
            self._refused = True
            super().data_received(self._data)
            self._refused = False
            if not self._keep_alive:
                super().shutdown()
        held, self._held = self._held, b""
        if held and not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(held)

    def _write(self, content: bytes) -> None:
        closing = b"" if self._keep_alive else b"\r\nconnection: close"
        start = self.lane.start(self.server_state.default_headers)
        self.transport.write(b"%s%d%s\r\n\r\n%s" % (start, len(content), closing, content))
        if not self._keep_alive:
            self.transport.close()
        elif self.timeout_keep_alive_task is None:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)


_LONG_WAY = {b"traceparent", b"content-encoding"}
"""Headers that the fast lane knows nothing about."""
