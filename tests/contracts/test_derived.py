"""Derived features as declared: what a formula may say, what it comes to, and what of a definition may change."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mojomesh_contracts.definitions import (
    DefinitionError,
    FeatureSet,
    definition_id,
    incompatible_changes,
    kind_of,
    parse_definition,
    parse_definitions,
    problems_among,
)
from mojomesh_contracts.events import FeatureValue
from mojomesh_contracts.formulas import Formula, FormulaError, Kind

KINDS: dict[str, Kind] = {"a": "number", "b": "number", "name": "category", "night": "boolean"}
AT = datetime(2013, 7, 1, 2, 30, tzinfo=UTC)  # a Monday; in New York Sunday evening
VALUES: dict[str, FeatureValue] = {"a": 3.0, "b": 4, "name": "UA", "night": True}

SETS = """
kind: FeatureSet
name: flights
entity: flight_id
features: {carrier: {type: category}, origin: {type: category}, distance: {type: number}}
aggregates:
  delay: {function: mean, of: arrivals.delay, by: [carrier], window: 2h}
  gate: {function: last, of: arrivals.gate, by: {flight_id: flight_id}, window: 90d}
computed:
  slack: distance / delay
---
kind: FeatureSet
name: arrivals
entity: flight_id
features: {carrier: {type: category}, delay: {type: number}, gate: {type: category}}
"""


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("a + b * 2 - a / b", "number", 10.25),
        ("a % 2 + b // 3", "number", 2.0),
        ("-a", "number", -3.0),
        ("log(a)", "number", math.log(3)),
        ("max(a, min(b, 9)) + abs(0 - a) + sqrt(b)", "number", 9.0),
        ("floor(a / 2) + ceil(a / 2) + exp(0) + log1p(0)", "number", 4.0),
        ("hour(event_time)", "number", 2.0),
        ("hour(event_time, 'America/New_York')", "number", 22.0),
        ("day_of_week(event_time)", "number", 0.0),
        ("day_of_week(event_time, 'America/New_York')", "number", 6.0),
        ("month(event_time) + day_of_year(event_time)", "number", 189.0),
        ("a < b", "boolean", True),
        ("name == 'UA'", "boolean", True),
        ("name if a > b else 'other'", "category", "other"),
        ("1 if night else 0", "number", 1.0),
        ("is_missing(a)", "boolean", False),
        ("0 * (0 - a)", "number", 0.0),
    ],
)
def test_a_formula_comes_to_what_it_says(text: str, kind: str, value: object) -> None:
    formula = Formula(text, KINDS)

    assert (formula.kind, formula(VALUES, AT)) == (kind, value)
    assert str(formula(VALUES, AT)) == str(value)  # no -0.0


@pytest.mark.parametrize("text", ["a / (b - 4)", "log(a - 3)", "sqrt(0 - a)", "exp(1000 * a)", "a % (b - 4)", "ceil(exp(700) * exp(700))"])
def test_where_a_formula_is_not_defined_its_value_is_missing(text: str) -> None:
    assert Formula(text, KINDS)(VALUES, AT) is None


@pytest.mark.parametrize("text", ["a + b", "a < b", "name == 'UA'", "a if night else b", "min(a, b)", "name", "a"])
def test_missing_in_missing_out(text: str) -> None:
    formula = Formula(text, KINDS)

    for name in formula.names:
        if not (name == "b" and text == "a if night else b"):  # not chosen
            assert formula({**VALUES, name: None}, AT) is None
    assert formula({}, AT) is None
    assert Formula("is_missing(a)", KINDS)({}, AT) is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no formula"),
        ("a +", "is no formula"),
        ("__import__('os').system('true')", "is not among what formulas know"),
        ("(lambda: a)()", "is not among what formulas know"),
        ("[a for a in b]", "is not among what formulas know"),
        ("a.real", "is not among what formulas know"),
        ("a ** 9 ** 9", "is not among what formulas know"),
        ("open('x')", "no function 'open' of 1"),
        ("log(a, b)", "no function 'log' of 2"),
        ("a and b", "is not among what formulas know"),
        ("c", "'c' is not one of a, b, name, night, event_time"),
        ("a + name", "'name' is a category, no number"),
        ("a == name", "a number and a category cannot be compared"),
        ("name < 'B'", "cannot be compared"),
        ("night == True", "compared by themselves"),
        ("a if b else a", "must be a boolean"),
        ("a if night else name", "of one type"),
        ("event_time", "is a time"),
        ("hour(a)", "hour takes event_time"),
        ("hour(event_time, name)", "takes a time zone"),
        ("hour(event_time, 'Mars/Phobos')", "no time zone 'Mars/Phobos'"),
        ("hour(event_time, '../../etc/passwd')", "no time zone"),
        ("1e999", "is not among what formulas know"),
        ("(" * 400 + "a" + ")" * 400, "500 characters at most"),
        ("-" * 450 + "a", "is no formula"),
        ("-" * 101 + "a", "nested more than 100 deep"),
    ],
)
def test_what_is_no_formula_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(FormulaError, match=words.replace("(", r"\(").replace("+", r"\+")):
        Formula(text, KINDS)


@given(text=st.text(alphabet="ab()+-*/%<>=.,'\" 019einfor_lambd[]{}:\n\x00@", max_size=40))
def test_any_text_is_a_formula_or_is_refused(text: str) -> None:
    try:
        formula = Formula(text, KINDS)
    except FormulaError:
        return
    value = formula(VALUES, AT)
    assert value is None or isinstance(value, str | bool) or math.isfinite(value)


def sets(change: Callable[[str], str] = str) -> dict[str, FeatureSet]:
    return {parsed.name: parsed for parsed in parse_definitions(change(SETS)) if isinstance(parsed, FeatureSet)}


def test_a_derived_feature_has_a_type() -> None:
    both = sets()

    kinds = {name: kind_of(both["flights"], name, both) for name in [*both["flights"].names, "speed"]}

    assert kinds == {
        "carrier": "category",
        "origin": "category",
        "distance": "number",
        "delay": "number",
        "gate": "category",
        "slack": "number",
        "speed": None,
    }
    assert both["flights"].problems({"slack": 1.0}) == ["'slack' is not a feature of 'flights', which has carrier, origin, distance"]
    assert parse_definition(both["flights"].model_dump(mode="json", exclude_unset=True) | {"kind": "FeatureSet"}) == both["flights"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("window: 2h", "window: 91d", "aggregates.delay.window: Input should be less than or equal to 90 days"),
        ("window: 2h", "window: 1s", "aggregates.delay.window"),
        ("function: mean", "function: median", "aggregates.delay.function"),
        ("of: arrivals.delay", "of: arrivals", "the mean of which feature of 'arrivals'?"),
        ("  delay: {function", "  distance: {function", "distance: a name for one feature only"),
        ("distance / delay", "distance / gate", "'gate' is not one of carrier, origin, distance, delay, event_time"),
        ("by: [carrier]", "by: []", "aggregates.delay.by"),
    ],
)
def test_a_derived_feature_that_cannot_be_is_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        sets(lambda text: text.replace(old, new))

    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("of: arrivals.delay", "of: landings.delay", "names the feature set 'landings', which is not defined"),
        ("of: arrivals.delay", "of: arrivals.late", "names 'late', which is not a stored feature of 'arrivals'"),
        ("of: arrivals.delay", "of: arrivals.gate", "is a mean, and 'arrivals.gate' is a category"),
        ("by: [carrier]", "by: [origin]", "is by 'origin', which is neither a stored feature of 'arrivals' nor its entity"),
        ("by: [carrier]", "by: {delay: carrier}", "is by 'delay' of 'arrivals', a number; keys are categories"),
        ("by: [carrier]", "by: {carrier: distance}", "is by 'distance' of 'flights', a number; keys are categories"),
    ],
)
def test_an_aggregate_of_what_is_not_there_is_told(old: str, new: str, words: str) -> None:
    (problem,) = problems_among({definition_id(one): one for one in sets(lambda text: text.replace(old, new)).values()})

    assert problem == f"aggregate 'delay' of 'flights' {words}"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("window: 2h", "window: 3h", ["delay"]),
        ("distance / delay", "delay / distance", ["slack"]),
        ("computed:\n  slack: distance / delay\n", "", ["slack"]),
        ("window: 90d}", "window: 90d}\n  mine: {function: count, of: arrivals, by: [carrier], window: 1h}", []),
    ],
)
def test_derived_features_are_added_and_never_changed(old: str, new: str, names: list[str]) -> None:
    found = incompatible_changes(sets()["flights"], sets(lambda text: text.replace(old, new))["flights"])

    assert found == [
        f"derived feature '{name}' is gone or changes; models were trained on what it was, so add a new one instead" for name in names
    ]
