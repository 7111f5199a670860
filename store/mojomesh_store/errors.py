"""What cannot be read from the feature store."""

from mojomesh_chassis.errors import PermanentError


class UnusableDefinition(PermanentError):
    """A model that names what there is not, or what cannot be joined or learned."""
