"""A way around ASGI for short requests, under the same port as the application (docs/decisions/0009-fast-lane.md)."""

from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SHORT_BYTES = 16 * 1024
TRACED = 1_000  # one request of so many without a trace of its own takes the long way, which begins one

Answer = Callable[[bytes, bytes | bytearray], bytes | None]
"""Path and body to the answer's body; None when the application must answer."""


class FastLane(HttpToolsProtocol):
    """uvicorn's protocol, with a way around ASGI for requests that `answer` can answer at once."""

    answer: Answer
    _body: bytearray | None = None  # of a request that may take the fast lane
    _n_requests = 0

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        plain = self.parser.get_method() == b"POST" and not self.expect_100_continue and not self.parser.should_upgrade()
        if plain and (self.cycle is None or self.cycle.response_complete) and not any(name in _LONG_WAY for name, _ in self.headers):
            self._body = bytearray()
        else:
            self._take_long_way()

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            super().on_body(body)
            return
        self._body += body
        if len(self._body) > SHORT_BYTES:
            self._take_long_way()

    def on_message_complete(self) -> None:
        if self._body is not None:
            FastLane._n_requests += 1
            content = self.answer(self.url, self._body) if FastLane._n_requests % TRACED else None
            if content is not None:
                self._write(content)
                return
            self._take_long_way()
        super().on_message_complete()

    def shutdown(self) -> None:
        if self._body is not None:
            self._take_long_way()  # which finishes what has begun
        super().shutdown()

    def _take_long_way(self) -> None:
        """Let ASGI have the request, as if it had had it from the beginning."""
        url, headers, expects, body, self._body = self.url, self.headers, self.expect_100_continue, self._body, None
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()
        if body:
            super().on_body(bytes(body))

    def _write(self, content: bytes) -> None:
        self._body = None
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        headers = b"".join([b"%s: %s\r\n" % header for header in self.server_state.default_headers])
        self.transport.write(
            b"HTTP/1.1 200 OK\r\n%scontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n%s"
            % (headers, len(content), b"" if keep_alive else b"connection: close\r\n", content)
        )
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()


_LONG_WAY = {b"traceparent", b"inference-header-content-length", b"content-encoding"}
"""Headers that the fast lane knows nothing about."""
