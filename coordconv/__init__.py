"""CoordConv layers for PyTorch, Paddle and Flax from one pure-NumPy core.

The layers are in ``coordconv.backends.torch``, ``.paddle``, ``.flax`` (NNX) and ``.linen``.
"""

import warnings as _warnings
from typing import Any as _Any

import numpy as _numpy  # noqa: F401  # first: importtime then tells its time from ours

from coordconv.backends import available_backends
from coordconv.backends import other_coordconv as _other_coordconv
from coordconv.backends import with_layer as _with_layer
from coordconv.coordinates import Coordinates
from coordconv.functions import Function, Given, fourier
from coordconv.grid import coordinate_grid
from coordconv.weights import load_weights, save_weights
from coordconv.windows import Window, window

__version__ = "0.1.0"

__all__ = [
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
]

if (_other := _other_coordconv()) is not None:
    _warnings.warn(_other, stacklevel=2)


def __getattr__(name: str) -> _Any:
    """Say where a layer is: ImportError, as Python has words of its own for AttributeError."""
    lines = [f"from coordconv.backends.{backend} import {name}" for backend in _with_layer(name)]
    if lines:
        raise ImportError(f"each framework's layers are in its own package: {' or '.join(lines)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
