"""The wiring of ingest."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.outbox import relaying
from mojomesh_chassis.publishing import open_publisher
from mojomesh_ingest import handlers, routes
from mojomesh_ingest.emptying import emptying
from mojomesh_ingest.parking import Parking
from mojomesh_ingest.quarantine import OUTBOX
from mojomesh_ingest.settings import Settings
from mojomesh_store.shards import open_feature_store


def build(settings: Settings) -> FastAPI:
    """The application, with its clients opened by its lifespan."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with AsyncExitStack() as stack:
            definitions = Definitions()
            feature_store = await stack.enter_async_context(open_feature_store(settings.postgres_urls))
            health.add("postgres", feature_store.ping)
            await stack.enter_async_context(emptying(feature_store, health))
            publisher = await stack.enter_async_context(open_publisher(settings))
            database = feature_store.shards[0]  # holds the services' own tables too
            relay = await stack.enter_async_context(relaying(database, OUTBOX, publisher, health))
            resources: dict[str, Any] = {"feature_store": feature_store, "definitions": definitions, "parking": Parking()}
            consumers = consuming(handlers.router, settings, publisher, health, **resources)
            await stack.enter_async_context(consumers)  # opened last, so closed first
            yield {"definitions": definitions, "publisher": publisher, "database": database, "relay": relay}

    return mesh_app("ingest", settings, health, lifespan, routes.router)
