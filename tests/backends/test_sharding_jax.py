"""JAX arrays that are split over four devices: by rows of the image, and by samples."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import harness
import sharding
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sharding import KINDS, ROWS, Cases, Lacking, hold

from coordconv import Coordinates, Window, position_bias
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv

try:
    from jax import shard_map
except ImportError:  # before 0.6.1
    from jax.experimental.shard_map import shard_map

case = Cases()
COUNT, WIDTH = 4, 16
SPLIT, BY_SAMPLE = PartitionSpec(None, "parts"), PartitionSpec("parts")
_COLLECTIVES = re.compile(
    r"= (\S+|\(.*?\)) "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


@pytest.fixture(scope="module")
def results():
    return sharding.run(
        __file__,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={COUNT}",
        JAX_PLATFORMS="cpu",
    )


@pytest.mark.parametrize("name", case)
def test_on_four_devices(results, name):
    sharding.check(results, name)


class Layer:
    """A layer of either kind of Flax as a function of its parameters."""

    def __init__(self, backend: str, conv: Any, arrays: Any, padding: Any = None) -> None:
        frame = harness.load(backend)
        geometry = replace(conv.geometry, padding=padding or conv.geometry.padding)
        given = geometry, conv.in_channels, conv.out_channels
        made = frame.make(*given, coords=conv.coords) if conv.coords else frame.make_plain(*given)
        if arrays is not None:
            frame.import_weights(made, arrays)
        self.linen = made.module if backend == "linen" else None
        if self.linen is None:
            self.graph, self.params = nnx.split(made)
        else:
            self.params = made.variables

    def __call__(self, params: Any, x: Any, **given: Any) -> Any:
        if self.linen is None:
            return nnx.merge(self.graph, params)(x, **given)
        return self.linen.apply(params, x, **given)

    def exported(self, params: Any) -> dict[str, Any]:
        if self.linen is None:
            return dict(nnx.merge(self.graph, params).export_weights())
        return dict(self.linen.export_weights(params))


def mesh() -> Any:
    return Mesh(np.array(jax.devices()), ("parts",))


def placed(x: Any, spec: Any) -> Any:
    return jax.device_put(x, NamedSharding(mesh(), spec))


def layers(backend: str, network: Any, weights: Any, rows: Any = None) -> list[Layer]:
    """The two convolutions, maybe with another padding of the rows."""
    padding = rows and (rows, (1, 1))
    return [
        Layer(backend, conv, {n: weights[f"{conv.name}.{n}"] for n in ("weight", "bias")}, padding)
        for conv in (network.layers[0], network.layers[2])
    ]


def value_and_gradients(forward: Any, params: Any, x: Any, dy: Any) -> Any:
    """A jitted function's output, and the gradients for that of the output."""

    def loss(params: Any, x: Any) -> Any:
        y = forward(params, x)
        return (y * dy).sum(), y

    (_, y), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, found


def arrays_of(made: list[Layer], y: Any, found: Any) -> dict[str, Any]:
    """Output and gradients by their canonical names."""
    arrays = {"y": harness.channels_first(y), "x": harness.channels_first(found[1])}
    for name, layer, params in zip(("first", "second"), made, found[0], strict=True):
        arrays |= {f"{name}.{own}": a for own, a in layer.exported(params).items()}
    return arrays


def both(made: list[Layer], params: Any, x: Any, **given: Any) -> Any:
    x = jax.nn.relu(made[0](params[0], x, **given))
    return made[1](params[1], x, **given)


def with_halo(x: Any, before: int, after: int) -> Any:
    """The rows of a part with some of its neighbours' around them, zeros beyond the frame."""
    down, up = [(i, i + 1) for i in range(COUNT - 1)], [(i + 1, i) for i in range(COUNT - 1)]
    rows = [lax.ppermute(x[:, -before:], "parts", down), x]
    return jnp.concatenate(rows + [lax.ppermute(x[:, :after], "parts", up)] * bool(after), 1)


def of_part(made: list[Layer], seen: bool, params: Any, x: Any) -> Any:
    """What a device computes of its rows; the first layer has stride 2, and needs one row above."""
    for layer, param, after in zip(made, params, (0, 1), strict=True):
        w = Window.of_shard(lax.axis_index("parts"), COUNT, "y").widened(1, after, "y", x.shape[1])
        x = layer(param, with_halo(x, 1, after), **({"window": w} if seen else {}))
        x = jax.nn.relu(x) if layer is made[0] else x
    return x


def in_parts(function: Any) -> Any:
    specs = {"in_specs": (PartitionSpec(), SPLIT), "out_specs": SPLIT}
    return shard_map(function, mesh=mesh(), **specs)


@case
def rows_in_shard_map() -> dict[str, float]:
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        want = sharding.wanted(network, weights, x, dy)
        x, dy = (placed(harness.channels_last(a), SPLIT) for a in (x, dy))
        for backend in harness.FLAX:
            made = layers(backend, network, weights, rows=(0, 0))
            params = [layer.params for layer in made]
            found = value_and_gradients(in_parts(partial(of_part, made, True)), params, x, dy)
            off = hold(kind, want, arrays_of(made, *found))
            largest |= {f"{backend} {name}": error for name, error in off.items()}
            blind, _ = value_and_gradients(in_parts(partial(of_part, made, False)), params, x, dy)
            error = want["y"].error(harness.channels_first(blind))
            assert error > 100, f"without a window the parts are not told apart: {error}"
    return largest


@case
def rows_in_shard_map_with_zeros_outside() -> dict[str, float]:
    """Beyond the frame the coordinates are 0 as the features are: the parts at its ends differ."""
    if not hasattr(jax, "shard_map"):
        raise Lacking(
            f"JAX {jax.__version__} sums gradients over the devices inside of a branch of "
            "lax.switch, and waits there forever; jax.shard_map, new in 0.6.1, does not"
        )
    network = sharding.network("xy", outside="zero", align="edges")
    network = replace(network, input_shape=(4, ROWS, 8), layers=network.layers[2:])
    weights, x, dy = sharding.data(network, harness.integers)
    want = sharding.wanted(network, weights, x, dy)
    x, dy = (placed(harness.channels_last(a), SPLIT) for a in (x, dy))
    largest = {}
    for backend in harness.FLAX:
        arrays = {n: weights[f"second.{n}"] for n in ("weight", "bias")}
        layer = Layer(backend, network.layers[0], arrays)

        def part(layer: Layer, params: Any, x: Any) -> Any:
            index, n = lax.axis_index("parts"), x.shape[1]
            wide = with_halo(x, 1, 1)

            def rows(top: int, bottom: int) -> Any:
                w = Window.of_shard(index, COUNT, "y").widened(top, bottom, "y", n)
                y = layer(params, wide[:, 1 - top : 1 + n + bottom], window=w)
                return y[:, top : top + n]

            at = jnp.where(index == 0, 0, jnp.where(index == COUNT - 1, 2, 1))
            cases = (0, 1), (1, 1), (1, 0)
            return lax.switch(at, [partial(rows, *each) for each in cases])

        y, found = value_and_gradients(in_parts(partial(part, layer)), layer.params, x, dy)
        arrays = {"y": harness.channels_first(y), "x": harness.channels_first(found[1])}
        arrays |= {f"second.{n}": a for n, a in layer.exported(found[0]).items()}
        off = hold("exact", want, arrays)
        largest |= {f"{backend} {name}": error for name, error in off.items()}
    return largest


def split_by_jit(spec: Any) -> dict[str, float]:
    """Both layers under jit, of inputs that are split; the layers know nothing of it."""
    largest: dict[str, float] = {}
    for kind, (network, make) in KINDS.items():
        weights, x, dy = sharding.data(network, make)
        want = sharding.wanted(network, weights, x, dy)
        x, dy = (placed(harness.channels_last(a), spec) for a in (x, dy))
        for backend in harness.FLAX:
            made = layers(backend, network, weights)
            params = [layer.params for layer in made]
            y, found = value_and_gradients(partial(both, made), params, x, dy)
            for array in (y, found[1]):
                assert array.sharding.is_equivalent_to(NamedSharding(mesh(), spec), 4), array
            off = hold(kind, want, arrays_of(made, y, found))
            largest |= {f"{backend} {name}": error for name, error in off.items()}
    return largest


@case
def rows_in_jit() -> dict[str, float]:
    return split_by_jit(SPLIT)


@case
def samples_in_jit() -> dict[str, float]:
    return split_by_jit(BY_SAMPLE)


@case
def samples_with_a_window_each() -> dict[str, float]:
    network, make = KINDS["exact"]
    weights, x, dy = sharding.data(network, make)
    boxes = np.array([[0, 0, 8, 16], [8, 16, 16, 32], [3, 8, 11, 24], [8, 0, 0, 16]], np.float32)
    largest = {}
    for backend in harness.FLAX:
        made = layers(backend, network, weights)
        params = [layer.params for layer in made]

        def loss(made: Any, dy: Any, params: Any, x: Any, w: Any) -> Any:
            y = both(made, params, x, window=w)
            return (y * dy).sum(), y

        found = []
        for place in (jnp.asarray, partial(placed, spec=BY_SAMPLE)):
            arrays = [place(harness.channels_last(a)) for a in (x, dy)]
            w = Window.from_boxes(place(boxes), (32, 16))
            step = jax.jit(jax.value_and_grad(partial(loss, made, arrays[1]), (0, 1), has_aux=True))
            (_, y), gradients = step(params, arrays[0], w)
            found.append(arrays_of(made, y, gradients))
        for name, one in found[0].items():
            assert np.array_equal(one, found[1][name]), (backend, name)
            largest[f"{backend} {name}"] = 0.0
    return largest


def collectives(
    layer: Layer, channels: int, spec: Any, gradients: bool, w: Any = None
) -> Counter[Any]:
    """What the compiled layer, or its gradients, exchange between devices: kinds and sizes."""
    x = placed(jnp.ones((4, ROWS, WIDTH, channels)), spec)
    given = {} if w is None else {"window": w}

    def loss(params: Any, x: Any) -> Any:
        return (layer(params, x, **given) ** 2).sum()

    function = jax.grad(loss, (0, 1)) if gradients else partial(layer, **given)
    out = None if gradients else NamedSharding(mesh(), spec)
    params = jax.device_put(layer.params, NamedSharding(mesh(), PartitionSpec()))
    compiled = jax.jit(function, out_shardings=out).lower(params, x).compile().as_text()
    return Counter((kind, elements(shapes)) for shapes, kind in _COLLECTIVES.findall(compiled))


def elements(shapes: str) -> int:
    """The elements of one array or of several, as XLA writes their shapes."""
    found = re.findall(r"\[([\d,]*)\]", shapes)
    return sum(math.prod(int(n) for n in each.split(",") if n) for each in found)


def total(found: Counter[Any], kind: str) -> int:
    """How many elements are exchanged; the compiler may join exchanges of one kind."""
    return sum(size * count for (each, size), count in found.items() if each == kind)


@case
def what_is_exchanged() -> dict[str, float]:
    """As much as by the plain convolution over as many channels, and by a map's a little more.

    A map of the radius or of a window is a convolution of a grid, of which a device then needs the
    rows beside its own, too: they have no samples and no features. Of a window, the coordinates of
    an axis may be gathered. The gradient of a map is summed over the devices as a map.
    """
    out, geometry = 8, ConvGeometry((3, 3), padding=1)
    crop, most = Window({"y": 0.25}, {"y": 0.5}), Counter[str]()
    for (split, spec), back in product({"rows": SPLIT, "samples": BY_SAMPLE}.items(), (0, 1)):
        plain = {
            n: collectives(
                Layer("flax", Conv("plain", 2 + n, out, geometry), None), 2 + n, spec, back
            )
            for n in (0, 2, 3)
        }
        kinds = {"rows": {"collective-permute"}, "samples": set()}[split]
        assert {kind for kind, _ in plain[0]} == kinds | ({"all-reduce"} if back else set())
        for coords, way, w in product(("xy", "xyr"), ("append", "map"), (None, crop)):
            n, what = len(coords), (split, back, coords, way, w)
            conv = Conv("ours", 2, out, geometry, Coordinates(coords))
            position_bias.FORCED = way
            found = collectives(Layer("flax", conv, None), 2, spec, back, w)
            position_bias.FORCED = None
            least = plain[n if way == "append" else 0]
            spare = Counter[str]()
            if split == "rows" and way == "map" and (w or "r" in coords):
                rows = 8 if back else 4
                spare["collective-permute"] = rows * 2 * n * n * (WIDTH + 2)
            if split == "rows" and w:
                spare["all-gather"] = 8 * COUNT * math.ceil((ROWS + 2) / COUNT)
            if back and way == "map" and not hasattr(jax, "shard_map"):
                spare["all-gather"] += 4 * ROWS * WIDTH * out  # JAX 0.6 gathers the gradient, too
            if back and way == "map":
                kernel, bias = geometry.taps * (2 + n) * out, out
                spare["all-reduce"] = kernel + bias + ROWS * WIDTH * out
            for kind in {kind for kind, _ in found}:
                more = total(found, kind) - total(least, kind)
                assert more <= spare[kind], (what, found, least)
                most[f"{kind} of {way}"] = max(most[f"{kind} of {way}"], more)
    return most


if __name__ == "__main__":
    sharding.main(case)
