"""How ``coord_init="zeros"`` draws a kernel, as an initializer of Paddle.

An initializer, so that the kernel is drawn where Paddle draws parameters: at once, at
``initialize()`` under ``paddle.LazyGuard``, or in the startup program of a static graph.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import paddle
from paddle import nn

# What set_global_initializer has set; there is no public way to ask.
from paddle.base.initializer import _global_weight_initializer

from coordconv.backends.paddle.arrays import concatenate, zeros
from coordconv.weights.kernels import KernelLayout


class CoordinatesAtZero(nn.initializer.Initializer):
    """Draws the features' part as another initializer draws a plain convolution's kernel.

    Args:
        drawn: the initializer of the features' part.
        layout: of the kernel.
    """

    def __init__(self, drawn: nn.initializer.Initializer, layout: KernelLayout) -> None:
        super().__init__()
        self.drawn, self.layout = drawn, layout

    def forward(self, var: Any, block: Any = None) -> Any:
        """Initialize a parameter; in a static graph return its value, as Paddle's own do."""
        layout, shape = self.layout, list(var.shape)
        shape[layout.axis] = layout.channels if layout.transposed else layout.features
        if not paddle.in_dynamic_mode():
            plain = self.drawn.forward(type(var)(shape, var.dtype), block)
            return layout.fitted(plain, concatenate, zeros)
        with paddle.no_grad():
            plain = paddle.empty(shape, var.dtype)
            self.drawn.forward(plain, block)
            paddle.assign(layout.fitted(plain, concatenate, zeros), var)
        return None


def coordinates_at_zero(attr: Any, layout: KernelLayout, kernel_size: list[int]) -> Any:
    """A ``weight_attr`` that draws the features' part as a plain convolution would with ``attr``.

    Args:
        attr: what Paddle takes: None, a name, an initializer, a ParamAttr and so on.
        layout: of the kernel.
        kernel_size: of the convolution.
    """
    attr = copy.copy(paddle.ParamAttr._to_attr(attr))  # what create_parameter does; nothing public
    drawn = attr.initializer or _global_weight_initializer()
    if drawn is None and layout.transposed:
        drawn = nn.initializer.XavierUniform()
    elif drawn is None:
        terms = math.prod(kernel_size) * layout.channels
        drawn = nn.initializer.Normal(0.0, (2.0 / terms) ** 0.5)
    attr.initializer = CoordinatesAtZero(drawn, layout)
    return attr
