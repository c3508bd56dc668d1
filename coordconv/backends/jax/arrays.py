"""Arrays of JAX as NumPy's, and canonical arrays in Flax's layout and back.

Flax keeps channels last, in kernels ``(*kernel, in, out)``. A transposed convolution's kernel
slides over the spread input, where torch's is added to the output, so that its taps are in the
reverse of the canonical order. With ``transpose_kernel`` Flax keeps the kernel of the convolution
that it is the transpose of, ``(*kernel, out, in)`` in the canonical order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from coordconv.grid import Array

NAMES = {"weight": "kernel", "bias": "bias"}  # of a layer's parameters: canonical, and Flax's


def to_numpy(array: Any) -> Array:
    """An array's values; bfloat16, which NumPy lacks, becomes float32."""
    values = np.asarray(array)
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def to_flax(array: Array, *, reverse: bool = False) -> Array:
    """A canonical kernel, matrix or bias in Flax's layout, its taps reversed or not.

    Example:
        >>> to_flax(np.zeros((8, 3, 5, 7))).shape
        (5, 7, 3, 8)
    """
    if array.ndim < 2:
        return array
    if not reverse:
        return np.moveaxis(array, (1, 0), (-2, -1))
    return np.flip(np.moveaxis(array, (0, 1), (-2, -1)), tuple(range(array.ndim - 2)))


def to_torch(param: Any, *, reverse: bool = False) -> Array:
    """The inverse of :func:`to_flax`, of an array of JAX or NumPy; a copy."""
    array = to_numpy(param)
    if array.ndim > 1 and reverse:
        array = np.moveaxis(np.flip(array, tuple(range(array.ndim - 2))), (-2, -1), (0, 1))
    elif array.ndim > 1:
        array = np.moveaxis(array, (-2, -1), (1, 0))
    return np.array(array, order="C")


def channels_last(x: Array, dtype: Any = None) -> jax.Array:
    """JAX's array of NumPy's, whose channels are on axis 1 where there are three and more."""
    # In NumPy: outside of a jitted function jnp would compile the transposition for each shape.
    return jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x, dtype)


def channels_first(x: jax.Array) -> Array:
    """The inverse of :func:`channels_last`, a copy."""
    array = to_numpy(x)
    return np.array(np.moveaxis(array, -1, 1) if array.ndim > 2 else array, order="C")


def layer_params(arrays: Mapping[str, Array], *, reverse: bool) -> dict[str, Array]:
    """A layer's parameters under Flax's names, from canonical arrays."""
    return {NAMES[name]: to_flax(array, reverse=reverse) for name, array in arrays.items()}


def layer_arrays(params: Mapping[str, Any], *, reverse: bool) -> dict[str, Array]:
    """The inverse of :func:`layer_params`."""
    return {
        name: to_torch(params[own], reverse=reverse) for name, own in NAMES.items() if own in params
    }
