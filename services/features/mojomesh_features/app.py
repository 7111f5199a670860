"""The wiring of features."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.fast_lane import Lane
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.outbox import relaying
from mojomesh_chassis.publishing import open_publisher
from mojomesh_chassis.redis import open_redis
from mojomesh_features import handlers, routes
from mojomesh_features.champions import ChampionBundles, Champions
from mojomesh_features.judging import OUTBOX, Judge, judging
from mojomesh_features.nearest import Neighbours
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Retired, retiring
from mojomesh_features.sealing import Due, Sealer, sealing
from mojomesh_features.settings import FeaturesSettings
from mojomesh_features.short_answers import ShortAnswers
from mojomesh_features.skew import SkewMonitor, watching_skew
from mojomesh_features.snapshots import Snapshots
from mojomesh_features.work_folder import open_work_folder
from mojomesh_store.online import OnlineStore
from mojomesh_store.shards import open_feature_store


def build(settings: FeaturesSettings) -> FastAPI:
    """The application; its clients are made when it starts and closed when it ends."""
    health = Health()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            work_folder = stack.enter_context(open_work_folder(settings.work_folder))
            feature_store = await stack.enter_async_context(open_feature_store(settings.postgres_urls))
            database = feature_store.shards[0]  # holds the services' own tables too
            online = OnlineStore(await stack.enter_async_context(open_redis(settings.redis)))
            objects = open_objects(settings.objects)
            publisher = await stack.enter_async_context(open_publisher(settings))
            # Redis has no ping here: without it answers are the same.
            health.add("postgres", database.ping)
            health.add("shards", feature_store.ping)
            health.add("objects", objects.ping)
            definitions = Definitions()
            snapshots = Snapshots(feature_store, settings.postgres_urls, objects, work_folder, settings.memory_limit)
            champions, bundles = Champions(), ChampionBundles(objects, work_folder / "bundles", settings.public_key)
            await stack.enter_async_context(
                consuming(
                    handlers.router,
                    settings,
                    publisher,
                    health,
                    online=online,
                    database=database,
                    definitions=definitions,
                    champions=champions,
                    bundles=bundles,
                )
            )
            sealer = Sealer(feature_store, settings.postgres_urls, objects, work_folder, settings.memory_limit)
            due = Due(settings.seal_rows, settings.seal_age)
            await stack.enter_async_context(sealing(sealer, definitions, due, health))
            await stack.enter_async_context(retiring(feature_store, definitions, retired := Retired(), settings.keep, health))
            monitor = SkewMonitor(snapshots, database, champions, bundles, definitions)
            await stack.enter_async_context(watching_skew(monitor, settings.compare_every, health))
            relay = await stack.enter_async_context(relaying(database, OUTBOX, publisher, health))
            await stack.enter_async_context(judging(Judge(feature_store, definitions, relay), health))
            yield {
                "lane": Lane(ShortAnswers(online, definitions, retired).route),
                "database": database,
                "feature_store": feature_store,
                "reader": FeatureReader(feature_store, online, retired),
                "neighbours": Neighbours(feature_store, retired),
                "definitions": definitions,
                "snapshots": snapshots,
                "sealer": sealer,
            }

    return mesh_app("features", settings, health, lifespan, routes.router)
