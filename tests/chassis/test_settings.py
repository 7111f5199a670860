"""What a service is told by its environment."""

from pathlib import Path

import pytest

from mojomesh_chassis.faults import arm_faults, fault
from mojomesh_chassis.settings import MeshSettings, read_settings


def test_what_is_missing_or_wrong_is_said_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOJOMESH_TOKEN", "short")
    monkeypatch.delenv("MOJOMESH_KAFKA", raising=False)

    with pytest.raises(SystemExit) as ended:
        read_settings(MeshSettings)

    assert "MOJOMESH_KAFKA: Field required" in str(ended.value)
    assert "MOJOMESH_TOKEN" in str(ended.value)


def test_production_refuses_faults(mesh_env: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unset it in production"):
        MeshSettings(**{**mesh_env, "MOJOMESH_ENVIRONMENT": "production", "MOJOMESH_FAULT": str(tmp_path)})  # type: ignore[arg-type]


def test_shards_are_the_urls_in_their_order(mesh_env: dict[str, str]) -> None:
    settings = MeshSettings(**{**mesh_env, "MOJOMESH_POSTGRES": "postgresql://b,postgresql://a"})  # type: ignore[arg-type]

    assert settings.postgres_urls == ["postgresql://b", "postgresql://a"]


def test_a_point_that_is_not_armed_is_passed(tmp_path: Path) -> None:
    fault("tester.anywhere")
    arm_faults(tmp_path)
    fault("tester.anywhere")
    arm_faults(None)
