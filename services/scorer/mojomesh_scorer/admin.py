"""The supervisor's operations: reload by hand, replay, the workers, everybody's metrics."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

from mojomesh_chassis.http import Protected
from mojomesh_chassis.publishing import Publisher
from mojomesh_scorer.metrics import merged_metrics
from mojomesh_scorer.pool import Pool
from mojomesh_scorer.swaps import Swaps

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

router = APIRouter()
admin = APIRouter(prefix="/admin", dependencies=[Protected], tags=["admin"])


class ReloadAsked(BaseModel):
    """Which model; without version and bundle, what was promoted last."""

    model_config = ConfigDict(extra="forbid")

    model: str
    version: int | None = Field(default=None, ge=1)
    bundle_digest: Digest | None = None


class ReplayAsked(BaseModel):
    """A row as its receipt has it: encoded, None is missing."""

    model_config = ConfigDict(extra="forbid")

    bundle_digest: Digest
    inputs: list[float | None]


async def _swaps(request: Request) -> Swaps:
    swaps: Swaps = request.state.swaps
    return swaps


@admin.post("/reload-model")
async def reload_model(asked: ReloadAsked, swaps: Annotated[Swaps, Depends(_swaps)], request: Request) -> JSONResponse:
    """Load and serve a version by hand; answers with the certificate, with 409 when the old version goes on serving."""
    certificate = await swaps.reload(asked.model, asked.version, asked.bundle_digest)
    publisher: Publisher = request.state.publisher
    await publisher.publish([certificate])
    return JSONResponse(certificate.model_dump(mode="json"), 200 if certificate.succeeded else 409)


@admin.post("/replay")
async def replay(asked: ReplayAsked, swaps: Annotated[Swaps, Depends(_swaps)]) -> dict[str, list[float]]:
    """Recompute the scores of a prediction from its bundle, in a process of its own: the same to the last bit."""
    return {"scores": await swaps.replay(asked.bundle_digest, asked.inputs)}


@admin.get("/workers")
async def workers(request: Request) -> list[dict[str, Any]]:
    """The worker processes, and what each serves."""
    pool: Pool = request.state.pool
    return [
        {
            "slot": worker.slot,
            "pid": worker.process.pid,
            "open": worker.open,
            "serving": {served.model: served.version for served in worker.serving.values()},
            "beside": {model: [served.version for served, _ in beside.versions] for model, beside in worker.beside.items()},
        }
        for worker in sorted(pool.members, key=lambda worker: worker.slot)
    ]


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Everybody's metrics on one page; taken instead of the chassis' own, which would be the supervisor's alone."""
    folder: Path = request.state.metrics
    return Response(merged_metrics(folder), media_type=CONTENT_TYPE_LATEST)


router.include_router(admin)
