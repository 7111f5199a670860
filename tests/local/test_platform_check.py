"""A machine that cannot run the mesh is refused in words, also by a Python too old for everything else."""

import ast
import inspect
import platform
import runpy
import sys

import pytest

from mojomesh_local import platform_check


@pytest.mark.parametrize("version", [(3, 8, 20), (3, 10, 13), (3, 13, 0)])
def test_an_unsupported_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(platform, "python_version", lambda: ".".join(map(str, version)))

    with pytest.raises(SystemExit, match=rf"This is Python 3\.{version[1]}\.\d+; mojomesh needs 3.11 or 3.12.*make setup PYTHON="):
        runpy.run_path(str(platform_check.__file__), run_name="__main__")


def test_an_unsupported_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    assert "Linux aarch64" in platform_check.problems()[0]


def test_an_old_python_can_read_the_check() -> None:
    source = ast.parse(inspect.getsource(platform_check), feature_version=(3, 6))

    returned = [node.returns for node in ast.walk(source) if isinstance(node, ast.FunctionDef)]
    assert all(isinstance(annotation, ast.Constant) for annotation in returned), "evaluated, `list[str]` is a TypeError before 3.9"
