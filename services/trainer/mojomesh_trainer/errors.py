"""What can end a run."""

from mojomesh_chassis.errors import PermanentError, TransientError


class RunFailed(PermanentError):
    """The run cannot succeed, however often it is tried; its text says why and what to do."""


class RunInterrupted(TransientError):
    """Something the run needs is away; it is tried again."""
