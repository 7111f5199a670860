"""What can go wrong when the mesh starts on one machine; every message says what to do."""


class LocalError(Exception):
    """The embedded stack cannot do what was asked; the message is for a person."""


class StartFailed(LocalError):
    """A process did not come up; says what it last logged, and where the rest is."""


class PortTaken(LocalError):
    """A port that this mesh keeps is held by somebody else."""


class AlreadyRunning(LocalError):
    """Another `up` owns the state folder."""


class NotRunning(LocalError):
    """No mesh runs in this state folder."""


class ServerUnreachable(LocalError):
    """A server of one's own, named in the environment, does not answer."""


class DiskFull(LocalError):
    """Too little space for a broker and a database to be safe."""


class JarMismatch(LocalError):
    """A jar is not the one whose digest is pinned."""
