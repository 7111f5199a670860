"""What cannot be read from the feature store."""

from mojomesh_chassis.errors import PermanentError, TransientError


class ShardAway(TransientError):
    """One shard does not take part; entities of the others are read and written as ever."""


class UnusableDefinition(PermanentError):
    """A model that names what there is not, or what cannot be joined or learned."""
