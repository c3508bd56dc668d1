"""Arrays of JAX as NumPy's, and canonical arrays in Flax's layout and back.

Flax keeps channels last, in kernels ``(*kernel, in, out)``. A transposed convolution's kernel
slides over the spread input, where torch's is added to the output, so that its taps are in the
reverse of the canonical order. With ``transpose_kernel`` Flax keeps the kernel of the convolution
that it is the transpose of, ``(*kernel, out, in)`` in the canonical order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coordconv.grid import Array


def to_numpy(array: Any) -> Array:
    """An array's values; bfloat16, which NumPy lacks, becomes float32."""
    values = np.asarray(array)
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def to_flax(array: Array, *, reverse: bool = False) -> Array:
    """A canonical kernel, matrix or bias in Flax's layout.

    Args:
        array: ``(out, in, *kernel)``, of a transposed convolution ``(in, out, *kernel)``; or
            ``(out, in)`` of a linear layer; or ``(out,)``.
        reverse: whether it is the kernel of a transposed convolution without ``transpose_kernel``.

    Example:
        >>> to_flax(np.zeros((8, 3, 5, 7))).shape
        (5, 7, 3, 8)
    """
    if array.ndim < 2:
        return array
    if not reverse:
        return np.moveaxis(array, (1, 0), (-2, -1))
    return np.flip(np.moveaxis(array, (0, 1), (-2, -1)), tuple(range(array.ndim - 2)))


def to_torch(array: Array, *, reverse: bool = False) -> Array:
    """The inverse of :func:`to_flax`, a copy."""
    if array.ndim < 2:
        return np.array(array)
    if not reverse:
        return np.array(np.moveaxis(array, (-2, -1), (1, 0)), order="C")
    flipped = np.flip(array, tuple(range(array.ndim - 2)))
    return np.array(np.moveaxis(flipped, (-2, -1), (0, 1)), order="C")
