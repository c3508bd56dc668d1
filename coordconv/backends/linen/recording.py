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

    It makes models for :func:`coordconv.parity.compare`; arguments, results and errors are those of
    :attr:`coordconv.backends.protocols.Backend.recorded`. ``channels_last`` says that the module
    has its channels on the last axis, and not on axis 1 as the inputs: arrays of three and more
    axes are turned round on the way in and out. Modules are named by their paths, with dots. What
    runs in a scan, a ``jit`` or another transformation of the model's own is not recorded. Every
    collection but the parameters may change in the course of a call; ``variables`` do not.

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
