"""The HTTP application that every service is: its routes, and what all have alike."""

import hmac
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from opentelemetry import trace
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mojomesh_chassis.errors import MeshError, TooLarge, TransientError, Unauthorized
from mojomesh_chassis.health import Health
from mojomesh_chassis.settings import MeshSettings
from mojomesh_chassis.telemetry import carried_trace, log, tracer

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]


def mesh_app(service: str, settings: MeshSettings, health: Health, lifespan: Lifespan, *routers: APIRouter) -> FastAPI:
    """A service's application: its routers, `/health/live`, `/health/ready`, `/metrics`, and one answer for each kind of error.

    An error is answered as `{"error": {"type", "message"}}` and its details; a transient one carries Retry-After.
    """
    app = FastAPI(title=f"mojomesh {service}", lifespan=lifespan)
    app.state.settings = settings
    for router in routers:
        app.include_router(router)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        problems = await health.check()
        return JSONResponse({"status": "not ready" if problems else "ready", "problems": problems}, 503 if problems else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(MeshError, _answer_mesh_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(Tracing)
    return app


async def require_token(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """Let pass only who brings the mesh's token, as `Authorization: Bearer …`.

    Raises:
        Unauthorized: The header is missing or names another token.
    """
    settings: MeshSettings = request.app.state.settings
    if not hmac.compare_digest(authorization.encode(), f"Bearer {settings.token}".encode()):
        raise Unauthorized("this call needs the mesh's token: send `Authorization: Bearer <MOJOMESH_TOKEN>`")


Protected = Depends(require_token)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request.

    Raises:
        TooLarge: It has more than `max_bytes`; the rest is not read.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise TooLarge(f"a request may bring {max_bytes} bytes here; send it in several")
    return bytes(body)


def error_body(error: Exception) -> dict[str, dict[str, Any]]:
    """An error as every door answers it."""
    details = error.details if isinstance(error, MeshError) else {}
    return {"error": {"type": type(error).__name__, "message": str(error), **details}}


async def _answer_mesh_error(_: Request, error: Exception) -> JSONResponse:
    headers = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, TransientError) else None
    return JSONResponse(error_body(error), getattr(error, "status", 500), headers)


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:10])
    return JSONResponse({"error": {"type": "ValidationError", "message": text}}, 422)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # as nginx calls it: the client went before it had sent all; no fault of ours, nobody reads this


async def _answer_bug(request: Request, error: Exception) -> JSONResponse:
    log.error("request_failed", path=request.url.path, exc_info=error)
    return JSONResponse({"error": {"type": "InternalError", "message": "a bug in mojomesh; the service's log has the traceback"}}, 500)


class Tracing:
    """A span around each request, continuing the caller's trace; pure ASGI, so that a disconnect cannot leak what the route holds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] != "http" or path.startswith(("/health", "/metrics")):
            await self._app(scope, receive, send)
            return
        parent = carried_trace({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        within = trace.set_span_in_context(trace.NonRecordingSpan(parent)) if parent.is_valid else None
        with tracer.start_as_current_span(f"{scope['method']} {path}", context=within, kind=trace.SpanKind.SERVER) as span:

            async def note_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, note_status)
