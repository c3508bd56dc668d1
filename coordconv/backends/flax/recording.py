"""What the modules of an NNX model return, by name."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flax import nnx

from coordconv.backends.jax import recording as common
from coordconv.recording import Names, OutputGradient, Recorded, See


def recorded(
    module: nnx.Module,
    *,
    names: Names = None,
    output_gradient: OutputGradient = None,
    channels_last: bool = False,
    **kwargs: Any,
) -> Recorded:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`. The names, their order and the gradients
    are those of :attr:`coordconv.backends.protocols.Backend.recorded`. What runs inside a scan, a
    ``jit`` or another transformation of the model's own is not recorded. A copy of the module is
    run, so that it keeps its state.

    Args:
        module: any module.
        names: other names for the modules inside it, by their paths, with dots.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether the module's channels are on the last axis where those of the
            inputs, and of all models that it is compared with, are on axis 1; arrays of three and
            more axes are then turned round on the way in and out.
        kwargs: what ``module`` is called with beside the inputs.

    Raises:
        TypeError: when run: the module returned no array.
        ValueError: when run: ``names`` has a module that was not called, or ``output_gradient``
            does not fit the output.

    Example:
        >>> import numpy as np
        >>> from coordconv.backends.flax import CoordConv
        >>> net = nnx.Sequential(CoordConv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> run = recorded(net, names={"layers.0": "conv"}, channels_last=True)
        >>> x = np.ones((1, 3, 5, 5), np.float32)
        >>> {name: array.shape for name, array in run(x).items()}
        {'conv': (1, 8, 5, 5), 'model output': (1, 8, 5, 5)}
    """

    def call(see: See, *inputs: Any) -> Any:
        copied = nnx.clone(module)
        paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(copied)}
        running = {id(copied)}  # its own output is recorded as the model's

        def seen(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                if id(self) not in paths:  # another model's module, of the same class
                    return call(self, *args, **kwargs)
                name = paths[id(self)]
                return common.see_once(
                    running, self, name, see, lambda: call(self, *args, **kwargs)
                )

            return wrapper

        kinds = {type(m) for _, m in nnx.iter_modules(copied) if callable(m)}
        with _PATCHING, ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(_patched(kind, seen(kind.__call__)))
            return copied(*inputs, **kwargs)

    return common.recorded(call, names, output_gradient, channels_last)


_PATCHING = threading.RLock()


@contextmanager
def _patched(kind: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Within it, modules of this class, and of those derived from it, are called by ``call``.

    NNX has no hooks, and Python looks for ``__call__`` on the class alone.
    """
    own = vars(kind).get("__call__")
    kind.__call__ = call
    try:
        yield
    finally:
        if own is None:
            del kind.__call__
        else:
            kind.__call__ = own
