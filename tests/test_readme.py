"""The Python of README and docs runs as it stands."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import coordconv
from coordconv import Coordinates
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
@pytest.mark.parametrize(
    "block", BLOCKS + PAGES, ids=lambda block: block.split("\n", 2)[1] or block[:40]
)
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


@pytest.mark.parametrize("align", ["corners", "edges", "start"])
@pytest.mark.parametrize("outside", ["zero", "extend"])
@pytest.mark.parametrize(("stride", "halo"), [(1, 3), (2, 4), (4, 8)])
def test_tiles_are_the_whole(align, outside, stride, halo):
    """The helper of docs/coordinates.md, of any alignment, where tiles do not divide the image."""
    if BACKENDS["torch"].missing:
        pytest.skip("torch is not installed")
    import torch

    from coordconv.backends.torch import CoordConv2d

    (block,) = (each for each in blocks("docs/coordinates.md") if "def tiled(" in each)
    imports, helper, _ = block.split("\n\n\n")
    names = {}
    exec(compile(f"{imports}\n{helper}", "the page", "exec"), names)
    coords = Coordinates("xyr", align=align, outside=outside)
    model = torch.nn.Sequential(
        CoordConv2d(3, 8, 5, stride=stride, padding=2, coords=coords),
        torch.nn.Tanh(),
        CoordConv2d(8, 2, 3, padding=1, coords=coords),
    ).to(torch.float64)
    image = torch.randn(2, 3, 88, 64, dtype=torch.float64)
    with torch.no_grad():
        whole = model(image)
        torch.testing.assert_close(names["tiled"](model, image, 32, halo, stride), whole)
        names["window"] = lambda window: nullcontext()
        without = names["tiled"](model, image, 32, halo, stride)
        assert (without - whole).abs().max() > 0.01
