"""The scorer's error types."""

from collections.abc import Mapping

from mojomesh_chassis.errors import BadBundle, MeshError, NotFound, PermanentError, TransientError


class SchemaMismatch(PermanentError):
    """A value or a tensor does not fit the model's columns."""


class RowsRefused(PermanentError):
    """Some rows of a request cannot be scored, so none is; `reasons` says why, by the row's place in the request."""

    def __init__(self, reasons: Mapping[int, str], n_rows: int) -> None:
        shown = [f"row {place}: {reason}" for place, reason in list(reasons.items())[:10]]
        super().__init__("; ".join(shown) if n_rows > 1 else reasons[0])
        self.reasons = dict(reasons)


class UnknownEntity(RowsRefused):
    """The feature store has nothing about the entities of some rows."""

    status = 404


class FeaturesFailed(MeshError):
    """A bug in features, at this question: neither waiting nor another question helps, and it is not the client's fault."""


class NotExplained(PermanentError):
    """The model is of a kind that has no contributions."""


class StaleFeatures(RowsRefused):
    """The model refuses to score from rows that are older than their max_age."""

    status = 409


class BadTensor(PermanentError):
    """A request that is not Open Inference Protocol."""

    status = 400


class NotServed(NotFound):
    """No version of the model is served here, or not the one that was asked for."""


class ProbeFailed(BadBundle):
    """The throw-away process that loads a bundle first did not survive it, or scored its golden rows otherwise."""


class LoadFailed(BadBundle):
    """A worker could not load the bundle."""


class DeadlineMissed(TransientError):
    """The answer was not ready within the time that the request gives."""

    status = 504


class WorkerLost(TransientError):
    """A worker died, or did not answer in time and was killed."""
