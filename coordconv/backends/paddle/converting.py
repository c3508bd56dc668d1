"""One convolution of Paddle made a CoordConv in place, and back: :mod:`coordconv.tape_changing`.

Paddle's own ``data`` of a parameter takes another shape, and checks nothing.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn

from coordconv.changing import Unfit
from coordconv.coordinates import Coordinates
from coordconv.tape_changing import Conversion, replaced_forward
from coordconv.weights.kernels import KernelLayout


def _unfit(conv: Any) -> Unfit | None:
    weight = dict(conv.named_parameters(include_sublayers=False)).get("weight")
    if weight is None:
        return Unfit(
            "its weight is computed from other parameters by a hook: call "
            "paddle.nn.utils.remove_weight_norm or the like first",
            fatal=True,
        )
    if weight.is_dist():
        return Unfit("its weight is distributed: change the network before that", fatal=True)
    if weight.numpy().shape != tuple(weight.shape):
        return Unfit(
            "its weight has no values yet: call initialize() of its parameters", fatal=True
        )
    return replaced_forward(conv)


def _is_transposed(conv: Any) -> bool:
    return isinstance(conv, (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose))


def _layout(conv: Any, coords: Coordinates) -> KernelLayout:
    return KernelLayout(coords, conv._in_channels, conv._groups, _is_transposed(conv))


def _plain_class(conv: Any) -> Any:
    return getattr(nn, f"Conv{len(conv._kernel_size)}D{'Transpose' * _is_transposed(conv)}")


def _draw(conv: Any, channels: int) -> Tensor:
    sizes = channels, conv._out_channels, conv._kernel_size
    drawn = _plain_class(conv)(*sizes, groups=conv._groups, bias_attr=False)
    return drawn.weight.to(conv.weight.place).astype(conv.weight.dtype)  # type: ignore[no-any-return]


def _resize(parameter: Any, values: Tensor, gradient: Tensor | None) -> None:
    parameter.clear_gradient(set_to_zero=False)  # else the next one would be added to it
    parameter.data = values
    if gradient is not None:
        parameter.grad = gradient


CONVERSION = Conversion(
    framework=paddle,
    unfit=_unfit,
    layout=_layout,
    plain_class=_plain_class,
    draw=_draw,
    like=lambda values, kernel: values.clone(),
    resize=_resize,
)
