"""Tensors as NumPy arrays, and the few operations on tensors that the core asks for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coordconv.grid import Array


def to_numpy(tensor: Tensor) -> Array:
    """A copy of a tensor's values; bfloat16, which NumPy lacks, becomes float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.array(tensor.numpy())


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type and on the device of another tensor."""
    return like.new_zeros(shape)
