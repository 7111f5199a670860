"""What ingest refuses over HTTP."""

from typing import Any

from pydantic import BaseModel, Field

from mojomesh_chassis.errors import PermanentError


class Refusal(BaseModel):
    """Why one event of a request is not taken."""

    index: int = Field(description="Its place in the request, from 0")
    event_id: str | None = Field(description="As sent; null when it has none")
    reason: str


class EventsRefused(PermanentError):
    """Some events of a request are wrong, so that none of them was taken."""

    def __init__(self, refusals: list[Refusal], n_events: int) -> None:
        first = refusals[0]
        more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        which = f"{len(refusals)} of {n_events} events are wrong, so none was taken; event {first.index}: " if n_events > 1 else ""
        super().__init__(f"{which}{first.reason}{more}")
        self.refusals = refusals

    @property
    def details(self) -> dict[str, Any]:
        return {"events": [refusal.model_dump() for refusal in self.refusals]}
