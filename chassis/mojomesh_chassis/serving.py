"""Running a service's application."""

import gc
import signal
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mojomesh_chassis.faults import arm_faults
from mojomesh_chassis.settings import AnySettings, read_settings
from mojomesh_chassis.telemetry import start_telemetry

KEEP_ALIVE_S = 75  # longer than clients keep a connection idle: closing one just as a request comes on it fails that request


def serve(
    service: str,
    build: Callable[[AnySettings], FastAPI],
    settings_type: type[AnySettings],
    protocol: type[HttpToolsProtocol] = HttpToolsProtocol,
) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting, finish what is in flight, close what is open."""
    settings = read_settings(settings_type)
    start_telemetry(service, settings)
    arm_faults(settings.fault)
    # Having shut down in good order, uvicorn raises the signal again: without this the process would look killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = build(settings)
    settle_memory()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=30,
    )


def settle_memory() -> None:
    """Take what lives as long as the process out of the garbage collector's sight, and let it look less often.

    Its pauses over everything that was imported are the longest of all, and a batch of events makes it look hundreds of times in vain.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
