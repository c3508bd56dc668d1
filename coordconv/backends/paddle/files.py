"""Paddle's files of weights, ``.pdparams``.

``paddle.save`` pickles a state dict unless it is told ``safetensors=True``, and ``paddle.load``
runs whatever code a pickle holds. So a pickle is written here, as users do, but none is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coordconv.grid import Array
from coordconv.networks import Linear, Network
from coordconv.weights.files import read_weights


def read_state(path: str) -> dict[str, Array]:
    """The arrays of a file that is no pickle; see :class:`coordconv.backends.protocols.Backend`."""
    try:
        return read_weights(path)
    except ValueError as error:
        if "not a safetensors file" not in str(error):
            raise
        raise ValueError(
            f"{error}\nPaddle's own files are pickles, which may hold code, and Paddle cannot read "
            "them without running it. If you trust this one, let Paddle write it anew:\n"
            "  import paddle\n"
            f"  paddle.save(paddle.load({path!r}), 'safe.pdparams', safetensors=True)"
        ) from error


def from_state(network: Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical arrays from Paddle's, or the inverse: its linear weights are ``(in, out)``."""
    linear = {f"{layer.name}.weight" for layer in network.layers if isinstance(layer, Linear)}
    return {n: np.ascontiguousarray(a.T) if n in linear else a for n, a in arrays.items()}
