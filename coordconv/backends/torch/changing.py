"""Coordinates for the convolutions of a network of torch, in place, and back.

:mod:`coordconv.tape_changing` does it; here is what torch alone has.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coordconv.backends.torch import adding, networks, options
from coordconv.backends.torch.converting import CONVERSION
from coordconv.backends.torch.layers import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    TorchCoordLayer,
)
from coordconv.changing import Choice
from coordconv.coordinates import CoordinatesLike
from coordconv.tape_changing import Appending, NetworkConversion, TapeChanges

_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.jit.ScriptModule,
    torch.optim.swa_utils.AveragedModel,
)
# Of libraries that need not be there, and of torch, which has no public name for the first.
_WRAPPER_NAMES = {
    "OptimizedModule",
    "FullyShardedDataParallel",
    "ModelEma",
    "ModelEmaV2",
    "ModelEmaV3",
}


class TorchChanges(TapeChanges):
    """:class:`coordconv.changing.Changes`, and what an optimizer made before needs."""

    conversion = CONVERSION

    def update_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after ``undo`` that part
        is dropped. Until then such an optimizer raises a RuntimeError at its next step.

        Raises:
            ValueError: the optimizer has none of the kernels, or keeps something of a shape that is
                neither a kernel's nor a number's, as Adafactor does: make a new one.

        Example:
            >>> conv = nn.Conv2d(3, 8, 3)
            >>> optimizer = torch.optim.SGD(conv.parameters(), 0.1, momentum=0.9)
            >>> conv(torch.ones(1, 3, 8, 8)).sum().backward()
            >>> optimizer.step()
            >>> add_coords(conv).update_optimizer(optimizer)
            >>> optimizer.state[conv.weight]["momentum_buffer"].shape
            torch.Size([8, 5, 3, 3])
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(kernel) for kernel, _ in self._kernels):
            raise ValueError("optimizer has none of the kernels that changed")
        self._update(optimizer)

    def _states(self, optimizer: Any, kernel: Any) -> Mapping[str, Any]:
        states = optimizer.state.get(kernel, {})
        return {name: state for name, state in states.items() if isinstance(state, Tensor)}

    def _put(self, optimizer: Any, kernel: Any, name: str, values: Any) -> None:
        optimizer.state[kernel][name] = values


class _Appending(Appending, TorchCoordLayer):
    in_channels: int
    groups: int

    def _appended(self, input: Tensor) -> Tensor:
        options.check(input, self.rank, self.in_channels, len(self.coords))
        window = options.window(None, input, self.rank)
        return adding.append(self, input, self.rank, self.groups, window)  # type: ignore[no-any-return]


def add_coords(
    model: nn.Module,
    coords: CoordinatesLike = "xy",
    *,
    layers: Choice = None,
    exclude: Choice = None,
    init: str = "zeros",
    subclasses: bool = False,
) -> TorchChanges:
    """Give the convolutions of a network coordinates, in place.

    A layer stays the same module and keeps its hooks, flags and ties, and its kernel stays the same
    parameter, with further input channels. With ``init="zeros"`` the network computes what it
    computed, in float32 on one device to the bit: for this the layers are ``map_only``. A state
    dict of the network before loads into the network after.

    Args:
        model: the network, as it is before it is wrapped or compiled.
        coords: the coordinates of all layers: tokens, a :class:`~coordconv.Coordinates`, or None
            for all axes of each layer.
        layers: which convolutions: names of layers or of blocks, which are all convolutions in
            them, whole or, if no name is the whole of it, the end of names; a compiled regular
            expression that matches the whole name; a function of name and module; several of these;
            None for every convolution of torch's own classes.
        exclude: those to leave out, in the same way.
        init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as torch draws a convolution over
            features and coordinates; the features' part stays.
        subclasses: whether to change subclasses of torch's convolutions, too. The coordinates are
            appended to their input; a subclass that then computes something else, as one that
            standardizes its kernel, is left. This is found by running it on random numbers.

    Returns:
        What changed and what was left, and why. It is to be printed, kept as JSON, or undone. A
        layer that has coordinates is left.

    Raises:
        TypeError: ``model`` is no module; ``layers`` or ``exclude`` of another type.
        ValueError: nothing matches; coordinates beyond the rank of a layer that was asked for; a
            wrapper, a parametrized, pruned or quantized layer, a kernel that is shared with another
            layer. All is said before anything changes.

    Source:
        The start at zero is that of a residual branch: Goyal et al., 2017, section 5.1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> print(add_coords(model, layers="0"))
        layer  from    to                 parameters added
        0      Conv2d  CoordConv2d('xy')  144
    """
    return _NETWORKS.add(model, coords, layers, exclude, init, subclasses)  # type: ignore[no-any-return]


def remove_coords(
    model: nn.Module, inputs: Any = None, *, layers: Choice = None, exclude: Choice = None
) -> TorchChanges:
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
        >>> model = nn.Sequential(CoordConv2d(3, 8, 3, coord_init="zeros"), nn.ReLU())
        >>> print(remove_coords(model, torch.rand(2, 3, 16, 16)))
        layer  from               to      parameters added  variance share
        0      CoordConv2d('xy')  Conv2d  -144              0.00%
    """
    return _NETWORKS.remove(model, inputs, layers, exclude)  # type: ignore[no-any-return]


def _modules(model: Any) -> dict[str, Any]:
    """All modules by name, one that is used twice under each; an error if one wraps a network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, _WRAPPERS) or kind in _WRAPPER_NAMES:
            raise ValueError(
                f"model must be the network as it is before {kind} wraps it: change what is inside "
                f"{name or 'model'}, and wrap that anew"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(f"model is quantized ({name} is a quantized {kind}): change it before")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        inside = {id(module) for module in modules.values()}
        for each in gc.get_objects():
            if issubclass(type(each), _WRAPPERS[1]) and inside & {*map(id, each.modules())}:
                raise ValueError(
                    "model is inside of a DistributedDataParallel, which does not reduce gradients "
                    "of kernels that change: give it coordinates first, on every rank"
                )
    return modules


_NETWORKS = NetworkConversion(
    conversion=CONVERSION,
    tape=networks.Network.TAPE,
    layer=TorchCoordLayer,
    classes={
        nn.Conv1d: CoordConv1d,
        nn.Conv2d: CoordConv2d,
        nn.Conv3d: CoordConv3d,
        nn.ConvTranspose1d: CoordConvTranspose1d,
        nn.ConvTranspose2d: CoordConvTranspose2d,
        nn.ConvTranspose3d: CoordConvTranspose3d,
    },
    appending=_Appending,
    modules=_modules,
    changes=TorchChanges,
)
