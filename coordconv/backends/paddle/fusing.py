"""Layers and networks for inference alone: a plain convolution, and a map made once.

In inference P does not change, so that :func:`fuse` splits the kernel once and keeps P. That is
asked for by the user, since what is kept no longer follows the kernel.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.utils.decorator_utils import param_one_alias

from coordconv.backends.paddle import adding, options
from coordconv.coordinates import Coordinates
from coordconv.fusing import (
    Poison,
    check_layer,
    checked_size,
    example,
    folded_parameters,
    followed_alone,
    followed_once,
    fused_copy,
    has_hooks,
    latest,
    layers_to_fuse,
    neighbours,
)
from coordconv.grid import Array
from coordconv.recording import mapped
from coordconv.tape import all_modules, to_numpy
from coordconv.windows import check_fused

_OPTIONS = (  # of a layer, those that options.py and adding.py read
    "coords",
    "rank",
    "transposed",
    "channels_last",
    "output_padding",
    "_in_channels",
    "_groups",
    "_kernel_size",
    "_stride",
    "_padding",
    "_padding_mode",
    "_padding_algorithm",
    "_updated_padding",
    "_reversed_padding_repeated_twice",
    "_dilation",
    "_data_format",
)
_BATCH_NORMS = (nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm, nn.BatchNorm)


@paddle.jit.marker.force_dynamic  # as the layers are
class FusedCoordConv(nn.Layer):
    """What a CoordConv computes in inference: ``conv``, a plain convolution, and P, a constant map.

    Made by the layer's ``fuse(size)``. The bias is in the map, as Paddle adds a bias slowly. With a
    ``size`` the map is a buffer; without, the maps of the last eight sizes are kept, each made when
    its first input comes, and a traced program makes its map in the graph. No parameter of it takes
    a gradient. Fuse a layer in the type that it is to run in: a map is made in float32 at least,
    but moves to 16 bits with what it is a buffer of.

    Shape:
        as the layer, with inputs of ``size`` alone if there is one.

    Raises:
        TypeError: ``size`` is no sequence.
        ValueError: the layer is in training mode or in a static graph, has a ``forward`` of its
            own, forward hooks or a weight that is computed, as by ``weight_norm``; ``size`` of
            another rank; at the call, an input of another size than ``size``, or one that is not
            known.
    """

    map: Any  # each a tensor or None, by size
    coordinates: Any
    bias: Any

    def __init__(
        self, layer: Any, size: Sequence[int] | None, weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        if not paddle.in_dynamic_mode():
            raise ValueError("a layer is fused in eager mode: call paddle.disable_static() first")
        check_layer(layer)
        self.coords: Coordinates = layer.coords
        self.size = None if size is None else checked_size(size, layer.rank)
        found: Any
        coordinates: Any
        features, coordinates = (each.clone() for each in layer.layout.split(weight.detach()))
        self.conv = _plain(layer, features)
        # Not read of conv, as quantization puts another layer in its place.
        self._options = options_of(layer)
        self._maps: dict[Any, Tensor] = {}
        self._made_of: list[Tensor] = []  # the values of coordinates and bias behind those maps
        bias = None if bias is None else bias.detach().clone()
        found = None
        if self.size is not None:
            lengths = options.output_shape(options.geometry(layer, self.size), self.size)
            found = self._made(self.size, lengths, coordinates, bias)
            coordinates = bias = None
        buffers = {"map": found, "coordinates": coordinates, "bias": bias}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.eval()

    def _like_layer(self, bias: Tensor | None) -> Any:
        """What ``adding`` asks of a layer: its options, and the bias that its map takes."""
        return SimpleNamespace(**self._options, bias=bias)

    def _made(
        self,
        shape: tuple[int, ...],
        lengths: tuple[int, ...],
        kernel: Tensor,
        bias: Tensor | None,
        output_size: Any = None,
    ) -> Tensor:
        """P and the bias ``(1, out, *lengths)``, in float32 at least."""
        dtype = paddle.float64 if kernel.dtype == paddle.float64 else paddle.float32
        last = self._options["channels_last"]
        kernel, bias = kernel.astype(dtype), None if bias is None else bias.astype(dtype)
        x, output = (
            kernel.new_zeros([1, *s, c] if last else [1, c, *s])
            for c, s in ((1, shape), (len(kernel), lengths))
        )
        return adding.add_map(self._like_layer(bias), output, x, kernel, output_size)

    @paddle.jit.marker.unified
    @param_one_alias(["x", "input"])  # as the layers
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """The layer's output."""
        check_fused()
        layer = self._like_layer(self.bias)
        last = layer.channels_last
        options.check(x, layer.rank, last, layer._in_channels, len(self.coords))
        shape = adding.spatial_shape(x, last)
        known = all(isinstance(n, int) for n in shape)
        if self.size is not None and (not known or shape != self.size):
            got = shape if known else "one that input_spec leaves open"
            raise ValueError(f"input must have the size that was fused, {self.size}, got {got}")
        if known:
            options.output_shape(options.geometry(layer, shape, output_size), shape)
        output = self.conv(x, output_size) if layer.transposed else self.conv(x)
        added = self.map
        if added is None and paddle.in_dynamic_mode():
            added = self._map(shape, adding.spatial_shape(output, last), output_size)
        if added is None:
            return adding.add_map(layer, output, x, self.coordinates, output_size)
        if list(added.shape[1:]) != list(output.shape[1:]):
            raise ValueError(
                f"output must have the size that was fused, {list(added.shape)}, got "
                f"{list(output.shape)} by output_size={output_size}"
            )
        return _add(output, added)

    def _map(self, shape: tuple[int, ...], lengths: tuple[int, ...], output_size: Any) -> Tensor:
        """P and the bias for a shape: one of the last few, if made of what the buffers hold now."""
        kernel, bias = self.coordinates, self.bias
        now = [kernel] if bias is None else [kernel, bias]
        # Paddle tells no sublayer that a state was loaded, and counts no version of its tensors.
        if not (self._made_of and all(map(_same, now, self._made_of))):
            self._maps, self._made_of = {}, [tensor.clone() for tensor in now]
        make = partial(self._made, shape, lengths, kernel, bias, output_size)
        return latest(self._maps, (shape, lengths), make)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, size={self.size}"


def _add(output: Tensor, added: Tensor) -> Tensor:
    """A convolution's output and a constant map, rounded once, as :mod:`adding` adds its own."""
    with adding._no_autocast():
        if adding._is_quick(output) and output.dtype == added.dtype:
            if len(output) == 1 and output.stop_gradient:
                return output.add_(added)
            ones = adding._ones(len(output), added.dtype)
            return adding._add_product(output, ones, added.reshape([1, -1]))
        return (output + added).astype(output.dtype)


def options_of(layer: Any) -> dict[str, Any]:
    """What else of a layer the arithmetic reads, beside its kernel and bias."""
    return {name: getattr(layer, name) for name in _OPTIONS if hasattr(layer, name)}


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.place == other.place
    return alike and bool(paddle.equal_all(one, other))


def _plain(layer: Any, features: Tensor) -> Any:
    """Paddle's own convolution with a layer's options and the features' part of its kernel."""
    kind = "Transpose" if layer.transposed else ""
    mode = {"padding_mode": layer._padding_mode}
    extra = {"output_padding": layer.output_padding} if layer.transposed else mode
    conv = getattr(nn, f"Conv{layer.rank}D{kind}")(
        layer._in_channels,
        layer._out_channels,
        layer._kernel_size,
        stride=layer._stride,
        padding=layer._padding,
        dilation=layer._dilation,
        groups=layer._groups,
        bias_attr=False,
        data_format=layer._data_format,
        **extra,
    )
    place = str(features.place).removeprefix("Place(").removesuffix(")")  # as Paddle 3.2 takes it
    conv.to(device=place, dtype=features.dtype)
    conv.weight.set_value(features)
    conv.weight.stop_gradient = True
    return conv


def fuse(model: nn.Layer, size: Any = None, batch_norm: bool = True) -> nn.Layer:
    """A copy of a trained network, with each CoordConv as a plain convolution and a constant map.

    Args:
        model: the network, in evaluation mode and not yet given to ``to_static``.
        size: the spatial shape of the network's input, or an example of its input (a tensor, or a
            tuple of all arguments): the network is run a few times to see the size at each layer,
            and a layer that saw one size keeps one map. None keeps the maps of the last sizes.
        batch_norm: whether to fold the batch normalization after a CoordConv into it. With a
            ``size`` the runs tell which one comes after it, and that nothing else takes the
            layer's output; without, the neighbours in a network that is an ``nn.Sequential``, and
            in those right in it, do.

    Returns:
        The copy; its ``fuse_report`` is a :class:`coordconv.fusing.FuseReport`, to be printed.

    Raises:
        TypeError: ``model`` is no layer; another ``size``.
        ValueError: a CoordConv or a batch normalization is in training mode; a layer has another
            ``forward`` than its class, as ``to_static`` gives it; there is no CoordConv.

    Example:
        >>> from coordconv.backends.paddle import CoordConv2D
        >>> block = nn.Sequential(CoordConv2D(3, 8, 3), nn.BatchNorm2D(8), nn.ReLU())
        >>> _ = block.eval()
        >>> fused = fuse(block, size=(16, 20))
        >>> print(fused.fuse_report)
        0  CoordConv2D  one map for 16x20  folded 1
        >>> x = paddle.randn([2, 3, 16, 20])
        >>> bool(paddle.allclose(fused(x), block(x), atol=1e-5))
        True
    """
    if not isinstance(model, nn.Layer):
        raise TypeError(f"model must be a paddle.nn.Layer, got {type(model).__name__}")
    named = all_modules(model)
    layers = layers_to_fuse(named, _BATCH_NORMS)
    for name, each in named:
        own = vars(each).get("forward")  # which paddle.flops sets to what it is anyway
        if own is not None and getattr(own, "__func__", None) is not type(each).forward:
            raise ValueError(
                f"forward of {name!r} must be that of its class, as the copy would run the old "
                "one: fuse the network before to_static"
            )
    sizes: Mapping[str, tuple[int, ...]] = {}
    pairs: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    if size is None:
        pairs = followed_once(named, neighbours(named, nn.Sequential), _BATCH_NORMS)
        if {name for name, each in named if type(each) in _BATCH_NORMS} - {*pairs.values()}:
            notes = (
                "batch normalizations in other modules than nn.Sequential are left: no size was "
                "given",
            )
    else:
        run = _Run(model, layers, size)
        sizes, pairs = run.sizes(), run.pairs()
    modules = dict(named)
    pairs = {n: norm for n, norm in pairs.items() if _folds(modules[norm], layers[n])}
    if not batch_norm:
        pairs, notes = {}, ()
    elif size is not None:
        alone = followed_alone(pairs, run.outputs)
        notes = tuple(
            f"{norm} is left: nothing shows that it alone takes the output of {name}"
            for name, norm in pairs.items()
            if name not in alone
        )
        pairs = alone
    return fused_copy(model, named, layers, pairs, notes, sizes, _folded)


def _folds(norm: Any, layer: Any) -> bool:
    """Whether a batch normalization, in evaluation, is a factor and a shift of a layer's output."""
    if has_hooks(norm):
        return False
    if type(norm) is nn.BatchNorm:  # its use_global_stats, False, says nothing of evaluation
        folds = not (norm._trainable_statistics or norm._act)
    else:
        folds = norm._use_global_stats is not False
    data_format: str = getattr(norm, "_data_layout", None) or norm._data_format
    last = data_format != "NC" and data_format.endswith("C")
    return folds and last == bool(layer.channels_last)


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    def tensor(array: Array, like: Tensor) -> Tensor:
        return paddle.to_tensor(array, place=like.place).astype(like.dtype)

    return folded_parameters(layer, norm, norm._mean, norm._variance, norm._epsilon, tensor)


class _Run:
    """A copy of the network that is run, to see what its layers are given and what they feed."""

    def __init__(self, model: nn.Layer, layers: Mapping[str, Any], size: Any) -> None:
        self.model = copy.deepcopy(model)
        self.inputs = _inputs(self.model, size)
        names = {each: name for name, each in reversed(all_modules(self.model))}
        for each, name in names.items():
            if name in layers:
                each.register_forward_post_hook(partial(self._after, name))
            elif type(each) in _BATCH_NORMS:
                each.register_forward_pre_hook(partial(self._before, name))
        self.outputs({})

    def outputs(self, poisoned: Mapping[str, str], poison: Poison | None = None) -> list[Array]:
        """What the network returns; see :func:`coordconv.fusing.followed_alone`."""
        self.poisoned, self.poison = poisoned, poison
        # By layer, for each call: the size of its input, or None if another size may come of it.
        self.seen: dict[str, list[tuple[int, ...] | None]] = defaultdict(list)
        self.taken: dict[str, list[str | None]] = defaultdict(list)  # by norm: the layers before
        # By id, for which it is kept: the layer, its output, and how often it had been written to.
        self.made: dict[int, tuple[str, Tensor, Tensor, int]] = {}
        # Clones, since the network may write to them.
        inputs = mapped(lambda _, x: x.clone() if isinstance(x, Tensor) else x, "", self.inputs)
        with paddle.no_grad():
            output = self.model(*inputs)
        found: list[Array] = []

        def leaf(_: str, part: Any) -> None:
            if isinstance(part, Tensor):
                found.append(to_numpy(part))
            elif isinstance(part, (int, float, np.ndarray)):
                found.append(np.asarray(part))
            elif part is not None and not isinstance(part, str):
                found.append(np.array(np.nan))  # it may hold what cannot be compared

        mapped(leaf, "", output)
        return found

    def _after(self, name: str, layer: Any, inputs: Any, output: Any) -> Any:
        """Note a layer's call; give something else on if the layer is poisoned."""
        last, shape = layer.channels_last, None
        if inputs and isinstance(output, Tensor):
            shape = adding.spatial_shape(inputs[0], last)
            lengths = options.output_shape(options.geometry(layer, shape), shape)
            shape = shape if adding.spatial_shape(output, last) == lengths else None
        self.seen[name].append(shape)
        given = output
        if self.poison and name in self.poisoned:
            given = paddle.to_tensor(self.poison(output.shape), place=output.place)
            given = given.astype(output.dtype)
        self.made[id(given)] = name, given, output, given.inplace_version
        return given

    def _before(self, name: str, norm: Any, inputs: Any) -> Any:
        """Note a batch normalization's call; give it what its layer computed."""
        found = self.made.get(id(inputs[0])) if inputs else None
        if found and found[1].inplace_version != found[3]:  # something in between wrote to it
            found = None
        self.taken[name].append(found and found[0])
        is_partner = found is not None and self.poisoned.get(found[0]) == name
        return (found[2], *inputs[1:]) if found and is_partner else None

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The size at each layer that saw one."""
        found = {name: set(shapes) for name, shapes in self.seen.items()}
        one = {name: shapes.pop() for name, shapes in found.items() if len(shapes) == 1}
        return {name: shape for name, shape in one.items() if shape is not None}

    def pairs(self) -> dict[str, str]:
        """The layers that were called once, and the norm, called once, that took the output."""
        return {
            sources[0]: name
            for name, sources in self.taken.items()
            if len(sources) == 1 and sources[0] is not None and len(self.seen[sources[0]]) == 1
        }


def _inputs(model: nn.Layer, size: Any) -> tuple[Any, ...]:
    """The arguments of a network for ``size`` as :func:`fuse` takes it."""

    def noise() -> Tensor:
        first = next(m for m in model.sublayers(include_self=True) if hasattr(m, "_in_channels"))
        channels, last = first._in_channels, first._data_format.endswith("C")
        shape = (1, *size, channels) if last else (1, channels, *size)
        x = np.random.default_rng(0).standard_normal(shape)
        return paddle.to_tensor(x, place=first.weight.place).astype(first.weight.dtype)

    return example(size, Tensor, noise)
