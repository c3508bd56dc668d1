"""Tensors as NumPy arrays, and the few operations on tensors that the core asks for.

Paddle keeps states as tensors or as NumPy arrays, so that the operations take both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from coordconv.grid import Array


def to_numpy(tensor: Tensor) -> Array:
    """A copy of a tensor's values; bfloat16, which NumPy lacks, becomes float32."""
    if tensor.dtype == paddle.bfloat16:
        tensor = tensor.astype(paddle.float32)
    return tensor.numpy()  # type: ignore[no-any-return]


def concatenate(arrays: list[Any], axis: int) -> Any:
    """Join tensors, or arrays of NumPy, along an axis."""
    if any(isinstance(array, np.ndarray) for array in arrays):
        return np.concatenate([np.asarray(array) for array in arrays], axis)
    return paddle.concat(arrays, axis)


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    """Zeros of the type of another tensor or array."""
    return (
        np.zeros(shape, like.dtype)
        if isinstance(like, np.ndarray)
        else paddle.zeros(shape, like.dtype)
    )
