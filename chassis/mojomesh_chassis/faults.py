"""A hook by which tests kill a process at a named point. `MeshSettings` refuses it in production."""

import os
import signal
from pathlib import Path

_armed: tuple[str, Path] | None = None


def arm_faults(fault: str | None) -> None:
    """Arm the fault `point:marker-file`, or none. The marker makes it happen once: it is removed before the kill."""
    global _armed
    point, _, marker = (fault or "").partition(":")
    _armed = (point, Path(marker)) if marker else None


def fault(point: str) -> None:
    """Die here by SIGKILL, if this point is armed and its marker file still exists."""
    if _armed is None or _armed[0] != point:
        return
    try:
        _armed[1].unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
