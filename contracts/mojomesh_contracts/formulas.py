"""On-demand features: pure functions of a row's values and the time of asking, written as formulas.

One text, one meaning: training and serving evaluate the same closure on the same Python numbers. A formula is taken apart by `ast`, and
what is not listed here is refused; nothing of it is ever run as code.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo

from mojomesh_contracts.events import FeatureValue

Kind = Literal["number", "category", "boolean"]
ASKED_AT = "event_time"
"""The name under which a formula finds the time of asking."""

MOST_CHARACTERS, MOST_LEVELS = 500, 100

Evaluate = Callable[[Mapping[str, FeatureValue], datetime], FeatureValue]
_Part = tuple[str, Evaluate]


class FormulaError(ValueError):
    """A text that is no formula; says what is wrong with it."""


_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_NUMBERS: dict[str, tuple[int, Callable[..., float]]] = {
    "abs": (1, abs),
    "ceil": (1, lambda value: float(math.ceil(value))),
    "exp": (1, math.exp),
    "floor": (1, lambda value: float(math.floor(value))),
    "log": (1, math.log),
    "log1p": (1, math.log1p),
    "max": (2, max),
    "min": (2, min),
    "sqrt": (1, math.sqrt),
}
"""Functions of numbers: how many they take, and what they do. Where they are not defined the value is missing."""

_TIMES: dict[str, Callable[[datetime], float]] = {
    "hour": lambda time: float(time.hour),
    "day_of_week": lambda time: float(time.weekday()),
    "day_of_year": lambda time: float(time.timetuple().tm_yday),
    "month": lambda time: float(time.month),
}
"""Functions of a time, in UTC or in the time zone named second. Monday is 0."""


class Formula:
    """A formula over the named features; missing in, missing out.

    Numbers are double precision; a result that is not finite, such as a division by zero, is missing. Comparing gives a boolean. Known
    are + - * / // %, comparisons, `a if condition else b`, abs, ceil, exp, floor, log, log1p, max, min and sqrt; hour, day_of_week,
    day_of_year and month of `event_time`, as in `hour(event_time, 'America/New_York')`; and is_missing.
    """

    def __init__(self, text: str, kinds: Mapping[str, Kind]) -> None:
        """Take `text` apart; `kinds` are the types of the features it may name.

        Raises:
            FormulaError: It is no formula over these.
        """
        self.names: dict[str, Kind] = {}
        """The features it uses, in the order of their first mention, with their types."""
        self._kinds = kinds
        self._level = 0
        if len(text) > MOST_CHARACTERS:
            raise FormulaError(f"a formula has {MOST_CHARACTERS} characters at most")
        try:
            kind, self._evaluate = self._part(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormulaError(f"'{text}' is no formula: {error}") from None
        if kind == "time":
            raise FormulaError(f"'{text}' is a time; ask for its hour, or for what else is a number")
        self.kind: Kind = kind  # type: ignore[assignment]  # a part's kind is a Kind or a time, which this is not

    def __call__(self, values: Mapping[str, FeatureValue], asked_at: datetime) -> FeatureValue:
        """The value for a row's `values` (absent or None is missing) asked for as of `asked_at`, in UTC."""
        value = self._evaluate(values, asked_at)
        return value + 0.0 if isinstance(value, float) else value  # no -0.0

    def _part(self, node: ast.expr) -> _Part:
        self._level += 1
        if self._level > MOST_LEVELS:  # what evaluates it is as deep
            raise FormulaError(f"it is nested more than {MOST_LEVELS} deep")
        part = self._part_of(node)
        self._level -= 1
        return part

    def _part_of(self, node: ast.expr) -> _Part:
        match node:
            case ast.Constant(value=bool()):
                raise FormulaError("true and false are compared by themselves, without '=='")
            case ast.Constant(value=int() | float() as number) if abs(number) < 1e300:
                constant = float(number)
                return "number", lambda values, at: constant
            case ast.Constant(value=str() as text):
                return "category", lambda values, at: text
            case ast.Name(id=name):
                return self._named(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._of_numbers(operator.neg, operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._of_numbers(_ARITHMETIC[type(op)], left, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return self._comparison(op, left, right)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._choice(test, body, orelse)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
        raise FormulaError(f"'{ast.unparse(node)}' is not among what formulas know")

    def _named(self, name: str) -> _Part:
        if name in self._kinds:
            kind = self.names[name] = self._kinds[name]
            if kind == "number":
                return kind, lambda values, at: None if (value := values.get(name)) is None else float(value)
            return kind, lambda values, at: values.get(name)
        if name == ASKED_AT:
            return "time", lambda values, at: None
        raise FormulaError(f"'{name}' is not one of {', '.join([*self._kinds, ASKED_AT])}")

    def _numbers(self, nodes: tuple[ast.expr, ...]) -> list[Evaluate]:
        parts = [self._part(node) for node in nodes]
        for node, (kind, _) in zip(nodes, parts, strict=True):
            if kind != "number":
                raise FormulaError(f"'{ast.unparse(node)}' is a {kind}, no number")
        return [evaluate for _, evaluate in parts]

    def _of_numbers(self, function: Callable[..., float], *nodes: ast.expr) -> _Part:
        parts = self._numbers(nodes)

        def evaluate(values: Mapping[str, FeatureValue], at: datetime) -> FeatureValue:
            numbers = [part(values, at) for part in parts]
            if None in numbers:
                return None
            try:
                result = function(*numbers)
            except (ArithmeticError, ValueError):
                return None
            return result if math.isfinite(result) else None

        return "number", evaluate

    def _comparison(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> _Part:
        (kind, one), (other_kind, other) = self._part(left), self._part(right)
        if kind != other_kind or kind == "time" or (kind != "number" and not isinstance(op, ast.Eq | ast.NotEq)):
            raise FormulaError(f"a {kind} and a {other_kind} cannot be compared in '{ast.unparse(left)}' and '{ast.unparse(right)}'")
        compare = _COMPARISONS[type(op)]

        def evaluate(values: Mapping[str, FeatureValue], at: datetime) -> FeatureValue:
            first, second = one(values, at), other(values, at)
            return None if first is None or second is None else compare(first, second)  # type: ignore[arg-type]  # of one kind, seen above

        return "boolean", evaluate

    def _choice(self, test: ast.expr, body: ast.expr, orelse: ast.expr) -> _Part:
        (condition_kind, condition), (kind, then), (other_kind, otherwise) = (self._part(node) for node in (test, body, orelse))
        if condition_kind != "boolean" or kind != other_kind:
            raise FormulaError(f"'{ast.unparse(test)}' must be a boolean, and what it chooses between of one type")

        def evaluate(values: Mapping[str, FeatureValue], at: datetime) -> FeatureValue:
            holds = condition(values, at)
            return None if holds is None else then(values, at) if holds else otherwise(values, at)

        return kind, evaluate

    def _call(self, name: str, arguments: list[ast.expr]) -> _Part:
        if name == "is_missing" and len(arguments) == 1:
            _, inner = self._part(arguments[0])
            return "boolean", lambda values, at: inner(values, at) is None
        if name in _TIMES and 1 <= len(arguments) <= 2:
            return self._of_time(name, *arguments)
        if name in _NUMBERS and len(arguments) == _NUMBERS[name][0]:
            return self._of_numbers(_NUMBERS[name][1], *arguments)
        raise FormulaError(f"there is no function '{name}' of {len(arguments)}")

    def _of_time(self, name: str, time: ast.expr, zone: ast.expr | None = None) -> _Part:
        if self._part(time)[0] != "time":
            raise FormulaError(f"{name} takes {ASKED_AT}, not '{ast.unparse(time)}'")
        place: tzinfo = UTC
        if zone is not None:
            if not (isinstance(zone, ast.Constant) and isinstance(zone.value, str)):
                raise FormulaError(f"{name} takes a time zone as in 'America/New_York', not {ast.unparse(zone)}")
            try:
                place = ZoneInfo(zone.value)
            except (KeyError, ValueError, OSError):
                raise FormulaError(f"there is no time zone '{zone.value}'") from None
        function = _TIMES[name]
        return "number", lambda values, at: function(at.astimezone(place))
