"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

from coordconv.backends import BACKENDS

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def needed(block: str) -> set[str]:
    """The backends that a block names."""
    found = re.findall(r"coordconv\.backends\.(\w+)|build\([^,]+, \"(\w+)\"", block)
    return {name for pair in found for name in pair if name}


def test_every_framework_has_an_example():
    assert set().union(*map(needed, BLOCKS)) == set(BACKENDS)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[1])
def test_example(block, tmp_path, monkeypatch):
    for name in needed(block):
        if BACKENDS[name].missing:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
