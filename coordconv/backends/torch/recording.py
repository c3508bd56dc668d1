"""What the modules of a PyTorch model return, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from coordconv.backends.torch.networks import Network
from coordconv.recording import Names, OutputGradient, Recorded


def recorded(
    module: nn.Module,
    *,
    names: Names = None,
    output_gradient: OutputGradient = None,
    **kwargs: Any,
) -> Recorded:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`; arguments, results and errors are those of
    :attr:`coordconv.backends.protocols.Backend.recorded`. The module runs as it is, in training or
    in evaluation; what it draws moves torch's generator on. Inputs that are floating-point get the
    type and the device of its first floating-point parameter. Nested, sparse and quantized tensors,
    and what runs inside a ``torch.func`` transformation or a scripted module, are not recorded.

    Example:
        >>> import numpy as np
        >>> from coordconv.backends.torch import CoordConv2d
        >>> net = nn.Sequential(CoordConv2d(3, 8, 3), nn.ReLU())
        >>> run = recorded(net, names={"0": "conv"})
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
        {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    """
    return Network.TAPE.recorded(module, names, output_gradient, kwargs)
