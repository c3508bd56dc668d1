"""Networks described once, without a framework, and built in any of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array


class _Layer:
    """What a layer is that says nothing else: its output is as its input, it has no weights."""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical shape of each parameter."""
        return {}


@dataclass(frozen=True)
class Conv(_Layer):
    """A convolution, transposed or not, with coordinates or without."""

    name: str
    in_channels: int
    out_channels: int
    geometry: ConvGeometry
    coords: Coordinates | None = None
    bias: bool = True

    @property
    def kind(self) -> str:
        transpose = "Transpose" if self.geometry.transposed else ""
        return f"{'Coord' if self.coords else ''}Conv{transpose}{self.geometry.rank}d"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.out_channels, *self.geometry.output_shape(shape[1:]))

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """``weight`` is over features and coordinates."""
        out, groups, seen = self.out_channels, self.geometry.groups, self._seen
        sides = (groups * seen, out // groups) if self.geometry.transposed else (out, seen)
        shapes: dict[str, tuple[int, ...]] = {"weight": (*sides, *self.geometry.kernel)}
        return shapes | {"bias": (out,)} if self.bias else shapes

    @property
    def _seen(self) -> int:
        """The input channels of a group: features and coordinates."""
        return self.in_channels // self.geometry.groups + len(self.coords or ())

    @property
    def fan_in(self) -> int:
        return self._seen * self.geometry.taps


@dataclass(frozen=True)
class Linear(_Layer):
    """A fully connected layer."""

    name: str
    in_features: int
    out_features: int
    kind = "Linear"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.out_features,)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}

    @property
    def fan_in(self) -> int:
        return self.in_features


@dataclass(frozen=True)
class ReLU(_Layer):
    """``max(x, 0)``."""

    name: str = ""
    kind = "ReLU"


@dataclass(frozen=True)
class Flatten(_Layer):
    """Everything but the batch into one axis, in channels-first order in every backend."""

    name: str = ""
    kind = "Flatten"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)


@dataclass(frozen=True)
class MeanPool(_Layer):
    """The mean over all positions: of a map ``(C, *S)`` the ``(C,)``."""

    name: str = ""
    kind = "MeanPool"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2 or 0 in shape[1:]:
            raise ValueError(f"MeanPool must have a map (C, *S) with positions, got {shape}")
        return shape[:1]


Layer: TypeAlias = Conv | Linear | ReLU | Flatten | MeanPool


@dataclass(frozen=True)
class Network:
    """A chain of layers, whose names are the prefixes of their weights.

    ``input_shape`` is that of one sample, channels first: ``(C, *S)``.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    def shapes(self) -> Iterator[tuple[Layer, tuple[int, ...], tuple[int, ...]]]:
        """Each layer with the shape of its input and of its output, without the batch."""
        shape = self.input_shape
        for layer in self.layers:
            output = layer.output_shape(shape)
            yield layer, shape, output
            shape = output

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical shape of every weight by its dotted name."""
        return {
            f"{layer.name}.{name}": shape
            for layer in self.layers
            for name, shape in layer.weight_shapes().items()
        }

    def coordinates(self) -> dict[str, Coordinates]:
        """The Coordinates of each CoordConv by the layer's name."""
        return {
            layer.name: layer.coords
            for layer in self.layers
            if isinstance(layer, Conv) and layer.coords
        }

    def with_coordinates(self, coords: CoordinatesLike) -> Network:
        """The same network with other coordinates in each CoordConv, as another implementation's.

        ``coords`` are tokens, a :class:`~coordconv.Coordinates`, or None for all axes. Errors are
        those of Coordinates, and ValueError where there is no CoordConv.

        Example:
            >>> keras = get("coord_classifier").with_coordinates(Coordinates.named("keras"))
            >>> keras.coordinates()
            {'conv1': Coordinates('yx')}
        """
        if not self.coordinates():
            raise ValueError(f"network {self.name!r} has no CoordConv to give coordinates to")
        layers = [
            replace(layer, coords=Coordinates.resolve(coords, layer.geometry.rank))
            if isinstance(layer, Conv) and layer.coords
            else layer
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))


class Weights(dict[str, Array]):
    """Canonical weights by dotted name, with the Coordinates that they were made for.

    A plain ``dict`` will do wherever these are taken, but has no Coordinates to be checked when it
    is imported, and neither Coordinates nor metadata to be saved.

    Args:
        arrays: by dotted name; of other Weights what is not given here is taken, too.
        coordinates: by the dotted name of each CoordConv; that of a layer on its own is ``""``.
        metadata: further text entries for the file.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array] | Iterable[tuple[str, Array]] = (),
        coordinates: Mapping[str, Coordinates] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(arrays)
        own = vars(arrays) if isinstance(arrays, Weights) else {}
        self.coordinates = dict(own.get("coordinates", {}) if coordinates is None else coordinates)
        self.metadata = dict(own.get("metadata", {}) if metadata is None else metadata)

    def copy(self) -> Weights:
        """The same arrays, with their Coordinates, which a ``dict`` of them would lose."""
        return Weights(self)

    @classmethod
    def of(cls, network: Network, arrays: Mapping[str, Array]) -> Weights:
        """A network's arrays, with the network's Coordinates, and its name in the metadata."""
        return cls(arrays, network.coordinates(), {"network": network.name})


def _article(name: str, coords: Coordinates | None) -> Network:
    halving = ConvGeometry((3, 3), stride=2)
    layers = (
        Conv("conv1", 3, 32, ConvGeometry((3, 3), padding=1)),
        ReLU(),
        Conv("conv2", 32, 64, halving),
        ReLU(),
        Conv("conv3", 64, 64, halving),
        ReLU(),
        Conv("conv4", 64, 64, ConvGeometry((3, 3), stride=2, padding=1), coords),
        ReLU(),
        Flatten("flatten"),
        Linear("linear1", 1024, 64),
        ReLU(),
        Linear("linear2", 64, 1),
    )
    return Network(name, (3, 32, 32), layers)


def _chain(
    prefix: str, channels: tuple[int, ...], geometry: ConvGeometry, coords: Coordinates | None
) -> tuple[Layer, ...]:
    """Convolutions, the first with the coordinates, and ReLUs between them, flattened."""
    layers: list[Layer] = []
    for i, (before, after) in enumerate(pairwise(channels), 1):
        layers += [Conv(f"{prefix}{i}", before, after, geometry, coords), ReLU()]
        coords = None
    return (*layers[:-1], Flatten("flatten"))


_DOUBLING = ConvGeometry((2, 2), stride=2, transposed=True)
_CONVS = _chain("conv", (2, 32, 32, 64, 64, 1), ConvGeometry((1, 1)), Coordinates())
_DECONVS = _chain("deconv", (2, 64, 64, 64, 64, 32, 1), _DOUBLING, None)

NETWORKS = {
    network.name: network
    for network in (
        _article("plain_cnn", None),
        _article("coord_cnn", Coordinates.named("paddle")),
        Network("coord_classifier", (2, 64, 64), _CONVS),
        Network("deconv_classifier", (2, 1, 1), _DECONVS),
    )
}


def get(name: str | Network) -> Network:
    """The network of that name.

    - ``plain_cnn``, ``coord_cnn``: the two networks of the article, without and with a CoordConv
      as the fourth convolution; input ``(3, 32, 32)``, output ``(1,)``.
    - ``coord_classifier``: the paper's coordinate classification network; input ``(2, 64, 64)``,
      the target's x and y tiled over the canvas, output the ``(4096,)`` logits of the positions.
    - ``deconv_classifier``: what the paper compares it with, transposed convolutions from
      ``(2, 1, 1)``, the target's x and y, to the same ``(4096,)`` logits.
    """
    if isinstance(name, Network):
        return name
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    return NETWORKS[name]


def build(name: str | Network, backend: str, *, seed: int = 0) -> Any:
    """Build a network as a module of a framework.

    Args:
        name: one of ``NETWORKS``, or a :class:`Network` of your own.
        backend: ``"torch"``, ``"paddle"``, ``"flax"`` or ``"linen"``.
        seed: of the initial weights, the same in every backend. A Linen module holds none: give it
            ``initial_weights(name, seed)`` by its ``import_weights``, or use its ``init``.

    Returns:
        A module with ``export_weights()`` and ``import_weights(mapping)``. Its inputs are channels
        first in torch and Paddle, channels last in Flax.

    Raises:
        ValueError: an unknown network or backend.
        ImportError: the backend's framework is not installed.
        NotImplementedError: the framework's convolution lacks an option of the network.
    """
    from coordconv import backends  # the registry imports a framework only when asked to

    network = get(name)
    for _ in network.shapes():  # a layer says what it cannot take
        pass
    return backends.load(backend).build(network, initial_weights(network, seed))


def initial_weights(name: str | Network, seed: int = 0) -> Weights:
    """Float32 arrays by dotted name for a network to start with, alike in every backend.

    They are uniform within ``1 / sqrt(fan_in)`` of zero, as ``torch.nn`` draws them, but by NumPy.
    """
    rng = np.random.default_rng(seed)
    network, weights = get(name), {}
    for layer in network.layers:
        for weight, shape in layer.weight_shapes().items():
            limit = 1 / np.sqrt(layer.fan_in)  # type: ignore[union-attr]  # it has weights
            weights[f"{layer.name}.{weight}"] = rng.uniform(-limit, limit, shape).astype("f4")
    return Weights.of(network, weights)
