"""Which values a feature set takes."""

from hypothesis import given
from hypothesis import strategies as st

from mojomesh_contracts.definitions import Feature, FeatureSet
from mojomesh_contracts.events import FeatureValue

NUMBER = Feature(type="number", min=-1, max=1e3)
FLIGHTS = FeatureSet(
    name="flights",
    entity="id",
    features={"a": NUMBER, "b": Feature(type="number"), "c": Feature(type="category"), "d": Feature(type="boolean")},
)
NUMERIC = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), -1, -1.5, 1000, 1001])


@given(st.dictionaries(st.sampled_from("abcde"), NUMERIC | st.booleans() | st.none() | st.text(max_size=2) | st.just("\x00")))
def test_values_found_usual_at_a_glance_are_those_in_which_nothing_is_wrong(values: dict[str, FeatureValue]) -> None:
    assert FLIGHTS.is_usual(values) == (not FLIGHTS.problems(values) and "\x00" not in "".join(map(str, values.values())))
