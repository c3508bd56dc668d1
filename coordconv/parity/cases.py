"""The cases that backends are compared on: plain data, sampled from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.functions import fourier
from coordconv.geometry import PADDING_MODES, ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Network, get, initial_weights
from coordconv.parity.bounds import PRECISIONS
from coordconv.weights import Weights
from coordconv.windows import Window

ARTICLE_NETWORKS = ("plain_cnn", "coord_cnn", "coord_classifier")

# Axis lengths on which every coordinate of span (-1, 1) or (0, 1) is a small multiple of a power
# of two, so that float32 sums of integers times coordinates have no rounding in any order.
_POWERS = (2, 4, 8, 16, 32)
_EXACT_LENGTHS = {"corners": (2, 3, 5, 9, 17, 33), "edges": _POWERS, "start": _POWERS}


@dataclass(frozen=True)
class Case:
    """One comparison: a network, or a layer as a network of one, and the data to run it on.

    Its ``repr`` is one line of Python that makes it again.

    Args:
        network: what is built.
        batch: the number of samples.
        seed: what weights, inputs and output gradients are sampled with.
        exact: whether the data are small integers, on which float32 arithmetic has no rounding, so
            that every backend must give the same bits; otherwise the data are normal.
        dtype: the type to compute in: float32, float64, bfloat16 or float16.
        window: what part of its frame the input shows.
    """

    network: Network
    batch: int
    seed: int
    exact: bool = False
    dtype: str = "float32"
    window: Window | None = None

    def data(self) -> tuple[Weights, Array, Array]:
        """Weights, input ``(N, C, *S)`` and output gradient, all of them values of ``dtype``.

        A network's weights are those that it starts with. The arrays are float64 where ``dtype``
        is, and float32 otherwise.
        """
        rng, rounded = np.random.default_rng(self.seed), PRECISIONS[self.dtype].rounded
        *_, (_, _, output_shape) = self.network.shapes()

        def sample(shape: tuple[int, ...]) -> Array:
            return rounded(rng.integers(-4, 5, shape) if self.exact else rng.standard_normal(shape))

        if self.is_layer:
            shapes = self.network.weight_shapes()
            arrays = {name: sample(shape) for name, shape in shapes.items()}
        else:
            start = initial_weights(self.network, self.seed)
            arrays = {name: rounded(array) for name, array in start.items()}
        x, dy = (sample((self.batch, *s)) for s in (self.network.input_shape, output_shape))
        return Weights.of(self.network, arrays), x, dy

    @property
    def plain(self) -> Case:
        """The same case without coordinates."""
        layers = tuple(
            replace(layer, coords=None) if isinstance(layer, Conv) else layer
            for layer in self.network.layers
        )
        return replace(self, network=replace(self.network, layers=layers))

    @property
    def is_layer(self) -> bool:
        """Whether the network is a single layer."""
        return len(self.network.layers) == 1

    @property
    def kind(self) -> str:
        """What a report counts the case under, a layer's rank and padding or a network's name."""
        layer = self.network.layers[0]
        if not self.is_layer or not isinstance(layer, Conv):
            return self.network.name
        g = layer.geometry
        return f"{g.rank}-D {'transposed' if g.transposed else g.padding_mode}"


def generate(
    count: int, seed: int = 0, *, dtype: str = "float32", windows: bool = False
) -> list[Case]:
    """Sample layers of every rank, transposed or not, half of them exact; then the networks.

    Args:
        count: the number of layers; the networks come on top.
        seed: what the layers are sampled with.
        dtype: the type to compute in. In 16 bits no sum is exact: there all data are normal.
        windows: whether the layers' inputs show random parts of their frames.

    Raises:
        ValueError: there is no such ``dtype``.

    Example:
        >>> cases = generate(3, seed=1)
        >>> [case.exact for case in cases[:3]], [case.network.name for case in cases[3:]]
        ([True, False, True], ['plain_cnn', 'coord_cnn', 'coord_classifier'])
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}")
    rng, exact_too = random.Random(seed), not PRECISIONS[dtype].rounding
    cases = [sample_case(rng, i, exact_too and i % 2 == 0, dtype, windows) for i in range(count)]
    return cases + [Case(get(name), 2, seed, dtype=dtype) for name in ARTICLE_NETWORKS]


def sample_case(
    rng: random.Random, seed: int, exact: bool, dtype: str = "float32", windows: bool = False
) -> Case:
    """A layer with options sampled from ``rng``, and data from ``seed``."""
    while (network := _sample_layer(rng, exact, windows)) is None:
        pass
    batch = rng.randint(1, 3)
    window = _sample_window(rng, network, batch, exact) if windows else None
    return Case(network, batch, seed, exact, dtype, window)


def _sample_window(rng: random.Random, network: Network, batch: int, exact: bool) -> Window:
    """A part of a frame for each sample, or one for all; of exact cases at whole pixels."""
    (layer,) = network.layers
    assert isinstance(layer, Conv)
    assert layer.coords is not None
    _, *shape = network.input_shape
    starts, stops, frames = [], [], []
    for _ in range(rng.choice((1, batch))):
        for n in shape:
            frame = n * rng.choice((1, 2, 4)) + (layer.coords.align == "corners")
            start: float = rng.randint(0, frame - n)
            stop = start + n
            if not exact:
                start, stop = rng.uniform(-0.2, 0.6) * frame, rng.uniform(0.7, 1.2) * frame
            if rng.random() < 0.3:
                start, stop = stop, start
            starts.append(start)
            stops.append(stop)
            frames.append(frame)
    arrays = (np.reshape(each, (-1, len(shape))) for each in (starts, stops, frames))
    start_array, stop_array, frame_array = arrays
    return Window(start_array, stop_array, frame=frame_array)


def _sample_layer(rng: random.Random, exact: bool, windows: bool = False) -> Network | None:
    """A layer on its own, or None where the sampled options do not fit the sampled shape."""
    rank = rng.choice((1, 2, 2, 3))
    align: Any = rng.choice(("corners", "corners", "edges", "start"))
    tokens: list[Any] = [
        *axis_tokens(rank),
        *([] if exact else ["r", *fourier("x", frequencies=[2])]),
    ]
    coords = Coordinates(
        rng.sample(tokens, rng.randint(1, len(tokens))),
        align=align,
        outside=rng.choice(("zero", "zero", "extend")),
        r_center=rng.choice((0.0, 0.5)),
        **_sample_scale(rng, exact),
    )
    longest = {1: 33, 2: 20, 3: 9}[rank]
    # The ramp of a window is in shares of the input's length.
    exact_lengths = _POWERS if windows else _EXACT_LENGTHS[align]
    lengths = [n for n in (exact_lengths if exact else range(1, 34)) if n <= longest]
    shape = tuple(rng.choice(lengths) for _ in range(rank))
    transposed = rng.random() < 0.4
    groups = rng.choice((1, 1, 2, 4))
    channels = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
    options = _sample_transposed_options(rng, rank) if transposed else _sample_options(rng, rank)
    geometry = ConvGeometry(groups=groups, transposed=transposed, **options)
    layer = Conv("conv", *channels, geometry, coords, bias=rng.random() < 0.7)
    if geometry.padding_mode == "circular" and max(map(max, geometry.pads(shape))) > min(shape):
        return None  # torch wraps once and no more
    try:
        geometry.output_shape(shape)
    except ValueError:
        return None
    return Network("layer", (channels[0], *shape), (layer,))


def _sample_scale(rng: random.Random, exact: bool) -> dict[str, Any]:
    """Pixels, or a span with an aspect."""
    if rng.random() < 0.1:
        return {"units": "pixels"}
    by_axis = {"x": (0, 4), "y": (1, -1), "z": (0, 1)}
    span = rng.choice(((-1, 1), (-1, 1), (-1, 1), (0, 1), (0, 1), by_axis))
    aspects = ("each", "each", "longer", "diagonal")  # only a whole number of steps is exact
    return {"span": span, "aspect": "each" if exact else rng.choice(aspects)}


def _sample_options(rng: random.Random, rank: int) -> dict[str, Any]:
    each = partial(_each_axis, rng, rank)
    options: dict[str, Any] = {"stride": each(1, 3), "dilation": each(1, 2), "kernel": each(1, 4)}
    kind = rng.choice(("symmetric", "symmetric", "asymmetric", "same", "mode", "mode", "holes"))
    if kind == "symmetric":
        options["padding"] = each(0, 3)
    elif kind == "asymmetric":
        options["padding"] = tuple(zip(each(0, 3), each(0, 3), strict=True))
    elif kind == "same":
        options["padding"] = "same"
        options["stride"] = rng.choice((1, options["stride"]))
    elif kind == "mode":
        options["padding_mode"] = rng.choice(PADDING_MODES)
        k, d = rng.choice((1, 3, 5)), rng.randint(1, 2)
        # Half of these layers are padded by half the kernel, the only circular padding of Flax.
        half = (k - 1) // 2 * d
        options |= {"kernel": (k,) * rank, "dilation": d}
        options["padding"] = rng.choice((half, rng.randint(0, 4)))
    else:
        options["input_dilation"] = each(1, 2)
        options["padding"] = rng.randint(0, 2)
    return options


def _sample_transposed_options(rng: random.Random, rank: int) -> dict[str, Any]:
    each = partial(_each_axis, rng, rank)
    options: dict[str, Any] = {"stride": each(1, 3), "dilation": each(1, 2), "kernel": each(1, 4)}
    # Less than the stride, as Paddle demands: more would only add places that no tap reaches.
    extra = tuple(rng.randint(0, s - 1) for s in options["stride"])
    options["padding"] = each(0, 2)
    if rng.random() < 0.2:
        options["padding"] = tuple(zip(options["padding"], each(0, 2), strict=True))
    options["output_padding"] = rng.choice((0, extra))
    return options


def _each_axis(rng: random.Random, rank: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(rng.randint(least, most) for _ in range(rank))
