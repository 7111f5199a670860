"""Running a service's application."""

import signal
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from mojomesh_chassis.faults import arm_faults
from mojomesh_chassis.settings import AnySettings, read_settings
from mojomesh_chassis.telemetry import start_telemetry


def serve(service: str, build: Callable[[AnySettings], FastAPI], settings_type: type[AnySettings]) -> None:
    """Serve until SIGTERM or SIGINT; then stop accepting, finish what is in flight, close what is open."""
    settings = read_settings(settings_type)
    start_telemetry(service, settings)
    arm_faults(settings.fault)
    # Having shut down in good order, uvicorn raises the signal again: without this the process would look killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        build(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=30,
    )
