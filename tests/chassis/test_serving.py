"""A service as a process of its own."""

import asyncio
import os
import sys
from pathlib import Path

import httpx
import pytest

from mojomesh_chassis.serving import KEEP_ALIVE_S
from mojomesh_local import ports
from mojomesh_local.processes import Command, Server

SERVICE = """
import sys
from fastapi import FastAPI
from mojomesh_chassis import serving
from mojomesh_chassis.settings import MeshSettings

serving.KEEP_ALIVE_S = int(sys.argv[1])
app = FastAPI()
app.get("/health/ready")(lambda: {})
serving.serve("idle", lambda _: app, MeshSettings)
"""
NEEDED = {"MOJOMESH_KAFKA": "unused", "MOJOMESH_POSTGRES": "unused", "MOJOMESH_OBJECTS": "file:///", "MOJOMESH_TOKEN": "x" * 16}


@pytest.mark.parametrize(("keep_alive_s", "is_closed"), [(KEEP_ALIVE_S, False), (5, True)])
async def test_a_connection_outlives_the_time_for_which_clients_keep_it(keep_alive_s: int, is_closed: bool, tmp_path: Path) -> None:
    """Otherwise it may be closed just as a request comes on it; the control keeps it as long as uvicorn would."""
    port = ports.choose()
    command = Command(
        "idle", [sys.executable, "-c", SERVICE, str(keep_alive_s)], tmp_path / "log", {**os.environ, **NEEDED, "PORT": str(port)}
    )
    server = Server(command, (port,), ready=lambda: ports.says_ok(f"http://127.0.0.1:{port}/health/ready")).start()
    clients_keep_s = httpx.Limits().keepalive_expiry
    assert clients_keep_s
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/ready HTTP/1.1\r\nHost: idle\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n{}")
        await asyncio.sleep(clients_keep_s + 1)
        assert reader.at_eof() == is_closed
        writer.close()
    finally:
        server.stop()
