"""Layers and networks for inference alone: a plain convolution, and a map made once.

In inference P does not change, so that :func:`fuse` splits the kernel once and keeps P. That is
asked for by the user, since what is kept no longer follows the kernel.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coordconv.backends.torch import adding, options
from coordconv.backends.torch.states import CarriesCoords
from coordconv.coordinates import Coordinates
from coordconv.fusing import (
    Named,
    Poison,
    check_layer,
    checked_size,
    example,
    folded_parameters,
    followed_alone,
    followed_once,
    fused_copy,
    latest,
    layers_to_fuse,
    neighbours,
)
from coordconv.grid import Array
from coordconv.layers import CoordLayer
from coordconv.position_bias import MapPlan
from coordconv.recording import mapped
from coordconv.tape import all_modules, is_distributed, refuse_computed, to_numpy
from coordconv.weights.kernels import same_channels
from coordconv.windows import check_fused

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FusedCoordConv(CarriesCoords, adding.OwnChannels, nn.Module):
    """What a CoordConv computes in inference: ``conv``, a plain convolution, and P, a constant map.

    Made by the layer's ``fuse(size)``. With a ``size`` the map is a buffer; without, the maps of
    the last eight sizes are kept, each made when its first input comes, and what a compiler or an
    exporter traces makes its map in the graph. No parameter of it requires a gradient. Fuse a layer
    in the type that it is to run in: a map is made in float32 at least, but moves to 16 bits with
    what it is a buffer of.

    Shape:
        as the layer, with inputs of ``size`` alone if there is one.

    Raises:
        ValueError: the layer is in training mode, has a ``forward`` or a ``_conv_forward`` of its
            own, forward hooks, parameters that are DTensors, or a weight that a hook computes, as
            in pruning; at the call, an input of another size than ``size``.
    """

    def __init__(
        self, layer: Any, size: Sequence[int] | None, weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        if is_lazy(weight):
            raise ValueError("a lazy layer has no weight to fuse yet: run the network once")
        if is_distributed(weight):
            raise ValueError("a layer must have whole parameters to be fused, got DTensors")
        # Torch's transposed convolutions call no second one.
        check_layer(layer, ("forward",) if layer.transposed else ("forward", "_conv_forward"))
        self.coords = layer.coords
        self.size = None if size is None else checked_size(size, layer.rank)
        features, coordinates = layer.layout.split(weight.detach())
        self.conv = _plain(layer, features, bias)
        self._geometry = options.geometry(self.conv)
        self._pointwise = self._geometry.pointwise
        self._maps: dict[Any, Tensor] = {}
        self._made_of: Tensor | None = None  # the tensor behind those maps
        self.register_buffer("coordinates", coordinates.clone() if size is None else None)
        self.register_buffer("map", None)
        if self.size is not None:
            zeros = features.new_zeros(1, layer.in_channels, *self.size)
            self.map = self._made(self.size, tuple(self.conv(zeros).shape[2:]), coordinates)
        self.register_load_state_dict_post_hook(_forget_maps)
        self.eval()

    def _fit(self, state: dict[str, Any], prefix: str, found: Coordinates | None) -> None:
        # A map is what it is; the coordinates' part of a kernel belongs to its coordinates.
        name, coords = f"{prefix}coordinates", self.coords
        if found is None or name not in state:
            return
        if found.names != coords.names or not same_channels(found, coords):
            raise ValueError(f"{name} was made for {found}, want {coords}")

    def _made(self, shape: tuple[int, ...], lengths: tuple[int, ...], kernel: Tensor) -> Tensor:
        plan = MapPlan(self._geometry, self.coords, shape, lengths)
        return adding.constant_map(plan, kernel, adding.is_low_precision(kernel, kernel.dtype))

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The layer's output."""
        # A few microseconds here are a few per cent of a small convolution.
        conv, size, bias = self.conv, self.size, self.map
        check_fused()
        if size is not None and not isinstance(input, torch.fx.Proxy):
            shape = tuple(input.shape[-len(size) :])
            if shape != size:
                raise ValueError(f"input must have the size that was fused, {size}, got {shape}")
        if self._pointwise and self._is_product(input):  # of which the layer itself makes use
            kernel, constant = conv.weight, conv.bias
            return adding.multiplied(input, kernel, constant, self._position_bias(input, input))
        output = conv(input) if output_size is None else conv(input, output_size)
        known = adding.is_known(output)
        if bias is None and not known:
            given = self, self._geometry, output, input, self.coordinates
            return adding.add_map(*given, conv.out_channels, self._is_low_precision())
        bias = self._position_bias(input, output) if bias is None else bias
        if known and output.dtype == bias.dtype:
            return output.add_(bias)
        return adding.add(output, bias, self._is_low_precision())

    def _is_low_precision(self) -> bool:
        kernel = next(self.conv.parameters())  # self.conv.weight may be a tracer's
        return adding.is_low_precision(kernel, kernel.dtype)

    def _is_product(self, input: Any) -> bool:
        low = self._is_low_precision()
        return adding.is_product(self._geometry, input, self.conv.weight, low)

    def _position_bias(self, input: Any, output: Any) -> Tensor:
        """P for a known shape: the one map, or one of the last few."""
        if self.map is not None:
            return self.map
        if self.coordinates is not self._made_of:  # as in torch.func.functional_call
            self._maps.clear()
            self._made_of = self.coordinates
        shape, lengths = (tuple(t.shape[-self._geometry.rank :]) for t in (input, output))
        key = shape, lengths, self.coordinates.dtype, self.coordinates.device
        make = partial(self._made, shape, lengths, self.coordinates)
        return latest(self._maps, key, make)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, size={self.size}"


def _forget_maps(module: Any, _: Any) -> None:
    """After a state was loaded; a function of the module, as no pickle takes a lambda."""
    module._maps.clear()


def _plain(layer: Any, features: Tensor, bias: Tensor | None) -> Any:
    """Torch's own convolution with a layer's options and the features' part of its kernel."""
    extra = {"output_padding": layer.output_padding} if layer.transposed else {}
    conv = nn.utils.skip_init(
        options.plain_class(layer),
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device=features.device,
        dtype=features.dtype,
        **extra,
    )
    conv.weight = nn.Parameter(features.contiguous().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


def fuse(model: nn.Module, size: Any = None, batch_norm: bool = True) -> nn.Module:
    """A copy of a trained network, with each CoordConv as a plain convolution and a constant map.

    Args:
        model: the network, in evaluation mode.
        size: the spatial shape of the network's input, or an example of its input (a tensor, or a
            tuple of all arguments): the network is run once to see the size at each layer, and a
            layer that saw one size keeps one map. None keeps the maps of the last sizes that came.
        batch_norm: whether to fold the batch normalization after a CoordConv into it. Which one
            comes after it ``torch.fx`` tells; where it cannot trace, the neighbours in a network
            that is an ``nn.Sequential``, and in those right in it, do, and the report says so. With
            a ``size`` runs show then that nothing else takes the layer's output.

    Returns:
        The copy; its ``fuse_report`` is a :class:`coordconv.fusing.FuseReport`, to be printed.

    Raises:
        TypeError: ``model`` is no module; another ``size``.
        ValueError: a CoordConv or a batch normalization is in training mode; there is no CoordConv;
            one has hooks or a step of its own, or a weight that a hook computes.

    Example:
        >>> from coordconv.backends.torch import CoordConv2d
        >>> block = nn.Sequential(CoordConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fused = fuse(block, size=(16, 20))
        >>> print(fused.fuse_report)
        0  CoordConv2d  one map for 16x20  folded 1
        >>> x = torch.randn(2, 3, 16, 20)
        >>> torch.allclose(fused(x), block(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = all_modules(model)
    layers = layers_to_fuse(named, _BATCH_NORMS)
    for layer in layers.values():
        refuse_computed(layer)  # PyTorch does not copy what a hook has computed
    run = copy.deepcopy(model)  # what is traced and run, which may change it
    copies = dict(all_modules(run))
    pairs: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    if batch_norm and any(isinstance(each, _BATCH_NORMS) for _, each in named):
        pairs, notes = _followers(run, named, anywhere=size is not None)
    sizes: Mapping[str, tuple[int, ...]] = {}
    if size is not None:
        inputs = _inputs(run, size)
        if notes:  # no graph shows that nothing else takes the output of a layer
            alone = followed_alone(pairs, partial(_outputs, copies, inputs))
            notes += tuple(
                f"{norm} is left: nothing shows that it alone takes the output of {name}"
                for name, norm in pairs.items()
                if name not in alone
            )
            pairs = alone
        sizes = _sizes(run, {name: copies[name] for name in layers}, inputs)
    return fused_copy(model, named, layers, pairs, notes, sizes, _folded)


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    statistics = norm.running_mean, norm.running_var, norm.eps
    return folded_parameters(layer, norm, *statistics, lambda a, like: torch.from_numpy(a).to(like))


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph keeps a call of the module: of layers, those here too."""
        return isinstance(m, CoordLayer) or super().is_leaf_module(m, module_qualified_name)


def _followers(
    model: nn.Module, named: Named, anywhere: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The batch normalization after each CoordConv that nothing else follows, and what to note.

    Where there is a note no graph has shown it; ``anywhere`` as in :func:`.neighbours`.
    """
    notes: tuple[str, ...] = ()
    try:
        # With all arguments, and with those alone that must be given.
        usual = inspect.signature(model.forward).parameters.values()
        optional = {p.name: p.default for p in usual if p.default is not p.empty}
        graphs = [_Tracer().trace(model, given) for given in ({}, optional)[: 1 + bool(optional)]]
    except Exception as error:  # noqa: BLE001  # it runs the user's code, which may raise anything
        found = neighbours(named, nn.Sequential, anywhere)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        notes = (
            "batch normalizations in other modules than nn.Sequential are left: torch.fx fails "
            f"({reason})",
        )
    else:
        found = dict(set.intersection(*(_followed_in(graph) for graph in graphs)))
    modules = dict(named)
    once = followed_once(named, found, _BATCH_NORMS)
    return {name: norm for name, norm in once.items() if modules[norm].track_running_stats}, notes


def _followed_in(graph: torch.fx.Graph) -> set[tuple[str, str]]:
    """The modules of a graph that are called once, each with the module that takes its output."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = set()
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1:
            continue
        (user,) = node.users
        if user.op == "call_module" and calls[node.target] == calls[user.target] == 1:
            found.add((str(node.target), str(user.target)))
    return found


def _inputs(model: nn.Module, size: Any) -> tuple[Any, ...]:
    """A network's arguments, of this size."""

    def zeros() -> Tensor:
        first: Any = next(m for m in model.modules() if hasattr(m, "in_channels"))
        return first.weight.new_zeros(1, first.in_channels, *size)

    return example(size, Tensor, zeros)


def _outputs(
    modules: Mapping[str, Any],
    inputs: tuple[Any, ...],
    poisoned: Mapping[str, str],
    poison: Poison,
) -> list[Array]:
    """What a network returns; see :func:`coordconv.fusing.followed_alone`."""
    made: dict[str, tuple[Tensor, Tensor]] = {}
    found: list[Array] = []

    def after(name: str, module: Any, args: Any, output: Tensor) -> Tensor:
        made[name] = output, torch.from_numpy(poison(output.shape)).to(output)
        return made[name][1]

    def before(name: str, module: Any, args: Any) -> Any:
        output, given = made.get(name, (None, None))
        return (output, *args[1:]) if args and args[0] is given else args

    def leaf(_: str, part: Any) -> None:
        if isinstance(part, Tensor):
            found.append(to_numpy(part))
        elif part is not None and not isinstance(part, str):
            found.append(np.array(part if isinstance(part, (int, float)) else np.nan))

    with ExitStack() as stack, torch.no_grad():
        for name, norm in poisoned.items():
            handle = modules[name].register_forward_hook(partial(after, name))
            stack.callback(handle.remove)
            handle = modules[norm].register_forward_pre_hook(partial(before, name))
            stack.callback(handle.remove)
        # Clones, since the network may write to them.
        given = mapped(lambda _, x: x.clone() if isinstance(x, Tensor) else x, "", inputs)
        mapped(leaf, "", modules[""](*given))
    return found


def _sizes(
    model: nn.Module, layers: dict[str, Any], inputs: tuple[Any, ...]
) -> dict[str, tuple[int, ...]]:
    """The size at each layer that sees one, in a network that is given these inputs."""
    # None for an output of another size than is usual, which one map cannot be for.
    seen: dict[str, set[tuple[int, ...] | None]] = {name: set() for name in layers}
    hooks = []
    for name, layer in layers.items():

        def hook(module: Any, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
            given = args[0] if args else kwargs["input"]
            shape, lengths = (tuple(t.shape[-module.rank :]) for t in (given, output))
            usual = options.geometry(module).lengths(shape)
            seen[name].add(shape if lengths == tuple(usual) else None)

        hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    sizes = {name: found.pop() for name, found in seen.items() if len(found) == 1}
    return {name: size for name, size in sizes.items() if size is not None}
