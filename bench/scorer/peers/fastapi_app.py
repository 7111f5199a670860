"""FastAPI on uvicorn, whole processes that share the port: `python fastapi_app.py PORT [N_PROCESSES]`."""

import socket
import subprocess
import sys
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel
from scoring import Model

app = FastAPI()


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferRequest(BaseModel):
    id: str
    inputs: list[Tensor]
    outputs: list[dict[str, str]] = []


@app.post("/v2/models/gbm/infer")
async def infer(request: InferRequest) -> Response:
    scores = app.state.scoring.score((tensor.name, tensor.data) for tensor in request.inputs)
    output = {"name": "score", "shape": [len(scores)], "datatype": "FP64", "data": scores}
    answer = {"id": request.id, "model_name": "gbm", "model_version": "1", "outputs": [output]}
    return Response(orjson.dumps(answer), media_type="application/json")


@app.get("/v2/health/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


def main(port: str, n_processes: str = "1") -> None:
    others = [subprocess.Popen([sys.executable, __file__, port]) for _ in range(int(n_processes) - 1)]
    app.state.scoring = Model()
    shared = socket.socket()
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # a listener each: one that all accept from gives most to one process
    shared.bind(("127.0.0.1", int(port)))
    uvicorn.Server(uvicorn.Config(app, http="httptools", loop="uvloop", access_log=False, log_level="warning")).run(sockets=[shared])
    for other in others:
        other.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
