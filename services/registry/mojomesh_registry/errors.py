"""What this service refuses, and why."""

from mojomesh_chassis.errors import Conflict, NotFound, PermanentError


class WrongDefinitions(PermanentError):
    """Documents that cannot be applied; none of them was."""


class UnknownVersion(NotFound):
    """A model has no such version."""


class WrongTraffic(PermanentError):
    """Challengers or shadows that there cannot be."""


class NotPromotable(Conflict):
    """A version that may not become the champion as things stand."""


class ChampionChanged(Conflict):
    """Somebody else promoted a version since the caller looked."""
