"""A kernel of Flax given channels for coordinates, and without them: what NNX and Linen share.

The coordinates are the last of a group's input channels, whose axis is counted from the end: so a
kernel may have further axes in front, as those of a scan or a vmap have.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.nn import initializers

from coordconv.changing import Unfit


def extended(kernel: Any, axis: int, n: int, filled: Any = 0) -> Any:
    """A kernel, or what has its shape, with ``n`` more channels at the end of an axis.

    Its type and sharding stay; one that is abstract stays so. ValueError if it is spread over
    devices that cannot divide the channels.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return _resized(kernel, axis, kernel.shape[axis] + n)
    widths = [(0, 0)] * kernel.ndim
    widths[axis] = (0, n)
    spread = _spread(kernel)
    if spread is not None:
        spread.shard_shape(_resized(kernel, axis, kernel.shape[axis] + n).shape)  # which may raise
    return _like(jnp.pad(kernel, widths, constant_values=filled), kernel)


def shortened(kernel: Any, axis: int, n: int) -> Any:
    """The inverse of :func:`extended`."""
    width = kernel.shape[axis] - n
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return _resized(kernel, axis, width)
    return _like(
        jax.lax.slice_in_dim(jnp.asarray(kernel), 0, width, axis=axis % kernel.ndim), kernel
    )


def drawn(kernel: Any, axis: int, n: int, key: jax.Array) -> Any:
    """A kernel with ``n`` channels more, these as Flax draws a new one by default."""
    more = extended(kernel, axis, n)
    new = initializers.lecun_normal()(key, more.shape, more.dtype)
    kept = np.arange(more.shape[axis]) < kernel.shape[axis]
    return _like(jnp.where(kept.reshape(-1, *(1,) * (-1 - axis)), more, new), kernel)


def fitted(values: Any, axis: int, width: int, n: int) -> Any:
    """What has the shape of a kernel of before, such as momenta, with ``width`` channels.

    That is ``n`` more, which are zero, or of what is one number throughout, that number; or ``n``
    less.
    """
    if values.shape[axis] > width:
        return shortened(values, axis, n)
    if isinstance(values, jax.ShapeDtypeStruct):
        return extended(values, axis, n)
    first = values.reshape(-1)[0]
    return extended(values, axis, n, jnp.where((values == first).all(), first, 0))


def unfit_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Unfit | None:
    """Why a kernel is not one of a convolution whose own shape is ``wanted``, if so."""
    if shape[max(len(shape) - len(wanted), 0) :] == wanted:
        return None
    return Unfit(f"its kernel has shape {shape}, and should have {wanted}", fatal=True)


def _resized(kernel: Any, axis: int, width: int) -> jax.ShapeDtypeStruct:
    shape = list(kernel.shape)
    shape[axis] = width
    return jax.ShapeDtypeStruct(tuple(shape), kernel.dtype, sharding=kernel.sharding)


def _like(values: Any, kernel: Any) -> Any:
    """Values as a kernel is spread over several devices."""
    spread = _spread(kernel)
    return values if spread is None else jax.device_put(values, spread)


def _spread(kernel: Any) -> Any:
    """The sharding of an array that several devices hold."""
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    return None if sharding is None or len(sharding.device_set) == 1 else sharding
