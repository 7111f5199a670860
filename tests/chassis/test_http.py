"""What every service's HTTP door has alike."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from mojomesh_chassis.errors import Busy, Conflict, MeshError, NotFound, PermanentError, TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import Protected, mesh_app
from mojomesh_chassis.settings import MeshSettings

ERRORS: dict[str, Exception] = {
    "permanent": PermanentError("wrong"),
    "absent": NotFound("not there"),
    "conflict": Conflict("moved on"),
    "away": TransientError("later", retry_after_s=3.2),
    "busy": Busy("full"),
    "odd": MeshError("odd"),
    "bug": ZeroDivisionError("secret"),
}
router = APIRouter()


@router.get("/fail/{how}")
async def fail(how: str) -> None:
    raise ERRORS[how]


@router.get("/square/{n}")
async def square(n: int) -> int:
    return n * n


@router.post("/protected", dependencies=[Protected])
async def protected() -> str:
    return "done"


@asynccontextmanager
async def nothing(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
    yield {}


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
async def client(mesh_env: dict[str, str], health: Health) -> AsyncIterator[httpx.AsyncClient]:
    app = mesh_app("tester", MeshSettings(**mesh_env), health, nothing, router)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://tester") as client:
        yield client


@pytest.mark.parametrize(
    ("how", "status", "kind"),
    [
        ("permanent", 422, "PermanentError"),
        ("absent", 404, "NotFound"),
        ("conflict", 409, "Conflict"),
        ("away", 503, "TransientError"),
        ("busy", 429, "Busy"),
        ("odd", 500, "MeshError"),
    ],
)
async def test_each_kind_of_error_has_its_answer(how: str, status: int, kind: str, client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/fail/{how}")

    assert answer.status_code == status
    assert answer.json() == {"error": {"type": kind, "message": str(ERRORS[how])}}
    assert answer.headers.get("retry-after") == {"away": "3", "busy": "1"}.get(how)


async def test_a_bug_is_answered_without_its_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/fail/bug")

    assert answer.status_code == 500
    assert "secret" not in answer.text


async def test_a_call_that_is_malformed_says_where(client: httpx.AsyncClient) -> None:
    answer = await client.get("/square/two")

    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("path.n: Input should be a valid integer")


async def test_a_protected_call_needs_the_token(client: httpx.AsyncClient, mesh_env: dict[str, str]) -> None:
    token = mesh_env["MOJOMESH_TOKEN"]

    for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": token}, {"Authorization": "Bearer ü".encode()}):
        assert (await client.post("/protected", headers=header)).status_code == 401  # type: ignore[arg-type]
    assert (await client.post("/protected", headers={"Authorization": f"Bearer {token}"})).json() == "done"


async def test_a_service_is_ready_when_all_it_opened_answers(client: httpx.AsyncClient, health: Health) -> None:
    well = True

    async def ping() -> None:
        if not well:
            raise ConnectionError("gone")

    health.add("thing", ping)
    assert (await client.get("/health/ready")).status_code == 200
    well = False
    answer = await client.get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["problems"] == {"thing": "ConnectionError: gone"}
    assert (await client.get("/health/live")).status_code == 200
