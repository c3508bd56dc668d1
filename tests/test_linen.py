"""CoordConv for Flax Linen against its definition, and against ``flax.linen.Conv``.

What it shares with NNX is tested there with more options.
"""

import copy
import inspect

import numpy as np
import pytest

pytest.importorskip("flax")

import flax
import jax
import optax
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

from coordconv import Coordinates, backends, coordinate_grid, load_weights, networks, save_weights
from coordconv.backends import flax as other
from coordconv.backends import linen as adapter
from coordconv.backends.linen import AddCoords, CoordConv
from coordconv.geometry import ConvGeometry
from coordconv.reference import Reference
from coordconv.weights import Weights

C = 4  # input channels; every case has 8 output channels and a batch of 2
KEY = jax.random.key(0)


def case(shape, kernel, coords=None, geometry=None, **options):
    """A layer's arguments, and the geometry that they mean, spelled out by hand."""
    sizes = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    return shape, kernel, coords, ConvGeometry(sizes, **(geometry or {})), options


SAME = {"padding": "same"}
CASES = {
    "default": case((6, 5), (3, 3), geometry=SAME),
    "list": case((6, 5), [3, 2], ["y", "x"], {"stride": (2, 1), **SAME}, strides=[2, 1]),
    "same lower": case((6, 7), (4, 2), "r", {"padding": ((2, 1), (1, 0))}, padding="SAME_LOWER"),
    "none": case(
        (4, 5),
        (3, 3),
        geometry=SAME,
        strides=None,
        kernel_dilation=None,
        input_dilation=None,
        use_bias=False,
    ),
    "holes": case(
        (5, 4),
        (3, 2),
        "xyr",
        {"padding": ((-1, 3), (2, -1)), "input_dilation": (2, 3), "dilation": 2},
        padding=((-1, 3), (2, -1)),
        input_dilation=(2, 3),
        kernel_dilation=2,
    ),
    "circular": case(
        (7, 6),
        (4, 3),
        Coordinates("yx", align="edges"),
        {"padding": ((3, 3), (1, 1)), "padding_mode": "circular", "dilation": (2, 1), "groups": 2},
        padding="CIRCULAR",
        kernel_dilation=(2, 1),
        feature_group_count=2,
    ),
    "reflect": case(
        (5, 6),
        (3, 4),
        Coordinates("xyr", outside="extend"),
        {"padding": ((1, 1), (1, 2)), "padding_mode": "reflect", "groups": 4},
        padding="REFLECT",
        feature_group_count=4,
    ),
    "causal": case(
        (7,), 3, "xr", {"padding": ((4, 0),), "dilation": 2}, padding="CAUSAL", kernel_dilation=2
    ),
    "3-D": case((3, 4, 2), (2, 3, 1), "zyxr", {"padding": (0, 1, 0)}, padding=(0, 1, 0)),
}


def init(key, shape, dtype):
    """An initializer that JAX need not compile, for biases as well; none under a trace."""
    if isinstance(key, jax.core.Tracer):
        return jnp.zeros(shape, dtype)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(0, 0.5, shape), dtype)


def build(kernel=(3, 3), coords=None, **options):
    options = {"kernel_init": init, "bias_init": init, **options}
    return CoordConv(8, kernel, coords=coords, **options)


def draw(shape, features=C):
    return np.random.default_rng(1).normal(size=(2, *shape, features)).astype("f4")


def integers(*shape):
    return np.random.default_rng(4).integers(-4, 5, shape).astype("f4")


def filled(layer, x):
    """Variables of integers."""
    weights, rng = layer.export_weights(layer.init(KEY, x)), np.random.default_rng(3)
    return layer.import_weights(
        {name: rng.integers(-4, 5, a.shape).astype("f4") for name, a in weights.items()}
    )


def first(array):
    """Channels first, in NumPy."""
    return np.moveaxis(np.asarray(array), -1, 1)


def check(got, want, magnitudes, terms, u=2.0**-24):
    """The componentwise bound of a sum of so many terms."""
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want)
    assert (error <= terms * u / (1 - terms * u) * magnitudes).all()


def gradients_of(layer, variables, x, dy):
    def pulled(variables, x, dy):
        y, pull_back = jax.vjp(layer.apply, variables, x)
        return y, pull_back(dy)

    return jax.jit(pulled)(variables, x, dy)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    shape, kernel, coords, geometry, options = CASES[name]
    layer, x = build(kernel, coords, **options), draw(shape)
    variables = layer.init(KEY, x)
    weights = {"bias": None, **layer.export_weights(variables)}
    dy = np.random.default_rng(2).normal(size=(2, 8, *geometry.output_shape(shape))).astype("f4")
    y, (of_variables, of_x) = gradients_of(layer, variables, x, np.moveaxis(dy, 1, -1))
    x, reference = first(x), Reference(geometry, layer.coords)
    taps, channels = geometry.taps, C // geometry.groups
    arguments = (x, weights["weight"], weights["coord_weight"], weights["bias"])
    check(
        first(y),
        reference.forward(*arguments),
        reference.forward(*arguments, magnitudes=True),
        (channels + len(layer.coords)) * taps + 1,
    )
    back = (dy, weights["weight"], shape)
    check(
        first(of_x),
        reference.input_gradient(*back),
        reference.input_gradient(*back, magnitudes=True),
        8 // geometry.groups * taps,
    )
    want = reference.weight_gradients(x, dy)
    magnitudes = reference.weight_gradients(x, dy, magnitudes=True)
    gradients = layer.export_weights(of_variables)
    assert set(gradients) == {"weight", "coord_weight"} | ({"bias"} if layer.use_bias else set())
    for weight, got in gradients.items():
        check(got, want[weight], magnitudes[weight], 2 * int(np.prod(dy.shape[2:])) + 2)


@pytest.mark.parametrize("name", ["default", "circular", "causal"])
def test_bitwise_as_nnx(name):
    shape, kernel, coords, _, options = CASES[name]
    layer, x = build(kernel, coords, **options), draw(shape)
    variables = layer.init(KEY, x)
    module = other.CoordConv(
        C, 8, kernel, coords=coords, **options, rngs=nnx.Rngs(0), kernel_init=init
    )
    module.import_weights(layer.export_weights(variables))
    assert np.array_equal(layer.apply(variables, x), module(x))


def test_exact_arithmetic_is_bitwise():
    layer, rng = build((3, 3), "yx", strides=2, feature_group_count=2), np.random.default_rng(3)
    x = rng.integers(-8, 9, (2, 17, 5, C)).astype("f4")
    drawn = layer.export_weights(layer.init(KEY, x))
    weights = {name: rng.integers(-4, 5, a.shape).astype("f4") for name, a in drawn.items()}
    variables = layer.import_weights(weights)
    reference = Reference(ConvGeometry((3, 3), stride=2, groups=2, **SAME), layer.coords)
    want = reference.forward(first(x), *weights.values())
    dy = rng.integers(-4, 5, want.shape).astype("f4")
    y, (of_variables, of_x) = gradients_of(layer, variables, x, np.moveaxis(dy, 1, -1))
    assert np.array_equal(first(y), want)
    assert np.array_equal(first(layer.apply(variables, x)), want)
    assert np.array_equal(first(of_x), reference.input_gradient(dy, weights["weight"], (17, 5)))
    for name, gradient in reference.weight_gradients(first(x), dy).items():
        assert np.array_equal(layer.export_weights(of_variables)[name], gradient)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batch_axes(batch):
    """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
    layer, x = build((3, 2), "xyr", strides=2), integers(*batch, 5, 1, C)
    variables = filled(layer, x)
    y = layer.apply(variables, x)
    assert y.shape == (*batch, 3, 1, 8)
    one_by_one = [layer.apply(variables, sample) for sample in x.reshape(-1, 5, 1, C)]
    assert np.array_equal(y.reshape(-1, 3, 1, 8), np.stack(one_by_one))


def test_fan_in_draws_one_kernel():
    options = {"features": 8, "kernel_size": (3, 2), "bias_init": init}
    layer, plain = CoordConv(**options, coords="xyr"), nn.Conv(**options)
    params = layer.init(KEY, draw((4, 5), 4))["params"]
    assert set(params) == {"kernel", "coord_kernel", "bias"}
    fused = plain.init(KEY, draw((4, 5), 4 + 3))["params"]
    kernel = jnp.concatenate([params["kernel"], params["coord_kernel"]], axis=-2)
    assert np.array_equal(kernel, fused["kernel"])
    assert np.array_equal(params["bias"], fused["bias"])


def test_zeros_is_the_plain_layer():
    options = {"features": 8, "kernel_size": (3, 2), "bias_init": init}
    layer = CoordConv(**options, coords="xyr", coord_init="zeros")
    x = draw((4, 5), 7)
    y, variables = layer.init_with_output(KEY, x)
    want, plain = nn.Conv(**options).init_with_output(KEY, x)
    params = dict(variables["params"])
    coord_kernel = params.pop("coord_kernel")
    assert coord_kernel.shape == (3, 2, 3, 8)
    assert not coord_kernel.any()
    assert jax.tree.all(jax.tree.map(np.array_equal, params, plain["params"]))
    assert np.array_equal(y, want)


def test_kernel_init_sees_the_fused_shape_once():
    asked = []

    def count(key, shape, dtype):
        asked.append((shape, dtype))
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    layer = build((3, 3), "xyr", kernel_init=count, feature_group_count=2, param_dtype=jnp.float16)
    layer = layer.clone().clone()
    variables = layer.init(KEY, draw((4, 5)))
    assert asked == [((3, 3, C // 2 + 3, 8), jnp.float16)]
    fused = np.arange(9 * 5 * 8, dtype="f2").reshape(3, 3, 5, 8)
    assert np.array_equal(variables["params"]["kernel"], fused[:, :, :2])
    assert np.array_equal(variables["params"]["coord_kernel"], fused[:, :, 2:])
    # when called, Flax asks for the shape of the feature kernel alone
    layer.apply(variables, draw((4, 5)))
    assert asked[1:] == [((3, 3, C // 2, 8), jnp.float16)]


@pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_partitioned_kernels(box, coord_init):
    names = (None, None, "in", "out")
    layer = build((3, 3), coord_init=coord_init, kernel_init=box(init, names))
    x = draw((4, 5))
    variables = layer.init(KEY, x)
    params = variables["params"]
    assert params["kernel"].names == names
    assert params["kernel"].value.shape == (3, 3, C, 8)
    assert params["coord_kernel"].shape == (3, 3, 2, 8)  # unboxed: few meshes divide n channels
    weights = layer.export_weights(variables)
    plain = build((3, 3), coord_init=coord_init)
    assert np.array_equal(layer.apply(variables, x), plain.apply(plain.import_weights(weights), x))


def test_mask_is_for_the_features():
    mask = np.tril(np.ones((3, 3, C, 8), "f4"))
    x, plain = draw((4, 5)), build()
    params = plain.init(KEY, x)["params"]
    y = build(mask=jnp.asarray(mask)).apply({"params": params}, x)
    params = {**params, "kernel": params["kernel"] * mask}
    assert np.array_equal(y, plain.apply({"params": params}, x))


def test_dtypes():
    x = draw((4, 5))
    y, variables = build(param_dtype=jnp.bfloat16, dtype=jnp.float16).init_with_output(KEY, x)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    assert y.dtype == jnp.float16
    # summed in float32 and cast once: neighbours lie closer, by 1/512, than bfloat16 has near 1
    narrow = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    layer = build((1, 2), "x", padding="VALID", use_bias=False, **narrow)
    step = np.broadcast_to(np.array([-1.0, 1.0]).reshape(1, 1, 1, 2), (8, 1, 1, 2))
    variables = layer.import_weights({"weight": np.ones((8, C, 1, 2)), "coord_weight": step})
    y = layer.apply(variables, np.zeros((1, 1, 1025, C), "f4"))
    assert (y == 2 / 1024).all()


def test_options_of_flax():
    called = []

    def convolution(*args, **kwargs):
        called.append(kwargs["precision"])
        return lax.conv_general_dilated(*args, **kwargs)

    x = draw((4, 5))
    layer = build(conv_general_dilated=convolution, precision=lax.Precision.HIGH)
    y, variables = layer.init_with_output(KEY, x)
    assert called == [lax.Precision.HIGH]
    assert np.array_equal(y, build().apply(variables, x))
    layer = build(promote_dtype=lambda *args, dtype: [a.astype("bfloat16") for a in args])
    assert layer.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((2, 5, 5, 4), "i4"), TypeError, "floating-point, got int32"),
        (np.ones((2, 5, 5, 3), "f4"), ValueError, "4 channels, got 3 in shape"),
        (np.ones((2, 5, 5, 6), "f4"), ValueError, "the features alone, the layer adds"),
        (np.ones((5, 4), "f4"), ValueError, r"shape \(\.\.\., H, W, C\), got \(5, 4\)"),
        (np.float32(1), ValueError, r"shape \(\.\.\., H, W, C\), got \(\)"),
        (np.ones((2, 0, 5, 4), "f4"), ValueError, "no empty axis"),
    ],
)
def test_bad_inputs(x, error, message):
    layer = build(feature_group_count=2)
    variables = layer.init(KEY, draw((4, 5)))
    with pytest.raises(error, match=message):
        layer.apply(variables, x)
    if "channels" not in message and "features" not in message:  # not known before init
        with pytest.raises(error, match=message):
            layer.init(KEY, x)


def test_a_kernel_of_no_rank_that_there_is():
    with pytest.raises(ValueError, match="1, 2 or 3 axes, got 4"):
        build((3, 3, 3, 3))


def test_own_errors_of_flax():
    with pytest.raises(flax.errors.CallCompactUnboundModuleError):
        build()(draw((4, 5)))
    layer = build()
    params = layer.init(KEY, draw((4, 5)))["params"]
    with pytest.raises(flax.errors.ScopeParamShapeError):
        build(coords="xyr").apply({"params": params}, draw((4, 5)))
    del params["coord_kernel"]
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="coord_kernel"):
        layer.apply({"params": params}, draw((4, 5)))


def test_signature():
    """That of ``linen.Conv``, its order and defaults, and two keyword-only arguments behind."""
    own = dict(inspect.signature(CoordConv).parameters)
    added = [own.pop(name) for name in ("coords", "coord_init")]
    assert [p.kind for p in added] == [inspect.Parameter.KEYWORD_ONLY] * 2
    assert [p.default for p in added] == [None, "fan_in"]
    plain = inspect.signature(nn.Conv).parameters
    assert [(p.name, p.kind, p.default) for p in own.values()] == [
        (p.name, p.kind, p.default) for p in plain.values()
    ]


def test_coordinates_join_a_plain_checkpoint():
    """A plain layer's parameters, completed by init: the coordinates start at zero."""
    x, layer = draw((4, 5)), build()
    y, variables = nn.Conv(8, (3, 3)).init_with_output(KEY, x)
    got, completed = layer.apply(variables, x, mutable=["params"], rngs={"params": KEY})
    assert not completed["params"]["coord_kernel"].any()
    assert np.array_equal(got, y)


def test_module_tools():
    layer, x = build((3, 3), "xyr"), draw((4, 5))
    assert isinstance(layer, nn.Conv)
    assert layer.clone() == layer
    assert hash(layer.clone(strides=2).clone(strides=1)) == hash(layer)
    assert build(coords=["x", "y"]) == build(coords=Coordinates("xy"))
    assert copy.deepcopy(layer) == layer
    assert "coords = Coordinates('xyr')" in repr(layer)
    variables = layer.init(KEY, x)
    y = layer.apply(variables, x)
    blank = jax.tree.map(jnp.zeros_like, variables)
    state = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
    assert np.array_equal(layer.apply(state, x), y)
    assert np.array_equal(layer.bind(variables)(x), y)
    assert np.array_equal(layer.apply(flax.core.freeze(variables), x), y)
    # init and apply are one call each to what watches them, and its output is the whole output
    calls = []

    def watch(call, args, kwargs, context):
        calls.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        layer.init(KEY, x)
        layer.apply(variables, x)
    assert calls == ["__call__", "__call__"]
    _, state = layer.apply(variables, x, capture_intermediates=True)
    (recorded,) = state["intermediates"]["__call__"]
    assert np.array_equal(recorded, y)
    table = layer.tabulate(KEY, x, console_kwargs={"width": 150})
    assert "coord_kernel: \x1b[2mfloat32\x1b[0m[3,3,3,8]" in table
    assert f"{9 * 4 * 8 + 9 * 3 * 8 + 8}" in table


@pytest.mark.parametrize("frozen", ["kernel", "coord_kernel", "bias"])
def test_a_frozen_parameter_stays_while_others_move(frozen):
    layer, x = build((1, 3)), integers(2, 1, 5, C)
    params = filled(layer, x)["params"]
    gradients = jax.grad(lambda p: (layer.apply({"params": p}, x) ** 2).sum())(params)
    label = {name: "frozen" if name == frozen else "trained" for name in params}
    optimizer = optax.multi_transform(
        {"frozen": optax.set_to_zero(), "trained": optax.sgd(0.5)}, label
    )
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert set(after) == {"kernel", "coord_kernel", "bias"}
    assert {name for name in params if np.array_equal(after[name], params[name])} == {frozen}


class Pair(nn.Module):
    def setup(self):
        self.one = build()

    @nn.compact
    def __call__(self, x):
        return build(name="two")(self.one(x))


def test_transformations():
    x = draw((4, 5))
    params = Pair().init(KEY, x)["params"]
    assert {name: set(p) for name, p in params.items()} == {
        name: {"kernel", "coord_kernel", "bias"} for name in ("one", "two")
    }
    layer, x = build((1, 3), "xyr", padding="REFLECT"), integers(2, 1, 5, C)
    variables = filled(layer, x)
    with jax.checking_leaks():
        compiled = jax.jit(layer.apply)(variables, x)
    y = layer.apply(variables, x)  # what the trace made was not kept
    assert np.array_equal(compiled, y)
    assert np.array_equal(jax.jit(jax.vmap(layer.apply, (None, 0)))(variables, x), y)
    again = jax.jit(nn.remat(CoordConv)(8, (1, 3), padding="REFLECT", coords="xyr").apply)
    assert np.array_equal(again(variables, x), y)

    def constant(key, shape, dtype):
        return jnp.full(shape, jax.random.key_data(key)[0], dtype)

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    many = nn.vmap(CoordConv, **options, in_axes=None, axis_size=3)(8, 3, kernel_init=constant)
    params = jax.jit(many.init)(KEY, x)["params"]
    assert params["coord_kernel"].shape == (3, 3, 1, 8)
    assert len(np.unique(params["coord_kernel"])) == 3
    abstract = jax.eval_shape(layer.init, KEY, x)["params"]
    assert abstract["coord_kernel"].shape == (1, 3, 3, 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_round_trip(dtype, tmp_path):
    layer, x = build((3, 2), "xyr", param_dtype=dtype, feature_group_count=2), draw((4, 5))
    variables = layer.init(KEY, x)
    weights = layer.export_weights(variables)
    assert {name: a.shape for name, a in weights.items()} == {
        "weight": (8, 2, 3, 2),
        "coord_weight": (8, 3, 3, 2),
        "bias": (8,),
    }
    save_weights(tmp_path / "layer", weights)
    loaded = layer.import_weights(load_weights(tmp_path / "layer"))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    swapped = Weights(
        {**weights, "coord_weight": weights["coord_weight"][:, [1, 0, 2]]}, {"": Coordinates("yxr")}
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, layer.import_weights(swapped), variables))


def test_import_lists_all_problems():
    layer = build(feature_group_count=2)
    wrong = Weights(
        {"coord_weight": np.ones((8, 1, 3, 3)), "bias": np.ones(8, int), "kernel": np.ones(1)},
        {"": Coordinates("xr")},
    )
    with pytest.raises(ValueError, match="cannot import") as caught:
        layer.import_weights(wrong)
    for problem in (
        "missing: weight, shape (8, -1, 3, 3)",
        "unexpected: kernel",
        "coord_weight is (8, 1, 3, 3), want (8, 2, 3, 3)",
        "not floating-point: bias",
        "made for Coordinates('xr'), want Coordinates('xy')",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ValueError, match=r"weight is \(8, 5\), want \(8, -1, 3, 3\)"):
        layer.import_weights({"weight": np.ones((8, 5))})
    with pytest.raises(ValueError, match=r"weight is \(6, 5, 3, 3\), want \(8, 5, 3, 3\)"):
        layer.import_weights({"weight": np.ones((6, 5, 3, 3))})
    with pytest.raises(TypeError, match="mapping"):
        layer.import_weights([1])


def test_add_coords():
    x = draw((5, 3))
    layer = AddCoords("yx")
    assert layer.init(KEY, x) == {}
    grid = np.moveaxis(coordinate_grid((5, 3), "yx"), 0, -1)
    want = np.concatenate([x, np.stack([grid, grid])], axis=-1)
    assert np.array_equal(layer.apply({}, x), want)
    model = nn.Sequential([AddCoords(), nn.Conv(8, (1, 1))])
    assert model.init(KEY, x)["params"]["layers_1"]["kernel"].shape == (1, 1, C + 2, 8)
    for bad, error, message in (
        (np.ones((2, 3, 3, 1), "i4"), TypeError, "floating-point"),
        (np.ones((2, 3), "f4"), ValueError, "1, 2 or 3 axes"),
        (np.ones((2, 3, 1), "f4"), ValueError, "name axis 'y'"),
    ):
        with pytest.raises(error, match=message):
            layer.apply({}, bad)
    with pytest.raises(ValueError, match="unknown token"):
        AddCoords("q")


@pytest.mark.parametrize(("name", "count"), [("coord_cnn", 160065), ("plain_cnn", 158913)])
def test_parameter_counts(name, count):
    module = networks.build(name, "linen")
    params = jax.eval_shape(module.init, KEY, draw((32, 32), 3))["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    variables = module.import_weights(networks.initial_weights(name))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_equal_nnx(name):
    """Bitwise: both compile the same operations."""
    network, weights = networks.get(name), networks.initial_weights(name, 3)
    linen, flax_module = networks.build(name, "linen", seed=3), networks.build(name, "flax", seed=3)
    exported = linen.export_weights(linen.import_weights(weights))
    assert exported.coordinates == network.coordinates()
    assert list(exported) == list(weights)
    assert all(np.array_equal(exported[key], weights[key]) for key in weights)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *network.input_shape)).astype("f4")
    dy = None
    if name in ("coord_cnn", "deconv_classifier"):
        dy = rng.normal(size=(2, *list(network.shapes())[-1][2])).astype("f4")
    y, gradients = backends.load("linen").evaluate(linen, weights, x, dy)
    want, expected = backends.load("flax").evaluate(flax_module, weights, x, dy)
    assert np.array_equal(y, want)
    assert list(gradients) == list(expected) == ([] if dy is None else ["x", *weights])
    assert all(np.array_equal(gradients[key], expected[key]) for key in expected)


def test_build_checks_weights_and_options():
    network = networks.get("plain_cnn")
    weights = networks.initial_weights(network)
    del weights["conv1.bias"]
    with pytest.raises(ValueError, match=r"missing: conv1.bias, shape \(32,\)"):
        adapter.build(network, weights)
    conv = networks.Conv("up", 2, 4, ConvGeometry((2, 2), transposed=True, groups=2))
    with pytest.raises(NotImplementedError, match="have no groups"):
        networks.build(networks.Network("up", (2, 3, 3), (conv,)), "linen")


def test_trainer():
    coords = Coordinates("xyr")
    layers = (
        networks.Conv("conv", 2, 4, ConvGeometry((3, 3), padding=1), coords),
        networks.ReLU(),
        networks.Flatten(),
        networks.Linear("linear", 80, 3),
    )
    network = networks.Network("small", (2, 4, 5), layers)
    weights = networks.initial_weights(network)
    step, export = adapter.trainer(adapter.build(network, weights), weights)
    assert all(np.array_equal(export()[name], weights[name]) for name in weights)
    x = np.random.default_rng(0).normal(size=(6, 2, 4, 5)).astype("f4")
    losses = [step(x, np.arange(6) % 3, 0.01) for _ in range(10)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    trained = export()
    assert list(trained) == list(weights)
    assert trained.coordinates == {"conv": coords}
    assert all(not np.array_equal(trained[name], weights[name]) for name in weights)
    same, there = other.trainer(other.build(network, weights), weights)
    assert [same(x, np.arange(6) % 3, 0.01) for _ in range(10)] == losses
    assert all(np.array_equal(there()[name], trained[name]) for name in trained)
