"""What may import what: the core no framework, a framework its own module alone."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import coordconv
from coordconv.backends import BACKENDS, available_backends

PACKAGE = Path(coordconv.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Each package beyond the standard library, and the files that may import it.
HOME = {
    "numpy": set(FILES),
    "safetensors": {"weights.py"},
    "torch": {"backends/torch.py"},
    "paddle": {"backends/paddle.py"},
    "jax": {"backends/jax.py", "backends/flax.py", "backends/linen.py"},
    "jaxlib": {"backends/jax.py"},
    "flax": {"backends/flax.py", "backends/linen.py"},
    "optax": {"backends/jax.py", "backends/flax.py", "backends/linen.py"},
    "orbax": {"backends/jax.py"},
    "typer": {"cli.py", "demo.py"},
    "rich": {"cli.py", "demo.py", "parity/report.py"},
    "matplotlib": {"cli.py", "demo.py", "parity/models.py", "parity/training.py"},
    "hypothesis": {"parity/strategies.py"},
}
FRAMEWORKS = ("torch", "paddle", "jax", "jaxlib", "flax", "optax")

# The modules that everything else stands on, and that stand on nothing but each other.
CORE = (
    "convert.py",
    "coordinates.py",
    "geometry.py",
    "grid.py",
    "networks.py",
    "position_bias.py",
    "recording.py",
    "reference.py",
    "weights.py",
)


def imported(tree: ast.Module) -> Iterator[str]:
    """The full name of each module that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):  # import_module("torch") and __import__("torch")
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = called.id if isinstance(called, ast.Name) else called
            if name in ("import_module", "__import__"):
                yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def parsed(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES)
def test_each_package_is_imported_in_its_own_files_alone(file: str) -> None:
    packages = {name.partition(".")[0] for name in imported(parsed(file))}
    foreign = packages - {"coordconv", "__future__"} - set(sys.stdlib_module_names)
    assert foreign <= set(HOME), f"{file} imports what the project does not know"
    misplaced = {name for name in foreign if file not in HOME[name]}
    assert not misplaced, f"{file} imports {misplaced}"


@pytest.mark.parametrize("file", CORE)
def test_the_core_knows_no_backend_and_no_command(file: str) -> None:
    """It may load one through the registry; its name it does not know."""
    ours = {name for name in imported(parsed(file)) if name.startswith("coordconv.")}
    modules = {f"coordconv.{name.removesuffix('.py')}" for name in (*CORE, "backends.py")}
    assert all(any(f"{name}.".startswith(f"{m}.") for m in modules) for name in ours), ours
    assert not any(name.startswith("coordconv.backends.") for name in ours)


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("backends/")])
def test_backends_stand_on_the_core_alone(file: str) -> None:
    ours = {name for name in imported(parsed(file)) if name.startswith("coordconv.")}
    assert not any(name.startswith(("coordconv.cli", "coordconv.parity")) for name in ours)


def run(code: str, **environment: str) -> str:
    """Run code in a new interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_numpy_and_safetensors_alone() -> None:
    """Every other package that is installed is hidden, as if it were not."""
    code = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        allowed = sys.stdlib_module_names | {"numpy", "safetensors", "coordconv"}
        if package not in allowed:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)

sys.meta_path.insert(0, Hidden())
import coordconv
from coordconv import *
from coordconv import geometry, networks, position_bias, reference

assert coordinate_grid((2, 3)).shape == (2, 2, 3)
assert networks.summary("coord_cnn").parameters == 160065
"""
    run(code)


def test_import_loads_no_framework() -> None:
    """Where frameworks are installed, too; nor does asking which they are load one."""
    code = f"""
import sys
import coordconv

coordconv.available_backends()
from coordconv import geometry, networks, position_bias, reference
print([name for name in {(*FRAMEWORKS, "typer", "rich", "matplotlib")} if name in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", BACKENDS)
def test_loading_a_backend_loads_no_other_framework(name: str) -> None:
    if name not in available_backends():
        pytest.skip(f"{name} is not installed")
    own = {"torch": {"torch"}, "paddle": {"paddle"}}.get(name, {"jax", "jaxlib", "flax", "optax"})
    others = set(FRAMEWORKS) - own
    code = f"""
import sys
framework = __import__({BACKENDS[name].imports[0]!r})
before = set(sys.modules)  # what a framework brings along itself is its own affair
from coordconv import backends
backends.load({name!r})
print(sorted((set(sys.modules) - before) & {others}))
"""
    assert run(code).strip() == "[]"


def test_import_is_quick() -> None:
    """Less than 30 ms beyond NumPy's and safetensors' own, the best of a few tries.

    In time of this process alone, so that what else the machine does is left out.
    """
    code = """
import time
import numpy, numpy.typing, safetensors, safetensors.numpy
start = time.process_time()
import coordconv
print(time.process_time() - start)
"""
    assert min(float(run(code)) for _ in range(5)) < 0.030


def test_the_public_face() -> None:
    assert set(coordconv.__all__) == {
        "Coordinates",
        "available_backends",
        "coordinate_grid",
        "load_weights",
        "save_weights",
    }
    assert all(hasattr(coordconv, name) for name in coordconv.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert set(available_backends()) <= set(BACKENDS)


def test_what_an_environment_promises_is_there() -> None:
    """And what it does not promise, under tox, is not: its tests prove what they say they do."""
    promised = set(os.environ.get("COORDCONV_REQUIRE", "").split(",")) & set(BACKENDS)
    assert promised <= set(available_backends())
    if "COORDCONV_REQUIRE" in os.environ and "TOX_ENV_NAME" in os.environ:
        assert promised == set(available_backends())


@pytest.mark.parametrize("require", ["tensorflow", "torch,caffe"])
def test_an_environment_cannot_promise_what_is_no_backend(require: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", str(Path(__file__))],
        env={**os.environ, "COORDCONV_REQUIRE": require, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "COORDCONV_REQUIRE names" in done.stdout + done.stderr
