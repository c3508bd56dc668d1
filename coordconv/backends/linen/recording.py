"""What the modules of a Linen model return, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import linen as nn

from coordconv.backends.jax import recording as common
from coordconv.recording import Names, OutputGradient, Recorded


def recorded(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    names: Names = None,
    output_gradient: OutputGradient = None,
    channels_last: bool = False,
    **kwargs: Any,
) -> Recorded:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`; its arguments, names, order and errors are
    those of :attr:`coordconv.backends.protocols.Backend.recorded`. What runs inside a scan, a
    ``jit`` or another transformation of the model's own is not recorded.

    Args:
        module: any module; those inside it are named by their paths, with dots.
        variables: its variables, as ``init`` returns them. The parameters stay as they are in the
            course of a call; other collections may change, but not those given.
        names: other names for them.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether the module's channels are last, where those of the inputs are on axis
            1: arrays of three and more axes are then turned round on the way in and out.
        kwargs: what the module is called with beside the inputs.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from coordconv.backends.linen import CoordConv
        >>> net = nn.Sequential([CoordConv(8, (3, 3)), nn.relu])
        >>> variables = net.init(jax.random.key(0), np.ones((1, 5, 5, 3)))
        >>> run = recorded(net, variables, names={"layers_0": "conv"}, channels_last=True)
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5), "f4")).items()}
        {'conv': (1, 8, 5, 5), 'model output': (1, 8, 5, 5)}
    """
    mutable = [collection for collection in variables if collection != "params"]

    def run(watch: common.Watch, *inputs: Any) -> Any:
        def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
            called, path = partial(call, *args, **options), context.module.path
            if context.method_name != "__call__" or not path:  # the model's own output, or a part
                return called()
            return watch(context.module, ".".join(path), called)

        with nn.intercept_methods(intercept):
            output, _ = module.apply(variables, *inputs, mutable=mutable, **kwargs)
        return output

    return common.recorded(run, names, output_gradient, channels_last)
