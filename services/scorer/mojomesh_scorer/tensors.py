"""Tensors of the Open Inference Protocol V2, the same under REST and gRPC.

Source: kserve/open-inference-protocol, specification/protocol (required API, binary tensor data extension).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mojomesh_scorer.errors import BadTensor

DTYPES = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Datatypes with elements of one size; BYTES is the other one."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor; texts are a flat list, numbers a flat array or one of shape `shape`."""

    name: str
    datatype: str
    shape: list[int]
    data: NDArray[np.generic] | list[str]


def check_shape(name: str, shape: Sequence[int]) -> int:
    """Number of rows of an input of shape [n] or [n, 1].

    Raises:
        BadTensor: It has another shape.
    """
    if len(shape) not in (1, 2) or shape[0] < 0 or (len(shape) == 2 and shape[1] != 1):
        raise BadTensor(f"input '{name}' has shape {list(shape)}; each column is a tensor of shape [n] or [n, 1]")
    return shape[0]


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[object]) -> Tensor:
    """An input whose elements came one by one, as in JSON; nested lists are flattened.

    Raises:
        BadTensor: The elements do not fit datatype or shape.
    """
    n_rows = check_shape(name, shape)
    kinds = set(map(type, values))
    flat = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values] if list in kinds else values
    if len(flat) != n_rows:
        raise BadTensor(f"input '{name}' has {len(flat)} elements, its shape says {n_rows}")
    wanted, missing = ((str,), '""') if datatype == "BYTES" else ((int, float, bool), "NaN")
    if not kinds <= {*wanted} and (odd := [value for value in flat if not isinstance(value, wanted)]):
        raise BadTensor(f"input '{name}' is {datatype} and holds {odd[0]!r}; a missing value is {missing}")
    if datatype == "BYTES":
        return Tensor(name, datatype, list(shape), cast(list[str], flat))
    try:
        return Tensor(name, datatype, list(shape), np.array(flat, dtype=_dtype(name, datatype)))
    except (OverflowError, ValueError) as error:
        raise BadTensor(f"input '{name}' does not fit {datatype}: {error}") from None


def from_bytes(name: str, datatype: str, shape: Sequence[int], content: bytes | memoryview) -> Tensor:
    """An input in the binary form: little-endian elements one after the other, a text as its length (4 bytes) and its UTF-8.

    Raises:
        BadTensor: The bytes do not fit datatype or shape.
    """
    n_rows = check_shape(name, shape)
    if datatype == "BYTES":
        texts = list(_texts(name, bytes(content)))
        if len(texts) != n_rows:
            raise BadTensor(f"input '{name}' has {len(texts)} texts, its shape says {n_rows}")
        return Tensor(name, datatype, list(shape), texts)
    dtype = _dtype(name, datatype)
    if len(content) != n_rows * dtype.itemsize:
        raise BadTensor(f"input '{name}' has {len(content)} bytes, {n_rows} {datatype} have {n_rows * dtype.itemsize}")
    return Tensor(name, datatype, list(shape), np.frombuffer(content, dtype=dtype))


def to_bytes(tensor: Tensor) -> bytes:
    """The tensor in the binary form."""
    if isinstance(tensor.data, list):
        encoded = [text.encode() for text in tensor.data]
        return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    return tensor.data.tobytes()


def _dtype(name: str, datatype: str) -> np.dtype[np.generic]:
    if datatype not in DTYPES:
        raise BadTensor(f"input '{name}' has the datatype {datatype!r}; known are {', '.join(DTYPES)}, BYTES")
    return DTYPES[datatype]


def _texts(name: str, content: bytes) -> Iterator[str]:
    at = 0
    while at < len(content):
        end = at + 4 + int.from_bytes(content[at : at + 4], "little")
        if end > len(content) or end < at + 4 or at + 4 > len(content):
            raise BadTensor(f"input '{name}': a text ends behind the end of the tensor")
        try:
            yield content[at + 4 : end].decode()
        except UnicodeDecodeError as error:
            raise BadTensor(f"input '{name}' is not UTF-8: {error}") from None
        at = end
