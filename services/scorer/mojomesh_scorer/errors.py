"""The scorer's error types."""

from mojomesh_chassis.errors import BadBundle, NotFound, PermanentError, TransientError


class SchemaMismatch(PermanentError):
    """A row does not fit the model's columns."""


class BadTensor(PermanentError):
    """A request that is not Open Inference Protocol."""

    status = 400


class TooManyRows(PermanentError):
    """More rows than one request may hold."""

    status = 413


class NotServed(NotFound):
    """No version of the model is served here, or not the one that was asked for."""


class UnknownEntity(NotFound):
    """The feature store has nothing about the entity."""


class ProbeFailed(BadBundle):
    """The throw-away process that loads a bundle first did not survive it, or scored its golden rows otherwise."""


class LoadFailed(BadBundle):
    """A worker could not load the bundle."""


class WorkerLost(TransientError):
    """A worker died, or did not answer in time and was killed."""
