"""What the layers of a Paddle model return, by name."""

from __future__ import annotations

from typing import Any

from paddle import nn

from coordconv.backends.paddle.networks import Network
from coordconv.recording import Names, OutputGradient, Recorded


def recorded(
    layer: nn.Layer,
    *,
    names: Names = None,
    output_gradient: OutputGradient = None,
    **kwargs: Any,
) -> Recorded:
    """The layer as a function on NumPy arrays that returns what each layer in it returned.

    It makes models for :func:`coordconv.parity.compare`; arguments, results and errors are those of
    :attr:`coordconv.backends.protocols.Backend.recorded`. The layer runs as it is, in training or
    in evaluation. Inputs that are floating-point get the type of its first floating-point
    parameter. It must not be compiled: ``to_static`` with ``full_graph=True`` hides the layers
    inside, and without it fails on what records them.

    Example:
        >>> import numpy as np
        >>> from coordconv.backends.paddle import CoordConv2D
        >>> net = nn.Sequential(CoordConv2D(3, 8, 3), nn.ReLU())
        >>> run = recorded(net, names={"0": "conv"})
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
        {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    """
    return Network.TAPE.recorded(layer, names, output_gradient, kwargs)
