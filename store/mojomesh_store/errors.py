"""What cannot be read from the feature store."""

from mojomesh_chassis.errors import PermanentError, TransientError


class ShardAway(TransientError):
    """One shard does not take part; entities of the others are read and written as ever."""


class Moved(TransientError):
    """Entities are placed on another number of shards than this process thought; by now it knows, so try again."""


class TooFewShards(TransientError):
    """Entities are on a shard that this process was not told of; it has to be started with MOJOMESH_POSTGRES naming all."""


class UnusableDefinition(PermanentError):
    """A model that names what there is not, or what cannot be joined or learned."""
