"""What the layers of every backend do alike, and do as their framework's own convolution does."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import harness
import numpy as np
import pytest
from harness import FLAX, WAYS, Framework, integers, normal

from coordconv import (
    Coordinates,
    backends,
    coordinate_grid,
    load_weights,
    position_bias,
    save_weights,
)
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity import Case, check_layers, generate
from coordconv.parity.bounds import COORDINATE_ROUNDINGS, PRECISIONS, expected
from coordconv.weights import Weights, join_kernel, split_kernel

KINDS = [(rank, transposed) for transposed in (False, True) for rank in (1, 2, 3)]


@pytest.fixture
def framework(backend: str) -> Framework:
    return harness.load(backend)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-D{' transposed' * kind[1]}")
def geometry(request: pytest.FixtureRequest) -> ConvGeometry:
    """A small convolution of each rank, plain and transposed."""
    rank, transposed = request.param
    return ConvGeometry((3,) * rank, transposed=transposed)


def x_for(geometry: ConvGeometry, channels: int = 4, make: Any = normal) -> Any:
    """A batch with axes of different lengths."""
    return make(2, channels, *(5, 4, 6)[: geometry.rank])


def equal(found: Any, wanted: Any) -> bool:
    """Whether arrays by name are the same to the last bit."""
    return found.keys() == wanted.keys() and all(
        np.array_equal(found[name], wanted[name]) for name in wanted
    )


def lacking(backend: str, geometry: ConvGeometry) -> bool:
    """Whether the framework has no such convolution."""
    return backend in FLAX and geometry.transposed and geometry.groups > 1


# --- what a layer computes -----------------------------------------------------------------------


def spec(shape, kernel, coords=None, channels=2, out=3, bias=True, **options) -> Network:
    """A network of one layer, called ``conv``."""
    geometry = ConvGeometry(kernel, **options)
    coords = Coordinates.resolve(coords, geometry.rank)
    layer = Conv("conv", channels, out, geometry, coords, bias)
    return Network("layer", (channels, *shape), (layer,))


ALL = {"stride": (2, 1), "dilation": (1, 2), "padding": ((2, 1), (1, 3))}
GROUPED = {"channels": 4, "out": 6, "groups": 2}
OUTSIDE = Coordinates("yx", outside="extend")
AXIS_BY_AXIS = ("torch",)  # the backends that have a third way to make a large map
# Axes of lengths 2, 3, 5, 9 have coordinates that are multiples of a power of two.
SPECS = {
    "1-D": spec((9,), (3,)),
    "2-D": spec((5, 9), (3, 2)),
    "3-D": spec((3, 2, 5), (2, 1, 3)),
    "pointwise": spec((5, 3), (1, 1)),
    "no bias": spec((5, 3), (3, 3), bias=False),
    "one sample an axis": spec((1, 3), (1, 2), "xyr"),
    "every option": spec((5, 9), (3, 2), "yx", **ALL),
    "every option, 3-D": spec((5, 3, 2), (2, 3, 2), "zxy", padding=1, stride=(2, 1, 2), dilation=1),
    "same": spec((5, 9), (4, 3), padding="same"),
    "same, stride": spec((5, 9), (4, 3), padding="same", stride=(3, 2)),
    "groups": spec((5, 3), (3, 3), padding=1, **GROUPED),
    "depthwise": spec((9,), (3,), channels=4, out=4, groups=4),
    "reflect": spec((5, 9), (3, 5), padding=(1, 2), padding_mode="reflect"),
    "replicate": spec((5, 9), (3, 5), padding=(2, 2), padding_mode="replicate", stride=2),
    "circular": spec((5, 9), (3, 5), "x", padding=(1, 2), padding_mode="circular"),
    "holes": spec((3, 5), (3, 2), padding=1, input_dilation=(2, 3)),
    "radius": spec((5, 4), (3, 3), "ryx", padding=1),
    "radius from elsewhere": spec((5,), (2,), Coordinates("r", r_center=0.5)),
    "another span": spec((4, 5), (3, 3), Coordinates("xy", span=(-1, -0.5)), padding=1),
    "edges": spec((4, 8), (3, 3), Coordinates("xy", align="edges"), padding=1),
    "extend": spec((5, 3), (3, 5), OUTSIDE, padding=(2, 3)),
    "extend, circular": spec((5, 3), (3, 3), OUTSIDE, padding=1, padding_mode="circular"),
    "transposed 1-D": spec((5,), (3,), transposed=True),
    "transposed 2-D": spec((3, 5), (3, 2), transposed=True),
    "transposed 3-D": spec((2, 3, 2), (2, 1, 3), transposed=True),
    "transposed, every option": spec(
        (3, 5),
        (3, 4),
        "yx",
        stride=(2, 3),
        dilation=(2, 1),
        padding=(1, 2),
        output_padding=(1, 2),
        transposed=True,
    ),
    "transposed groups": spec((5, 3), (3, 3), stride=2, transposed=True, **GROUPED),
    "transposed extend": spec((5, 3), (3, 3), OUTSIDE, stride=2, padding=1, transposed=True),
    "transposed circular": spec(
        (5, 3), (3, 3), stride=2, padding=1, transposed=True, padding_mode="circular"
    ),
}


def build(backend: str, network: Network, weights: Any, dtype: str = "float32") -> Any:
    try:
        return backends.load(backend).build(network, weights, dtype)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    except ValueError as error:  # torch has nothing else for it
        if network.layers[0].geometry.transposed and "padding mode is supported" in str(error):
            pytest.skip(str(error))
        raise


def computed(backend: str, case: Case) -> tuple[Any, Any]:
    """Output, with gradients wanted and not, and gradients; and what they must be."""
    weights, x, dy = case.data()
    module, evaluate = (
        build(backend, case.network, weights, case.dtype),
        backends.load(backend).evaluate,
    )
    y, gradients = evaluate(module, weights, x, dy)
    alone, _ = evaluate(module, weights, x)
    wanted = expected(case.network, weights, x, dy, PRECISIONS[case.dtype])
    return {"y": y, "alone": alone, **gradients}, {"alone": wanted["y"], **wanted}


@pytest.mark.parametrize("way", [*WAYS, "map axis by axis"])
@pytest.mark.parametrize("name", SPECS)
def test_output_and_gradients_are_the_references(backend, name, way, monkeypatch):
    (layer,) = SPECS[name].layers
    if way not in WAYS:
        if backend not in AXIS_BY_AXIS:
            pytest.skip("it makes no map axis by axis")
        monkeypatch.setattr(position_bias, "MANY_PRODUCTS", 0)
    network = Network(way, SPECS[name].input_shape, (layer,))  # of a name, so that jit knows it
    way = position_bias.APPEND if way == position_bias.APPEND else position_bias.MAP
    monkeypatch.setattr(position_bias, "FORCED", way)
    ways = harness.ways_taken(monkeypatch)
    for exact in (False, True):
        found, wanted = computed(backend, Case(network, 2, seed=3, exact=exact))
        assert found.keys() == wanted.keys()
        for each, value in wanted.items():
            assert value.error(found[each]) <= 1, each
        grid = coordinate_grid(network.input_shape[1:], layer.coords)
        if exact and (grid * 16 % 1 == 0).all():
            assert all(value.equals(found[each]) for each, value in wanted.items())
    assert set(ways) <= {position_bias.MAP if layer.coords.outside == "extend" else way}
    assert ways or layer.geometry.pointwise  # which may be a product of matrices


def test_which_specs_are_exact():
    inexact = {
        name
        for name, network in SPECS.items()
        if (coordinate_grid(network.input_shape[1:], network.layers[0].coords) * 16 % 1).any()
    }
    assert inexact == {"radius", "another span"}


@pytest.mark.parametrize("way", WAYS)
def test_generated_layers(backend, way):
    cases = [case for case in generate(16, seed=12) if case.is_layer]
    (tally,) = check_layers(cases, [backend], way=way).tallies
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.layers + sum(tally.excluded.values()) == 16
    assert tally.layers >= 8
    assert tally.bitwise == tally.exact >= 4


def test_a_batch_is_its_halves(backend):
    """Whichever way each of them is computed."""
    for shape, kernel, channels, out in (
        ((33, 20), 3, 2, 3),
        ((3, 3), 3, 32, 16),
        ((64, 64), 3, 1, 16),
        ((9, 8), 1, 5, 6),
    ):
        options = {"channels": channels, "out": out, "padding": kernel // 2}
        network = spec(shape, (kernel, kernel), **options)
        weights, x, _ = Case(network, 4, seed=1).data()
        load = backends.load(backend)
        module = load.build(network, weights)
        whole, *halves = (
            load.evaluate(module, weights, part)[0] for part in (x, x[:1], x[1:2], x[2:])
        )
        bound = expected(network, weights, x, None)["y"].bound
        assert (np.abs(whole - np.concatenate(halves)) <= 2 * bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_keep_their_bounds(backend, dtype, monkeypatch):
    """In 16 bits the map is taken, whatever is asked for."""
    monkeypatch.setattr(position_bias, "FORCED", position_bias.APPEND)
    ways = harness.ways_taken(monkeypatch)
    for name in ("2-D", "radius", "transposed 2-D"):
        found, wanted = computed(backend, Case(SPECS[name], 2, seed=3, dtype=dtype))
        for each, value in wanted.items():
            assert value.error(found[each]) <= 1, (name, each)
    assert set(ways) == {"append" if dtype == "float64" else "map"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_neighbours_on_a_wide_map_differ_in_16_bits(backend, dtype):
    """Each position is its exact value, rounded once; appended coordinates would be rounded first.

    On an axis of 1000 samples these are closer together than bfloat16 can tell apart near 1.
    """
    precision = PRECISIONS[dtype]
    network = spec((1, 1000), (1, 1), "xr", channels=1, out=4, bias=False)
    kernel = precision.rounded(normal(4, 3, 1, 1))
    kernel[:, 0] = 0
    kernel[0, :, 0, 0] = 1, 1, 0  # of a feature that is 1: 1 + x, which is small on the left
    x = np.ones((1, 1, 1, 1000), np.float32)
    module = build(backend, network, {"conv.weight": kernel}, dtype)
    y, _ = backends.load(backend).evaluate(module, {"conv.weight": kernel}, x)
    weights = kernel[..., 0, 0].astype(np.float64)
    grid = coordinate_grid((1, 1000), "xr", dtype=np.float64)[:, 0]
    grid = np.concatenate([np.ones((1, 1000)), grid])
    exact = weights @ grid
    # In float32 the roundings of a coordinate, of a product and of two sums; and one to 16 bits.
    slack = 2 * (COORDINATE_ROUNDINGS + 3) * 2.0**-24 * np.abs(weights) @ np.abs(grid)
    bound = precision.rounding * np.abs(exact) + slack + precision.tiny
    assert (np.abs(y[0, :, 0] - exact) <= bound).all()
    appended = weights @ precision.rounded(grid).astype(np.float64)
    assert (np.abs(appended - exact) > bound).any()


def test_unbatched_input_is_a_batch_of_one(framework, geometry, monkeypatch):
    layer = framework.filled(framework.make(geometry, 4, 6, coords="xr"))
    x = x_for(geometry, make=integers)
    for way in WAYS:
        monkeypatch.setattr(position_bias, "FORCED", way)
        if framework.name == "paddle":  # as Paddle's own convolutions
            with pytest.raises(ValueError, match=r"must have shape \(N, C"):
                layer(framework.paddle.to_tensor(x[0]))
            return
        if framework.name == "torch":
            alone = layer(framework.torch.tensor(x[0])).detach().numpy()
        else:
            alone = harness.channels_first(np.asarray(layer(np.moveaxis(x[0], 0, -1)))[None])[0]
        assert np.array_equal(alone, framework.call(layer, x[:1])[0])


@pytest.mark.parametrize(
    ("name", "rank", "with_r"),
    [
        ("walsvid", 1, True),
        ("paddle", 2, False),
        ("paddledetection", 2, False),
        ("uber", 2, True),
        ("paper", 2, True),
        ("mkocabas", 2, True),
        ("walsvid", 2, True),
        ("keras", 2, True),
        ("keras", 3, False),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_sees_what_is_named(framework, transposed, name, rank, with_r):
    """A kernel of one tap that hands every coordinate on shows them, in their order."""
    coords = Coordinates.named(name, rank=rank, with_r=with_r)
    n, tap = len(coords), (1,) * rank
    layer = framework.make(
        ConvGeometry(tap, transposed=transposed), 1, n, bias=False, coords=coords
    )
    features = np.zeros((1, n, *tap) if transposed else (n, 1, *tap))
    kernel = join_kernel(features, np.eye(n).reshape(n, n, *tap), transposed=transposed)
    framework.import_weights(layer, {"weight": kernel})
    shape = (2, 1, 3)[-rank:]
    y = framework.call(layer, np.zeros((2, 1, *shape), np.float32))
    assert np.array_equal(y, [coordinate_grid(shape, coords)] * 2)


def test_every_group_sees_every_coordinate(framework):
    layer = framework.make(ConvGeometry((1, 1), groups=4), 4, 8, bias=False)
    features, coordinates = np.zeros((8, 1, 1, 1)), integers(8, 2, 1, 1)
    coordinates[:, 0] += 10  # of x: no output is constant
    framework.import_weights(layer, {"weight": join_kernel(features, coordinates, 4)})
    y = framework.call(layer, normal(1, 4, 5, 3))[0]
    assert np.array_equal(
        y, np.einsum("on,nhw->ohw", coordinates[..., 0, 0], coordinate_grid((5, 3)))
    )


# --- what a layer is -----------------------------------------------------------------------------


def test_it_is_the_frameworks_convolution_and_has_its_parameters(framework, geometry):
    layer = framework.make(geometry, 4, 6, coords="xr")
    module = getattr(layer, "module", layer)
    assert isinstance(module, framework.plain_class(geometry))
    assert module.coords == Coordinates("xr")
    fused = framework.make_plain(geometry, 4 + 2, 6)
    found, wanted = (framework.parameters(each) for each in (layer, fused))
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in wanted.items()}
    assert set(found) == {framework.kernel, "bias"}
    assert set(framework.parameters(framework.make(geometry, 4, 6, bias=False))) == {
        framework.kernel
    }


def test_its_arguments_are_the_frameworks_and_two_more(framework, geometry):
    """In what editors show, and tools that construct layers look into."""
    layer = framework.make(geometry, 4, 6)
    found = dict(inspect.signature(type(getattr(layer, "module", layer))).parameters)
    own = [found.pop(name) for name in ("coords", "coord_init")]
    assert [(p.kind, p.default) for p in own] == [
        (inspect.Parameter.KEYWORD_ONLY, default) for default in (None, "fan_in")
    ]
    _, *wanted = inspect.signature(framework.plain_class(geometry).__init__).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in wanted
    ]


def test_in_channels_are_what_it_takes(framework, geometry):
    if framework.name == "linen":
        pytest.skip("a Linen module does not know its input channels")
    layer = framework.make(geometry, 4, 6, coords="xr")
    attribute = {"torch": "in_channels", "paddle": "_in_channels", "flax": "in_features"}
    assert getattr(layer, attribute[framework.name]) == 4


@pytest.mark.parametrize("coords", ["xy", None], ids=["given", "all axes"])
def test_coordinates_of_a_rank(framework, geometry, coords):
    if coords and geometry.rank == 1:
        coords = "x"
    layer = framework.make(geometry, 4, 6, coords=coords)
    found = getattr(layer, "module", layer).coords
    assert found == Coordinates(coords or "xyz"[: geometry.rank])


@pytest.mark.parametrize("groups", [1, 2])
def test_fan_in_draws_what_the_framework_draws_for_all_channels(framework, geometry, groups):
    geometry = ConvGeometry(geometry.kernel, groups=groups, transposed=geometry.transposed)
    if lacking(framework.name, geometry):
        pytest.skip("Flax's transposed convolutions have no groups")
    layer = framework.make(geometry, 4, 6, coords="xr", seed=3)
    fused = framework.make_plain(geometry, 4 + groups * 2, 6, seed=3)
    other = framework.make_plain(geometry, 4 + groups * 2, 6, seed=4)
    assert equal(framework.parameters(layer), framework.parameters(fused))
    assert not equal(framework.parameters(layer), framework.parameters(other))


@pytest.mark.parametrize("groups", [1, 2])
def test_zeros_starts_as_the_plain_layer(framework, geometry, groups, monkeypatch):
    geometry = ConvGeometry(geometry.kernel, groups=groups, transposed=geometry.transposed)
    if lacking(framework.name, geometry):
        pytest.skip("Flax's transposed convolutions have no groups")
    layer = framework.make(geometry, 4, 6, coords="xr", coord_init="zeros", seed=3)
    plain = framework.make_plain(geometry, 4, 6, seed=3)
    weight = framework.export_weights(layer)["weight"]
    features, coordinates = split_kernel(weight, "xr", groups, geometry.transposed)
    assert features.any()
    assert not coordinates.any()
    monkeypatch.setattr(position_bias, "FORCED", position_bias.MAP)  # the very same step, and + 0
    x = x_for(geometry)
    assert np.array_equal(framework.call(layer, x), framework.call(plain, x))


def test_repr_shows_the_coordinates(framework, geometry):
    assert "Coordinates('rx')" in repr(framework.make(geometry, 4, 6, coords="rx"))


def test_copies_compute_the_same(framework, geometry):
    layer = framework.make(geometry, 4, 6, coords=Coordinates("x", align="edges"))
    x = x_for(geometry)
    twins = [copy.deepcopy(layer)]
    if framework.name == "linen":  # whose modules hold a function that no pickle takes
        twins.append(harness.LinenLayer(layer.module.clone(), layer.variables))
    elif _is_pickled(framework, geometry):
        twins.append(pickle.loads(pickle.dumps(layer)))
    if framework.name == "flax":
        twins.append(framework.nnx.clone(layer))
    for twin in twins:
        assert np.array_equal(framework.call(twin, x), framework.call(layer, x))


def _is_pickled(framework, geometry):
    """Whether the framework's own convolution is: not in Paddle 3.2, nor in NNX before 0.12.1."""
    try:
        pickle.dumps(framework.make_plain(geometry, 4, 6))
    except (TypeError, AttributeError, pickle.PicklingError):
        return False
    return True


def test_a_copy_is_its_own(framework):
    geometry = ConvGeometry((1, 1))
    layer = framework.make(geometry, 4, 6)
    before, twin = framework.export_weights(layer), copy.deepcopy(layer)
    framework.filled(twin)
    assert equal(framework.export_weights(layer), before)


def test_first_in_one_way_then_in_the_other(framework, monkeypatch):
    """Nothing that one way keeps is of use to the other."""
    geometry = ConvGeometry((3, 3), padding=1)
    layer, x = framework.filled(framework.make(geometry, 4, 6)), integers(2, 4, 5, 3)
    found = []
    for way in (*WAYS, *WAYS):
        monkeypatch.setattr(position_bias, "FORCED", way)
        found.append(framework.call(layer, x))
    assert all(np.array_equal(y, found[0]) for y in found)


def test_calls_of_many_shapes(framework):
    layer = framework.filled(framework.make(ConvGeometry((2,), padding=1), 1, 1))
    kernel, bias = framework.export_weights(layer).values()
    for n in (2, 3, 5, 9, 3):
        ramp = np.concatenate([[0], np.linspace(-1, 1, n), [0]])
        wanted = [kernel[0, 1] @ ramp[i : i + 2] + bias[0] for i in range(n + 1)]
        assert np.array_equal(framework.call(layer, np.zeros((1, 1, n), np.float32))[0, 0], wanted)


# --- weights in and out --------------------------------------------------------------------------


class TestWeights:
    def test_are_canonical_and_copies(self, framework, geometry):
        layer, other = (framework.make(geometry, 4, 6, coords="xr", seed=s) for s in (1, 2))
        weights = framework.export_weights(layer)
        assert weights["weight"].shape == (6, 6, *geometry.kernel)  # 4 features, 2 coordinates
        assert weights["bias"].shape == (6,)
        assert list(weights) == ["weight", "bias"]
        assert weights.coordinates == {"": Coordinates("xr")}
        framework.import_weights(other, weights)
        x = x_for(geometry)
        assert np.array_equal(framework.call(other, x), framework.call(layer, x))
        before = framework.call(layer, x)
        for array in weights.values():
            array += 1
        assert np.array_equal(framework.call(layer, x), before)
        assert np.array_equal(framework.call(other, x), before)

    def test_travel_through_a_file(self, framework, geometry, tmp_path):
        layer, other = (framework.make(geometry, 4, 6, seed=s) for s in (1, 2))
        save_weights(tmp_path / "layer.safetensors", framework.export_weights(layer))
        framework.import_weights(other, load_weights(tmp_path / "layer.safetensors"))
        assert equal(framework.parameters(other), framework.parameters(layer))

    @pytest.mark.parametrize("groups", [1, 2])
    def test_another_order_of_the_same_coordinates_is_permuted(self, framework, geometry, groups):
        geometry = ConvGeometry(geometry.kernel, groups=groups, transposed=geometry.transposed)
        if lacking(framework.name, geometry):
            pytest.skip("Flax's transposed convolutions have no groups")
        layer = framework.filled(framework.make(geometry, 4, 6, coords="xr"))
        other = framework.make(geometry, 4, 6, coords="rx")
        weights = framework.export_weights(layer)
        framework.import_weights(other, weights)
        found = framework.export_weights(other)
        assert found.coordinates == {"": Coordinates("rx")}
        parts, mine = (
            split_kernel(w["weight"], "xr", groups, geometry.transposed) for w in (found, weights)
        )
        assert np.array_equal(parts[0], mine[0])
        assert np.array_equal(parts[1], mine[1][:, ::-1])

    def test_all_problems_at_once_and_nothing_changed(self, framework, geometry):
        layer = framework.make(geometry, 4, 6)
        before, n = framework.parameters(layer), geometry.rank
        taps = ", ".join("3" * n)
        alone = (4, 6) if geometry.transposed else (6, 4)
        wanted = (4 + n, 6) if geometry.transposed else (6, 4 + n)
        wrong = {
            "weight": np.ones((*alone, *geometry.kernel), np.float32),
            "conv.weight": np.ones(1, np.float32),
            "coord_weight": np.ones(1, np.float32),
        }
        with pytest.raises(ValueError, match="^cannot import weights:") as error:
            framework.import_weights(layer, wrong)
        parts = [
            "missing: bias, shape (6,)",
            "unexpected: conv.weight, shape (1,)",
            "unexpected: coord_weight, shape (1,)",
        ]
        if framework.name != "linen":  # whose modules do not know their input channels
            parts.append(
                f"wrong shape: weight is ({alone[0]}, {alone[1]}, {taps}), "
                f"want ({wanted[0]}, {wanted[1]}, {taps}): 4 input channels, where features and "
                f"coordinates have {4 + n}, and features alone 4"
            )
        for part in parts:
            assert part in str(error.value)
        assert equal(framework.parameters(layer), before)

    def test_of_other_coordinates_are_refused(self, framework):
        geometry = ConvGeometry((3, 3))
        layer = framework.make(geometry, 4, 6, coords="xy")
        before = framework.parameters(layer)
        for coords in ("xr", Coordinates("xy", span=(0, 1))):
            other = framework.make(geometry, 4, 6, coords=coords, seed=1)
            with pytest.raises(ValueError, match="other coordinates: weight was made for") as error:
                framework.import_weights(layer, framework.export_weights(other))
            assert f"{Coordinates.resolve(coords, 2)}, want Coordinates('xy')" in str(error.value)
        assert equal(framework.parameters(layer), before)

    def test_integers_are_refused(self, framework):
        layer = framework.make(ConvGeometry((1, 1)), 4, 6)
        weights = dict(framework.export_weights(layer))
        weights["bias"] = np.ones(6, np.int64)
        with pytest.raises(ValueError, match="not floating-point: bias is int64"):
            framework.import_weights(layer, weights)

    def test_from_one_backend_into_another(self, framework, geometry):
        """Through plain arrays: those that a dict holds, of float64 here."""
        shape = (6, 6, *geometry.kernel)
        weights = Weights({"weight": integers(*shape).astype(float), "bias": np.zeros(6)})
        layer = framework.make(geometry, 4, 6, coords="xr")
        framework.import_weights(layer, weights)
        assert equal(framework.export_weights(layer), weights)


# --- states of the framework ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "paddle"], indirect=True)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a network"])
class TestStates:
    """Into a layer, or a network that has one."""

    @pytest.fixture
    def load(self, framework, nested):
        """What loads a state of one layer into another layer of ours."""

        def load(layer, state):
            module = framework.nested(layer) if nested else layer
            if nested:
                state = {f"0.{name}": array for name, array in state.items()}
            if nested and framework.name == "paddle":  # whose outermost layer goes by the shapes
                adapt = backends.load("paddle").adapt_state_dict
                adapted = adapt(module, framework.tensors(state))
                state = {name: each.numpy() for name, each in adapted.items()}
            framework.load_state(module, state)

        return load

    def test_its_own(self, framework, geometry, nested):
        layer, other = (framework.make(geometry, 4, 6, seed=s) for s in (1, 2))
        if nested:
            layer, other = framework.nested(layer), framework.nested(other)
        names = set(framework.state(layer))
        assert names == ({"0.weight", "0.bias"} if nested else {"weight", "bias"})
        framework.load_state(other, framework.state(layer))
        assert equal(framework.parameters(other), framework.parameters(layer))

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("prefix", ["", "conv."])
    def test_a_plain_convolutions(self, framework, geometry, load, prefix, groups, monkeypatch):
        geometry = ConvGeometry(geometry.kernel, groups=groups, transposed=geometry.transposed)
        plain = framework.make_plain(geometry, 4, 6)
        layer = framework.make(geometry, 4, 6, coords="xr", seed=1)
        load(layer, {f"{prefix}{name}": a for name, a in framework.state(plain).items()})
        weight = framework.export_weights(layer)["weight"]
        features, coordinates = split_kernel(weight, "xr", groups, geometry.transposed)
        assert np.array_equal(features, framework.parameters(plain)["weight"])
        assert not coordinates.any()
        monkeypatch.setattr(position_bias, "FORCED", position_bias.MAP)
        x = x_for(geometry)
        assert np.array_equal(framework.call(layer, x), framework.call(plain, x))

    @pytest.mark.parametrize("prefix", ["", "conv."])
    def test_another_implementations(self, framework, geometry, load, prefix):
        """Its kernel is over features and coordinates."""
        fused = framework.make_plain(geometry, 4 + 2, 6)
        layer = framework.make(geometry, 4, 6, coords="xr", seed=1)
        load(layer, {f"{prefix}{name}": a for name, a in framework.state(fused).items()})
        assert equal(framework.parameters(layer), framework.parameters(fused))

    def test_coordinates_before_the_features(self, framework, geometry, nested):
        layer = framework.make(geometry, 4, 6, coords="xr")
        weights = framework.export_weights(layer)
        features, coordinates = split_kernel(weights["weight"], "xr", 1, geometry.transposed)
        kernel = join_kernel(features, coordinates, 1, geometry.transposed, position="first")
        state = {"conv.weight": kernel, "conv.bias": weights["bias"]}
        other = framework.make(geometry, 4, 6, coords="xr", seed=1)
        module = framework.nested(other) if nested else other
        if nested:
            state = {f"0.{name}": array for name, array in state.items()}
        adapted = backends.load(framework.name).adapt_state_dict(
            module, framework.tensors(state), position="first"
        )
        assert set(state) == {f"{'0.' * nested}conv.{name}" for name in ("weight", "bias")}
        framework.load_state(module, {name: each.numpy() for name, each in adapted.items()})
        assert equal(framework.parameters(other), framework.parameters(layer))

    def test_a_kernel_that_fits_neither(self, framework, geometry, load):
        layer = framework.make(geometry, 4, 6, coords="xr")
        before = framework.parameters(layer)
        state = framework.state(framework.make_plain(geometry, 5, 6, seed=1))
        with pytest.raises((ValueError, RuntimeError)) as error:
            load(layer, state)
        assert "weight: a kernel must have 6 input channels (features and coordinates) or 4" in str(
            error.value
        )
        assert "got 5 in shape" in str(error.value)
        assert equal(framework.parameters(layer), before)

    def test_another_position(self, framework, nested):
        layer = framework.make(ConvGeometry((1, 1)), 4, 6)
        adapt = backends.load(framework.name).adapt_state_dict
        message = "position must be one of ('last', 'first'), got 'middle'"
        with pytest.raises(ValueError, match=re.escape(message)):
            adapt(framework.nested(layer) if nested else layer, {}, position="middle")


# --- AddCoords -----------------------------------------------------------------------------------


class TestAddCoords:
    @pytest.mark.parametrize("coords", [None, "rx", Coordinates("x", span=(0, 1), align="edges")])
    @pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 5, 4)])
    def test_appends_the_grid(self, framework, shape, coords):
        x, rank = normal(2, 3, *shape), len(shape)
        y = framework.call(framework.add_coords(coords, rank=rank), x)
        assert np.array_equal(y[:, :3], x)
        for sample in y[:, 3:]:
            assert np.array_equal(sample, coordinate_grid(shape, coords))

    def test_is_of_two_axes_unless_told_otherwise(self, framework):
        layer = framework.add_coords()
        assert framework.call(layer, normal(2, 3, 5, 4)).shape == (2, 5, 5, 4)
        assert re.search("rank ?= ?2", repr(layer))

    def test_an_image_without_a_batch_axis_is_no_batch_of_sequences(self, framework):
        x = normal(1, 3, 32, 40)
        image, sequences = (framework.add_coords(rank=rank) for rank in (2, 1))
        if framework.name == "paddle":
            pytest.skip("Paddle's layers take a batch")
        if framework.name == "torch":
            assert image(framework.torch.tensor(x[0])).shape == (5, 32, 40)
            assert sequences(framework.torch.tensor(x[0])).shape == (3, 33, 40)
        else:
            assert image(np.moveaxis(x[0], 0, -1)).shape == (32, 40, 5)
            assert sequences(np.moveaxis(x[0], 1, -1)).shape == (3, 40, 33)

    def test_its_output_convolved_is_the_layers_output(self, framework, geometry):
        """The framework's own convolution of features and coordinates, with the same kernel."""
        layer = framework.make(geometry, 4, 6, seed=3)
        fused = framework.make_plain(geometry, 4 + geometry.rank, 6, seed=3)
        x = x_for(geometry)
        wanted = framework.call(fused, framework.call(framework.add_coords(rank=geometry.rank), x))
        error = np.abs(framework.call(layer, x) - wanted)
        conv = Conv("conv", 4, 6, geometry, Coordinates.resolve(None, geometry.rank))
        arrays = framework.export_weights(layer)
        weights = {f"conv.{name}": array for name, array in arrays.items()}
        network = Network("layer", x.shape[1:], (conv,))
        assert (error <= 2 * expected(network, weights, x, None)["y"].bound).all()

    def test_keeps_its_place_in_copies(self, framework):
        layer = framework.add_coords("yr")
        x = normal(1, 2, 3, 4)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert np.array_equal(framework.call(twin, x), framework.call(layer, x))
