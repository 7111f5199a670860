"""Models trained by a real H2O, and what a scorer needs around it."""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import Publisher
from tests.scorer.making import Keys, Registry, Scorer, StartScorer, Trained, make_keys, read_trained, running_scorer


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, h2o_url: str) -> dict[str, Trained]:
    """Models trained on the same rows; `reversed` is `binomial` with the classes exchanged, so their scores differ visibly."""
    folder = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("train_models.py")
    subprocess.run([sys.executable, str(script), h2o_url, str(folder)], check=True, capture_output=True, text=True)
    return {home.name: read_trained(home) for home in folder.iterdir() if home.is_dir()}


@pytest.fixture
async def registry(kafka: str, mesh_env: dict[str, str], keys: Keys, tmp_path: Path) -> AsyncIterator[Registry]:
    publisher = Publisher(kafka)
    yield Registry(open_objects(mesh_env["MOJOMESH_OBJECTS"]), publisher, keys, tmp_path / "bundles")
    await publisher.close()


@pytest.fixture
async def start_scorer(kafka: str, mesh_env: dict[str, str], keys: Keys, tmp_path: Path) -> AsyncIterator[StartScorer]:
    """Starts scorers: `await start_scorer(SCORER_WORKERS="1")`; all are stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(**env: str) -> Scorer:
            return await stack.enter_async_context(running_scorer({**mesh_env, "MOJOMESH_KAFKA": kafka, **env}, keys, tmp_path))

        yield start
