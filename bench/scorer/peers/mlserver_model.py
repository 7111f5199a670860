"""MLServer's custom runtime. Codecs are left out: reading the tensors as they are is faster."""

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput, TensorData
from scoring import Model


class Gbm(MLModel):
    async def load(self) -> bool:
        self._scoring = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        scores = self._scoring.score((tensor.name, tensor.data.root) for tensor in payload.inputs)
        output = ResponseOutput(name="score", shape=[len(scores)], datatype="FP64", data=TensorData(scores))
        return InferenceResponse(id=payload.id, model_name=self.name, model_version="1", outputs=[output])
