"""The code of README and docs runs as it stands, or is named here with the reason why not."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

import coordconv
from coordconv import Coordinates
from coordconv.backends import BACKENDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)


class Block(NamedTuple):
    """A block of code: its page and line, its language, and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, of one language or all; MyST's directives are none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```([\w{}-]*).*\n((?:.*\n)*?)```$", text, re.MULTILINE)
    every = [Block(page, text[: it.start()].count("\n") + 1, it[1], it[2]) for it in found]
    return [
        each for each in every if not each.language.startswith("{") and language in (None, each[2])
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [each for each in BLOCKS if each.language == "python" and each.page != "docs/parity.md"]
COMMANDS = [
    (f"{block.page}:{block.line + i}", line.partition("#")[0].strip())
    for block in BLOCKS
    if block.language == "sh"
    for i, line in enumerate(block.text.splitlines(), 1)
    if line.strip()
]

# Commands that no test here runs, by how they start, and why.
NOT_HERE = {
    'python -m pip install -c constraints.txt ".[cli,torch': ".ci/run runs it, from README",
    "python -m pip install tox": ".ci/run runs it, from README",
    "python -m pip install": "installs into the reader's environment; tox installs the same extras",
    "python3.11 -m venv": "makes the reader's environment",
    "pre-commit install": "writes into the reader's clone",
    "pytest": "is the tests themselves",
    "COORDCONV_SITE=": "is these tests themselves",
    "ruff": "runs in tox's environment lint",
    "mypy": "runs in tox's environment types",
    "tox": "runs this test",
    "sphinx-build": "ran before, in tox's environment docs",
    "python -m http.server": "does not end",
    "python docs/versions.py": "reads what tox leaves of a whole run",
    "python benchmarks/": "takes minutes, and a quiet machine",
}

# What a block may raise, where the fault is in another project.
KNOWN = {"paddle.flops(": (TypeError, "paddle.flops fails with NumPy 2.4: see test_fusing_paddle")}


def needed(block: Block) -> set[str]:
    """The backends that a block names."""
    found = re.findall(r"coordconv\.backends\.(\w+)|build\([^,]+, \"(\w+)\"", block.text)
    found += [("linen", "")] * ("coordconv.backends import linen" in block.text)
    return {name for pair in found for name in pair if name}


def test_every_framework_has_an_example():
    for page, frameworks in (
        ("README.md", set(BACKENDS) - {"linen"}),
        ("docs/start.md", set(BACKENDS)),
    ):
        assert set().union(*map(needed, blocks(page, "python"))) == frameworks, page


def test_every_block_is_of_a_language_that_is_run_or_of_none():
    """What has none is a picture of something; an output, behind code, is held to what it is of."""
    run = ("python", "sh", "py")  # the last in tests/backends/test_quantization.py
    for page in PAGES:
        before = None
        for block in blocks(page):
            assert block.language in (*run, "", "text", "toml", "yaml"), str(block)
            assert block.language != "py" or page == "docs/deployment.md", str(block)
            output = block.language in ("", "text") and before and before.language in run
            assert block.language or not re.match(
                r"(coordconv|pip|pytest|python|tox) ", block.text
            ), f"{block} has commands: say sh"
            assert not output or page == "docs/parity.md", f"{block}: nothing checks this output"
            before = block
        text = (ROOT / page).read_text(encoding="utf-8")
        unseen = re.findall(r"(?:^|\n)\n {4}(?![-*])\S.*", re.sub(r"(?ms)^```.*?^```$", "", text))
        assert not unseen, f"{page} has code without a fence, which no test sees: {unseen}"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_example(block, tmp_path, monkeypatch, record_property):
    for name in needed(block):
        if BACKENDS[name].missing:
            pytest.skip(f"{name} is not installed")
    if "onnx" in block.text:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.text, block.page, "exec")
    for part, (error, reason) in KNOWN.items():
        if part in block.text:
            try:
                exec(code, {})
            except error:
                pytest.skip(reason)
            return
    exec(code, {})
    record_property("blocks run", 1)


@pytest.mark.parametrize("page", sorted({at.partition(":")[0] for at, _ in COMMANDS}))
def test_commands(page, tmp_path, record_property):
    """Those of a page run one after the other in a folder, but for what NOT_HERE names."""
    pytest.importorskip("typer")
    commands = [
        command
        for at, command in COMMANDS
        if at.startswith(f"{page}:") and not command.startswith(tuple(NOT_HERE))
    ]
    if page == "docs/weights.md":  # its first block writes the file that the commands read
        if missing := [name for name in BACKENDS if BACKENDS[name].missing]:
            pytest.skip(f"{', '.join(missing)} not installed")
        run([sys.executable, "-c", blocks(page, "python")[0].text], tmp_path)
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program in ("coordconv", "python"), f"{page}: run it or name it: {command}"
        module = ["-m", "coordconv"] if program == "coordconv" else []
        run([sys.executable, *module, *arguments], tmp_path)
    record_property("commands run", len(commands))


def test_no_reason_is_left_over():
    for start in NOT_HERE:
        assert any(command.startswith(start) for _, command in COMMANDS), start
    for part in KNOWN:
        assert any(part in block.text for block in PYTHON), part


def run(command, folder, *more):
    """What a command says that runs in a folder, with the package and more on its path."""
    path = os.pathsep.join(map(str, (Path(coordconv.__file__).parents[1], *more)))
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_on_parity(tmp_path, record_property):
    """Its files are a project whose tests pass, and whose planted error is found as it says."""
    for name in ("torch", "flax"):
        if BACKENDS[name].missing:
            pytest.skip(f"{name} is not installed")
    files = blocks("docs/parity.md", "python")
    for block in files:
        name = block.text.split("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    tests = ("-m", "pytest", "-p", "no:cacheprovider", "test_small_cnn.py")
    assert "2 passed" in run([sys.executable, *tests], tmp_path, tmp_path)
    found = run([sys.executable, "swapped.py"], tmp_path, tmp_path).splitlines()
    (said,) = (block.text.splitlines() for block in blocks("docs/parity.md", ""))
    assert found[0].startswith("flax differs from torch at conv2: error 0.")
    assert [line[:15] for line in found[1:]] == [line[:15] for line in said[1:]]
    # Not closer: other versions of the frameworks draw and round a little differently.
    shares = [[float(line.split()[-2]) for line in lines[2:]] for lines in (found, said)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    record_property("blocks run", len(files))


@pytest.mark.parametrize("align", ["corners", "edges", "start"])
@pytest.mark.parametrize("outside", ["zero", "extend"])
@pytest.mark.parametrize(("stride", "halo"), [(1, 3), (2, 4), (4, 8)])
def test_tiles_are_the_whole(align, outside, stride, halo):
    """The helper of docs/windows.md, of any alignment, where tiles do not divide the image."""
    if BACKENDS["torch"].missing:
        pytest.skip("torch is not installed")
    import torch

    from coordconv.backends.torch import CoordConv2d

    (block,) = (each for each in blocks("docs/windows.md") if "def tiled(" in each.text)
    imports, helper, _ = block.text.split("\n\n\n")
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
