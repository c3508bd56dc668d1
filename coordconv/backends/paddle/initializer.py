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

from coordconv.tape import zeros
from coordconv.weights.kernels import KernelLayout


class CoordinatesAtZero(nn.initializer.Initializer):  # type: ignore[name-defined,misc]
    """Draws the features' part of a kernel as ``drawn`` does, or by None as Paddle would."""

    def __init__(self, drawn: Any, layout: KernelLayout) -> None:
        super().__init__()
        self.drawn, self.layout = drawn, layout

    def forward(self, var: Any, block: Any = None) -> Any:
        """Initialize a parameter; in a static graph return its value, as Paddle's own do."""
        layout, shape = self.layout, list(var.shape)
        shape[layout.axis] = layout.plain_width
        drawn = self.drawn
        if drawn is None and layout.transposed:  # as Paddle's layers
            drawn = nn.initializer.XavierUniform()
        elif drawn is None:
            deviation = (2.0 / (math.prod(shape[2:]) * layout.channels)) ** 0.5
            drawn = nn.initializer.Normal(0.0, deviation)
        if not paddle.in_dynamic_mode():
            plain = drawn(type(var)(shape, var.dtype), block)
            return layout.fitted(plain, paddle.concat, zeros)
        with paddle.no_grad():
            plain = paddle.empty(shape, var.dtype)
            drawn(plain, block)
            paddle.assign(layout.fitted(plain, paddle.concat, zeros), var)
        return None


def at_zero(attr: Any) -> Any:
    """A ``weight_attr`` or ``bias_attr`` like ``attr`` that starts at zero, or False."""
    attr = copy.copy(paddle.ParamAttr._to_attr(attr))
    if attr:
        attr.initializer = nn.initializer.Constant(0.0)
    return attr


def coordinates_at_zero(attr: Any, layout: KernelLayout) -> Any:
    """A ``weight_attr`` that draws the features' part as a plain convolution would with ``attr``.

    That is what Paddle takes: None, a name, an initializer, a ParamAttr and so on.
    """
    attr = copy.copy(paddle.ParamAttr._to_attr(attr))  # what create_parameter does; nothing public
    drawn = attr.initializer or _global_weight_initializer()
    attr.initializer = CoordinatesAtZero(drawn, layout)
    return attr
