"""A recipe file as written: its values, and the line of each key, so that an error can point at it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ggpo.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with the numbers of YAML 1.2: PyYAML by itself reads 5e-4 as a string.

    No setting is made of bytes, which the JSON and YAML of a run folder could not hold: !!binary is unknown here.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # it may contain itself, or stand for a billion values
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not read; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML expects dates to be in calendars
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this cannot be read as {kind}; put it in quotes if it is text", node.start_mark
            ) from error


_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag != "tag:yaml.org,2002:binary"
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Source:
    """Where the values of a recipe come from.

    Attributes:
        name: The file, as the user named it.
        values: The values, with overrides applied.
        lines: 1-based line of each key in the file, by its path.
        overrides: The overrides as written, by the path they set.
    """

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """Say where the value at `path`, or the nearest thing around it, was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return f"override {self.overrides[path[:end]]!r}"
            if path[:end] in self.lines:
                return f"{self.name}, line {self.lines[path[:end]]}"
        return self.name


def read_source(path: Path, overrides: Iterable[str] = ()) -> Source:
    """Read a YAML recipe and apply ``key.subkey=value`` overrides, whose values are YAML too.

    Raises:
        UserError: the file is missing, no YAML mapping, or has a key twice; or an override has no ``=``.
    """
    if not path.is_file():
        raise UserError(f"There is no recipe file {path}; give the path of a YAML file.")
    try:
        return parse_source(path.read_text(encoding="utf-8"), str(path), overrides)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8; a recipe is YAML text.") from error


def parse_source(text: str, name: str, overrides: Iterable[str] = ()) -> Source:
    """As `read_source`, for text at hand; `name` stands for the file in error messages."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _find_lines(node, (), name, lines)
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{name}, line {line}: this is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:  # PyYAML's scanner: the number of a %YAML directive
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise UserError(f"{name} is not a recipe: its values are nested too deeply.") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: a recipe is a YAML mapping (model: ..., task: ...), not a {type(values).__name__}.")
    for key, shorthand in _SHORTHANDS.items():
        if isinstance(values.get(key), str):
            values[key] = {shorthand: values[key]}
    return Source(name, values, lines, _apply(values, overrides))


_SHORTHANDS = {"task": "kind", "data": "source", "optimizer": "kind", "forgetting": "source"}


def _find_lines(node: yaml.Node | None, path: KeyPath, name: str, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
            _find_lines(item, (*path, index), name, lines)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            key = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if key in lines:
                dotted = ".".join(map(str, key))
                raise UserError(f"{name}, line {line}: {dotted} is set a second time (first on line {lines[key]}).")
            lines[key] = line
            _find_lines(value, key, name, lines)


def _apply(values: dict[str, Any], overrides: Iterable[str]) -> dict[KeyPath, str]:
    applied: dict[KeyPath, str] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"Override {override!r} is not of the form key=value, such as training.learning_rate=1e-4.")
        set_value(values, keys, yaml_value(text, override), override)
        applied[tuple(keys)] = override
    return applied


def yaml_value(text: str, override: str) -> Any:
    """The value that `text` is in YAML; `override` is what the user wrote."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"Override {override!r}: {text!r} is not a YAML value.") from error


def set_value(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set the value at `keys`, making the mappings on the way; `override` is what the user wrote."""
    if len(keys) == 1 and keys[0] in _SHORTHANDS and isinstance(value, str):
        value = {_SHORTHANDS[keys[0]]: value}
    inner: Any = values
    for key in keys[:-1]:
        if inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]
        if not isinstance(inner, dict):
            raise UserError(f"Override {override!r}: {key} is {inner!r}, which has no settings inside.")
    inner[keys[-1]] = value


def dump_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
