"""YAML templates with placeholders, <<name>> at the end of a line. A value can't be parsed as anything but itself."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_PLACE = re.compile(r"<<(\w+)>>")
_WORD = re.compile(
    r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z][A-Za-z0-9_-]*", re.IGNORECASE
)  # Not a boolean of YAML 1.1.


def read_template(name: str) -> str:
    """The text of a template of this package."""
    return Path(__file__).with_name(name).read_text()


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with a value for each placeholder: text, a number, a list or a map.

    A value of None turns the line into a comment, to be completed by hand. In a comment the value is inserted as it is.
    Text is always quoted, in ASCII, so that no YAML version reads a word as a number or a boolean.
    """
    return "".join(_filled(line, values) + "\n" for line in template.splitlines())


def _filled(line: str, values: Mapping[str, Any]) -> str:
    place = _PLACE.search(line)
    if not place:
        return line
    value = values[place[1]]
    indent = len(line) - len(line.lstrip())
    if line.lstrip().startswith("#"):
        return line.replace(place[0], str(value))
    before = line[: place.start()].rstrip()
    if value is None:
        return f"{' ' * indent}# {before.lstrip()} ..."
    # Dumped as the only item of a list, "- …", so that the further lines of a value are indented by two.
    first, *rest = yaml.dump(_Item([value]), Dumper=_Quoted, width=float("inf"), sort_keys=False).splitlines()
    lines = [first[2:], *(" " * indent + each for each in rest)]
    if before.endswith(":") and isinstance(value, dict | list) and first[2] not in "{[":
        lines = [before, " " * (indent + 2) + lines[0], *lines[1:]]
    else:
        lines[0] = f"{before} {lines[0]}"
    return "\n".join(lines)


class _Item(list[Any]):
    """A list that is written with one item per line."""


class _Quoted(yaml.SafeDumper):
    """Quotes all text except plain words as keys, and writes short collections on one line.

    PyYAML's own dumper leaves 1e3, 0o17 and 08 without quotes, which readers of YAML 1.2 take for numbers.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def text_node(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else '"')

    def map_node(self, data: dict[str, Any]) -> yaml.MappingNode:
        node = self.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=len(str(data)) < 100)
        for key, _ in node.value:
            if _WORD.fullmatch(key.value):
                key.style = None
        return node

    def list_node(self, data: list[Any]) -> yaml.SequenceNode:
        return self.represent_sequence(
            "tag:yaml.org,2002:seq", data, flow_style=len(str(data)) < 40 and not isinstance(data, _Item)
        )


_Quoted.add_representer(str, _Quoted.text_node)
_Quoted.add_representer(dict, _Quoted.map_node)
_Quoted.add_representer(list, _Quoted.list_node)
_Quoted.add_representer(_Item, _Quoted.list_node)
