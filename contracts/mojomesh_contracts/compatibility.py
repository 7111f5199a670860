"""Whether a contract still means to everybody what it meant: JSON Schemas compared over all versions ever accepted.

Two sides need it at once. Records of years ago must be readable by today's code, and a reader of yesterday, still running while
its neighbours are replaced, must be able to read what today's code writes. So an existing field accepts exactly what it did, and
the one thing that may happen to a record is a new field with a default.

Run as a program it adds today's schemas to the golden ones: `python -m mojomesh_contracts.compatibility --write`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mojomesh_contracts.events import EVENTS, Event

Schema = dict[str, Any]

GOLDEN_FOLDER = Path(__file__).parents[1] / "schemas"
WRITE_COMMAND = "python -m mojomesh_contracts.compatibility --write"

_DOCUMENTATION = {"title", "description", "examples", "deprecated", "discriminator", "$comment", "$schema", "$id"}
_LOWER_BOUNDS = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_UPPER_BOUNDS = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
_EXPLAINED = _LOWER_BOUNDS | _UPPER_BOUNDS | {"type", "format", "enum", "anyOf", "properties", "required", "items", "default"}
_EXPLAINED |= {"prefixItems", "additionalProperties", "x-keyed-by", "$defs"}

_OLD_RECORDS = "records written before are refused"
_OLD_READERS = "readers of before refuse what is written now"


def shape_of(schema: Schema | bool) -> Schema:
    """What a schema accepts, without how it is explained: texts left out, spellings that mean the same made one."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    shape: Schema = {}
    for keyword, value in schema.items():
        if keyword in _DOCUMENTATION or (keyword == "additionalProperties" and value is True):
            continue
        if keyword in ("properties", "$defs"):
            shape[keyword] = {name: shape_of(part) for name, part in value.items()}
        elif keyword in ("anyOf", "oneOf", "prefixItems"):
            shape["anyOf" if keyword == "oneOf" else keyword] = [shape_of(part) for part in value]
        elif keyword == "allOf" and len(value) == 1:
            shape |= shape_of(value[0])
        elif keyword == "const":
            shape["enum"] = [value]
        elif keyword == "type" and isinstance(value, list):
            shape["anyOf"] = [{"type": name} for name in value]
        elif keyword == "items" or (isinstance(value, dict) and keyword != "default"):
            shape[keyword] = shape_of(value)
        elif keyword == "required":
            shape[keyword] = sorted(value)
        else:
            shape[keyword] = value
    return shape


def schema_of(event: type[Event]) -> Schema:
    """The shape of an event as it is kept among the golden ones; the key belongs to it, since order hangs on it."""
    return {"x-keyed-by": event.keyed_by, **shape_of(event.model_json_schema())}


def incompatibilities(old_schema: Schema, new_schema: Schema) -> list[str]:
    """What `new_schema` breaks of `old_schema`, in words, each fault with the field it is about; empty when nothing."""
    return list(_Comparison(shape_of(old_schema), shape_of(new_schema)).faults())


class _Comparison:
    """Two schemas side by side, each with its own `$defs`."""

    def __init__(self, old: Schema, new: Schema) -> None:
        self._old, self._new = old, new
        self._open: set[tuple[str, str]] = set()

    def faults(self) -> Iterator[str]:
        if (before := self._old.get("x-keyed-by")) != (now := self._new.get("x-keyed-by")):
            yield f"the key changes from {before} to {now}: the order of records would be another"
        yield from self._between(self._old, self._new, "")

    def _between(self, old: Schema, new: Schema, at: str) -> Iterator[str]:
        refs = (old.get("$ref", ""), new.get("$ref", ""))
        if all(refs):
            if refs in self._open:  # a model that holds itself: compared further up already
                return
            self._open.add(refs)
        old, new = _resolve(old, self._old), _resolve(new, self._new)
        if "anyOf" in old or "anyOf" in new:
            yield from self._alternatives(old, new, at)
        elif old.get("type") != new.get("type"):
            yield f"{_named(at)} changes its type from {_kind(old)} to {_kind(new)}"
        else:
            yield from _values(old, new, at)
            yield from self._fields(old, new, at)
            yield from self._parts(old, new, at)
        yield from _other_keywords(old, new, at)
        self._open.discard(refs)

    def _fields(self, old: Schema, new: Schema, at: str) -> Iterator[str]:
        before, now = old.get("properties", {}), new.get("properties", {})
        was_required, is_required = set(old.get("required", [])), set(new.get("required", []))
        added = [name for name in now if name not in before]
        for name, schema in before.items():
            field = f"{at}.{name}".lstrip(".")
            if name not in now:
                twins = [other for other in added if not list(self._between(schema, now[other], field))]
                renamed = f" (renamed to '{twins[0]}'?)" if twins else ""
                yield f"field '{field}' is gone{renamed}: {_OLD_READERS if name in was_required else 'readers of before miss it'}"
                continue
            yield from self._between(schema, now[name], field)
            yield from _presence(field, name in was_required, name in is_required)
            if name not in was_required | is_required and schema.get("default") != now[name].get("default"):
                change = f"from {json.dumps(schema.get('default'))} to {json.dumps(now[name].get('default'))}"
                yield f"field '{field}' changes its default {change}: records without it change their meaning"
        for name in added:
            field = f"{at}.{name}".lstrip(".")
            if name in is_required:
                yield f"new field '{field}' is required: {_OLD_RECORDS}; give it a default"

    def _parts(self, old: Schema, new: Schema, at: str) -> Iterator[str]:
        """Items of arrays and values of mappings."""
        yield from self._maybe(old.get("items"), new.get("items"), f"{at}[]", "items")
        before, now = old.get("prefixItems", []), new.get("prefixItems", [])
        if len(before) != len(now):
            yield f"{_named(at)} changes its length from {len(before)} to {len(now)} places"
        for place, (first, second) in enumerate(zip(before, now, strict=False)):
            yield from self._between(first, second, f"{at}[{place}]")
        extra_before, extra_now = old.get("additionalProperties"), new.get("additionalProperties")
        if extra_before is False and extra_now is not False:
            yield f"{_named(at)} allows additional fields: {_OLD_READERS}"
        elif extra_now is False and extra_before is not False:
            yield f"{_named(at)} forbids additional fields: {_OLD_RECORDS}"
        elif extra_before is not False:
            yield from self._maybe(extra_before, extra_now, f"{at}{{}}", "values")

    def _maybe(self, old: Schema | None, new: Schema | None, at: str, what: str) -> Iterator[str]:
        if old is not None and new is not None:
            yield from self._between(old, new, at)
        elif new is not None:
            yield f"{_named(at)}: the {what} were of any kind and are now {_kind(new)}: {_OLD_RECORDS}"
        elif old is not None:
            yield f"{_named(at)}: the {what} were {_kind(old)} and are now of any kind: {_OLD_READERS}"

    def _alternatives(self, old: Schema, new: Schema, at: str) -> Iterator[str]:
        """Alternatives match as sets; one that finds no equal is explained against the new one of its own kind, if there is one."""
        before, now = old.get("anyOf", [_branch(old)]), list(new.get("anyOf", [_branch(new)]))
        unmatched = []
        for schema in before:
            equal = next((other for other in now if not list(self._between(schema, other, at))), None)
            if equal is None:
                unmatched.append(schema)
            else:
                now.remove(equal)
        for schema in unmatched:
            alike = next((other for other in now if self._kind(schema, self._old) == self._kind(other, self._new)), None)
            if alike is None:
                yield f"{_named(at)} can no longer be {_kind(schema)}: {_OLD_RECORDS}"
            else:
                now.remove(alike)
                yield from self._between(schema, alike, at)
        for schema in now:
            yield f"{_named(at)} can now also be {_kind(schema)}: {_OLD_READERS}"

    def _kind(self, schema: Schema, root: Schema) -> object:
        return _resolve(schema, root).get("type")


def _resolve(schema: Schema, root: Schema) -> Schema:
    while "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        schema = root["$defs"][name] | {keyword: value for keyword, value in schema.items() if keyword != "$ref"}
    return schema


def _branch(schema: Schema) -> Schema:
    return {keyword: value for keyword, value in schema.items() if keyword != "default"}


def _named(at: str) -> str:
    return f"field '{at}'" if at else "the record"


def _kind(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    kind = str(schema.get("type", "anything"))
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _presence(field: str, was_required: bool, is_required: bool) -> Iterator[str]:
    if is_required and not was_required:
        yield f"field '{field}' becomes required: {_OLD_RECORDS}"
    if was_required and not is_required:
        yield f"field '{field}' becomes optional: {_OLD_READERS}"


def _values(old: Schema, new: Schema, at: str) -> Iterator[str]:
    """Which values of one type are accepted."""
    if old.get("format") != new.get("format"):
        yield f"{_named(at)} changes its type from {_kind(_plain(old))} to {_kind(_plain(new))}"
    before, now = old.get("enum"), new.get("enum")
    if (before is None) != (now is None):
        yield f"{_named(at)} was {_kind(old)} and is now {_kind(new)}: {_OLD_RECORDS if before is None else _OLD_READERS}"
    elif before is not None and now is not None:
        if gone := [value for value in before if value not in now]:
            yield f"{_named(at)} can no longer be {', '.join(map(json.dumps, gone))}: {_OLD_RECORDS}"
        if added := [value for value in now if value not in before]:
            yield f"{_named(at)} can now also be {', '.join(map(json.dumps, added))}: {_OLD_READERS}"
    for bound in sorted(_LOWER_BOUNDS | _UPPER_BOUNDS):
        first, second = old.get(bound), new.get(bound)
        if first != second:
            tightened = first is None or (second is not None and (second > first) == (bound in _LOWER_BOUNDS))
            change = f"{bound} {'none' if first is None else first} to {'none' if second is None else second}"
            yield f"{_named(at)} is {'tightened' if tightened else 'loosened'} from {change}: {_OLD_RECORDS if tightened else _OLD_READERS}"


def _plain(schema: Schema) -> Schema:
    return {keyword: schema[keyword] for keyword in ("type", "format") if keyword in schema}


def _other_keywords(old: Schema, new: Schema, at: str) -> Iterator[str]:
    """A keyword this module knows nothing special of (`pattern`, `multipleOf`, `uniqueItems`, ...) may not change at all."""
    for keyword in sorted((old.keys() | new.keys()) - _EXPLAINED):
        if old.get(keyword) != new.get(keyword):
            yield f"{_named(at)} changes its {keyword} from {json.dumps(old.get(keyword))} to {json.dumps(new.get(keyword))}"


def golden_schemas(event: type[Event], folder: Path = GOLDEN_FOLDER) -> list[Schema]:
    """Every version of an event's schema that was ever accepted, oldest first.

    Raises:
        FileNotFoundError: A version between the first and the last is gone.
    """
    versions = folder / event.topic.name
    count = len(list(versions.glob("*.json")))
    return [json.loads((versions / f"{number}.json").read_text()) for number in range(1, count + 1)]


def faults_of(event: type[Event], folder: Path = GOLDEN_FOLDER) -> list[str]:
    """What today's event, or a golden version after another, breaks of any golden version before it."""
    versions = [*golden_schemas(event, folder), schema_of(event)]
    found = []
    for later, new in enumerate(versions[1:], start=2):
        for number, old in enumerate(versions[: later - 1], start=1):
            newer = "today's schema" if later == len(versions) else f"version {later}"
            found += [f"{event.topic.name}, version {number} against {newer}: {fault}" for fault in incompatibilities(old, new)]
    return found


def write_golden(event: type[Event], folder: Path = GOLDEN_FOLDER) -> Path | None:
    """Add today's schema as the next version; None when it is there already."""
    versions, today = golden_schemas(event, folder), schema_of(event)
    if today in versions:
        return None
    file = folder / event.topic.name / f"{len(versions) + 1}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(today, indent=2, sort_keys=True) + "\n")
    return file


def main(arguments: list[str]) -> int:
    """Check every event; with `--write`, add the schemas that are new and compatible."""
    faults = [fault for event in EVENTS for fault in faults_of(event)]
    if faults:
        sys.stderr.write("\n".join([*faults, "Make these changes in a new topic, one major version up, beside the old one.", ""]))
        return 1
    missing = [event for event in EVENTS if schema_of(event) not in golden_schemas(event)]
    for event in missing:
        text = f"added {write_golden(event)}" if "--write" in arguments else f"{event.topic.name} is new or changed: {WRITE_COMMAND}"
        sys.stdout.write(text + "\n")
    return 1 if missing and "--write" not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
