"""The registry: which backends there are, which are installed, and how to load one.

A backend is a module with these functions, all in canonical weights and channels-first NumPy
arrays, so that whatever compares or trains backends is written once:

- ``build(network, weights, dtype="float32") -> module``: a :class:`coordconv.networks.Network` as
  the framework's module, with those weights and computing in that type; NotImplementedError says
  which option the framework lacks.
- ``evaluate(module, weights, x, dy=None, *, compiled) -> (y, gradients)``: the output for ``x``,
  and for the output's gradient ``dy`` those of ``x`` (under the name ``"x"``) and of all weights;
  bfloat16 is returned as float32, which NumPy has. ``compiled`` puts the framework's compiler
  before it; the default, ``COMPILED``, is what the framework's users mostly do.
- ``trainer(module, weights) -> (step, export)``: ``step(x, labels, learning_rate) -> loss`` takes
  one step of Adam on the mean softmax cross-entropy; ``export()`` returns the weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """What the registry knows of a backend: its module, what that imports, and what to install."""

    name: str
    imports: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that it imports and that are not installed."""
        return tuple(name for name in self.imports if importlib.util.find_spec(name) is None)

    @property
    def install(self) -> str:
        """The command that installs what it needs."""
        return f"pip install 'coordconv[{self.extra}]'"

    def versions(self) -> dict[str, str]:
        """The installed version of each distribution that it stands on."""
        from importlib import metadata  # slow to import, and only this needs it

        found = {}
        for name in self.distributions:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", ("torch",), ("torch",), "torch"),
        # paddlepaddle-gpu brings the same package under another distribution's name
        Backend("paddle", ("paddle",), ("paddlepaddle", "paddlepaddle-gpu"), "paddle"),
        Backend("flax", ("flax", "jax"), ("flax", "jax"), "flax"),
        Backend("linen", ("flax", "jax"), ("flax", "jax"), "flax"),
    )
}


def available_backends() -> tuple[str, ...]:
    """The names of the installed backends, in the order of the registry; imports none of them.

    Example:
        >>> set(available_backends()) <= {"torch", "paddle", "flax", "linen"}
        True
    """
    return tuple(name for name, backend in BACKENDS.items() if not backend.missing)


def load(name: str) -> Any:
    """The module of a backend, imported now.

    Raises:
        ValueError: there is no backend of that name.
        ImportError: its framework is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    if backend.missing:
        raise ImportError(f"backend {name!r} needs {', '.join(backend.missing)}: {backend.install}")
    return importlib.import_module(f"{__name__}.{name}")
