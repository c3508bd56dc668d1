"""Coordinates for the convolutions of a network that exists, in place, and back.

``converting.py`` has how one layer changes; which of them do is decided before any does.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from coordconv.backends.torch import adding, converting, options
from coordconv.backends.torch.layers import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    TorchCoordLayer,
)
from coordconv.changing import ALREADY, Change, Changes, Choice, Unfit, check_ties, plan
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.tape import zeros
from coordconv.weights.kernels import KernelLayout

_CLASSES: dict[type, Any] = {
    nn.Conv1d: CoordConv1d,
    nn.Conv2d: CoordConv2d,
    nn.Conv3d: CoordConv3d,
    nn.ConvTranspose1d: CoordConvTranspose1d,
    nn.ConvTranspose2d: CoordConvTranspose2d,
    nn.ConvTranspose3d: CoordConvTranspose3d,
}
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


@dataclass
class TorchChanges(Changes):
    """:class:`coordconv.changing.Changes`, and what an optimizer made before needs."""

    _kernels: list[tuple[Any, KernelLayout]] = field(default_factory=list, repr=False)

    def update_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after :meth:`undo` that part
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
        kernels = [(p, layout) for p, layout in self._kernels if id(p) in held]
        if not kernels:
            raise ValueError("optimizer has none of the kernels that changed")
        updates = []
        for kernel, layout in kernels:
            for name, state in optimizer.state.get(kernel, {}).items():
                if not isinstance(state, Tensor) or not state.dim() or state.shape == kernel.shape:
                    continue
                if not converting.is_stale(kernel, state):
                    raise ValueError(
                        f"optimizer keeps {name!r} of shape {tuple(state.shape)} for a kernel of "
                        f"shape {tuple(kernel.shape)}: make a new {type(optimizer).__name__}"
                    )
                updates.append((kernel, name, _fitted(state, kernel, layout)))
        for kernel, name, state in updates:
            optimizer.state[kernel][name] = state


def _fitted(values: Tensor, kernel: Tensor, layout: KernelLayout) -> Tensor:
    """What has the shape of a kernel of before, in the shape of the kernel as it is now."""
    if values.shape[layout.axis] == layout.width:
        return converting.like(layout.split(values)[0], kernel)
    return converting.like(layout.fitted(values, torch.cat, zeros), kernel)


class _Appending(TorchCoordLayer):
    """A subclass of torch's convolution, of which no more is known than what it is called with."""

    subclass: type  # what it was
    in_channels: int
    groups: int

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        options.check(input, self.rank, self.in_channels, len(self.coords))
        input = adding.append(self.coords, input, self.rank, self.groups)
        return super().forward(input, *args, **kwargs)  # type: ignore[misc]  # a mixin

    def fuse(self, size: Any = None) -> Any:
        raise ValueError(f"a subclass of torch's convolution is not fused, here {type(self)}")

    def __reduce__(self) -> Any:  # pickle finds no class that is made at run time
        return _empty, (self.subclass,), self.__dict__


def _empty(subclass: type) -> Any:
    cls = _appending(subclass)
    return cls.__new__(cls)


@cache  # one class of ours for each of the user's
def _appending(subclass: Any) -> Any:
    base = next(base for base in subclass.__mro__ if base in _CLASSES)
    rank, space = _CLASSES[base].rank, {"subclass": subclass, "__module__": subclass.__module__}
    bases = _Appending, subclass
    return types.new_class(
        f"Coord{subclass.__name__}", bases, {"rank": rank}, lambda names: names.update(space)
    )


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
        layers: which convolutions: names, whole or the end of them, of layers or of blocks, which
            are all convolutions in them; a compiled regular expression that matches the whole name;
            a function of name and module; several of these; None for every convolution of torch's
            own classes.
        exclude: those to leave out, in the same way.
        init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as torch draws a convolution over
            features and coordinates; the features' part stays.
        subclasses: whether to change subclasses of torch's convolutions, too. The coordinates are
            appended to their input; a subclass that then computes something else, as one that
            standardizes its kernel, is left. This is found by running it on random numbers.

    Returns:
        What changed and what was left and why: to be printed, kept as JSON, or undone. A layer that
        has coordinates is left.

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
    check_coord_init(init, "init")
    Coordinates.resolve(coords, 3)
    modules = _modules(model)

    def examine(name: str, conv: Any) -> Unfit | None:
        if isinstance(conv, TorchCoordLayer):
            return Unfit(f"{ALREADY}, {conv.coords}")
        unfit = converting.unfit(conv)
        if unfit:
            return unfit
        try:
            Coordinates.resolve(coords, _coord_class(conv).rank)
        except ValueError as error:
            return Unfit(str(error))
        return None if type(conv) in _CLASSES else _unfit_subclass(conv, coords, subclasses)

    chosen, skipped = plan(modules, _is_convolution, examine, layers, exclude)
    layouts = {
        id(conv): converting.layout_of(conv, Coordinates.resolve(coords, _coord_class(conv).rank))
        for conv in chosen.values()
    }
    check_ties(chosen, modules, _parameters(model), lambda conv: layouts[id(conv)])
    kernels: dict[int, Any] = {}
    for conv in chosen.values():
        kernel, layout = conv.weight, layouts[id(conv)]
        if id(kernel) not in kernels:
            values = converting.with_coordinates(kernel, conv, layout, init)
            gradient = kernel.grad
            if gradient is not None:
                gradient = converting.with_coordinates(gradient, conv, layout, "zeros")
            kernels[id(kernel)] = kernel, layout, values, gradient
    # All that could fail is behind us, and now all changes.
    rows, sizes = [], {name: conv.weight.numel() for name, conv in chosen.items()}
    for kernel, _, values, gradient in kernels.values():
        converting.resize(kernel, values, gradient)
    for name, conv in chosen.items():
        before = type(conv).__name__
        converting.become(conv, _coord_class(conv), layouts[id(conv)].coords, init)
        rows.append(Change(name, before, _shown(conv), conv.weight.numel() - sizes[name]))
    of_kernels = [(kernel, layout) for kernel, layout, *_ in kernels.values()]
    return TorchChanges(tuple(rows), skipped, lambda: _remove(chosen), of_kernels)


def remove_coords(
    model: nn.Module, inputs: Any = None, *, layers: Choice = None, exclude: Choice = None
) -> Changes:
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
    modules = _modules(model)

    def examine(name: str, layer: Any) -> Unfit | None:
        if type(layer) not in _CLASSES.values() and not isinstance(layer, _Appending):
            return Unfit(f"it is a {type(layer).__name__}, a class of its own", fatal=True)
        return converting.unfit(layer)

    chosen, skipped = plan(
        modules, lambda module: isinstance(module, TorchCoordLayer), examine, layers, exclude
    )
    check_ties(chosen, modules, _parameters(model), lambda layer: layer.layout)
    shares = {} if inputs is None else _variance_shares(model, chosen, inputs)
    before = {name: (_shown(layer), layer.weight.numel()) for name, layer in chosen.items()}
    _remove(chosen)
    rows = [
        Change(name, shown, type(layer).__name__, layer.weight.numel() - size, shares.get(name))
        for (name, layer), (shown, size) in zip(chosen.items(), before.values(), strict=True)
    ]
    return Changes(tuple(rows), skipped)


def _shown(layer: Any) -> str:
    return f"{type(layer).__name__}({layer.coords.channels!r})"


def _parameters(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False))


def _is_convolution(module: Any) -> bool:
    return isinstance(module, tuple(_CLASSES))


def _coord_class(conv: Any) -> Any:
    """The class of ours that a convolution becomes."""
    kind: Any = type(conv)
    return _CLASSES.get(kind) or _appending(kind)


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


def _unfit_subclass(conv: Any, coords: CoordinatesLike, subclasses: bool) -> Unfit | None:
    """Why a subclass of torch's convolution does not become a CoordConv, by running it."""
    kind, base = type(conv).__name__, next(b for b in type(conv).__mro__ if b in _CLASSES)
    if not subclasses:
        return Unfit(
            f"{kind} is a subclass of {base.__name__} and may compute something else; "
            "subclasses=True finds out whether it goes together with coordinates"
        )
    if conv.weight.is_meta:
        return Unfit(f"{kind} is on the meta device, where it cannot be run to find out")
    try:
        one = copy.deepcopy(conv).double()
        cls, layout = _coord_class(one), None
        sizes = [k * d + 8 for k, d in zip(one.kernel_size, one.dilation, strict=True)]
        generator = torch.Generator().manual_seed(0)  # the user's draws stay what they are
        shape = (2, one.in_channels, *sizes)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(one.weight.device)
        with torch.no_grad():
            wanted = type(one).forward(one, x)  # without hooks
            layout = converting.layout_of(one, Coordinates.resolve(coords, cls.rank))
            values = converting.with_coordinates(one.weight, one, layout, "zeros")
            converting.resize(one.weight, values, None)
            converting.become(one, cls, layout.coords, "zeros")
            found = cls.forward(one, x)
    except Exception as error:  # noqa: BLE001  # it runs the user's code, which may raise anything
        return Unfit(f"{kind} fails with coordinates ({type(error).__name__}: {error})")
    # Half of the digits of float64: rounding is far below, and another computation far above.
    if not torch.allclose(found, wanted, rtol=2**-26, atol=2**-26 * float(wanted.abs().max())):
        return Unfit(f"{kind} computes something else once its kernel has channels for coordinates")
    return None


def _remove(layers: Mapping[str, Any]) -> None:
    """Make layers plain convolutions."""
    for name, layer in layers.items():
        unfit = converting.unfit(layer)
        if unfit:
            raise ValueError(f"{name or 'the layer'} cannot lose its coordinates: {unfit.reason}")
    kernels: dict[int, Any] = {}
    for layer in layers.values():
        kernel, layout = layer.weight, layer.layout
        values = converting.like(layout.split(kernel.detach())[0], kernel)
        gradient = kernel.grad
        if gradient is not None:
            gradient = converting.like(layout.split(gradient)[0], kernel)
        kernels[id(kernel)] = kernel, values, gradient
    for resized in kernels.values():
        converting.resize(*resized)
    for layer in layers.values():
        appending = isinstance(layer, _Appending)
        cls = layer.subclass if appending else options.plain_class(layer)
        converting.become_plain(layer, cls)


def _variance_shares(model: nn.Module, layers: Mapping[str, Any], inputs: Any) -> dict[str, float]:
    """The coordinates' part of the variance of each layer's output, where the inputs reach it."""
    sums: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in layers.items():
        plain = copy.deepcopy(layer)
        _remove({name: plain})

        def hook(
            _: Any, args: Any, kwargs: Any, output: Any, name: str = name, plain: Any = plain
        ) -> None:
            rest = type(plain).forward(plain, *args, **kwargs).double()  # without hooks
            axes = [
                axis
                for axis in range(rest.dim())
                if axis != rest.dim() - 1 - len(plain.kernel_size)
            ]
            parts = [part.var(axes, correction=0).sum() for part in (output.double() - rest, rest)]
            sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), parts, strict=True)]

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(p / (p + rest)) if p else 0.0 for name, (p, rest) in sums.items()}
