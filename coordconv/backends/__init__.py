"""The registry: which backends there are, which are installed, and how to load one.

A backend is a package that satisfies :class:`coordconv.backends.protocols.Backend`. This file
imports nothing of coordconv and no framework, so that any other file may ask it.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BackendInfo:
    """What the registry knows of a backend: its package, what that imports, and what to install.

    ``suffixes`` are those of the files that it reads and writes; ``"/"`` stands for a folder.
    """

    name: str
    imports: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str
    suffixes: tuple[str, ...] = ()

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
        BackendInfo("torch", ("torch",), ("torch",), "torch", (".pt", ".pth")),
        # paddlepaddle-gpu brings the same package under another distribution's name
        BackendInfo(
            "paddle",
            ("paddle",),
            ("paddlepaddle", "paddlepaddle-gpu"),
            "paddle",
            (".pdparams",),
        ),
        BackendInfo("flax", ("flax", "jax"), ("flax", "jax"), "flax", (".orbax", "/")),
        BackendInfo("linen", ("flax", "jax"), ("flax", "jax"), "flax"),
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
    """The package of a backend, imported now.

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
