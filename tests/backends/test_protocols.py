"""What a backend provides, at run time: mypy sees the types, in backends/protocols.py."""

import inspect

import pytest

from coordconv import backends
from coordconv.backends import BACKENDS, BackendInfo
from coordconv.backends.protocols import Backend

METHODS = {name: f for name, f in vars(Backend).items() if inspect.isfunction(f)}
METHODS = {name: f for name, f in METHODS.items() if not name.startswith("_")}
LAYERS = {
    "torch": ["CoordConv1d", "CoordConvTranspose3d", "LazyCoordConv2d", "PositionBias2d"],
    "paddle": ["CoordConv1D", "CoordConv3DTranspose", "PositionBias2D"],
    "flax": ["CoordConv", "CoordConvTranspose", "PositionBias"],
    "linen": ["CoordConv", "CoordConvTranspose", "PositionBias"],
}


def test_the_protocol_has_what_is_tested_here():
    assert set(METHODS) == {
        "build",
        "evaluate",
        "trainer",
        "read_state",
        "from_state",
        "write_state",
    }


def test_a_backend_provides_it_all(backend):
    package = backends.load(backend)
    assert isinstance(package.COMPILED, bool)
    for name in (*METHODS, "recorded"):
        assert callable(getattr(package, name)), name
    for name in ("AddCoords", *LAYERS[backend], *METHODS, "recorded", "COMPILED"):
        assert name in package.__all__


@pytest.mark.parametrize("name", METHODS)
def test_arguments_have_the_names_and_defaults_of_the_protocol(backend, name):
    wanted = list(inspect.signature(METHODS[name]).parameters.values())[1:]
    package = backends.load(backend)
    found = list(inspect.signature(getattr(package, name)).parameters.values())
    assert [p.name for p in found] == [p.name for p in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        default = package.COMPILED if theirs.default is ... else theirs.default
        assert ours.default == default, ours.name


def test_keywords_of_recorded(backend):
    found = inspect.signature(backends.load(backend).recorded).parameters
    keywords = [n for n, p in found.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords[:2] == ["names", "output_gradient"]


@pytest.mark.parametrize("name", ["keras", "", "jax", "protocols"])
def test_there_is_no_such_backend(name):
    with pytest.raises(ValueError, match=f"backend must be one of .*, got '{name}'"):
        backends.load(name)


def test_a_framework_that_is_not_installed(monkeypatch):
    missing = BackendInfo("torch", ("no_such_package",), ("no-such",), ("torch>=2.4",))
    monkeypatch.setitem(BACKENDS, "torch", missing)
    assert "torch" not in backends.available_backends()
    assert missing.versions() == {}
    with pytest.raises(ImportError, match=r"needs no_such_package: pip install 'torch>=2.4"):
        backends.load("torch")
