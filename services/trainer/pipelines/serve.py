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

HERE = Path(__file__).resolve().parent


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
        "SCHEDULER_TRIGGER_INTERVAL": os.environ.get("SCHEDULER_TRIGGER_INTERVAL", "1"),
    }


def main() -> None:
    """Start Mage in this process; returns when it was told to end."""
    state = Path(os.environ["MOJOMESH_MAGE_STATE"]).resolve()
    state.mkdir(parents=True, exist_ok=True)
    set_environment(state)
    project = copy_project(state)
    os.register_at_fork(after_in_child=die_with_parent)
    from mage_ai.cli.main import app

    host, port = os.environ.get("MAGE_HOST", "127.0.0.1"), os.environ.get("MAGE_PORT", "6789")
    sys.argv = ["mage", "start", "--host", host, "--port", port, str(project)]
    app()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a spawned child imports this file
    die_with_parent()
