"""An application on a port of its own, in this process."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI

from mojomesh_chassis.fast_lane import FastLane


class Serving(uvicorn.Server):
    """uvicorn, without taking the signals over."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


def app_with(router: APIRouter, state: Mapping[str, Any]) -> FastAPI:
    """An application whose lifespan yields `state`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        yield state

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    return app


@asynccontextmanager
async def serving(app: FastAPI, **options: Any) -> AsyncIterator[Serving]:
    """Serve, with a fast lane, until this is left; then what is in flight has been finished."""
    server = Serving(
        uvicorn.Config(app, port=0, http=FastLane, access_log=False, log_level="warning", timeout_graceful_shutdown=10, **options)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        await task
