"""A layer of position alone, in every backend: against its definition, and what it shares.

The definition is ``x + weight . grid + bias`` in float64. It is what a pointwise CoordConv computes
whose kernel over the features is the identity, so that the bound is the bound of that.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import harness
import numpy as np
import pytest
from harness import FLAX, channels_first, channels_last, integers, normal

from coordconv import (
    Coordinates,
    Function,
    Given,
    Window,
    backends,
    coordinate_grid,
    fourier,
    window,
)
from coordconv.backends import BACKENDS
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.bounds import PRECISIONS, Expected, expected

N, C = 3, 4
SHAPES = {1: (7,), 2: (5, 8), 3: (3, 4, 6)}
EXACT = {1: (17,), 2: (9, 5), 3: (3, 5, 9)}  # all coordinates are multiples of a power of two
RANKS = pytest.mark.parametrize("rank", SHAPES)
BOTH = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
COORDS = {
    "axes": Coordinates("yx"),
    "radius": Coordinates("rxy", align="edges"),
    "scale": Coordinates("x", span=(0, 3), align="start", outside="extend"),
    "functions": Coordinates(
        ["x", Function("ridge", "yx", lambda y, x: y * y + x), *fourier("y", 2)]
    ),
    "map": Coordinates(["y", Given("mask", np.arange(40).reshape(SHAPES[2]) % 3)]),
}
WINDOWS = {
    "one": Window({"x": 0.25}, {"x": 0.75}),
    "each": Window({"x": [0.0, 0.5, 0.125], "y": 0.5}, {"x": [0.5, 1.0, 0.25], "y": 0.25}),
    "beyond": Window(-0.5, [[0.5], [1.0], [2.0]] * np.ones((1, 2))),
}


class Layers:
    """The layers of a backend as functions of NumPy's arrays, channels first."""

    def __init__(self, name: str) -> None:
        self.name, self.framework, self.load = name, harness.load(name), backends.load(name)

    def make(
        self, coords: Any = None, rank: int = 2, bias: bool = True, seed: int = 0, **given: Any
    ) -> Any:
        channels, name = given.pop("channels", C), self.name
        if name == "torch":
            self.framework.torch.manual_seed(seed)
            return getattr(self.load, f"PositionBias{rank}d")(channels, coords, bias=bias, **given)
        if name == "paddle":
            self.framework.paddle.seed(seed)
            bias = None if bias else False
            kind = getattr(self.load, f"PositionBias{rank}D")
            return kind(channels, coords, bias_attr=bias, **given)
        given |= {"rank": rank, "use_bias": bias}
        if name == "flax":
            rngs = self.framework.nnx.Rngs(seed)
            return self.load.PositionBias(channels, coords, rngs=rngs, **given)
        module = self.load.PositionBias(coords, **given)
        x = np.zeros((1, *SHAPES[rank], C), np.float32)
        variables = module.init(self.framework.jax.random.key(seed), x)
        return harness.LinenLayer(module, variables)

    def weights(self, layer: Any) -> dict[str, Any]:
        return self.framework.export_weights(layer)

    def set(self, layer: Any, arrays: Mapping[str, Any]) -> Any:
        self.framework.import_weights(layer, arrays)
        return layer

    def call(self, layer: Any, x: Any, w: Any = None) -> Any:
        if w is None:
            return self.framework.call(layer, x)
        with window(w):
            return self.framework.call(layer, x)

    def gradients(self, layer: Any, x: Any, dy: Any, w: Any = None) -> dict[str, Any]:
        """Of ``x`` and of the canonical weights."""
        with window(w):
            return getattr(self, f"_of_{self.name}")(layer, x, dy)

    def _of_torch(self, layer, x, dy):
        torch = self.framework.torch
        given = torch.tensor(x, requires_grad=True)
        layer(given).backward(torch.tensor(dy))
        found = {"x": given, **dict(layer.named_parameters())}
        return {name: tensor.grad.numpy() for name, tensor in found.items()}

    def _of_paddle(self, layer, x, dy):
        paddle = self.framework.paddle
        given = paddle.to_tensor(x, stop_gradient=False)
        layer(given).backward(paddle.to_tensor(dy))
        found = {"x": given, **dict(layer.named_parameters())}
        return {name: tensor.grad.numpy() for name, tensor in found.items()}

    def _of_flax(self, layer, x, dy):
        graph, state = self.framework.nnx.split(layer)

        def call(state: Any, x: Any) -> Any:
            return self.framework.nnx.merge(graph, state)(x)

        of_state, of_x = self._vjp(call, state, x, dy)
        return self._canonical(self.framework.nnx.to_pure_dict(of_state), of_x)

    def _of_linen(self, layer, x, dy):
        of_variables, of_x = self._vjp(layer.module.apply, layer.variables, x, dy)
        return self._canonical(of_variables["params"], of_x)

    def _vjp(self, call, state, x, dy):
        import jax

        _, pull = jax.vjp(call, state, channels_last(x))
        return pull(jax.numpy.asarray(channels_last(dy)))

    def _canonical(self, params, of_x):
        from coordconv.backends.jax.arrays import layer_arrays

        return {"x": channels_first(of_x), **layer_arrays(params, reverse=False)}


@pytest.fixture
def layers(backend: str) -> Layers:
    return Layers(backend)


def arrays(n: int, rank: int, bias: bool, draw: Any = normal) -> dict[str, Any]:
    found = {"weight": draw(C, n, *(1,) * rank, seed=1)}
    return found | ({"bias": draw(C, seed=2)} if bias else {})


def definition(weights, coords, x, w=None):
    grid = coordinate_grid(x.shape[2:], coords, dtype=np.float64, window=w)
    grid = grid[None] if w is None else grid
    weight = weights["weight"].astype(np.float64).reshape(weights["weight"].shape[:2])
    added = np.moveaxis(np.tensordot(grid, weight, axes=(1, 1)), -1, 1)
    bias = weights.get("bias", np.zeros(C)).astype(np.float64)
    return x.astype(np.float64) + added + bias.reshape(-1, *(1,) * (x.ndim - 2))


def bounded(weights, coords, x, dy=None, w=None, precision="float32") -> dict[str, Expected]:
    """What the CoordConv with the identity computes, held to the definition."""
    rank, n = x.ndim - 2, len(coords)
    ones = np.eye(C).reshape(C, C, *(1,) * rank)
    kernel = np.concatenate([ones, weights["weight"]], 1)
    bias = {"layer.bias": weights["bias"]} if "bias" in weights else {}
    conv = Conv("layer", C, C, ConvGeometry((1,) * rank), coords, bias=bool(bias))
    network = Network("layer", x.shape[1:], (conv,))
    with window(w):
        given = {"layer.weight": kernel, **bias}
        found = expected(network, given, x, dy, PRECISIONS[precision])
    wanted = definition(weights, coords, x, w)
    np.testing.assert_allclose(found["y"].value, wanted, rtol=0, atol=1e-12)
    renamed = {name.removeprefix("layer."): each for name, each in found.items()}
    if dy is not None:
        each = renamed["weight"]
        renamed["weight"] = Expected(each.value[:, -n:], each.bound[:, -n:])
    return renamed


# --- what it computes ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("coords", COORDS)
def test_output_and_gradients(layers, coords, bias):
    coords = COORDS[coords]
    layer, weights = layers.make(coords, bias=bias), arrays(len(coords), 2, bias)
    layers.set(layer, weights)
    x, dy = (normal(N, C, *SHAPES[2], seed=seed) for seed in (3, 4))
    wanted = bounded(weights, coords, x, dy)
    assert wanted["y"].error(layers.call(layer, x)) <= 1
    found = layers.gradients(layer, x, dy)
    assert {*found} == {*wanted} - {"y"}
    assert np.array_equal(found["x"], dy)
    for name, gradient in found.items():
        assert wanted[name].error(gradient) <= 1, name


@RANKS
@BOTH
@pytest.mark.parametrize("batch", [1, 3])
def test_exact_to_the_bit(layers, rank, bias, batch):
    coords = Coordinates("xyz"[:rank])
    layer, weights = layers.make(rank=rank, bias=bias), arrays(rank, rank, bias, integers)
    layers.set(layer, weights)
    x, dy = (integers(batch, C, *EXACT[rank], seed=seed) for seed in (3, 4))
    assert np.array_equal(layers.call(layer, x), definition(weights, coords, x))
    grid = coordinate_grid(EXACT[rank], coords, dtype=np.float64)
    summed = dy.sum(0).reshape(C, -1)  # over the batch and the positions
    wanted = {"x": dy, "weight": (summed @ grid.reshape(rank, -1).T).reshape(C, rank, *(1,) * rank)}
    wanted |= {"bias": summed.sum(1)} if bias else {}
    found = layers.gradients(layer, x, dy)
    assert {*found} == {*wanted}
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


@pytest.mark.parametrize("coords", ["axes", "radius", "scale", "functions"])
@pytest.mark.parametrize("w", WINDOWS)
def test_windows(layers, coords, w):
    coords, w = COORDS[coords], WINDOWS[w]
    layer, weights = layers.make(coords), arrays(len(coords), 2, True)
    layers.set(layer, weights)
    x, dy = (normal(N, C, *SHAPES[2], seed=seed) for seed in (3, 4))
    wanted = bounded(weights, coords, x, dy, w)
    assert wanted["y"].error(layers.call(layer, x, w)) <= 1
    for name, gradient in layers.gradients(layer, x, dy, w).items():
        assert wanted[name].error(gradient) <= 1, name
    assert not np.allclose(layers.call(layer, x, w), layers.call(layer, x))


def test_a_crop_has_the_coordinates_of_its_pixels(layers):
    layer, weights = layers.make("xyr"), arrays(3, 2, True)
    layers.set(layer, weights)
    x = normal(2, C, 9, 17)
    boxes = [[4, 2, 9, 7], [12, 4, 17, 9]]
    crops = np.stack([x[i, :, y0:y1, x0:x1] for i, (x0, y0, x1, y1) in enumerate(boxes)])
    w = Window.from_boxes(boxes, (9, 17))
    wanted = bounded(weights, Coordinates("xyr"), crops, w=w)["y"]
    whole = definition(weights, Coordinates("xyr"), x)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        np.testing.assert_allclose(wanted.value[i], whole[i, :, y0:y1, x0:x1], rtol=0, atol=1e-12)
    assert wanted.error(layers.call(layer, crops, w)) <= 1


def test_a_window_at_the_call(layers):
    layer, x, w = layers.make(), normal(N, C, *SHAPES[2]), WINDOWS["each"]
    wanted = layers.call(layer, x, w)
    if layers.name == "torch":
        found = layer(layers.framework.torch.tensor(x), window=w).detach().numpy()
    elif layers.name == "paddle":
        found = layer(layers.framework.paddle.to_tensor(x), window=w).numpy()
    elif layers.name == "flax":
        found = channels_first(layer(channels_last(x), window=w))
    else:
        found = channels_first(layer.module.apply(layer.variables, channels_last(x), window=w))
    assert np.array_equal(found, wanted)
    assert np.array_equal(layers.call(layer, x, Window()), layers.call(layer, x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("w", [None, "each"])
def test_other_types_round_once(layers, dtype, w):
    """Between what the ends of float32's bound are rounded to, since rounding keeps the order."""
    coords, w = Coordinates("xr"), w and WINDOWS[w]
    precision, shape = PRECISIONS[dtype], (N, C, 5, 300)  # in 16 bits neighbours would be the same
    weights = {name: precision.rounded(a) for name, a in arrays(2, 2, True).items()}
    x = precision.rounded(normal(*shape))
    found = in_type(layers, dtype, coords, weights, x, w)
    unrounded = "float64" if dtype == "float64" else "float32"
    wanted = bounded(weights, coords, x, w=w, precision=unrounded)
    y, bound = wanted["y"].value, wanted["y"].bound
    if dtype == "float64":
        assert wanted["y"].error(found) <= 1
        return
    assert (precision.rounded(y - bound) <= found).all()
    assert (found <= precision.rounded(y + bound)).all()


def in_type(layers, dtype, coords, weights, x, w):
    """The output of a layer of that type, as float64."""
    if layers.name == "torch":
        torch = layers.framework.torch
        layer = layers.set(layers.make(coords, dtype=getattr(torch, dtype)), weights)
        y = layer(torch.tensor(x).to(getattr(torch, dtype)), window=w)
        assert y.dtype == getattr(torch, dtype)
        return y.detach().double().numpy()
    if layers.name == "paddle":
        paddle = layers.framework.paddle
        layer = layers.set(layers.make(coords).to(dtype=dtype), weights)
        y = layer(paddle.to_tensor(x).astype(dtype), window=w)
        assert y.dtype == getattr(paddle, dtype)
        return y.astype("float64").numpy()
    import jax
    from jax import numpy as jnp

    with jax.enable_x64(dtype == "float64") if hasattr(jax, "enable_x64") else _x64(dtype):
        layer = layers.make(coords, param_dtype=getattr(jnp, dtype))
        layers.set(layer, weights)
        given = jnp.asarray(channels_last(x), getattr(jnp, dtype))
        with window(w):
            y = layer(given)
        assert y.dtype == getattr(jnp, dtype)
        return channels_first(y).astype(np.float64)


def _x64(dtype):
    from jax.experimental import enable_x64

    return enable_x64(dtype == "float64")


def test_no_coordinate_is_left_out_of_a_single_position(layers):
    layer = layers.set(layers.make("xr"), arrays(2, 2, True, integers))
    x = integers(1, C, 1, 1)
    assert np.array_equal(
        layers.call(layer, x), definition(layers.weights(layer), Coordinates("xr"), x)
    )


def test_calls_of_many_shapes(layers):
    layer, weights = layers.make(), arrays(2, 2, True, integers)
    layers.set(layer, weights)
    for shape in ((3, 5), (5, 3), (9, 17), (3, 5)):
        x = integers(2, C, *shape)
        assert np.array_equal(layers.call(layer, x), definition(weights, Coordinates("xy"), x))


# --- parameters ----------------------------------------------------------------------------------


@RANKS
@BOTH
def test_fan_in_draws_a_pointwise_convolution(layers, rank, bias):
    layer = layers.make("xr", rank, bias, seed=3)
    framework = layers.framework
    plain = framework.make_plain(ConvGeometry((1,) * rank), 2, C, bias=bias, seed=3)
    found, wanted = framework.parameters(layer), framework.parameters(plain)
    assert {*found} == {framework.kernel, "bias"} - ({"bias"} if not bias else set())
    assert {*found} == {*wanted}
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert found[framework.kernel].any()
    shapes = {name: array.shape for name, array in layers.weights(layer).items()}
    assert shapes == {"weight": (C, 2, *(1,) * rank)} | ({"bias": (C,)} if bias else {})


@RANKS
def test_zeros_starts_as_the_identity(layers, rank):
    layer = layers.make("xr", rank, coord_init="zeros")
    x = normal(N, C, *SHAPES[rank])
    assert not any(array.any() for array in layers.weights(layer).values())
    assert np.array_equal(layers.call(layer, x), x)
    assert layers.gradients(layer, x, np.ones_like(x))["weight"].any()  # and it learns


@pytest.mark.parametrize("other", BACKENDS)
@RANKS
def test_weights_of_another_framework(layers, other, rank):
    if BACKENDS[other].missing:
        pytest.skip(f"{other} is not installed")
    theirs, ours = Layers(other), layers.make("xr", rank, seed=2)
    source = theirs.set(theirs.make("xr", rank), arrays(2, rank, True))
    weights = theirs.weights(source)
    assert weights.coordinates == {"": Coordinates("xr")}
    layers.set(ours, weights)
    again = layers.weights(ours)
    assert all(np.array_equal(again[name], array) for name, array in weights.items())
    x = integers(2, C, *EXACT[rank])
    wanted = bounded(weights, Coordinates("xr"), x)["y"]
    assert wanted.error(layers.call(ours, x)) <= 1


def test_weights_for_the_coordinates_in_another_order(layers):
    source = layers.set(layers.make("xy"), arrays(2, 2, True, integers))
    layer, x = layers.set(layers.make("yx"), layers.weights(source)), integers(2, C, 5, 9)
    assert np.array_equal(layers.call(layer, x), layers.call(source, x))
    assert not np.array_equal(layers.weights(layer)["weight"], layers.weights(source)["weight"])


def test_copies_compute_the_same(layers):
    layer, x = layers.make("xr"), normal(N, C, *SHAPES[2])
    twins = [copy.deepcopy(layer)]
    if layers.name not in ("linen", "paddle"):  # as their own layers in some releases
        twins.append(pickle.loads(pickle.dumps(layer)))
    for twin in twins:
        assert np.array_equal(layers.call(twin, x), layers.call(layer, x))
    assert "Coordinates('xr')" in repr(layer)


# --- what it refuses -----------------------------------------------------------------------------


@RANKS
def test_inputs_that_do_not_fit(layers, rank):
    layer, shape = layers.make("xr", rank), SHAPES[rank]
    wrong = {
        "must have 4 channels, got 5": (2, C + 1, *shape),
        "pass the features alone": (2, C + 2, *shape),
        "no empty axis": (2, C, *shape[:-1], 0),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            layers.call(layer, np.zeros(given, np.float32))
    run = layer if layers.name in FLAX else layers.framework.call  # Flax takes any batch axes
    given = (
        (np.zeros((C,) * rank),) if layers.name in FLAX else (layer, np.zeros((1, 1, C, *shape)))
    )
    with pytest.raises(ValueError, match="input must have shape"):
        run(*given)
    with pytest.raises(TypeError, match="input must be floating-point, got .*int32"):
        layers.call(layer, np.zeros((2, C, *shape), np.int32))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"coords": "xz"}, ValueError, "name axis 'z', which a 2-D grid does not have"),
        ({"coords": 4}, TypeError, "coords"),
        ({"coord_init": "ones"}, ValueError, "coord_init must be one of"),
        ({"channels": 0}, ValueError, "must be at least 1, got 0"),
        ({"channels": "xy"}, TypeError, "must be an int, got 'xy'"),
    ],
)
def test_arguments_that_do_not_fit(layers, given, error, message):
    if layers.name == "linen" and "channels" in given:
        pytest.skip("a Linen module takes its channels from the input")
    with pytest.raises(error, match=message):
        layers.make(**given)


def test_windows_that_do_not_fit(layers):
    layer, x = layers.make(), normal(N, C, *SHAPES[2])
    for w in (Window({"x": [0.0, 0.5]}, {"x": [0.5, 1.0]}), Window([0.0] * 3, [0.5] * 3)):
        with pytest.raises(ValueError, match="window"):
            layers.call(layer, x, w)
    with pytest.raises(ValueError, match="'mask' is given for one size, and has no window"):
        layers.call(layers.make(COORDS["map"]), x, WINDOWS["one"])


def test_a_given_map_has_one_size(layers):
    with pytest.raises(ValueError, match="a given map has one size"):
        layers.call(layers.make(COORDS["map"]), normal(N, C, 5, 7))


def test_weights_that_do_not_fit(layers):
    layer = layers.make("xr")
    before = {name: array.copy() for name, array in layers.weights(layer).items()}
    with pytest.raises(ValueError, match=r"missing: bias") as caught:
        layers.set(layer, {"weight": np.zeros((C, 5, 1, 1), np.float32)})
    assert "weight is (4, 5, 1, 1), want (4, 2, 1, 1)" in str(caught.value)
    assert "features" not in str(caught.value)
    others = layers.weights(layers.make(Coordinates("xr", align="edges")))
    with pytest.raises(ValueError, match="other coordinates: weight was made for"):
        layers.set(layer, others)
    assert all(np.array_equal(layers.weights(layer)[name], a) for name, a in before.items())


def test_coordinates_are_those_of_the_construction(layers):
    layer = layers.make("xr")
    module = getattr(layer, "module", layer)
    with pytest.raises(AttributeError, match="fixed at construction"):
        module.coords = Coordinates("yr")
    assert module.coords == Coordinates("xr")


# --- compiled and exported -----------------------------------------------------------------------


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    def made(self, coords="xr", rank=2, **given):
        layers = Layers("torch")
        layer = layers.make(coords, rank, **given)
        return layers.set(layer, arrays(2, rank, True, integers)) if coords == "yx" else layer

    @RANKS
    def test_an_input_without_a_batch(self, torch, rank):
        layer, x = self.made(rank=rank), torch.randn(2, C, *SHAPES[rank])
        assert torch.equal(layer(x[0]), layer(x)[0])
        w = Window({"x": 0.5}, {"x": 1.0})
        assert torch.equal(layer(x[0], window=w), layer(x, window=w)[0])

    def test_an_input_is_left_as_it_is(self, torch):
        layer, x = self.made(), torch.randn(1, C, 5, 8)
        before = x.clone()
        with torch.no_grad():
            layer(x)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("coords", ["yx", "functions"])
    def test_compiled_at_open_sizes(self, torch, coords):
        layer = self.made(COORDS.get(coords, coords))
        torch._dynamo.reset()
        dynamic = True if coords == "yx" else None
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for shape in ((2, C, 5, 9), (3, C, 9, 3), (C, 17, 5)):
            x = torch.randint(-4, 5, shape).float()
            if coords == "yx":
                assert torch.equal(compiled(x), layer(x))
            else:
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)

    def test_compiled_once_for_all_windows(self, torch):
        if not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("the compiler of this torch does not see what a thread has, and says so")
        layer, graphs = self.made("yx"), []
        torch._dynamo.reset()

        def counted(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(lambda x, w: layer(x, window=w), backend=counted, fullgraph=True)
        x = torch.randn(2, C, 5, 9)
        for start, stop in (([0.0, 0.5], [0.5, 1.0]), ([0.25, 0.5], [0.75, 0.75])):
            w = Window({"x": torch.tensor(start)}, {"x": torch.tensor(stop)})
            torch.testing.assert_close(compiled(x, w), layer(x, window=w))
        assert len(graphs) == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_at_open_sizes(self, torch, strict):
        layer, dims = self.made("yx"), {i: torch.export.Dim(f"n{i}") for i in (0, 2, 3)}
        program = torch.export.export(
            layer, (torch.randn(2, C, 5, 9),), dynamic_shapes=(dims,), strict=strict
        )
        for shape in ((1, C, 5, 9), (3, C, 9, 17)):
            x = torch.randint(-4, 5, shape).float()
            assert torch.equal(program.module()(x), layer(x))

    @pytest.mark.parametrize("tracer", ["jit", "fx"])
    def test_traced(self, torch, tracer):
        layer, x = self.made("yx"), torch.randint(-4, 5, (2, C, 5, 9)).float()
        if tracer == "jit":
            traced = torch.jit.trace(layer, (x,))
        elif not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("this torch.fx traces no range of unknown length")
        else:
            traced = torch.fx.symbolic_trace(layer)
        for each in (x, torch.randint(-4, 5, (3, C, 9, 3)).float()):
            assert torch.equal(traced(each), layer(each))

    def test_a_state_has_its_coordinates(self, torch):
        layer, other = self.made("yx"), self.made("xy")
        other.load_state_dict(layer.state_dict())
        x = torch.randint(-4, 5, (2, C, 5, 9)).float()
        assert torch.equal(other(x), layer(x))
        with pytest.raises(RuntimeError, match="weight was made for"):
            self.made("xr").load_state_dict(layer.state_dict())

    def test_autocast(self, torch):
        layer, x = self.made("yx"), torch.randint(-4, 5, (2, C, 5, 9)).float()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer(x.double()).float())
            assert layer(x.bfloat16()).dtype == torch.bfloat16

    def test_made_on_no_device_and_drawn_later(self, torch):
        for init in ("fan_in", "zeros"):
            layer = self.made(device="meta", coord_init=init).to_empty(device="cpu")
            torch.manual_seed(0)
            layer.reset_parameters()
            torch.manual_seed(0)
            wanted = self.made(coord_init=init)
            assert torch.equal(layer.weight, wanted.weight)
            assert torch.equal(layer.bias, wanted.bias)

    def test_transformations(self, torch):
        layer, x = self.made("yx"), torch.randint(-4, 5, (3, 2, C, 5, 9)).float()
        wanted = torch.stack([layer(each) for each in x])
        assert torch.equal(torch.vmap(layer)(x), wanted)
        assert torch.autograd.gradgradcheck(
            self.made("yx", dtype=torch.float64), torch.randn(1, C, 2, 3).double().requires_grad_()
        )

    def test_complex(self, torch):
        layer = self.made("yx", dtype=torch.complex64)
        x = torch.randn(2, C, 3, 5, dtype=torch.complex64)
        real = self.made("yx")
        torch.testing.assert_close(layer(x).real, real(x.real))
        with pytest.raises(TypeError, match="complex"):
            layer(x.real)


class TestPaddle:
    @pytest.fixture
    def paddle(self):
        return pytest.importorskip("paddle")

    @RANKS
    def test_channels_last(self, paddle, rank):
        layers = Layers("paddle")
        weights, x = arrays(2, rank, True, integers), integers(2, C, *EXACT[rank])
        data_format = {1: "NLC", 2: "NHWC", 3: "NDHWC"}[rank]
        layer = layers.set(layers.make("xr", rank, data_format=data_format), weights)
        first = layers.set(layers.make("xr", rank), weights)
        for w in (None, Window({"x": [0, 0.5]}, {"x": [0.5, 1]})):
            found = layers.call(layer, channels_last(x), w)
            np.testing.assert_allclose(channels_first(found), layers.call(first, x, w), rtol=1e-6)
        with pytest.raises(ValueError, match="must have 4 channels"):
            layers.call(layer, np.zeros((2, C, *(3,) * rank), np.float32))

    def test_data_format_of_another_rank(self, paddle):
        with pytest.raises(ValueError, match="data_format must be one of"):
            Layers("paddle").make(data_format="NLC")

    @pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
    def test_programs_at_open_sizes(self, paddle, data_format, tmp_path):
        layers, last = Layers("paddle"), data_format == "NHWC"
        layer = layers.make("yx", data_format=data_format)
        layers.set(layer, arrays(2, 2, True, integers))
        spec = [None, None, None, C] if last else [None, C, None, None]
        spec = [paddle.static.InputSpec(spec, "float32")]
        inputs = [integers(2, C, 5, 9), integers(3, C, 9, 3)]
        inputs = [paddle.to_tensor(channels_last(x) if last else x) for x in inputs]
        wanted = [layer(x).numpy() for x in inputs]
        paddle.jit.save(layer, str(tmp_path / "net"), input_spec=spec)
        loaded = paddle.jit.load(str(tmp_path / "net"))
        static = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
        for x, y in zip(inputs, wanted, strict=True):
            assert np.array_equal(static(x).numpy(), y)
            assert np.array_equal(loaded(x).numpy(), y)
        files = [str(tmp_path / f"net.{end}") for end in ("json", "pdiparams")]
        config = paddle.inference.Config(*files)
        config.disable_glog_info()
        predictor = paddle.inference.create_predictor(config)
        for x, y in zip(inputs, wanted, strict=True):
            (found,) = predictor.run([x])
            assert np.array_equal(found.numpy(), y)

    def test_an_input_is_left_as_it_is(self, paddle):
        layer, x = Layers("paddle").make(), paddle.randn([2, C, 5, 8])
        before = x.numpy()
        with paddle.no_grad():
            layer(x)
        assert np.array_equal(x.numpy(), before)

    def test_an_empty_batch(self, paddle):
        assert list(Layers("paddle").make()(paddle.zeros([0, C, 5, 8])).shape) == [0, C, 5, 8]

    def test_parameters_that_are_made_later(self, paddle):
        with paddle.LazyGuard():
            layer = Layers("paddle").make(coord_init="zeros")
        for parameter in layer.parameters():
            parameter.initialize()
        x = paddle.randn([2, C, 5, 8])
        assert np.array_equal(layer(x).numpy(), x.numpy())

    def test_attributes(self, paddle):
        constant = paddle.nn.initializer.Constant
        load = backends.load("paddle")
        layer = load.PositionBias2D(C, weight_attr=constant(2.0), bias_attr=constant(3.0))
        assert (layer.weight.numpy() == 2).all()
        assert (layer.bias.numpy() == 3).all()
        attr = paddle.ParamAttr(initializer=constant(2.0), trainable=False)
        layer = load.PositionBias2D(C, coord_init="zeros", weight_attr=attr, bias_attr=False)
        assert not layer.weight.numpy().any()
        assert layer.weight.stop_gradient
        assert layer.bias is None

    def test_second_derivatives(self, paddle):
        layer = Layers("paddle").make("yx")
        x = paddle.to_tensor(integers(2, C, 3, 5), stop_gradient=False)
        (gradient,) = paddle.grad((layer(x) ** 3).sum(), [layer.weight], create_graph=True)
        (again,) = paddle.grad(gradient.sum(), [x])
        grid = coordinate_grid((3, 5), "yx").sum(0)
        np.testing.assert_allclose(again.numpy(), 6 * layer(x).numpy() * grid, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLAX)
class TestJax:
    @pytest.fixture
    def made(self, name):
        pytest.importorskip("flax")
        layers = Layers(name)
        return layers.set(layers.make("yx"), arrays(2, 2, True, integers))

    @pytest.mark.parametrize("w", [None, Window({"x": 0.5}, {"x": 1.0})], ids=["", "window"])
    def test_any_batch_axes(self, made, w):
        x = channels_last(integers(6, C, 5, 9))
        more = (2, 3, *x.shape[1:])
        with window(w):
            wanted = np.asarray(made(x))
            assert np.array_equal(made(x[0]), wanted[0])
            assert np.array_equal(made(x.reshape(more)), wanted.reshape(more))

    def test_jit(self, made, name):
        import jax
        from flax import nnx

        x = channels_last(integers(2, C, 5, 9))
        if name == "flax":
            run = nnx.jit(lambda layer, x, w: layer(x, window=w))
            call = lambda x, w: run(made, x, w)  # noqa: E731
        else:
            apply = jax.jit(lambda variables, x, w: made.module.apply(variables, x, window=w))
            call = lambda x, w: apply(made.variables, x, w)  # noqa: E731
        assert np.array_equal(call(x, None), made(x))
        w = Window({"x": np.array([0.0, 0.5])}, {"x": np.array([0.5, 1.0])})
        with window(w):
            wanted = made(x)
        np.testing.assert_allclose(call(x, w), wanted, rtol=1e-6, atol=1e-6)

    def test_exported_at_open_sizes(self, made, name):
        import jax

        shape = jax.export.symbolic_shape(f"n, h, w, {C}")
        given = jax.ShapeDtypeStruct(shape, np.float32)
        program = jax.export.export(jax.jit(lambda x: made(x)))(given)
        for size in ((5, 9), (9, 17)):
            x = channels_last(integers(3, C, *size))
            assert np.array_equal(program.call(x), made(x))

    def test_strict_promotion(self, made):
        import jax

        x = channels_last(integers(2, C, 5, 9))
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            made(jax.numpy.asarray(x))
            with window(Window({"x": np.float32([0, 0.5])}, {"x": np.float32([0.5, 1])})):
                made(jax.numpy.asarray(x))

    def test_type_of_the_computation(self, name):
        pytest.importorskip("flax")
        from jax import numpy as jnp

        layers = Layers(name)
        layer = layers.make(dtype=jnp.bfloat16)
        assert layer(channels_last(normal(2, C, 5, 9))).dtype == jnp.bfloat16
        assert layers.weights(layer)["weight"].dtype == np.float32
