"""What a model looks like in the Open Inference Protocol V2, under REST and gRPC alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mojomesh_contracts.storable import EntityId
from mojomesh_scorer.errors import BadTensor
from mojomesh_scorer.models import LoadedModel
from mojomesh_scorer.scoring import Scored, score_of
from mojomesh_scorer.tensors import Tensor, check_shape

SERVER = "mojomesh-scorer"
PLATFORM = "h2o_mojo"
EXTENSIONS = ["binary_tensor_data"]
CONTRIBUTIONS = "contributions"
_ENTITY_ID: TypeAdapter[str] = TypeAdapter(EntityId)
_DATATYPES = {"number": "FP64", "category": "BYTES", "boolean": "BOOL"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of a tensor; -1 is the number of rows."""

    name: str
    datatype: str
    shape: list[int]


def inputs_of(model: LoadedModel) -> list[TensorSpec]:
    """One tensor a column. Any numeric datatype will do for a number or a boolean; only a float one can say that it is missing (NaN)."""
    return [TensorSpec(column.name, _DATATYPES[column.type], [-1]) for column in model.schema.columns]


def outputs_of(model: LoadedModel) -> list[TensorSpec]:
    """The score that people ask for, for a classifier the probability of each class, and the ids of the predictions."""
    return outputs_with(n_classes_of(model))


def n_classes_of(model: LoadedModel) -> int:
    """How many classes a classifier has, 0 for a regression."""
    return len(model.schema.classes or ())


def outputs_with(n_classes: int, wanted: Sequence[str] = ()) -> list[TensorSpec]:
    """The same by the number of classes; with `wanted` only those, in that order.

    Raises:
        KeyError: There is none of such a name.
    """
    probabilities = [TensorSpec("probabilities", "FP64", [-1, n_classes])] if n_classes else []
    specs = [TensorSpec("score", "FP64", [-1]), *probabilities, TensorSpec("prediction_id", "BYTES", [-1])]
    by_name = {spec.name: spec for spec in specs}
    return [by_name[name] for name in wanted] if wanted else specs


def n_rows_of(tensors: Sequence[Tensor]) -> int:
    """How many rows the inputs of a request have.

    Raises:
        BadTensor: There are no inputs, or they disagree.
    """
    sizes = {tensor.name: check_shape(tensor.name, tensor.shape) for tensor in tensors}
    if len(set(sizes.values())) != 1:
        raise BadTensor(f"inputs must have one number of rows, have {sizes}" if sizes else "the request has no inputs")
    return next(iter(sizes.values()))


async def answer(scored: Scored, wanted: Sequence[str], explain: bool) -> list[Tensor]:
    """The outputs named in `wanted`, in that order; all of them when it is empty.

    `contributions`, shape [n, n_columns + 1], columns in scoring order and then the bias, is among them only if it is named or `explain`.

    Raises:
        BadTensor: One is named that the model does not have.
        NotExplained: The model is of a kind that has no contributions.
        TooLarge: More rows than a request may have explained.
    """
    specs = {spec.name: spec for spec in outputs_of(scored.model)}
    if unknown := [name for name in wanted if name not in specs and name != CONTRIBUTIONS]:
        raise BadTensor(f"model '{scored.model.name}' has no output {unknown[0]!r}; it has {', '.join(specs)}")
    values = values_of(scored)
    names = list(wanted or specs)
    if explain or CONTRIBUTIONS in wanted:
        names += [] if CONTRIBUTIONS in wanted else [CONTRIBUTIONS]
        specs[CONTRIBUTIONS] = TensorSpec(CONTRIBUTIONS, "FP64", [-1, 1 + len(scored.model.schema.columns)])
        values[CONTRIBUTIONS] = (await scored.model.explain(scored.inputs)).tolist()
    return [_tensor(specs[name], values[name], len(scored.scores)) for name in names]


def values_of(scored: Scored) -> dict[str, list[Any]]:
    """The elements of every output, by its name; rows of several elements are lists in the list."""
    return {
        "score": [score_of(scores) for scores in scored.scores],
        "probabilities": scored.scores,
        "prediction_id": scored.prediction_ids,
    }


def _tensor(spec: TensorSpec, values: list[Any], n_rows: int) -> Tensor:
    data = values if spec.datatype == "BYTES" else np.array(values)
    return Tensor(spec.name, spec.datatype, [n_rows, *spec.shape[1:]], data)


def entity_asked(entity_id: object) -> str | None:
    """Whose rows they are, by a request's parameter `entity_id`: it decides which version scores them, and is kept in the receipts.

    Raises:
        BadTensor: It is none.
    """
    if not entity_id:
        return None
    try:
        return _ENTITY_ID.validate_python(entity_id)
    except ValidationError as error:
        raise BadTensor(f"parameter entity_id: {error.errors()[0]['msg']}") from None


def timeout_s_of(microseconds: object) -> float | None:
    """The request's parameter `timeout`, which clients send in microseconds; nothing or 0 is none.

    Raises:
        BadTensor: It is no whole number.
    """
    if not microseconds:
        return None
    if not isinstance(microseconds, int) or microseconds < 0:
        raise BadTensor(f"timeout {microseconds!r} is not a number of microseconds")
    return microseconds / 1e6


def version_asked(text: str) -> int | None:
    """A version of a path or a field; empty is whichever serves.

    Raises:
        BadTensor: It is not a number.
    """
    if not text:
        return None
    if not text.isdecimal():
        raise BadTensor(f"version {text!r} is not a number")
    return int(text)
