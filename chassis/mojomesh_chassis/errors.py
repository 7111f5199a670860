"""The three ways a thing can go wrong, and what each means at every door (STYLE.md's table is `http` and `consuming`)."""


class MeshError(Exception):
    """Something went wrong that a person can act on; the text says what and what to do. `status` is its HTTP status."""

    status = 500


class PermanentError(MeshError):
    """Trying again cannot help: 4xx over HTTP, the dead-letter topic on Kafka."""

    status = 422


class NotFound(PermanentError):
    """What was asked for does not exist."""

    status = 404


class Conflict(PermanentError):
    """The state has moved on, or forbids it."""

    status = 409


class Unauthorized(PermanentError):
    """The call needs the token, and came without it or with another."""

    status = 401


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
