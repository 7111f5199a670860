"""BentoML's service. `async def`, since a thread a request is slower than the score itself."""

from typing import Any

import bentoml
from pydantic import BaseModel
from scoring import Model


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}}, metrics={"enabled": True})
class Gbm:
    def __init__(self) -> None:
        self._scoring = Model()

    @bentoml.api(route="/v2/models/gbm/infer")
    async def infer(self, id: str, inputs: list[Tensor], outputs: list[dict[str, str]] | None = None) -> dict[str, Any]:
        scores = self._scoring.score((tensor.name, tensor.data) for tensor in inputs)
        output = {"name": "score", "shape": [len(scores)], "datatype": "FP64", "data": scores}
        return {"id": id, "model_name": "gbm", "model_version": "1", "outputs": [output]}
