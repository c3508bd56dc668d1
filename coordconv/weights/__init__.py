"""Canonical weights, their file, and other implementations' kernels."""

from coordconv.weights.canonical import Weights
from coordconv.weights.files import load_weights, save_weights
from coordconv.weights.foreign import adopt
from coordconv.weights.kernels import join_kernel, split_kernel

__all__ = ["Weights", "adopt", "join_kernel", "load_weights", "save_weights", "split_kernel"]
