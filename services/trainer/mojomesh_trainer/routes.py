"""What can be asked of trainer. Training itself is asked for through registry, by an event."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request

from mojomesh_chassis.database import Database
from mojomesh_chassis.errors import NotFound
from mojomesh_contracts.storable import Text
from mojomesh_trainer import tables

router = APIRouter(prefix="/v1/runs")


def database_of(request: Request) -> Database:
    """What the application opened."""
    found: Database = request.state.database
    return found


@router.get("")
async def list_runs(
    database: Annotated[Database, Depends(database_of)], model: Text | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, list[dict[str, Any]]]:
    """Runs, newest first, of one model or of all."""
    async with database.begin() as db:
        return {"runs": [described(run) for run in await tables.runs(db, model, limit)]}


@router.get("/{run_id}")
async def get_run(run_id: UUID, database: Annotated[Database, Depends(database_of)]) -> dict[str, Any]:
    """One run: where it stands, and why it failed if it did."""
    async with database.begin() as db:
        run = await db.get(tables.Run, run_id)
    if run is None:
        raise NotFound(f"no training run {run_id}; GET /v1/runs lists those there are")
    return described(run)


def described(run: tables.Run) -> dict[str, Any]:
    """A run as it is answered."""
    hidden = {"announced", "leased_by", "leased_until"}
    return {column.key: getattr(run, column.key) for column in tables.Run.__table__.columns if column.key not in hidden}
