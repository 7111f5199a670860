"""A way around ASGI for short requests, under the same port as the application (docs/decisions/0009-fast-lane.md)."""

from collections.abc import Callable
from typing import NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SHORT_BYTES = 16 * 1024
TRACED = 1_000  # one request of so many without a trace of its own takes the long way, which begins one
MOST_HEADS, HEAD_BYTES = 1_000, 2_048  # that are remembered; a client sends a few, again and again

Answer = Callable[[bytes], bytes | None]
"""A request's body to its answer's; None when the application must answer."""

Route = Callable[[bytes], Answer | None]
"""A request's path to what may answer it."""


class _Head(NamedTuple):
    answer: Answer
    n_body: int


class Lane:
    """What all connections of a worker share."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.heads: dict[bytes, _Head] = {}
        """By all bytes before a body: requests that begin like one that was parsed, and answered here, need no parsing."""
        self.n_requests = 1
        self._headers: list[tuple[bytes, bytes]] = []
        self._start = b""

    def learn(self, data: bytes, n_body: int, answer: Answer) -> None:
        """Remember the head of a request, if `data` is all of it and nothing else."""
        n_head = data.find(b"\r\n\r\n") + 4
        if len(data) - n_head == n_body and n_head <= HEAD_BYTES:
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


class FastLane(HttpToolsProtocol):
    """uvicorn's protocol, with a way around ASGI for requests that can be answered at once."""

    lane: Lane
    _answer: Answer | None = None  # of a request that may take the fast lane
    _body: bytearray
    _data = b""  # what came last, if a request begins with it
    _amid = False  # a request has begun and not ended
    _used = False  # since the keep-alive time began

    def data_received(self, data: bytes) -> None:
        if not self._amid and (self.cycle is None or self.cycle.response_complete):
            n_head = data.find(b"\r\n\r\n") + 4
            head = self.lane.heads.get(data[:n_head])
            if head is not None and len(data) - n_head == head.n_body and self.lane.n_requests % TRACED:
                if (content := head.answer(data[n_head:])) is not None:
                    self._used = True
                    self.lane.n_requests += 1
                    self.transport.write(b"%s%d\r\n\r\n%s" % (self.lane.start(self.server_state.default_headers), len(content), content))
                    return
                del self.lane.heads[data[:n_head]]  # nor would it be answered here when it has been parsed
        self._data = b"" if self._amid else data
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._amid = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        plain = self.parser.get_method() == b"POST" and not self.expect_100_continue and not self.parser.should_upgrade()
        if plain and (self.cycle is None or self.cycle.response_complete) and not any(name in _LONG_WAY for name, _ in self.headers):
            self._answer = self.lane.route(self.url)
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
        if self._answer is not None:
            content = self._answer(bytes(self._body)) if self.lane.n_requests % TRACED else None
            self.lane.n_requests += 1
            if content is not None:
                self._write(content, self._answer)
                return
            self._take_long_way()
        super().on_message_complete()

    def shutdown(self) -> None:
        if self._answer is not None:
            self._take_long_way()  # which finishes what has begun
        super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        if self._used:  # a timer is not set anew for each request, which would cost as much as to read it
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

    def _write(self, content: bytes, answer: Answer) -> None:
        self._answer = None
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        closing = b"" if keep_alive else b"\r\nconnection: close"
        start = self.lane.start(self.server_state.default_headers)
        self.transport.write(b"%s%d%s\r\n\r\n%s" % (start, len(content), closing, content))
        if keep_alive:
            self.lane.learn(self._data, len(self._body), answer)
            self._wait_for_next()
        else:
            self.transport.close()

    def _wait_for_next(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)


_LONG_WAY = {b"traceparent", b"inference-header-content-length", b"content-encoding"}
"""Headers that the fast lane knows nothing about."""
