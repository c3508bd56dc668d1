"""The examples in the docstrings run, in every module whose packages are there."""

import doctest
import importlib
import os
from pathlib import Path

import pytest

import coordconv
from coordconv.backends import BACKENDS

# What a module outside the core may lack here. A ModuleNotFoundError for anything else is an error.
OPTIONAL = {"torch", "paddle", "flax", "jax", "optax", "typer", "rich", "matplotlib"}

# By their files: a package whose framework is not there cannot be walked.
ROOT = Path(coordconv.__file__).parent
MODULES = sorted(
    ".".join(("coordconv", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if file.stem != "__main__"
)

# Modules with what users call, which must show how it is used.
MUST_HAVE = {
    *(f"coordconv.{name}" for name in ("coordinates", "grid", "geometry", "position_bias")),
    *(f"coordconv.{name}" for name in ("reference", "networks", "summary", "convert")),
    *(f"coordconv.{name}" for name in ("recording", "backends", "parity.compare")),
    *(f"coordconv.weights.{name}" for name in ("files", "foreign", "kernels")),
    *(f"coordconv.backends.{name}.layers" for name in BACKENDS),
    *(f"coordconv.backends.{name}.recording" for name in ("flax", "linen")),
    *(f"coordconv.backends.{name}.networks" for name in ("torch", "paddle")),  # as they share it
    *(f"coordconv.backends.{name}.changing" for name in ("torch", "paddle")),
    *(f"coordconv.backends.{name}.position" for name in ("torch", "paddle")),
    "coordconv.fusing",
    "coordconv.position_report",
    "coordconv.backends.torch.reporting",
    "coordconv.backends.torch.fusing",
}


def promised(module: str) -> bool:
    """Whether this environment says that the module's framework is there."""
    names = os.environ.get("COORDCONV_REQUIRE", "").split(",")
    return module.removeprefix("coordconv.backends.").partition(".")[0] in names


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL or promised(name):
            raise
        pytest.skip(f"{name} needs {package}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see above"
    assert result.attempted > 0 or name not in MUST_HAVE, f"{name} has no examples"


def test_every_module_that_must_have_examples_exists() -> None:
    assert set(MODULES) >= MUST_HAVE
