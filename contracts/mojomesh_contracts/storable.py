"""Texts and times as doors take them: such as PostgreSQL can hold."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, StringConstraints

NUL = "\x00"
"""What PostgreSQL keeps in no text."""


def is_in_calendar(time: datetime) -> bool:
    """Whether a time with an offset is one in UTC too: near the years 1 and 9999 it may not be."""
    try:
        time.astimezone(UTC)
    except OverflowError:
        return False
    return True


def _without_nul(text: str) -> str:
    if NUL in text:
        raise ValueError("contains a NUL character, which cannot be stored")
    return text


def _in_calendar(time: datetime) -> datetime:
    if not is_in_calendar(time):
        raise ValueError("lies outside the years 1 to 9999 in UTC")
    return time


Text = Annotated[str, AfterValidator(_without_nul)]
EntityId = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_without_nul)]
Time = Annotated[AwareDatetime, AfterValidator(_in_calendar)]
