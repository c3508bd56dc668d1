"""Coordinates for the convolutions of a network of Paddle, in place, and back.

:mod:`coordconv.tape_changing` does it; here is what Paddle alone has.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor, nn

from coordconv.backends.paddle import adding, networks, options
from coordconv.backends.paddle.converting import CONVERSION, MASTER, kept, parameters
from coordconv.backends.paddle.layers import (
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
    PaddleCoordLayer,
)
from coordconv.changing import Choice
from coordconv.coordinates import CoordinatesLike
from coordconv.tape_changing import Appending, NetworkConversion, TapeChanges

# By name, as most of them are found nowhere in Paddle's documentation; subclasses, too.
_WRAPPERS = {
    "DataParallel",
    "GroupShardedStage2",
    "GroupShardedStage3",
    "MetaParallelBase",
    "MixPrecisionLayer",
}
_QUANTIZED = ("Quanted", "Quantized", "ObserveWrapper")


class PaddleChanges(TapeChanges):
    """:class:`coordconv.changing.Changes`, and what an optimizer made before needs."""

    conversion = CONVERSION

    def update_optimizer(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after ``undo`` that part
        is dropped. Until then such an optimizer raises a RuntimeError at its next step.

        Raises:
            TypeError: no optimizer of Paddle's: of a wrapper give what is in it.
            ValueError: the optimizer has none of the kernels, or keeps something of a shape that is
                neither a kernel's nor a number's, as LBFGS and ASGD do, or master weights of
                kernels of 16 bits: make a new one.

        Example:
            >>> conv = nn.Conv2D(3, 8, 3)
            >>> optimizer = paddle.optimizer.Momentum(0.1, parameters=conv.parameters())
            >>> conv(paddle.ones([1, 3, 8, 8])).sum().backward()
            >>> optimizer.step()
            >>> add_coords(conv).update_optimizer(optimizer)
            >>> list(optimizer.state_dict()[f"{conv.weight.name}_velocity_0"].shape)
            [8, 5, 3, 3]
        """
        if not isinstance(optimizer, paddle.optimizer.Optimizer):
            raise TypeError(
                f"optimizer must be a paddle.optimizer.Optimizer, got {type(optimizer).__name__}"
            )
        held = {*map(id, parameters(optimizer))}
        if held.isdisjoint(id(kernel) for kernel, _ in self._kernels):
            raise ValueError("optimizer has none of the kernels that changed")
        self._update(optimizer)

    def _states(self, optimizer: Any, kernel: Any) -> Mapping[str, Any]:
        states = kept(optimizer, kernel)
        if MASTER in states:
            raise ValueError(
                f"optimizer keeps master weights of {kernel.name}, which has 16 bits: make a new "
                f"{type(optimizer).__name__}, or change the network before paddle.amp.decorate"
            )
        flat = optimizer.state_dict().get("state", {})  # LBFGS's, of all parameters in one
        return states | {name: each for name, each in flat.items() if isinstance(each, Tensor)}

    def _put(self, optimizer: Any, kernel: Any, name: str, values: Any) -> None:
        paddle.assign(values, kept(optimizer, kernel)[name])  # in place: some have it twice


class _Appending(Appending, PaddleCoordLayer):
    _in_channels: int
    _groups: int

    def _appended(self, x: Tensor) -> Tensor:
        options.check(x, self.rank, self.channels_last, self._in_channels, len(self.coords))
        return adding.append(self.coords, x, self.channels_last, self._groups)


def add_coords(
    model: nn.Layer,
    coords: CoordinatesLike = "xy",
    *,
    layers: Choice = None,
    exclude: Choice = None,
    init: str = "zeros",
    subclasses: bool = False,
) -> PaddleChanges:
    """Give the convolutions of a network coordinates, in place.

    A layer stays the same object and keeps its hooks, flags and ties, and its kernel stays the same
    parameter of the same name, with further input channels. With ``init="zeros"`` the network
    computes what it computed, in float32 on one device to the bit: for this the layers are
    ``map_only``. A state dict of the network before loads into the network after by
    :func:`~coordconv.backends.paddle.adapt_state_dict`; without it Paddle leaves out the kernels
    and warns.

    Args:
        model: the network, as it is before it is wrapped or traced.
        coords: the coordinates of all layers: tokens, a :class:`~coordconv.Coordinates`, or None
            for all axes of each layer.
        layers: which convolutions: names of layers or of blocks, which are all convolutions in
            them, whole or, if no name is the whole of it, the end of names; a compiled regular
            expression that matches the whole name; a function of name and layer; several of these;
            None for every convolution of Paddle's own classes.
        exclude: those to leave out, in the same way.
        init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as Paddle draws a convolution over
            features and coordinates; the features' part stays.
        subclasses: whether to change subclasses of Paddle's convolutions, too. The coordinates are
            appended to their input; a subclass that then computes something else, as one that
            standardizes its kernel, is left. This is found by running it on random numbers.

    Returns:
        What changed and what was left, and why. It is to be printed, kept as JSON, or undone. A
        layer that has coordinates is left.

    Raises:
        TypeError: ``model`` is no layer; ``layers`` or ``exclude`` of another type.
        ValueError: nothing matches; coordinates beyond the rank of a layer that was asked for;
            static mode; a wrapper, or what is inside of one; what ``to_static`` traced; a
            quantized layer; a kernel without values, one that others compute, as
            in ``weight_norm``, or one that is shared with another layer. All is said before
            anything changes.

    Source:
        The start at zero is that of a residual branch: Goyal et al., 2017, section 5.1.

    Example:
        >>> model = nn.Sequential(nn.Conv2D(3, 8, 3), nn.ReLU(), nn.Conv2D(8, 8, 3))
        >>> print(add_coords(model, layers="0"))
        layer  from    to                 parameters added
        0      Conv2D  CoordConv2D('xy')  144
    """
    return _NETWORKS.add(model, coords, layers, exclude, init, subclasses)  # type: ignore[no-any-return]


def remove_coords(
    model: nn.Layer, inputs: Any = None, *, layers: Choice = None, exclude: Choice = None
) -> PaddleChanges:
    """Make the CoordConvs of a network plain convolutions, in place: the coordinates' part is lost.

    Args:
        model: the network.
        inputs: a batch, or a tuple of all arguments, on which to measure first how much of what
            each layer computes is the coordinates': the variance of the coordinates' part P of the
            output, over this and the variance of the rest, each over batch and positions and summed
            over channels. None measures nothing.
        layers: which layers, as in :func:`add_coords`.
        exclude: those to leave out, in the same way.

    Returns:
        What changed, with each layer's ``variance_share``.

    Raises:
        TypeError, ValueError: as :func:`add_coords`; there is no CoordConv.

    Example:
        >>> model = nn.Sequential(CoordConv2D(3, 8, 3, coord_init="zeros"), nn.ReLU())
        >>> print(remove_coords(model, paddle.rand([2, 3, 16, 16])))
        layer  from               to      parameters added  variance share
        0      CoordConv2D('xy')  Conv2D  -144              0.00%
    """
    return _NETWORKS.remove(model, inputs, layers, exclude)  # type: ignore[no-any-return]


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
    changes=PaddleChanges,
)
