"""YAML by the core schema of YAML 1.2."""

import math
from typing import Any

import pytest
import yaml

from erann_dist.formats import strict_yaml

SURPRISES = [
    "1e6",
    "010",
    "0o10",
    "08",
    "off",
    "yes",
    "1:30",
    "1.5e3",
    "2024-01-01",
    "~",
    "",
    "null",
    "<<",
    "0x1f",
    "=",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1e6", 1e6),
        ("1e-3", 1e-3),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("off", "off"),
        ("yes", "yes"),
        ("TRUE", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, c: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = strict_yaml.load(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "{a: {b: 1, b: 2}}",
        "? [1]\n: 2",
        "[" * 1000,
        "{a: " * 1000,
        "- " * 1000,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e" + "9" * 5000,
        "[x",
        "- a\n---\n- b",
        "&a [*a]",
        "*a",
        "[&a [x, x, x, x], &b [*a, *a, *a], &c [*b, *b, *b], &d [*c, *c, *c], &e [*d, *d, *d], &f [*e, *e, *e],"
        " &g [*f, *f, *f], &h [*g, *g, *g], &i [*h, *h, *h], &j [*i, *i, *i]]",
        "[&a {x: 1}, " + "".join(f"&a {{<<: [{'*a, ' * 9}*a]}}, " for _ in range(9)) + "]",
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        b"\xff",
        "a\0b",
        "!!int abc",
        "!!bool abc",
        "!!timestamp abc",
        "!!binary YQ==",
        "!!python/object/apply:os.system ['true']",
    ],
)
@pytest.mark.parametrize("load", [strict_yaml.load, strict_yaml.load_dumped])
def test_texts_that_are_refused_are_one_line(text: str, load: Any) -> None:
    if load is strict_yaml.load_dumped and text in ("!!binary YQ==", "0x" + "f" * 5000, "1e" + "9" * 5000):
        return  # YAML 1.1 has these
    with pytest.raises(ValueError, match=".") as error:
        load(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_what_is_dumped_is_read_alike_by_both_versions() -> None:
    tree = {"strings": SURPRISES, "numbers": [1e-5, 1e22, 7, 0.5], "others": [None, True], "😀": "ü"}
    text = strict_yaml.dump(tree)
    assert strict_yaml.load(text) == strict_yaml.load_dumped(text) == yaml.safe_load(text) == tree


def test_what_pyyaml_dumped_is_read_as_it_was_meant() -> None:
    text = yaml.safe_dump(SURPRISES)
    assert strict_yaml.load_dumped(text) == SURPRISES
