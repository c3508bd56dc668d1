"""The cases that backends are compared on: plain data, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_up
from itertools import islice
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates
from coordconv.geometry import PADDING_MODES, ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Network, initial_weights
from coordconv.weights import Weights

ARTICLE_NETWORKS = ("plain_cnn", "coord_cnn", "coord_classifier")

# Axis lengths on which every coordinate of span (-1, 1) or (0, 1) is a small multiple of a power
# of two, so that float32 sums of integers times coordinates have no rounding in any order.
_EXACT_LENGTHS = {"corners": (2, 3, 5, 9, 17, 33), "edges": (2, 4, 8, 16, 32)}


@dataclass(frozen=True)
class Case:
    """One comparison: a network, or a layer as a network of one, and the data to run it on.

    Its ``repr`` is one line of Python that makes it again.

    Args:
        network: what is built.
        batch: the number of samples.
        seed: what weights, inputs and output gradients are drawn with.
        exact: draw small integers, on which float32 arithmetic has no rounding, so that every
            backend must give the same bits (DESIGN: exact arithmetic); otherwise normal data.
    """

    network: Network
    batch: int
    seed: int
    exact: bool = False

    def draw(self) -> tuple[Weights, Array, Array]:
        """Weights, input ``(N, C, *S)`` and output gradient, in float32."""
        rng = np.random.default_rng(self.seed)
        *_, (_, _, output_shape) = self.network.shapes()

        def array(shape: tuple[int, ...]) -> Array:
            if self.exact:
                return rng.integers(-4, 5, shape).astype(np.float32)
            return rng.standard_normal(shape, dtype=np.float32)

        if self.is_layer:
            shapes = self.network.weight_shapes()
            weights = Weights(
                {name: array(shape) for name, shape in shapes.items()}, self.network.coordinates()
            )
        else:
            weights = initial_weights(self.network, self.seed)
        return (
            weights,
            array((self.batch, *self.network.input_shape)),
            array((self.batch, *output_shape)),
        )

    @property
    def is_layer(self) -> bool:
        """Whether this is a single layer rather than a network."""
        return len(self.network.layers) == 1


def generate(count: int, seed: int = 0) -> list[Case]:
    """Draw 2-D layers, half of them exact, and after them the article's networks.

    Args:
        count: the number of layers.
        seed: what they are drawn with.

    Example:
        >>> case = generate(3, seed=1)[0]
        >>> case.exact, case.network.layers[0].geometry.rank
        (True, 2)
    """
    from coordconv.networks import get

    layers = islice(_layers(random.Random(seed)), count)
    cases = [Case(network, batch, i, exact) for i, (network, batch, exact) in enumerate(layers)]
    return cases + [Case(get(name), 2, seed) for name in ARTICLE_NETWORKS]


def _layers(rng: random.Random) -> Iterator[tuple[Network, int, bool]]:
    for i in count_up():
        exact = i % 2 == 0
        while (network := _layer(rng, exact)) is None:
            pass
        yield network, rng.randint(1, 3), exact


def _layer(rng: random.Random, exact: bool) -> Network | None:
    """A layer on its own, or None where the options drawn do not fit the shape drawn."""
    align: Any = rng.choice(("corners", "corners", "edges"))
    coords = Coordinates(
        "".join(rng.sample("xy" if exact else "xyr", rng.choice((1, 2) if exact else (1, 2, 3)))),
        span=rng.choice(((-1, 1), (-1, 1), (0, 1))),
        align=align,
        outside=rng.choice(("zero", "zero", "extend")),
        r_center=rng.choice((0.0, 0.5)),
    )
    lengths = _EXACT_LENGTHS[align] if exact else tuple(range(1, 20))
    shape = (rng.choice(lengths), rng.choice(lengths))
    groups = rng.choice((1, 1, 2, 4))
    channels = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
    geometry = ConvGeometry(groups=groups, **_options(rng))
    layer = Conv("conv", *channels, geometry, coords, bias=rng.random() < 0.7)
    if geometry.padding_mode == "circular" and max(map(max, geometry.pads(shape))) > min(shape):
        return None  # torch wraps once and no more
    try:
        geometry.output_shape(shape)
    except ValueError:
        return None
    return Network("layer", (channels[0], *shape), (layer,))


def _options(rng: random.Random) -> dict[str, Any]:
    def pair(high: int) -> tuple[int, int]:
        return rng.randint(1, high), rng.randint(1, high)

    options: dict[str, Any] = {"stride": pair(3), "dilation": pair(2), "kernel": pair(4)}
    kind = rng.choice(("symmetric", "symmetric", "asymmetric", "same", "mode", "mode", "holes"))
    if kind == "symmetric":
        options["padding"] = (rng.randint(0, 3), rng.randint(0, 3))
    elif kind == "asymmetric":
        options["padding"] = tuple((rng.randint(0, 3), rng.randint(0, 3)) for _ in range(2))
    elif kind == "same":
        options["padding"] = "same"
        options["stride"] = rng.choice(((1, 1), options["stride"]))
    elif kind == "mode":
        options["padding_mode"] = rng.choice(PADDING_MODES)
        k, d = rng.choice((1, 3, 5)), rng.randint(1, 2)
        # half of them padded as Flax pads, by half the kernel: it has no other circular padding
        half = (k - 1) // 2 * d
        options |= {"kernel": (k, k), "dilation": (d, d)}
        options["padding"] = rng.choice((half, rng.randint(0, 4)))
    else:
        options["input_dilation"] = pair(2)
        options["padding"] = rng.randint(0, 2)
    return options
