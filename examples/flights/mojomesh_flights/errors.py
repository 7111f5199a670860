"""What can go wrong with the demo."""

from mojomesh_chassis.errors import MeshError


class DemoFailed(MeshError):
    """The mesh did not do what the demo waits for; the text says what and where to look."""
