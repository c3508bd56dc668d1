"""Coordinates for the convolutions of a network of Paddle, in place, and back.

:mod:`coordconv.tape_changing` does it; here is what Paddle alone has.

Example:
    >>> model = nn.Sequential(nn.Conv2D(3, 8, 3), nn.ReLU(), nn.Conv2D(8, 8, 3))
    >>> optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    >>> model(paddle.ones([1, 3, 8, 8])).sum().backward()
    >>> optimizer.step()
    >>> changes = add_coords(model, layers="0")
    >>> print(changes)
    layer  from    to                 parameters added
    0      Conv2D  CoordConv2D('xy')  144
    >>> changes.update_optimizer(optimizer)
    >>> list(optimizer.state_dict()[f"{model[0].weight.name}_velocity_0"].shape)
    [8, 5, 3, 3]
    >>> print(remove_coords(model, paddle.rand([2, 3, 16, 16])))
    layer  from               to      parameters added  variance share
    0      CoordConv2D('xy')  Conv2D  -144              0.00%
"""

from __future__ import annotations

import gc
from typing import Any

import paddle
from paddle import Tensor, nn

from coordconv.backends.paddle import adding, networks, options, windows
from coordconv.backends.paddle.converting import CONVERSION
from coordconv.backends.paddle.layers import (
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
    PaddleCoordLayer,
)
from coordconv.tape_changing import Appending, NetworkConversion

# By name, as most of them are found nowhere in Paddle's documentation; subclasses, too.
_WRAPPERS = {
    "DataParallel",
    "GroupShardedStage2",
    "GroupShardedStage3",
    "MetaParallelBase",
    "MixPrecisionLayer",
}
_QUANTIZED = ("Quanted", "Quantized", "ObserveWrapper")


class _Appending(Appending, PaddleCoordLayer):
    _in_channels: int
    _groups: int

    def _appended(self, x: Tensor) -> Tensor:
        options.check(x, self.rank, self.channels_last, self._in_channels, len(self.coords))
        window = windows.window_of(None, x, self.rank)
        return adding.append(self.coords, x, self.channels_last, self._groups, window)


def _is_wrapper(kind: type) -> bool:
    return issubclass(kind, nn.Layer) and not _WRAPPERS.isdisjoint(c.__name__ for c in kind.__mro__)


def _modules(model: Any) -> dict[str, Any]:
    """All layers by name, one that is used twice under each; an error if one cannot be changed."""
    if not paddle.in_dynamic_mode():
        raise ValueError("model cannot be changed in static mode: call paddle.disable_static()")
    if not isinstance(model, nn.Layer):
        raise TypeError(f"model must be a paddle.nn.Layer, got {type(model).__name__}")
    modules = dict(model.named_sublayers(include_self=True, remove_duplicate=False))
    for name, module in modules.items():
        kind = type(module).__name__
        if _is_wrapper(type(module)):
            raise ValueError(
                f"model must be the network as it is before {kind} wraps it: change what is inside "
                f"{name or 'model'}, and wrap that anew"
            )
        if kind.startswith(_QUANTIZED):
            raise ValueError(f"model is quantized ({name} is a {kind}): change it before")
        forward: Any = module.forward
        if type(forward).__name__ == "ASTStaticFunction" and forward.get_traced_count():
            raise ValueError(
                f"{name or 'model'} was traced by to_static with full_graph: change it before, or "
                "call rollback() of its forward"
            )
    inside = {id(module) for module in modules.values()}
    for each in gc.get_objects():
        if _is_wrapper(type(each)) and inside & {*map(id, each.sublayers())}:
            raise ValueError(
                f"model is inside of a {type(each).__name__}, which has been told the shapes of "
                "its kernels: give it coordinates first, on every rank"
            )
    return modules


_NETWORKS = NetworkConversion(
    conversion=CONVERSION,
    tape=networks.Network.TAPE,
    layer=PaddleCoordLayer,
    classes={
        nn.Conv1D: CoordConv1D,
        nn.Conv2D: CoordConv2D,
        nn.Conv3D: CoordConv3D,
        nn.Conv1DTranspose: CoordConv1DTranspose,
        nn.Conv2DTranspose: CoordConv2DTranspose,
        nn.Conv3DTranspose: CoordConv3DTranspose,
    },
    appending=_Appending,
    modules=_modules,
)

add_coords = _NETWORKS.add_coords
remove_coords = _NETWORKS.remove_coords
