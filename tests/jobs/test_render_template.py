"""Whatever stands in an option comes out of the file as it was, and nowhere else."""

import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.render.template import fill

TEMPLATE = """\
# A comment: <<number>>
first: 1
deep:
  # Above the value.
  value: <<value>>
  items:
    - <<value>>
    - plain
last: {a: b}
"""
TEXT = st.text() | st.sampled_from(
    [
        "",
        "yes",
        "on",
        "null",
        "~",
        "1e3",
        "0o17",
        "1_000",
        "12:30:00",
        "=",
        "a: b",
        "- a",
        "# a",
        "{",
        "a\n",
        "\n a",
        "'",
        '"',
    ]
)
VALUES = st.recursive(
    TEXT | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_a_value_is_what_it_was(value: Any) -> None:
    text = fill(TEMPLATE, {"value": value, "number": 7})
    assert yaml.safe_load(text) == {
        "first": 1,
        "deep": {"value": value, "items": [value, "plain"]},
        "last": {"a": "b"},
    }
    assert text.isascii()
    assert text.startswith("# A comment: 7\nfirst: 1\ndeep:\n  # Above the value.\n  value:")


@pytest.mark.parametrize("text", ["1e3", "0o17", "08", "1.5e3", "0x1F", "yes", "~", "plain"])
def test_text_is_quoted(text: str) -> None:
    """Kubernetes reads YAML 1.2, in which more words are numbers than in PyYAML's 1.1."""
    assert fill("a: <<value>>", {"value": text}) == f'a: "{text}"\n'
    assert fill("a: <<value>>", {"value": {"k": [text]}}) == f'a: {{k: ["{text}"]}}\n'


def test_what_is_not_given_stays_as_a_comment() -> None:
    text = fill(TEMPLATE, {"value": None, "number": 7})
    assert "  # value: ...\n" in text
    assert yaml.safe_load(text)["deep"] == {"items": ["plain"]}


def test_commands_of_several_lines_can_be_read() -> None:
    assert fill("- <<command>>", {"command": "if a; then\n    b\nfi\n"}) == "- |\n  if a; then\n      b\n  fi\n"


def test_rendering_is_quick_and_needs_no_ray() -> None:
    """`erann cluster render` answers at once; neither torch nor Ray is loaded for it."""
    code = "import sys, cluster.render.aws, cluster.render.kubernetes; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
