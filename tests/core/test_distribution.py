"""Under which name the package is installed, and what it says of that."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coordconv.backends import BACKENDS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_missing_framework_is_said_to_need_is_what_its_extra_asks_for(name):
    info = BACKENDS[name]
    assert info.requirements
    assert set(info.requirements) <= set(
        PROJECT["optional-dependencies"][name if name != "linen" else "flax"]
    )
    assert info.install == f"pip install {' '.join(map(repr, info.requirements))}"


OTHERS_NAME = re.compile(r"pip3? install[^\n&]*?(?<![-\w/.])coordconv(?![-\w/.])")


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("pip install 'coordconv[torch]'", True),
        ("python -m pip install -c constraints.txt coordconv", True),
        ("pip install 'coordconv-layers[torch]' && coordconv demo", False),
        ("pip install . && coordconv demo", False),
    ],
)
def test_the_search_finds(line, is_wrong):
    assert bool(OTHERS_NAME.search(line)) is is_wrong


def test_nobody_is_told_to_install_the_other_coordconv():
    """On the package index that name belongs to a converter of geographic coordinates."""
    kinds = {".py", ".md", ".toml", ".yml", ".yaml", ".ini", ".txt", ".cff"}
    read = 0
    for folder in ("coordconv", "tests", "benchmarks", "docs", ".github", "."):
        files = (ROOT / folder).rglob("*") if folder != "." else ROOT.iterdir()
        for file in files:
            if file.suffix in kinds and file != Path(__file__):
                read += 1
                found = OTHERS_NAME.search(file.read_text(encoding="utf-8"))
                assert not found, f"{file}: {found}"
    assert read > 50


def test_the_other_coordconv_is_named(tmp_path):
    """It brings a package Coordsys and a command of that name, neither of which is ours."""
    (tmp_path / "Coordsys").mkdir()
    (tmp_path / "Coordsys" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import coordconv; coordconv.coordinate_grid((2,))"],
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip uninstall coordconv" in done.stderr
    assert "coordconv-layers" in done.stderr
