"""One convolution of torch made a CoordConv in place, and back.

The module stays the same object and changes its class, as torch's own parametrizations and lazy
modules do: so its hooks, its flags, its names and all that refers to it stay. Its kernel stays the
same parameter, too, and changes its shape: so ties and the groups of an optimizer stay, and an
optimizer that keeps momenta of the old shape raises an error at its next step.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from coordconv.backends.torch import options
from coordconv.changing import Unfit
from coordconv.coordinates import Coordinates
from coordconv.tape import zeros
from coordconv.weights.kernels import KernelLayout


def unfit(conv: Any) -> Unfit | None:
    """Why a convolution that has the class of torch's own cannot become a CoordConv, if so."""
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
    replaced = {"forward", "_conv_forward"} & vars(conv).keys()
    if replaced:
        return Unfit(f"its {replaced.pop()} was replaced on the instance", fatal=True)
    return None


def layout_of(conv: Any, coords: Coordinates) -> KernelLayout:
    """Where features and coordinates will lie, or lie, in a convolution's kernel."""
    return KernelLayout(coords, conv.in_channels, conv.groups, conv.transposed)


def with_coordinates(kernel: Tensor, conv: Any, layout: KernelLayout, init: str) -> Tensor:
    """A plain convolution's kernel over its features and, as ``init`` says, coordinates."""
    with torch.no_grad():
        joined: Tensor = layout.fitted(kernel.detach(), torch.cat, zeros)
        if init == "fan_in":
            drawn = options.plain_class(conv)(
                conv.in_channels + conv.groups * len(layout.coords),
                conv.out_channels,
                conv.kernel_size,
                groups=conv.groups,
                bias=False,
                device=kernel.device,
                dtype=kernel.dtype,
            )
            joined = layout.join(kernel.detach(), layout.split(drawn.weight)[1], torch.cat)
        return like(joined, kernel)


def like(values: Tensor, kernel: Tensor) -> Tensor:
    """Values in memory of their own, in the memory format of a kernel."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(kernel.dim())
    if last and kernel.is_contiguous(memory_format=last) and not kernel.is_contiguous():
        return values.clone(memory_format=last)
    return values.clone(memory_format=torch.contiguous_format)


def from_conv(cls: Any, conv: Any, coords: Coordinates, init: str) -> Any:
    """A copy of a convolution as a layer of a class of ours.

    Example:
        >>> from coordconv.backends.torch import CoordConv2d
        >>> conv, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 20)
        >>> torch.equal(CoordConv2d.from_conv(conv, coords="xyr")(x), conv(x))
        True
    """
    if not isinstance(conv, nn.Module) or type(conv) not in cls.__mro__:
        plain = next(base for base in cls.__mro__ if base.__module__ == nn.Conv2d.__module__)
        raise TypeError(f"conv must be a torch.nn.{plain.__name__}, got a {type(conv).__name__}")
    found = unfit(conv)
    if found:
        raise ValueError(f"conv cannot be given coordinates: {found.reason}")
    conv = copy.deepcopy(conv)
    layout = layout_of(conv, coords)
    resize(conv.weight, with_coordinates(conv.weight, conv, layout, init), None)
    become(conv, cls, coords, init)
    return conv


def become(conv: Any, cls: Any, coords: Coordinates, init: str) -> None:
    """Make a convolution a layer of a class of ours; its kernel is changed apart."""
    conv.__class__ = cls
    conv.coords = coords
    conv.coord_init = init
    conv.map_only = init == "zeros"


def become_plain(layer: Any, cls: Any) -> None:
    """The inverse of :func:`become`."""
    layer.__class__ = cls
    for name in ("coords", "coord_init", "map_only"):
        vars(layer).pop(name, None)


def resize(parameter: Any, values: Tensor, gradient: Tensor | None) -> None:
    """Give a parameter values of another shape, and a gradient of that shape or none."""
    _stale_shape[id(parameter)] = tuple(parameter.shape)
    weakref.finalize(parameter, _stale_shape.pop, id(parameter), None)
    parameter.grad = None  # torch refuses one of another shape
    # Of another type in between: then torch forgets what it keeps for gradients of the old shape,
    # where an earlier output is still there.
    other = torch.float32 if values.dtype == torch.float16 else torch.float16
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = gradient


# The shape that each resized parameter had before, by identity. A fused optimizer with momenta of
# that shape would write outside of them, and says nothing: so every optimizer is asked at its step.
_stale_shape: dict[int, tuple[int, ...]] = {}


def is_stale(parameter: Any, state: Any) -> bool:
    """Whether something that an optimizer keeps for a parameter has the shape of before."""
    return isinstance(state, Tensor) and tuple(state.shape) == _stale_shape.get(id(parameter))


def _refuse_stale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, states in optimizer.state.items():
        if any(is_stale(parameter, state) for state in states.values()):
            raise RuntimeError(
                "the optimizer keeps momenta for kernels as they were before their layers were "
                "given coordinates, or lost them: call update_optimizer(optimizer) of the Changes "
                "that add_coords returned, or make a new optimizer"
            )


register_optimizer_step_pre_hook(_refuse_stale)
