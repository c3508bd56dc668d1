"""What may import what: the core no framework, a framework its own module alone."""

import ast
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

import coordconv
from coordconv import backends
from coordconv.backends import BACKENDS, available_backends

PACKAGE = Path(coordconv.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Each package beyond the standard library, and the files and folders that may import it.
HOME = {
    "numpy": ("",),
    "safetensors": ("weights/files.py",),
    "torch": ("backends/torch/",),
    "paddle": ("backends/paddle/",),
    "jax": ("backends/jax/", "backends/flax/", "backends/linen/"),
    "jaxlib": ("backends/jax/",),
    "flax": ("backends/jax/", "backends/flax/", "backends/linen/"),
    "optax": ("backends/jax/",),
    "orbax": ("backends/jax/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "matplotlib": ("cli/", "parity/compare.py", "parity/training.py", "position_report.py"),
    "hypothesis": ("parity/strategies.py",),
}
FRAMEWORKS = ("torch", "paddle", "jax", "jaxlib", "flax", "optax")

# The rooms from the ground up: the files and folders in each, and the rooms that it may import from
# beside itself. What is in several is in the first.
ROOMS = {
    "registry": (("backends/__init__.py",), ()),
    "jax": (("backends/jax/",), ("core", "registry")),
    "linen": (("backends/linen/",), ("core", "registry", "jax")),
    "flax": (("backends/flax/",), ("core", "registry", "jax")),
    "torch": (("backends/torch/",), ("core", "registry")),
    "paddle": (("backends/paddle/",), ("core", "registry")),
    "protocols": (("backends/protocols.py",), ("core", "registry")),
    "convert": (("convert.py",), ("core", "registry")),
    "parity": (("parity/",), ("core", "registry")),
    "cli": (("cli/", "__main__.py"), ("core", "registry", "convert", "parity")),
    "core": (("",), ("registry",)),
}


def room(file: str) -> str:
    return next(name for name, (places, _) in ROOMS.items() if file.startswith(places))


def parsed(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a file, but for what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from (other, *executed(other))
        else:
            yield from (node, *executed(node))


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each import of a file, wherever in it: the module, and a name from it or ""."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):  # import_module("torch") and __import__("torch")
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = called.id if isinstance(called, ast.Name) else called
            if name in ("import_module", "__import__"):
                yield from ((str(a.value), "") for a in node.args if isinstance(a, ast.Constant))


def file_of(module: str, files: Collection[str]) -> str | None:
    """The file of a module of ours: a package's is its ``__init__``."""
    path = "/".join(module.split(".")[1:])
    candidates = (f"{path}.py", f"{path}/__init__.py" if path else "__init__.py")
    return next((each for each in candidates if each in files), None)


def needed(file: str, tree: ast.Module, files: Collection[str]) -> set[str]:
    """The files of ours that a file needs before it can be run to its end.

    An import runs the ``__init__`` of the packages around a module, too. Those of the packages that
    the importing file is in do not count, since they are under way already, unless it takes a name
    from one.
    """
    found = set()
    for module, name in imported(tree):
        if module.partition(".")[0] != "coordconv":
            continue
        inner = file_of(f"{module}.{name}", files) if name else None
        own = inner or file_of(module, files)
        assert own, f"{file} imports {module}, which there is not"
        found.add(own)
        parts = own.split("/")
        packages = ["/".join(parts[:i]) for i in range(1, len(parts))]
        found |= {f"{p}/__init__.py" for p in packages if not file.startswith(f"{p}/")}
    return found & set(files)


def graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    return {file: needed(file, tree, trees) for file, tree in trees.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of files that need each other, or an empty list."""
    done: set[str] = set()

    def walk(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return []
        for other in sorted(graph[file]):
            if found := walk(other, [*path, file]):
                return found
        done.add(file)
        return []

    return next(filter(None, (walk(file, []) for file in sorted(graph))), [])


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """The imports that leave a room for one that it may not import from."""
    return [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in sorted(others)
        if room(other) not in (room(file), *ROOMS[room(file)][1])
    ]


@pytest.mark.parametrize("file", FILES)
def test_each_package_is_imported_in_its_own_rooms_alone(file: str) -> None:
    packages = {module.partition(".")[0] for module, _ in imported(parsed(file))}
    foreign = packages - {"coordconv", "__future__"} - set(sys.stdlib_module_names)
    assert foreign <= set(HOME), f"{file} imports what the project does not know"
    misplaced = {name for name in foreign if not file.startswith(HOME[name])}
    assert not misplaced, f"{file} imports {misplaced}"


def test_no_circle_and_no_import_that_runs_up() -> None:
    found = graph({file: parsed(file) for file in FILES})
    assert not (path := circle(found)), " -> ".join(path)
    assert not (wrong := upward(found)), "\n".join(wrong)
    assert not found["backends/__init__.py"], "anything may ask the registry, which asks nothing"


@pytest.mark.parametrize(
    ("sources", "path"),
    [
        ({"grid.py": "from coordconv import layers", "layers.py": "import coordconv.grid"}, 2),
        ({"grid.py": "def f():\n  import coordconv.grid as g"}, 1),
        # Through the face of a package, which has what needs the file.
        (
            {
                "networks.py": "from coordconv.weights.canonical import Weights",
                "weights/__init__.py": "from coordconv.weights.foreign import adopt",
                "weights/canonical.py": "",
                "weights/foreign.py": "from coordconv import networks",
            },
            3,
        ),
        # A name of its own package, which is not there yet.
        (
            {
                "weights/__init__.py": "from coordconv.weights.files import load",
                "weights/files.py": "from coordconv.weights import Weights",
            },
            2,
        ),
        # A package's face may have what its own files share among themselves.
        (
            {
                "weights/__init__.py": "from coordconv.weights.files import load",
                "weights/files.py": "from coordconv.weights import canonical",
                "weights/canonical.py": "if TYPE_CHECKING:\n  import coordconv.weights.files",
            },
            0,
        ),
    ],
)
def test_a_circle_is_found(sources: dict[str, str], path: int) -> None:
    found = circle(graph({file: ast.parse(text) for file, text in sources.items()}))
    assert len(found) == (path + 1 if path else 0)


@pytest.mark.parametrize(
    ("file", "text", "up"),
    [
        ("networks.py", "from coordconv import backends", False),
        ("networks.py", "from coordconv.backends import torch", True),
        ("weights/foreign.py", "from coordconv.parity import compare", True),
        ("backends/torch/files.py", "import coordconv.convert", True),
        ("backends/torch/files.py", "from coordconv.backends.jax import files", True),
        ("backends/linen/files.py", "from coordconv.backends.jax import files", False),
        ("parity/layers.py", "import importlib\nimportlib.import_module('coordconv.cli')", True),
        ("cli/proving.py", "from coordconv.parity import compare", False),
    ],
)
def test_an_import_that_runs_up_is_found(file: str, text: str, up: bool) -> None:
    others = ("backends/__init__.py", "backends/torch/__init__.py", "backends/jax/files.py")
    others += ("parity/compare.py", "convert.py", "cli/__init__.py")
    trees = dict.fromkeys(others, ast.parse(""))
    assert bool(upward(graph({**trees, file: ast.parse(text)}))) == up


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
        asked_for = {"Coordsys"}  # whether that package is there, which nothing imports
        if package not in allowed | asked_for:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)

sys.meta_path.insert(0, Hidden())
import coordconv
from coordconv import *
from coordconv import geometry, networks, position_bias, position_report, recording
from coordconv import reference, summary, tape

assert coordinate_grid((2, 3)).shape == (2, 2, 3)
assert summary.summary("coord_cnn").parameters == 160065
"""
    run(code)


def test_import_loads_no_framework() -> None:
    """Where frameworks are installed, too; nor does asking which they are load one."""
    code = f"""
import sys
import coordconv

coordconv.available_backends()
from coordconv import geometry, networks, position_bias, position_report, recording
from coordconv import reference, summary, tape
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
    """It loads few modules beyond NumPy's and safetensors' own, here 23, which take 20 ms."""
    code = """
import sys
import numpy, numpy.typing, safetensors, safetensors.numpy
before = set(sys.modules)
import coordconv
print(*sorted(set(sys.modules) - before))
"""
    assert len(run(code).split()) < 40


def test_the_public_face() -> None:
    assert set(coordconv.__all__) == {
        "Coordinates",
        "Function",
        "Given",
        "Window",
        "available_backends",
        "coordinate_grid",
        "fourier",
        "load_weights",
        "save_weights",
        "window",
    }
    assert all(hasattr(coordconv, name) for name in coordconv.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert set(available_backends()) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("name", "homes"),
    [
        ("CoordConv2d", ["torch"]),
        ("LazyCoordConvTranspose3d", ["torch"]),
        ("CoordConv1DTranspose", ["paddle"]),
        ("CoordConv", ["flax", "linen"]),
        ("PositionBias2d", ["torch"]),
        ("PositionBias", ["flax", "linen"]),
        ("CoordConvTranspose", ["flax", "linen"]),
        ("AddCoords", ["torch", "paddle", "flax", "linen"]),
    ],
)
def test_a_layer_is_told_where_it_lives(name: str, homes: list[str]) -> None:
    lines = [f"from coordconv.backends.{home} import {name}" for home in homes]
    code = f"""
import sys
try:
    from coordconv import {name}
except ImportError as error:
    print(error)
print([name for name in {FRAMEWORKS} if name in sys.modules])
"""
    told = f"each framework's layers are in its own package: {' or '.join(lines)}"
    assert run(code).splitlines() == [told, "[]"]


@pytest.mark.parametrize("name", available_backends())
def test_every_layer_is_told_where_it_lives(name: str) -> None:
    layers = {name for name in backends.load(name).__all__ if "Coord" in name or "Position" in name}
    assert layers
    for layer in layers:
        with pytest.raises(ImportError, match=f"from coordconv.backends.{name} import {layer}"):
            getattr(coordconv, layer)


@pytest.mark.parametrize("name", ["CoordConv4d", "CoordConv2dTranspose", "Conv2d", "torch"])
def test_what_no_framework_has_is_not_there(name: str) -> None:
    assert not hasattr(coordconv, name)
    with pytest.raises(AttributeError, match=f"module 'coordconv' has no attribute '{name}'"):
        getattr(coordconv, name)


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
        env={
            **os.environ,
            "COORDCONV_REQUIRE": require,
            "PYTEST_ADDOPTS": "",
            "PYTHONPATH": str(PACKAGE.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "COORDCONV_REQUIRE names" in done.stdout + done.stderr
