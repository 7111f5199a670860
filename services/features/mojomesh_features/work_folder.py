"""Where files are built, in a folder of each process's own: what a killed process leaves there, the next one removes."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

WORK_FOLDER = Path(gettempdir()) / "mojomesh-features"
_PREFIX = "process-"


@contextmanager
def open_work_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that lives as long as the process at most; first, those of processes that are no more are removed.

    Whoever lives in a folder holds a lock on it, which the kernel takes back however the process ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(parent):  # a new folder is there for a moment before it is locked
            for folder in parent.glob(f"{_PREFIX}*"):
                with suppress(BlockingIOError, FileNotFoundError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder)
            # A thread may write to the end; what it leaves goes when the next process starts.
            own = Path(stack.enter_context(TemporaryDirectory(dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True)))
            stack.enter_context(_locked(own))
        yield own


@contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
