"""One convolution of torch made a CoordConv in place, and back: :mod:`coordconv.tape_changing`.

An optimizer that keeps momenta of the old shape raises an error at its next step.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from coordconv.backends.torch import options
from coordconv.changing import Unfit
from coordconv.coordinates import Coordinates
from coordconv.tape_changing import Conversion, note_step, refuse_stale, replaced_forward
from coordconv.weights.kernels import KernelLayout


def _unfit(conv: Any) -> Unfit | None:
    weight = dict(conv.named_parameters(recurse=False)).get("weight")
    if weight is None or parametrize.is_parametrized(conv):
        return Unfit(
            "its parameters are computed from others, by a parametrization, a norm or pruning: "
            "remove that first, as torch.nn.utils.parametrize.remove_parametrizations and "
            "torch.nn.utils.prune.remove do",
            fatal=True,
        )
    if is_lazy(weight):
        return Unfit("it has no weight yet: run the network once", fatal=True)
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        kind = type(weight.data).__name__
        return Unfit(f"its weight is a {kind}: change the network before that", fatal=True)
    return replaced_forward(conv, "_conv_forward")


def _layout(conv: Any, coords: Coordinates) -> KernelLayout:
    return KernelLayout(coords, conv.in_channels, conv.groups, conv.transposed)


def _draw(conv: Any, channels: int) -> Any:
    return options.plain_class(conv)(
        channels,
        conv.out_channels,
        conv.kernel_size,
        groups=conv.groups,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).weight


def _like(values: Tensor, kernel: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(kernel.dim())
    if last and kernel.is_contiguous(memory_format=last) and not kernel.is_contiguous():
        return values.clone(memory_format=last)
    return values.clone(memory_format=torch.contiguous_format)


def _resize(parameter: Any, values: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = None  # torch refuses one of another shape
    # Of another type in between: then torch forgets what it keeps for gradients of the old shape,
    # where an earlier output is still there.
    other = torch.float32 if values.dtype == torch.float16 else torch.float16
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = gradient


@cache  # once, and not at import: who changes no network has no step that asks
def _watch_optimizers() -> None:
    def ask(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept = [(each, optimizer.state.get(each, {}).values()) for each in _held(optimizer)]
        refuse_stale(optimizer, kept)

    register_optimizer_step_pre_hook(ask)
    for each in gc.get_objects():
        if issubclass(type(each), torch.optim.Optimizer):  # isinstance may run any code
            note_step(each, _held(each))


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer, kernel: Any) -> Mapping[str, Any]:
    states = optimizer.state.get(kernel, {})
    return {name: state for name, state in states.items() if isinstance(state, Tensor)}


def _put(optimizer: torch.optim.Optimizer, kernel: Any, name: str, values: Tensor) -> None:
    optimizer.state[kernel][name] = values


CONVERSION = Conversion(
    framework=torch,
    unfit=_unfit,
    layout=_layout,
    plain_class=options.plain_class,
    draw=_draw,
    like=_like,
    resize=_resize,
    watch=lambda parameters: _watch_optimizers(),
    optimizer=torch.optim.Optimizer,
    held=_held,
    states=_states,
    put=_put,
)
