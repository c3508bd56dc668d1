"""CoordConv layers for PyTorch, Paddle and Flax from one pure-NumPy core.

The layers are in ``coordconv.backends.torch``, ``.paddle``, ``.flax`` (NNX) and ``.linen``.
"""

import numpy as _numpy  # noqa: F401  # first: importtime then tells its time from ours

from coordconv.backends import available_backends
from coordconv.coordinates import Coordinates
from coordconv.grid import coordinate_grid
from coordconv.weights import load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "Coordinates",
    "available_backends",
    "coordinate_grid",
    "load_weights",
    "save_weights",
]
