"""Starts Mage's server on this project, with what it writes kept elsewhere and nobody outliving it.

    MOJOMESH_MAGE_STATE=/state/mage MOJOMESH_MAGE_EMAIL=… MOJOMESH_MAGE_PASSWORD=… python serve.py

Environment: ../README.md lists it.
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ON_ITS_WAY_S = 10.0
LOOK_S = 0.1


def die_with_parent() -> None:
    """End this process soon after its parent has ended.

    Mage forks a scheduler, which forks a pool, which forks a process a block; killed, it leaves them all behind.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def copy_project(state: Path) -> Path:
    """The project as Mage may scribble in it: it rewrites its YAML files and adds caches beside them."""
    project = state / "project"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(HERE, project, ignore=shutil.ignore_patterns("__pycache__", "serve.py"))
    return project


def set_environment(state: Path) -> None:
    """Mage's own variables. It reads them when it is imported."""
    os.environ |= {
        "HOME": str(state),
        "MAGE_DATA_DIR": str(state / "data"),
        "LOGS_DIR_PATH": str(state / "logs"),
        "MAGE_DATABASE_CONNECTION_URL": f"sqlite:///{state / 'mage.db'}",
        "REQUIRE_USER_AUTHENTICATION": "1",
        "DEFAULT_OWNER_EMAIL": os.environ["MOJOMESH_MAGE_EMAIL"],
        "DEFAULT_OWNER_PASSWORD": os.environ["MOJOMESH_MAGE_PASSWORD"],
        "DEFAULT_OWNER_USERNAME": "mojomesh",
        "JWT_SECRET": os.environ["MOJOMESH_MAGE_PASSWORD"],
        "DISABLE_TERMINAL": "1",
        "DISABLE_NOTEBOOK_EDIT_ACCESS": "1",
        "DISABLE_AUTO_BROWSER_OPEN": "1",
        "DISABLE_AUTORELOAD": "1",
        "ENABLE_OPEN_AI": "0",
        "ENABLE_HUGGING_FACE": "0",
        "SCHEDULER_TRIGGER_INTERVAL": os.environ.get("SCHEDULER_TRIGGER_INTERVAL", "0.5"),
    }


def mend_queue() -> None:
    """Give Mage 0.9.80 a queue that loses no job, and looks more often.

    Its pool of workers ends when it finds nothing to do: a job that comes while it is ending is never started, and the run stands still
    for good; this one goes on. And a job is noted after it is handed over, and forgotten while a worker has taken it and not said so:
    the worker dies of a KeyError, and the block waits for another tick.
    """
    from mage_ai.orchestration.queue import process_queue

    queued = process_queue.JobStatus.QUEUED

    def work_off(jobs: Any, size: int, noted: Any, *_: object) -> None:
        workers: list[Any] = []
        while True:
            workers = [worker for worker in workers if worker.is_alive()]
            if len(workers) < size and not jobs.empty():
                workers.append(process_queue.Worker(jobs, noted))
                workers[-1].start()
            time.sleep(LOOK_S)

    class Queue(process_queue.ProcessQueue):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self._noted: dict[str, float] = {}

        def enqueue(self, job_id: str, target: object, *args: object, **kwargs: object) -> None:
            """Note the job, then hand it to the pool; unless it is there already."""
            if self.status != process_queue.QueueStatus.ACTIVE or self.has_job(job_id):
                return
            self.job_dict[job_id] = queued
            self._noted[job_id] = time.monotonic()
            self.queue.put([job_id, target, args, kwargs])
            if not self.is_worker_pool_alive():
                self.start_worker_pool()

        def has_job(self, job_id: str, *args: object, **kwargs: object) -> bool:
            """Whether the job waits or runs; one on its way from the queue to a worker does."""
            on_its_way = self.job_dict.get(job_id) == queued and time.monotonic() - self._noted.get(job_id, 0) < ON_ITS_WAY_S
            return on_its_way or super().has_job(job_id, *args, **kwargs)

    process_queue.ProcessQueue = Queue
    process_queue.poll_job_and_execute = work_off


def main() -> None:
    """Start Mage in this process; returns when it was told to end."""
    state = Path(os.environ["MOJOMESH_MAGE_STATE"]).resolve()
    state.mkdir(parents=True, exist_ok=True)
    set_environment(state)
    project = copy_project(state)
    os.register_at_fork(after_in_child=die_with_parent)
    mend_queue()
    from mage_ai.cli.main import app

    host, port = os.environ.get("MAGE_HOST", "127.0.0.1"), os.environ.get("MAGE_PORT", "6789")
    sys.argv = ["mage", "start", "--host", host, "--port", port, str(project)]
    app()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a spawned child imports this file
    die_with_parent()
