"""What the modules of an NNX model return, by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

from flax import nnx

from coordconv.backends.jax import recording as common
from coordconv.recording import Names, OutputGradient, Recorded

_PATCHING = threading.RLock()


def recorded(
    module: nnx.Module,
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
    runs in a scan, a ``jit`` or another transformation of the model's own is not recorded. A copy
    of the module is run.

    Example:
        >>> import numpy as np
        >>> from coordconv.backends.flax import CoordConv
        >>> net = nnx.Sequential(CoordConv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> run = recorded(net, names={"layers.0": "conv"}, channels_last=True)
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5), "f4")).items()}
        {'conv': (1, 8, 5, 5), 'model output': (1, 8, 5, 5)}
    """

    def run(watch: common.Watch, *inputs: Any) -> Any:
        copied = nnx.clone(module)
        with watched(copied, watch):
            return copied(*inputs, **kwargs)

    return common.recorded(run, names, output_gradient, channels_last)


@contextmanager
def watched(model: nnx.Module, watch: common.Watch) -> Iterator[None]:
    """Within it, ``watch`` calls the modules in a model, by their paths with dots."""
    found = [(path, m) for path, m in nnx.iter_graph(model) if isinstance(m, nnx.Module)]
    # But for its own, whose output is the model's.
    paths = {id(m): ".".join(map(str, path)) for path, m in found if path}
    with _PATCHING, ExitStack() as stack:
        for kind in {type(m) for _, m in found if callable(m)}:
            stack.enter_context(_watched(kind, paths, watch))
        yield


@contextmanager
def _watched(kind: Any, paths: Mapping[int, str], watch: common.Watch) -> Iterator[None]:
    """Within it, ``watch`` calls the modules of a class, and of those derived from it.

    NNX has no hooks, and Python looks for ``__call__`` on the class alone.
    """
    own, call = vars(kind).get("__call__"), kind.__call__

    @wraps(call)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in paths:  # another model's module, of the same class
            return call(self, *args, **kwargs)
        return watch(self, paths[id(self)], partial(call, self, *args, **kwargs))

    kind.__call__ = watched
    try:
        yield
    finally:
        if own is None:
            del kind.__call__
        else:
            kind.__call__ = own
