import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_contracts.events import FeatureValue
from mojomesh_scorer.encoding import BY_COLUMN_ROWS, Encoder
from mojomesh_scorer.errors import BadTensor, RowsRefused, SchemaMismatch
from mojomesh_scorer.tensors import Tensor, from_bytes, from_values, to_bytes

SCHEMA = BundleSchema(
    columns=[
        Column(name="carrier", feature_set="flights", feature="carrier", type="category", levels=["AA", "B6"]),
        Column(name="distance", feature_set="flights", feature="distance", type="number"),
        Column(name="holiday", feature_set="flights", feature="holiday", type="boolean"),
    ],
    label="late",
    classes=["0", "1"],
)
ENCODER = Encoder(SCHEMA)
NAN = math.nan


def test_a_level_becomes_its_place_and_a_boolean_0_or_1() -> None:
    encoded = ENCODER.encode_rows([{"carrier": "B6", "distance": 12, "holiday": True}])

    assert encoded.matrix.tolist() == [[1.0, 12.0, 1.0]]
    assert not encoded.unknown_levels


def test_what_is_absent_none_or_unknown_is_nan_and_counted_apart() -> None:
    encoded = ENCODER.encode_rows([{"carrier": "ZZ", "distance": None}, {"carrier": None, "distance": NAN, "holiday": False}])

    np.testing.assert_array_equal(encoded.matrix, [[NAN, NAN, NAN], [NAN, NAN, 0.0]])
    assert encoded.unknown_levels == {"carrier": 1}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"carrier": 3}, "'carrier' must be a text"),
        ({"distance": "far"}, "'distance' must be a finite number"),
        ({"distance": True}, "'distance' must be a finite number"),
        ({"distance": math.inf}, "'distance' must be a finite number"),
        ({"distance": 10**400}, "'distance' must be a finite number"),
        ({"holiday": 1}, "'holiday' must be true or false"),
    ],
)
def test_a_value_of_another_type_is_refused_by_column(values: dict[str, FeatureValue], complaint: str) -> None:
    with pytest.raises(RowsRefused, match=f"^column {complaint}"):
        ENCODER.encode_rows([values])
    with pytest.raises(RowsRefused, match=f"^row 2: column {complaint}"):
        ENCODER.encode_rows([{}, {}, values])


def test_a_column_the_model_does_not_have_is_named() -> None:
    with pytest.raises(RowsRefused, match="row 1: the model has no column 'carier'; its columns are carrier, distance, holiday") as refused:
        ENCODER.check_rows([{"carrier": "AA"}, {"carier": "AA"}])
    assert list(refused.value.reasons) == [1]


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["AA", "B6", "ZZ", ""]) | st.just(10**400)
FITTING = {
    "carrier": st.none() | st.sampled_from(["AA", "B6", "ZZ", ""]),
    "distance": st.none() | st.integers() | st.floats(allow_infinity=False),
    "holiday": st.none() | st.booleans(),
}
ROWS = st.fixed_dictionaries({}, optional=FITTING)
ODD_ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(FITTING, VALUES))


@given(st.lists(ROWS, min_size=BY_COLUMN_ROWS, max_size=BY_COLUMN_ROWS + 2), st.none() | ODD_ROWS)
def test_many_rows_are_encoded_or_refused_as_each_would_be(
    rows: list[dict[str, FeatureValue]], odd: dict[str, FeatureValue] | None
) -> None:
    rows = [*rows, *([odd] if odd else [])]
    alone, unknown, reasons = [], Counter[str](), {}
    for place, row in enumerate(rows):
        try:
            one = ENCODER.encode_rows([row])
        except RowsRefused as refused:
            reasons[place] = refused.reasons[0]
        else:
            alone += one.matrix.tolist()
            unknown.update(one.unknown_levels)

    if reasons:
        with pytest.raises(RowsRefused) as refused_together:
            ENCODER.encode_rows(rows)
        assert refused_together.value.reasons == reasons
        return
    together = ENCODER.encode_rows(rows)
    np.testing.assert_array_equal(together.matrix, alone)
    assert together.unknown_levels == unknown


def test_tensors_and_rows_are_encoded_alike() -> None:
    tensors = [
        from_values("carrier", "BYTES", [3, 1], ["AA", "", "ZZ"]),
        from_values("distance", "FP64", [3], [1.5, NAN, 3]),
        from_values("holiday", "FP32", [3], [1, 0, NAN]),
    ]
    rows: list[dict[str, FeatureValue]] = [
        {"carrier": "AA", "distance": 1.5, "holiday": True},
        {"carrier": None, "holiday": False},
        {"carrier": "ZZ", "distance": 3},
    ]

    by_tensor, by_row = ENCODER.encode_tensors(tensors, 3), ENCODER.encode_rows(rows)

    np.testing.assert_array_equal(by_tensor.matrix, by_row.matrix)
    assert by_tensor.unknown_levels == by_row.unknown_levels


def test_nan_is_missing_whatever_the_column() -> None:
    encoded = ENCODER.encode_tensors([from_values("carrier", "FP64", [2], [NAN, NAN])], 2)

    assert np.isnan(encoded.matrix).all() and not encoded.unknown_levels


def test_a_tensor_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="'carrier' is a category: send it as BYTES, not FP64"):
        ENCODER.encode_tensors([from_values("carrier", "FP64", [1], [1.0])], 1)
    with pytest.raises(SchemaMismatch, match="'distance' is a number: send it as a numeric datatype, not BYTES"):
        ENCODER.encode_tensors([from_values("distance", "BYTES", [1], ["1"])], 1)


@given(st.lists(st.text(), max_size=5))
def test_texts_survive_the_binary_form(texts: list[str]) -> None:
    tensor = Tensor("carrier", "BYTES", [len(texts)], texts)

    assert from_bytes("carrier", "BYTES", [len(texts)], to_bytes(tensor)).data == texts


@given(st.sampled_from(["BYTES", "FP64", "INT32", "BOOL", "BF16"]), st.lists(st.integers(-2, 3), max_size=3), st.binary(max_size=40))
def test_bytes_that_are_no_tensor_are_refused_and_nothing_worse(datatype: str, shape: list[int], content: bytes) -> None:
    try:
        tensor = from_bytes("x", datatype, shape, content)
    except BadTensor:
        return
    assert len(tensor.data) == shape[0]
