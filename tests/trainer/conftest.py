"""A trainer between real servers, with features and registry at its seams."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.trainer.making import Neighbours, Process, World, serving


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """The mesh's signing key and its public half, as trainer is told of them."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "signing.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return {"MOJOMESH_SIGNING_KEY": str(private), "MOJOMESH_PUBLIC_KEY": str(public)}


@pytest.fixture
async def world(
    mesh_env: dict[str, str], keys: dict[str, str], kafka: str, postgres: Any, h2o_url: str, records: Any, tmp_path: Path
) -> AsyncIterator[World]:
    neighbours = Neighbours(tmp_path / "objects")
    neighbours.let_in.set()
    async with serving(neighbours.app()) as url:
        env = {
            **mesh_env,
            **keys,
            "MOJOMESH_KAFKA": kafka,
            "MOJOMESH_POSTGRES": postgres.url,
            "MOJOMESH_H2O": h2o_url,
            "MOJOMESH_FEATURES_URL": url,
            "MOJOMESH_REGISTRY_URL": url,
            "TRAINER_FOLD_RUNNER": "local",
            "TRAINER_PAUSE_S": "0.1",
        }
        world = World(records, postgres, env, neighbours, tmp_path)
        await world.define()
        yield world
        neighbours.let_in.set()


@pytest.fixture
def process(world: World, tmp_path: Path) -> Iterator[Process]:
    process = Process(world.env, tmp_path)
    yield process
    process.stop()
