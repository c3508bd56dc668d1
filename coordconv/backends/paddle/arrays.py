"""Tensors as NumPy arrays, and the few operations on tensors that the core asks for."""

from __future__ import annotations

import paddle
from paddle import Tensor

from coordconv.grid import Array


def to_numpy(tensor: Tensor) -> Array:
    """A copy of a tensor's values; bfloat16, which NumPy lacks, becomes float32."""
    if tensor.dtype == paddle.bfloat16:
        tensor = tensor.astype(paddle.float32)
    return tensor.numpy()  # type: ignore[no-any-return]


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type of another tensor."""
    return paddle.zeros(shape, like.dtype)
