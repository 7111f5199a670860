"""The supervisor: owns what happens once (models to serve, bundles, swaps), has the admin port, never scores and never blocks."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import open_publisher
from mojomesh_scorer import admin
from mojomesh_scorer.handlers import router
from mojomesh_scorer.pool import open_pool
from mojomesh_scorer.settings import Settings
from mojomesh_scorer.swaps import Swaps


def build(settings: Settings) -> FastAPI:
    """The supervisor's application, on the admin port; it is up when every champion serves in every worker."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with AsyncExitStack() as stack:
            folder = settings.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mojomesh-scorer-")))
            metrics = folder / "metrics"
            shutil.rmtree(metrics, ignore_errors=True)  # of a process that was killed
            metrics.mkdir(parents=True)
            objects = open_objects(settings.objects)
            health.add("objects", objects.ping)
            publisher = await stack.enter_async_context(open_publisher(settings))
            pool = await stack.enter_async_context(open_pool(settings, metrics))
            health.add("workers", pool.ping)
            swaps = Swaps(settings, objects, pool, folder / "bundles")
            await stack.enter_async_context(consuming(router, settings, publisher, health, swaps=swaps))
            pool.open_doors()  # after the champions are known: no worker ever answers that it has none
            yield {"swaps": swaps, "pool": pool, "publisher": publisher, "metrics": metrics}

    return mesh_app("scorer", settings, health, lifespan, admin.router)
