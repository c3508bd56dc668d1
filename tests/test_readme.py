"""The Python of README and docs runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coordconv
from coordconv.backends import BACKENDS

ROOT = Path(__file__).parents[1]


def blocks(page: str, kind: str = "python") -> list[str]:
    """The blocks of one kind on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == kind]


BLOCKS = blocks("README.md")
PAGES = [
    *blocks("docs/coordinates.md"),
    *blocks("docs/deployment.md"),
    *blocks("docs/networks.md"),
]


def needed(block: str) -> set[str]:
    """The backends that a block names."""
    found = re.findall(r"coordconv\.backends\.(\w+)|build\([^,]+, \"(\w+)\"", block)
    return {name for pair in found for name in pair if name}


def test_every_framework_has_an_example():
    assert set().union(*map(needed, BLOCKS)) == set(BACKENDS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block", BLOCKS + PAGES, ids=lambda block: block.split("\n")[1])
def test_example(block, tmp_path, monkeypatch):
    for name in needed(block):
        if BACKENDS[name].missing:
            pytest.skip(f"{name} is not installed")
    if "onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "the page", "exec"), {})


def test_the_page_on_parity(tmp_path):
    """Its files are a project whose tests pass, and whose planted error is found as it says."""
    for name in ("torch", "flax"):
        if BACKENDS[name].missing:
            pytest.skip(f"{name} is not installed")
    for block in blocks("docs/parity.md"):
        (tmp_path / block.split("\n")[0].removeprefix("# ")).write_text(block, encoding="utf-8")

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (coordconv_at, tmp_path)))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    coordconv_at = Path(coordconv.__file__).parents[1]
    assert "2 passed" in run("-m", "pytest", "-p", "no:cacheprovider", "test_small_cnn.py")
    found = run("swapped.py").splitlines()
    (said,) = (block.splitlines() for block in blocks("docs/parity.md", kind=""))
    assert found[0].startswith("flax differs from torch at conv2: error 0.")
    assert [line[:15] for line in found[1:]] == [line[:15] for line in said[1:]]
    # Not closer: other versions of the frameworks draw and round a little differently.
    shares = [[float(line.split()[-2]) for line in lines[2:]] for lines in (found, said)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
