"""The wiring of registry."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.database import open_database
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.outbox import relaying
from mojomesh_chassis.publishing import open_publisher
from mojomesh_registry import handlers, routes
from mojomesh_registry.settings import RegistrySettings
from mojomesh_registry.tables import OUTBOX


def build(settings: RegistrySettings) -> FastAPI:
    """The application; its clients are made when it starts and closed when it ends."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(open_database(settings.postgres_urls[0]))
            objects = open_objects(settings.objects)
            health.add("postgres", database.ping)
            health.add("objects", objects.ping)
            publisher = await stack.enter_async_context(open_publisher(settings))
            relay = await stack.enter_async_context(relaying(database, OUTBOX, publisher, health))
            await stack.enter_async_context(
                consuming(
                    handlers.router,
                    settings,
                    publisher,
                    health,
                    database=database,
                    objects=objects,
                    public_key=settings.public_key,
                    relay=relay,
                )
            )
            yield {"database": database, "relay": relay}

    return mesh_app("registry", settings, health, lifespan, routes.router)
