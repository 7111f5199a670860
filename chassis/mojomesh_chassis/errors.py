"""The three ways a thing can go wrong, and what each means at every door (STYLE.md's table is `http` and `consuming`)."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


class MeshError(Exception):
    """Something went wrong that a person can act on; the text says what and what to do. `status` is its HTTP status."""

    status = 500

    @property
    def details(self) -> dict[str, Any]:
        """What a program needs to know beyond the text, as JSON; part of the answer over HTTP."""
        return {}


class PermanentError(MeshError):
    """Trying again cannot help: 4xx over HTTP, the dead-letter topic on Kafka."""

    status = 422


class Rejected(PermanentError):
    """Some events of a batch are wrong: on Kafka those go to the dead-letter topic, and the others are handled without them.

    `reasons` says why, by the event's index in the list that the handler was given.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        if not reasons:
            raise ValueError("nothing is rejected")
        super().__init__("; ".join(f"event {index}: {reason}" for index, reason in reasons.items()))
        self.reasons = dict(reasons)


class NotFound(PermanentError):
    """What was asked for does not exist."""

    status = 404


class Conflict(PermanentError):
    """The state has moved on, or forbids it."""

    status = 409


class Unauthorized(PermanentError):
    """The call needs the token, and came without it or with another."""

    status = 401


class TooLarge(PermanentError):
    """A request brings more than is taken at once."""

    status = 413


class BadBundle(PermanentError):
    """A bundle that must not be used: tampered with, unsigned, malformed or dangerous."""


class TransientError(MeshError):
    """Trying again later may help: 503 with Retry-After over HTTP; on Kafka the partition waits and is read again."""

    status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Busy(TransientError):
    """Refused early, because the queue is full: 429 with Retry-After."""

    status = 429


def faults_of(error: ValidationError, at_most: int = 5) -> str:
    """What Pydantic found, in one line: the field and what is wrong with it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    text = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in found[:at_most])
    return text if len(found) <= at_most else f"{text}; and {len(found) - at_most} more"
