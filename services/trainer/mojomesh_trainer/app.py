"""The wiring of trainer."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.database import open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.objects import Objects, open_objects
from mojomesh_chassis.publishing import open_publisher
from mojomesh_chassis.telemetry import asking
from mojomesh_trainer import handlers, routes
from mojomesh_trainer.runners import FoldRunner, LocalRunner, MageRunner
from mojomesh_trainer.running import Bell, Trainer, working
from mojomesh_trainer.settings import TrainerSettings


def build(settings: TrainerSettings) -> FastAPI:
    """The application; its clients are made when it starts and closed when it ends."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(open_database(settings.postgres_urls[0]))
            objects = open_objects(settings.objects)
            publisher = await stack.enter_async_context(open_publisher(settings))
            http = await stack.enter_async_context(asking(settings))
            bundles = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mojomesh-trainer-")))
            definitions, bell = Definitions(), Bell()
            health.add("postgres", database.ping)
            health.add("objects", objects.ping)
            await stack.enter_async_context(
                consuming(handlers.router, settings, publisher, health, database=database, definitions=definitions, bell=bell)
            )
            runner = _runner(settings, objects)
            trainer = Trainer(settings, database, objects, publisher, definitions, http, runner, bundles, bell)
            work = await stack.enter_async_context(working(trainer))
            health.add("runs", lambda: _alive(work))
            yield {"database": database}

    return mesh_app("trainer", settings, health, lifespan, routes.router)


def _runner(settings: TrainerSettings, objects: Objects) -> FoldRunner:
    if settings.fold_runner == "local":
        return LocalRunner(objects)
    return MageRunner(settings.mage, settings.mage_email, settings.mage_password, objects)


async def _alive(work: "asyncio.Task[None]") -> None:
    if work.done():
        raise RuntimeError(f"runs are no longer taken: {work.exception()!r}")
