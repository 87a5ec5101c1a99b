"""YAML by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, chapter 10.3), for files and single values.

010 is ten, 0o10 eight, 1e6 a float; off, yes, 1:30, 1_000 and 2024-01-01 are strings. A duplicate key is an error. The
merge key << of YAML 1.1 still works. Tags can only create JSON's types, so no text runs code.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from erann_dist.errors import UsageError
from erann_dist.storage.plain_file import read_plain_file

_MAX_BYTES = 1_000_000  # of a file
_MAX_DEPTH = 50
_MAX_DIGITS = 100
_MAX_VALUES = 100_000
_PREFIX = "tag:yaml.org,2002:"

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with its own resolvers and constructors, in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ConstructorError(None, None, f"nested more than {_MAX_DEPTH} deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _require_distinct_keys(node)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:
            raise ConstructorError(None, None, f"more than {_MAX_VALUES:,} merged keys", node.start_mark)


def _require_distinct_keys(node: yaml.MappingNode) -> None:
    keys = set[tuple[str, str]]()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConstructorError(None, None, "a key is a single word", key.start_mark)
        if (key.tag, key.value) in keys:
            raise ConstructorError(None, None, f"the key {key.value[:100]!r} is given twice", key.start_mark)
        keys.add((key.tag, key.value))


def _require_small(value: Any, depth: int = 0, values: int = 0) -> int:
    """How many values there are, aliases counted each time they are used. Raises ValueError when there are too many."""
    values += 1
    if depth > _MAX_DEPTH or values > _MAX_VALUES:
        raise ValueError("its aliases repeat themselves without end")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            values = _require_small(item, depth + 1, values)
    return values


def _scalar(node: yaml.Node, pattern: re.Pattern[str], kind: str) -> str:
    """The text of a scalar, which an explicit tag may have mislabelled."""
    if not isinstance(node, yaml.ScalarNode) or not pattern.match(node.value):
        raise ConstructorError(None, None, f"not {kind}", node.start_mark)
    if len(node.value) > _MAX_DIGITS and pattern in (_INT, _FLOAT):
        raise ConstructorError(None, None, f"a number of {len(node.value):,} characters", node.start_mark)
    return str(node.value)


def _null(loader: _Loader, node: yaml.Node) -> None:
    _scalar(node, _NULL, "null")


def _bool(loader: _Loader, node: yaml.Node) -> bool:
    return _scalar(node, _BOOL, "true or false").lower() == "true"


def _int(loader: _Loader, node: yaml.Node) -> int:
    text = _scalar(node, _INT, "a whole number")
    return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else int(text)


def _float(loader: _Loader, node: yaml.Node) -> float:
    text = _scalar(node, _FLOAT, "a number").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _str(loader: _Loader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or _SURROGATE.search(node.value):
        raise ConstructorError(None, None, "not text that can be written as UTF-8", node.start_mark)
    return str(node.value)


def _undefined(loader: _Loader, node: yaml.Node) -> None:
    raise ConstructorError(None, None, f"the tag {node.tag[:100]!r} is not one of JSON's types", node.start_mark)


# The first match wins: a number without a decimal point and an exponent is an integer.
for _tag, _pattern, _first, _construct in (
    ("null", _NULL, ["~", "n", "N", ""], _null),
    ("bool", _BOOL, list("tTfF"), _bool),
    ("int", _INT, list("-+0123456789"), _int),
    ("float", _FLOAT, list("-+.0123456789"), _float),
    ("merge", re.compile(r"<<\Z"), ["<"], _undefined),
):
    _Loader.add_implicit_resolver(_PREFIX + _tag, _pattern, _first)
    _Loader.add_constructor(_PREFIX + _tag, _construct)
_Loader.yaml_constructors |= {
    f"{_PREFIX}str": _str,
    f"{_PREFIX}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_PREFIX}map": yaml.SafeLoader.construct_yaml_map,
    None: _undefined,
}


class _Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in (("int", _INT, list("-+0123456789")), ("float", _FLOAT, list("-+.0123456789"))):
    _Dumper.add_implicit_resolver(_PREFIX + _tag, _pattern, _first)


class _Loader11(_Loader):
    """YAML 1.1, as PyYAML implements it."""

    yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    yaml_constructors: ClassVar[Any] = {**yaml.SafeLoader.yaml_constructors, f"{_PREFIX}str": _str}


def load(text: str | bytes) -> Any:
    """The value of a YAML text. Raises ValueError, in one line: what is wrong, and in which line."""
    return _load(text, _Loader)


def load_dumped(text: str | bytes) -> Any:
    """The value of a YAML 1.1 text by PyYAML or `dump`, such as a run's recipe.yaml. Raises what load raises."""
    return _load(text, _Loader11)


def _load(text: str | bytes, kind: type[_Loader]) -> Any:
    try:
        value = kind(text if isinstance(text, str) else text.decode()).get_single_data()
        _require_small(value)
        return value
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "it ends too early").split())
        raise ValueError(f"{problem}, line {where.line + 1}" if where else problem) from error
    # PyYAML's scanner calls chr() with any number; YAML 1.1's constructors rely on what an explicit tag claims.
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump(tree: Any) -> str:
    """YAML that `load` and readers of YAML 1.1 understand in the same way."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read(path: Path) -> Any:
    """The value of a YAML file. Raises UsageError, which names the file."""
    data = read_plain_file(path, _MAX_BYTES)
    try:
        return load(data)
    except ValueError as error:
        raise UsageError(f"{path}: not YAML: {error}") from error
