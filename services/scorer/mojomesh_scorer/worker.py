"""A worker process: a whole server with its own event loop and JVM, on ports that it shares with the other workers.

It is started by the supervisor with its end of the control socket, the two ports and the supervisor's process id.
"""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import uvicorn
import uvloop
from fastapi import FastAPI

from mojomesh_chassis.consuming import consuming
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.fast_lane import FastLane, Lane
from mojomesh_chassis.faults import arm_faults
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.publishing import Publisher, open_publisher
from mojomesh_chassis.redis import open_redis
from mojomesh_chassis.serving import KEEP_ALIVE_S
from mojomesh_chassis.settings import read_settings
from mojomesh_chassis.telemetry import asking, log, start_telemetry
from mojomesh_scorer import rest, routes, worker_handlers
from mojomesh_scorer.control import (
    Command,
    Commit,
    Committed,
    Count,
    Counted,
    Discard,
    Done,
    Drain,
    Drained,
    Load,
    Loaded,
    OpenDoors,
    Reply,
    Surround,
    obey,
)
from mojomesh_scorer.doors import Doors
from mojomesh_scorer.grpc_door import serving_grpc
from mojomesh_scorer.lookups import FeatureLookup
from mojomesh_scorer.models import Models
from mojomesh_scorer.mojo import start_jvm
from mojomesh_scorer.parent import die_with
from mojomesh_scorer.receipts import open_receipts
from mojomesh_scorer.scoring import Scoring
from mojomesh_scorer.settings import Settings
from mojomesh_scorer.shadows import open_shadowing
from mojomesh_scorer.short_answers import ShortAnswers
from mojomesh_store.online import OnlineStore

LOOKUP_S = 5.0
GRACE_S = 10
SWITCH_S = 0.001  # how long a thread with a large block may keep the event loop waiting for Python's lock; by default 5 ms
MOST_CONNECTIONS = 512


@contextmanager
def opened_above_connections() -> Iterator[None]:
    """Give listeners that are opened meanwhile higher file numbers than most connections will have.

    Linux closes the files of a killed process from the highest number down. A listener that goes after connections would take, and drop,
    the clients that ask again because their connection just broke.
    """
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    below = [os.open(os.devnull, os.O_RDONLY) for _ in range(min(MOST_CONNECTIONS, most_files // 2))]
    try:
        yield
    finally:
        for file in below:
            os.close(file)


class Worker:
    """What the supervisor's commands do."""

    def __init__(self, settings: Settings, ports: tuple[int, int], doors: Doors, publisher: Publisher, definitions: Definitions) -> None:
        self._settings = settings
        self._ports = ports
        self._doors = doors
        self._publisher = publisher
        self._definitions = definitions
        self._open = AsyncExitStack()

    async def do(self, command: Command) -> Reply:
        """Carry out one command."""
        models = self._doors.scoring.models
        match command:
            case Load():
                model = await models.stage(command.model, command.version, command.digest, command.folder)
                return Loaded(golden_rows=model.golden_rows, max_golden_difference=model.golden_difference, scored_by=model.scored_by)
            case Commit():
                return Committed(in_flight=models.commit(command.model, command.digest))
            case Surround():
                models.surround(command.model, command.challengers)
            case Discard():
                models.discard(command.model, command.digest)
            case Drain():
                return Drained(in_time=await models.drain(command.model, command.timeout_s))
            case OpenDoors():
                await self._open_doors(str(command.slot))
            case Count():
                scoring = self._doors.scoring
                return Counted(failed_requests=scoring.failed_requests, latencies=scoring.tallies.latencies)
        return Done()

    async def _open_doors(self, slot: str) -> None:
        health = Health()
        http, grpc = self._ports
        scoring = self._doors.scoring
        await self._open.enter_async_context(
            consuming(
                worker_handlers.router,
                self._settings,
                self._publisher,
                health,
                slot=slot,
                scoring=scoring,
                definitions=self._definitions,
                replica=self._settings.replica,
            )
        )
        short = ShortAnswers(self._doors)
        app = _app(self._settings, health, self._doors, Lane(short.route))
        with opened_above_connections():
            await self._open.enter_async_context(serving_grpc(self._doors, short, self._settings.host, grpc))
            await self._open.enter_async_context(serving_http(app, self._settings.host, http))
        # Python's oldest generation would cost pauses of tens of milliseconds: what lives now lives for ever. And what a request makes
        # is gone before a block of receipts is: to look through it 70 times in that time finds nothing.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        self._doors.ready = True

    async def close_doors(self) -> None:
        """Take no more requests, finish those in flight."""
        self._doors.ready = False
        await self._open.aclose()


def _app(settings: Settings, health: Health, doors: Doors, lane: Lane) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, object]]:
        yield {"doors": doors, "lane": lane}

    return mesh_app("scorer", settings, health, lifespan, routes.router, rest.router)


class _Server(uvicorn.Server):
    """uvicorn, which would take the signals over and die of them at its end; here the worker has them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving_http(app: FastAPI, host: str, port: int) -> AsyncIterator[None]:
    """Serve on a port that other workers share; at the end requests in flight finish."""
    shared = socket.socket()
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((host, port))
    config = uvicorn.Config(
        app,
        http=FastLane,
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[shared]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def work(settings: Settings, control: socket.socket, ports: tuple[int, int]) -> None:
    """Do as the supervisor says, until it or a signal ends this."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, log.debug, "interrupt_left_to_supervisor")
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(open_publisher(settings))
        client = await stack.enter_async_context(asking(settings, LOOKUP_S))
        receipts = await stack.enter_async_context(open_receipts(publisher, settings.replica, settings.receipts_waiting))
        online = OnlineStore(await stack.enter_async_context(open_redis(settings.redis)))
        definitions = Definitions()
        shadowing = await stack.enter_async_context(open_shadowing(publisher, settings.shadows_waiting, settings.shadows_every_s))
        lookup = FeatureLookup(client, settings.features_url, online, definitions)
        scoring = Scoring(Models(), lookup, shadowing, settings.max_in_flight)
        worker = Worker(settings, ports, Doors(scoring, receipts), publisher, definitions)
        stack.push_async_callback(worker.close_doors)
        obeying = asyncio.create_task(obey(control, worker.do))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([obeying, stopping], return_when=asyncio.FIRST_COMPLETED)
        if obeying.done():
            obeying.result()
        else:
            obeying.cancel()
        stopping.cancel()


def main(control: int, http: int, grpc: int, parent: int) -> None:
    """Be a worker."""
    die_with(parent)
    sys.setswitchinterval(SWITCH_S)
    settings = read_settings(Settings)
    start_telemetry("scorer", settings)
    arm_faults(settings.fault)
    start_jvm(settings.heap_mb)
    gc.freeze()  # what is imported lives for ever: to look through it when the doors open takes 0.1 s
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(settings, socket.socket(fileno=control), (http, grpc)))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
