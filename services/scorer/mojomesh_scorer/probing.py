"""Scoring in a throw-away process, which a bomb, a crash or a hang in a MOJO may harm as it likes."""

import asyncio
import io
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mojomesh_scorer.errors import ProbeFailed

PROBE_S = 60.0


async def score_in_probe(folder: Path, inputs: NDArray[np.float64], heap_mb: int) -> NDArray[np.float64]:
    """Scores of encoded rows by the bundle in `folder`, computed in a new process.

    Raises:
        ProbeFailed: The process died, took too long, or could not load the MOJO.
    """
    question = io.BytesIO()
    np.save(question, inputs, allow_pickle=False)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mojomesh_scorer.probe", str(folder), str(heap_mb), str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROBE_S):
            scores, complaint = await process.communicate(question.getvalue())
    except TimeoutError:
        raise ProbeFailed(f"the probe was not done with the bundle after {PROBE_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = complaint.decode("utf-8", "replace").strip().splitlines() or ["no word"]
        raise ProbeFailed(f"the probe ended with {process.returncode}: {lines[-1]}")
    return np.asarray(np.load(io.BytesIO(scores), allow_pickle=False), dtype=np.float64)
