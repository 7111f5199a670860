"""The model that every server serves, and requests whose answers are known to the last bit."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import service_pb2 as pb

from bench.scorer.servers import CACHE, MODEL, PEERS, peer_variables, python_of
from mojomesh_local import ports
from mojomesh_local.h2o import H2O
from tests.scorer.making import Row, Trained, read_trained

N_REQUESTS = {1: 1000, 100: 40, 1000: 8}
"""Different requests by their size in rows."""


@dataclass(frozen=True)
class Known:
    """A trained model, and what its MOJO scores: a number a row, bit for bit the same from every server."""

    trained: Trained
    scores: list[float]

    @property
    def mojo(self) -> Path:
        return self.trained.folder / "model.mojo.zip"

    def infer_request(self, number: int, rows: Sequence[Row]) -> bytes:
        """A request of the Open Inference Protocol V2, its id `number`; of many rows it asks for the scores alone."""
        inputs = [
            {
                "name": column.name,
                "shape": [len(rows)],
                "datatype": "FP64" if column.levels is None else "BYTES",
                "data": [row[column.name] for row in rows],
            }
            for column in self.trained.schema.columns
        ]
        asked = {"id": str(number), "inputs": inputs} | ({"outputs": [{"name": "score"}]} if len(rows) > 1 else {})
        return json.dumps(asked, separators=(",", ":")).encode()

    def requests(self, n_rows: int) -> list[tuple[bytes, list[float]]]:
        """Bodies of `n_rows` rows each, and their scores."""
        n = len(self.trained.rows)
        made = []
        for number in range(N_REQUESTS[n_rows]):
            places = [(number * 37 + place) % n for place in range(n_rows)]
            made.append(
                (self.infer_request(number, [self.trained.rows[place] for place in places]), [self.scores[place] for place in places])
            )
        return made

    def write_requests(self, n_rows: int, file: Path) -> Path:
        """Requests for `infer.lua`: two lines each, the body and its scores."""
        lines = [line for body, scores in self.requests(n_rows) for line in (body.decode(), " ".join(map(repr, scores)))]
        file.write_text("\n".join(lines) + "\n")
        return file

    def grpc_request(self, place: int) -> pb.ModelInferRequest:
        """A request for one row, the score wanted."""
        request = pb.ModelInferRequest(model_name=MODEL, outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="score")])
        for column in self.trained.schema.columns:
            value = self.trained.rows[place][column.name]
            text = column.levels is not None
            contents = {"bytes_contents": [value.encode()]} if text else {"fp64_contents": [value]}
            request.inputs.add(name=column.name, datatype="BYTES" if text else "FP64", shape=[1], contents=contents)
        return request

    def write_grpc_request(self, file: Path) -> Path:
        """The request for the first row, for ghz."""
        file.write_bytes(self.grpc_request(0).SerializeToString())
        return file


def know() -> Known:
    """The model of the benchmark, trained if that was not done before."""
    folder = CACHE / "model"
    if not (folder / "asked.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        h2o = H2O(folder / "h2o", ports.choose(2), folder / "h2o.log")
        server = h2o.server.start()
        try:
            subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), h2o.url, str(folder)], check=True)
        finally:
            server.stop()
    trained = read_trained(folder)
    scored = subprocess.run(
        [python_of("fastapi"), PEERS / "scoring.py"],
        input=json.dumps(trained.rows).encode(),
        stdout=subprocess.PIPE,
        env=os.environ | peer_variables(folder / "model.mojo.zip"),
        check=True,
    )
    return Known(trained, json.loads(scored.stdout))
