"""The registry: which backends there are, which are installed, and how to load one.

A backend is a package that satisfies :class:`coordconv.backends.protocols.Backend`. This file
imports nothing of coordconv and no framework, so that any other file may ask it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BackendInfo:
    """A backend's name, the packages that it imports, and their distributions.

    ``requirements`` are what a missing framework's own distributions are installed by, at the
    versions that the extra in pyproject.toml asks for. ``suffixes`` are those of the files that it
    reads and writes, ``"/"`` for a folder; ``layers`` is a pattern of its layers' names, but for
    ``AddCoords``, which all have.
    """

    name: str
    imports: tuple[str, ...]
    distributions: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    layers: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that it imports and that are not installed."""
        return tuple(name for name in self.imports if importlib.util.find_spec(name) is None)

    @property
    def install(self) -> str:
        """The command that installs the framework, since that is what is missing."""
        return f"pip install {' '.join(map(repr, self.requirements))}"

    def versions(self) -> dict[str, str]:
        """The installed version of each distribution that it stands on."""
        from importlib import metadata  # slow to import, and only this needs it

        found = {}
        for name in self.distributions:
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return found


_FLAX = ("flax", "jax")
_FLAX_NEEDS = ("flax>=0.10.7", "jax>=0.6", "optax>=0.2.4", "orbax-checkpoint>=0.11.5")
# paddlepaddle-gpu brings the same package under another distribution's name
_PADDLE = ("paddlepaddle", "paddlepaddle-gpu")
_TORCH_LAYERS = "(Lazy)?CoordConv(Transpose)?[123]d|PositionBias[123]d"
_PADDLE_LAYERS = "CoordConv[123]D(Transpose)?|PositionBias[123]D"
_FLAX_LAYERS = "CoordConv(Transpose)?|PositionBias"
BACKENDS = {
    backend.name: backend
    for backend in (
        BackendInfo(
            "torch", ("torch",), ("torch",), ("torch>=2.4",), (".pt", ".pth"), _TORCH_LAYERS
        ),
        BackendInfo(
            "paddle", ("paddle",), _PADDLE, ("paddlepaddle>=3.2",), (".pdparams",), _PADDLE_LAYERS
        ),
        BackendInfo("flax", _FLAX, _FLAX, _FLAX_NEEDS, (".orbax", "/"), _FLAX_LAYERS),
        BackendInfo("linen", _FLAX, _FLAX, _FLAX_NEEDS, (), _FLAX_LAYERS),
    )
}


def other_coordconv() -> str | None:
    """What to know if an unrelated distribution called ``coordconv`` is installed; else None."""
    if importlib.util.find_spec("Coordsys") is None:
        return None
    return (
        "the package Coordsys is installed too: that is what the distribution coordconv holds, an "
        "unrelated converter of geographic coordinates. This package is coordconv-layers. If the "
        "other one is not wanted: pip uninstall coordconv"
    )


def available_backends() -> tuple[str, ...]:
    """The names of the installed backends, in the order of the registry; imports none of them.

    Example:
        >>> set(available_backends()) <= {"torch", "paddle", "flax", "linen"}
        True
    """
    return tuple(name for name, backend in BACKENDS.items() if not backend.missing)


def with_layer(name: str) -> tuple[str, ...]:
    """The names of the backends that have a layer of that name; imports none of them.

    Example:
        >>> with_layer("CoordConv2d"), with_layer("CoordConv")
        (('torch',), ('flax', 'linen'))
    """
    return tuple(b.name for b in BACKENDS.values() if re.fullmatch(f"AddCoords|{b.layers}", name))


def load(name: str) -> Any:
    """The package of a backend, imported now.

    ValueError if there is no backend of that name, ImportError if its framework is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    if backend.missing:
        raise ImportError(f"backend {name!r} needs {', '.join(backend.missing)}: {backend.install}")
    return importlib.import_module(f"{__name__}.{name}")
