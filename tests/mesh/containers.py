"""The five services from their images, on the servers of a local mesh."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from testcontainers.core.container import DockerContainer

from mojomesh_local.layout import ONLY_FOR
from mojomesh_local.stack import Mesh
from mojomesh_local.state import SERVICES

READY_S = 90.0


@contextmanager
def services_in_containers(mesh: Mesh, folder: Path) -> Iterator[None]:
    """Each service in a container of its image `mojomesh-<service>`, on the host's network, as the user that the image names."""
    keys = folder / "keys"
    shutil.copytree(mesh.state.path / "keys", keys)
    objects = mesh.state.path / "objects"
    objects.chmod(0o777)  # the image's user is not the one who runs the tests
    for path in (keys, *keys.iterdir()):
        path.chmod(0o755)
    with ExitStack() as stack:
        for service in SERVICES:
            container = DockerContainer(f"mojomesh-{service}").with_kwargs(network_mode="host")
            container.with_volume_mapping(str(objects), str(objects), "rw")
            container.with_volume_mapping(str(keys), str(mesh.state.path / "keys"), "ro")
            for name, value in mesh.env.items():
                if ONLY_FOR.get(name, service) == service:
                    container.with_env(name, value)
            container.with_env("MOJOMESH_ENVIRONMENT", "production").with_env("SCORER_FOLDER", "/tmp/scorer")
            stack.enter_context(container)
            stack.callback(tell_log, service, container)
        for service in SERVICES:
            wait_ready(mesh.env["MOJOMESH_SCORER_ADMIN_URL"] if service == "scorer" else mesh.url(service))
        yield


def wait_ready(url: str) -> None:
    give_up = time.monotonic() + READY_S
    while True:
        try:
            answer = httpx.get(f"{url}/health/ready", trust_env=False)
            if answer.status_code == 200:
                return
            problem = answer.text
        except httpx.TransportError as error:
            problem = repr(error)
        assert time.monotonic() < give_up, f"{url} is not ready: {problem}"
        time.sleep(0.3)


def tell_log(service: str, container: DockerContainer) -> None:
    """The end of a container's log, for whoever reads the test's output; asked before the container goes."""
    _, errors = container.get_logs()
    os.write(2, f"--- {service}\n".encode() + errors[-2_000:])
