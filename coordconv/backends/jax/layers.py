"""What the layers of NNX and of Linen share: how they use their base class, and draw a kernel.

The base classes compute with the kernel that they find on a layer. A layer has them find the whole
kernel and an input with coordinates, or the features' part of the kernel and the input alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from coordconv.backends.jax import adding
from coordconv.windows import Window


class _Seen:
    """A layer as its base class is to see it: without a mask, and with arrays already promoted."""

    mask = None

    def __init__(self, layer: Any, kernel: jax.Array, bias: jax.Array | None) -> None:
        self._layer, self._kernel, self._bias = layer, kernel, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, *_: Any) -> None:
        """Linen's parameter, which :meth:`promote_dtype` brings."""

    def promote_dtype(self, inputs: Any, *_: Any, dtype: Any) -> tuple[Any, ...]:
        """The arrays to compute with; NNX gives its three as one tuple."""
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return inputs, self._kernel, self._bias


def coord_conv(
    layer: Any,
    call: Any,
    arrays: Any,
    *args: Any,
    made: jax.Array | None = None,
    window: Window | None = None,
    **kwargs: Any,
) -> jax.Array:
    """The output of a layer for its promoted arrays: inputs, masked kernel, and bias or None.

    ``call`` is the base class's, bound to the layer. Its function is called by itself: as a method
    of a Linen module it would be recorded apart by capture_intermediates and interceptors.
    """
    function = inspect.unwrap(call.__func__)

    def convolve(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        return function(_Seen(layer, kernel, bias), inputs, *args, **kwargs)

    return adding.coord_conv(layer, arrays, convolve, made, window)


def masked(kernel: jax.Array, mask: Any) -> jax.Array:
    """The kernel over features and coordinates, masked."""
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ValueError(
            "mask must have the shape of the kernel over features and coordinates, "
            f"{kernel.shape}, got {mask.shape}"
        )
    return kernel * mask


@dataclass(frozen=True)
class KernelInit:
    """What draws a kernel over features and coordinates, the last ``zeros`` input channels as zero.

    ``init`` draws the others; it may return a box of metadata. Equal ones compare equal, as some
    releases of Flax keep what drew a kernel on an NNX layer, where unequal graphs compile anew.
    """

    init: Callable[..., Any]
    zeros: int
    axis: int  # of the input channels

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """The kernel, in ``init``'s box."""
        asked, zeros = list(shape), list(shape)
        asked[self.axis], zeros[self.axis] = shape[self.axis] - self.zeros, self.zeros

        def complete(kernel: Any) -> Any:
            if np.shape(kernel) != tuple(asked):
                raise ValueError(
                    "kernel_init must return a kernel of the shape that it is asked for, "
                    f"{tuple(asked)}, got {np.shape(kernel)}"
                )
            if not self.zeros:
                return kernel
            return jnp.concatenate([kernel, jnp.zeros(zeros, kernel.dtype)], self.axis)

        drawn = self.init(key, tuple(asked), dtype)
        if isinstance(drawn, nnx.VariableMetadata):  # NNX's box, which is no tree as Linen's is
            return replace(drawn, raw_value=complete(drawn.raw_value))
        return jax.tree.map(complete, drawn)
