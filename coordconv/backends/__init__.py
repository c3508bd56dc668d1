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
- ``trainer(module, weights, optimizer="adam", epsilon=1e-8) -> (step, export)``:
  ``step(x, target, learning_rate) -> loss`` takes one step of Adam (``beta`` 0.9 and 0.999,
  ``epsilon`` beside the root of the corrected moment) or, for ``"sgd"``, of plain gradient
  descent; ``export()`` returns the weights. The loss is the mean softmax cross-entropy where the
  target is labels, integers of shape ``(N,)``, and the mean squared error where it is outputs,
  floats of the output's shape.

With this one for modules of any kind, as :func:`coordconv.parity.compare` takes them:

- ``recorded(module, *, names=None, output_gradient=None, **kwargs) -> run``: ``run(*arrays)``
  returns, by dotted names and in the order of the calls, what each module inside returned, and then
  ``"model output"``. A module's later calls are numbered, as in ``relu#2``; the parts of a tuple, a
  list, a mapping or a dataclass have their place, key or field in brackets, as in ``lstm[0]``.
  ``names`` gives modules other names, so that those of two models meet; ``kwargs`` go to the call.
  With an ``output_gradient``, an array or arrays by name, there follow in backward order
  ``"gradient of NAME"`` of each, and of ``"model input"`` (``"model input[0]"`` and so on where
  there are several). TypeError says that there is no array in what the module returned. The module
  is left as it was; bfloat16, which NumPy lacks, becomes float32. Those of Flax also take
  ``channels_last``, and Linen's the variables behind the module.

And with these, for the files that the framework's users save:

- ``read_state(path) -> arrays``: what is in a file, under the framework's dotted names and in its
  layout, but in NumPy. It runs no code that the file holds; ValueError names the file and what is
  wrong with it, OSError that it cannot be read.
- ``from_state(network, arrays) -> arrays``: the same under canonical names and in canonical layout,
  as far as they are the network's; the rest as it is, for the caller to refuse.
- ``write_state(path, network, weights)``: write canonical weights, whole or not at all.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """What the registry knows of a backend: its module, what that imports, and what to install.

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
        Backend("torch", ("torch",), ("torch",), "torch", (".pt", ".pth")),
        # paddlepaddle-gpu brings the same package under another distribution's name
        Backend(
            "paddle",
            ("paddle",),
            ("paddlepaddle", "paddlepaddle-gpu"),
            "paddle",
            (".pdparams",),
        ),
        Backend("flax", ("flax", "jax"), ("flax", "jax"), "flax", (".orbax", "/")),
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
