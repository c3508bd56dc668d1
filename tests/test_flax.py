"""CoordConv for Flax NNX against its definition, and against ``flax.nnx.Conv``."""

import copy
import pickle

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.extend.core
import optax
from flax import nnx
from jax import lax
from jax import numpy as jnp

from coordconv import Coordinates, backends, coordinate_grid, load_weights, networks, save_weights
from coordconv.backends import flax as adapter
from coordconv.backends import jax as common
from coordconv.backends.flax import AddCoords, CoordConv
from coordconv.geometry import ConvGeometry
from coordconv.parity.comparison import expected
from coordconv.reference import Reference
from coordconv.weights import Weights

C = 4  # input channels; every case has 8 output channels and a batch of 2


def case(shape, kernel, coords=None, geometry=None, **options):
    """A layer's arguments, and the geometry that they mean, spelled out by hand."""
    sizes = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    return shape, kernel, coords, ConvGeometry(sizes, **(geometry or {})), options


SAME = {"padding": "same"}
CASES = {
    "default": case((6, 5), (3, 3), geometry=SAME),
    "same even stride": case((7, 6), (4, 3), geometry={"stride": 2, **SAME}, strides=2),
    "same lower": case(
        (6, 7),
        (4, 2),
        "xyr",
        {"padding": ((2, 1), (1, 0))},
        padding="SAME_LOWER",
    ),
    "same lower stride": case(
        (6, 7),
        (4, 4),
        geometry={"padding": ((1, 1), (2, 1)), "stride": 2},
        padding="SAME_LOWER",
        strides=(2, 2),
    ),
    "lower case": case((4, 5), (2, 2), geometry=SAME, padding="same"),
    "valid": case((6, 5), (3, 2), "yx", {"stride": (2, 1)}, padding="VALID", strides=[2, 1]),
    "kernel 1": case((4, 6), (1, 1), "yx", SAME),
    "int padding": case((5, 4), (3, 3), "y", {"padding": 2}, padding=2),
    "ints padding": case((5, 4), (3, 3), "yx", {"padding": (1, 2)}, padding=[1, 2]),
    "pairs": case((5, 4), (3, 3), "rxy", {"padding": ((2, 0), (1, 3))}, padding=((2, 0), (1, 3))),
    "negative": case(
        (6, 6), (3, 2), "xy", {"padding": ((-1, 2), (0, -2))}, padding=[(-1, 2), (0, -2)]
    ),
    "negative, holes": case(
        (5, 4),
        (3, 2),
        "xyr",
        {"padding": ((-1, 0), (-2, 1)), "input_dilation": (2, 3)},
        padding=((-1, 0), (-2, 1)),
        input_dilation=(2, 3),
    ),
    "kernel dilation": case(
        (7, 8), (3, 2), "xyr", {"dilation": (2, 3), **SAME}, kernel_dilation=(2, 3)
    ),
    "holes": case(
        (4, 3),
        (3, 3),
        None,
        {"padding": (2, 1), "input_dilation": (2, 3), "stride": 2},
        padding=(2, 1),
        input_dilation=(2, 3),
        strides=2,
    ),
    "circular": case(
        (5, 6),
        (4, 3),
        None,
        {"padding": ((1, 2), (1, 1)), "padding_mode": "circular"},
        padding="CIRCULAR",
    ),
    "circular, all options": case(
        (7, 6),
        (4, 3),
        "xyr",
        {
            "padding": ((3, 3), (1, 1)),
            "padding_mode": "circular",
            "dilation": (2, 1),
            "stride": (3, 2),
            "groups": 2,
        },
        padding="CIRCULAR",
        kernel_dilation=(2, 1),
        strides=(3, 2),
        feature_group_count=2,
    ),
    "reflect": case(
        (5, 6),
        (3, 4),
        "xyr",
        {"padding": ((1, 1), (1, 2)), "padding_mode": "reflect", "stride": 2},
        padding="REFLECT",
        strides=2,
    ),
    "groups": case((5, 4), (3, 3), geometry={"groups": 2, **SAME}, feature_group_count=2),
    "depthwise": case((5, 4), (3, 3), "xyr", {"groups": 4, **SAME}, feature_group_count=4),
    "no bias": case((4, 5), (3, 3), geometry=SAME, use_bias=False),
    "none": case(
        (4, 5),
        (3, 3),
        ["x"],
        SAME,
        strides=None,
        kernel_dilation=None,
        input_dilation=None,
    ),
    "extend": case((4, 5), (5, 3), Coordinates("xyr", outside="extend"), SAME),
    "extend, circular": case(
        (4, 5),
        (3, 3),
        Coordinates("xy", outside="extend"),
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        padding="CIRCULAR",
        strides=2,
    ),
    "extend, holes": case(
        (4, 5),
        (3, 3),
        Coordinates("yxr", outside="extend"),
        {"padding": 3, "input_dilation": 2},
        padding=3,
        input_dilation=2,
    ),
    "edges": case((4, 5), (3, 3), Coordinates("xy", align="edges"), SAME),
    "span": case((1, 6), (3, 3), Coordinates("yxr", span=(0, 3), r_center=0.5), SAME),
    "1-D": case((7,), 3, "xr", SAME),
    "causal": case((7,), (3,), geometry={"padding": ((2, 0),)}, padding="CAUSAL"),
    "causal, all options": case(
        (6,),
        (3,),
        Coordinates("rx", outside="extend"),
        {"padding": ((4, 0),), "dilation": 2, "stride": 3, "groups": 2},
        padding="CAUSAL",
        kernel_dilation=2,
        strides=3,
        feature_group_count=2,
    ),
    "3-D": case((3, 4, 2), (2, 3, 1), geometry=SAME),
    "3-D, all options": case(
        (5, 4, 3),
        (2, 3, 2),
        "zyxr",
        {"padding": ((1, 0), (2, 1), (0, 1)), "stride": (2, 1, 1), "dilation": (2, 1, 1)},
        padding=((1, 0), (2, 1), (0, 1)),
        strides=(2, 1, 1),
        kernel_dilation=(2, 1, 1),
    ),
}


def init(key, shape, dtype):
    """An initializer that JAX need not compile, for biases as well."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(0, 0.5, shape), dtype)


def build(kernel, coords=None, seed=0, **options):
    options = {"kernel_init": init, "bias_init": init, "rngs": nnx.Rngs(seed), **options}
    return CoordConv(C, 8, kernel, coords=coords, **options)


def fill(layer, largest=4):
    """Integers for all weights; and the layer."""
    rng = np.random.default_rng(3)
    weights = layer.export_weights()
    layer.import_weights(
        {k: rng.integers(-largest, largest + 1, a.shape).astype("f4") for k, a in weights.items()}
    )
    return layer


def integers(*shape, largest=4):
    return np.random.default_rng(4).integers(-largest, largest + 1, shape).astype("f4")


def draw(shape, features=C):
    return np.random.default_rng(1).normal(size=(2, *shape, features)).astype("f4")


@nnx.jit
def gradients_of(layer, x, dy):
    """The output, and the gradients of ``x`` and of the parameters."""
    graph, params = nnx.split(layer)
    y, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
    of_params, of_x = pull_back(dy)
    return y, of_x, nnx.to_pure_dict(of_params)


def first(array):
    """Channels first, in NumPy."""
    return np.moveaxis(np.asarray(array), -1, 1)


def gamma(terms, u=2.0**-24):
    return terms * u / (1 - terms * u)


def check(got, want, magnitudes, terms, u=2.0**-24):
    """The componentwise bound of a sum of so many terms."""
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want)
    assert (error <= gamma(terms, u) * magnitudes).all(), (
        error - gamma(terms, u) * magnitudes
    ).max()


def against_reference(layer, geometry, x, dy):
    """Every output and gradient, as ``check`` wants them: (name, got, want, magnitudes, terms)."""
    weights = {"bias": None, **layer.export_weights()}
    y, of_x, of_params = gradients_of(layer, x, np.moveaxis(dy, 1, -1))
    x, reference = first(x), Reference(geometry, layer.coords)
    n, groups, taps = len(layer.coords), geometry.groups, geometry.taps
    outer, inner = weights["weight"].shape[:2]
    summed = len(x) * int(np.prod(dy.shape[2:])) + 2
    arguments = (x, weights["weight"], weights["coord_weight"], weights["bias"])
    yield (
        "y",
        first(y),
        reference.forward(*arguments),
        reference.forward(*arguments, magnitudes=True),
        (inner + n) * taps + 1,
    )
    back = (dy, weights["weight"], x.shape[2:])
    yield (
        "x",
        first(of_x),
        reference.input_gradient(*back),
        reference.input_gradient(*back, magnitudes=True),
        outer // groups * taps,
    )
    want = reference.weight_gradients(x, dy)
    magnitudes = reference.weight_gradients(x, dy, magnitudes=True)
    for name, got in common.to_weights(of_params).items():
        yield name, got, want[name], magnitudes[name], summed


@pytest.mark.parametrize("name", CASES)
def test_options(name):
    shape, kernel, coords, geometry, options = CASES[name]
    assert common.geometry(build(kernel, coords, **options), shape) == geometry


# Those left out say what another says: to compile each takes long.
SAID = ("lower case", "int padding", "ints padding", "none", "negative", "circular", "3-D", "edges")


@pytest.mark.parametrize("name", [name for name in CASES if name not in SAID])
def test_output_and_gradients(name):
    shape, kernel, coords, geometry, options = CASES[name]
    layer = build(kernel, coords, **options)
    dy = np.random.default_rng(2).normal(size=(2, 8, *geometry.output_shape(shape))).astype("f4")
    checked = set()
    for quantity, *rest in against_reference(layer, geometry, draw(shape), dy):
        check(*rest)
        checked.add(quantity)
    assert checked == {"y", "x", "weight", "coord_weight"} | ({"bias"} if layer.use_bias else set())


@pytest.mark.parametrize(
    "name",
    [
        "same lower stride",
        "lower case",
        "negative, holes",
        "circular, all options",
        "reflect",
        "depthwise",
        "causal",
    ],
)
def test_definition_by_concatenation(name):
    """Flax's own convolution of features and coordinates, under the very same options."""
    shape, kernel, coords, geometry, options = CASES[name]
    layer, x, groups = build(kernel, coords, **options), draw(shape), geometry.groups
    grid = np.broadcast_to(
        np.moveaxis(coordinate_grid(shape, layer.coords), 0, -1), (2, *shape, len(layer.coords))
    )
    parts = [part for group in np.split(x, groups, axis=-1) for part in (group, grid)]
    options = {**options, "kernel_init": init, "rngs": nnx.Rngs(0)}
    fused = nnx.Conv(C + groups * len(layer.coords), 8, kernel, **options)
    fused.kernel[...] = jnp.concatenate([layer.kernel[...], layer.coord_kernel[...]], axis=-2)
    if layer.use_bias:
        fused.bias[...] = layer.bias[...]
    arguments = [first(x), *layer.export_weights().values()]
    magnitudes = Reference(geometry, layer.coords).forward(*arguments, magnitudes=True)
    want = first(fused(np.concatenate(parts, axis=-1)))
    terms = (C // groups + len(layer.coords)) * geometry.taps + 1
    check(first(layer(x)), want.astype(np.float64), magnitudes, 2 * terms)


@pytest.mark.parametrize(
    ("shape", "kernel", "coords", "geometry", "options"),
    [
        case((5, 9), (3, 3), geometry=SAME),
        case((17, 3), (4, 3), "yx", {"stride": 2, **SAME}, strides=2),
        case(
            (9, 5),
            (3, 3),
            Coordinates("xy", outside="extend"),
            {"padding": 2, "groups": 2},
            padding=2,
            feature_group_count=2,
        ),
        case(
            (5, 3),
            (3, 2),
            "y",
            {"padding": ((1, 1), (0, 1)), "padding_mode": "circular", "stride": 2},
            padding="CIRCULAR",
            strides=2,
        ),
        case(
            (17,),
            3,
            geometry={"padding": ((4, 0),), "dilation": 2},
            padding="CAUSAL",
            kernel_dilation=2,
        ),
        case((3, 5, 2), (2, 2, 2), "zyx", SAME),
        case((4, 8), (3, 3), Coordinates("xy", align="edges"), SAME),
    ],
)
def test_exact_arithmetic_is_bitwise(shape, kernel, coords, geometry, options):
    layer, rng = build(kernel, coords, **options), np.random.default_rng(3)
    layer.import_weights(
        {
            name: rng.integers(-4, 5, a.shape).astype("f4")
            for name, a in layer.export_weights().items()
        }
    )
    x = rng.integers(-8, 9, (2, *shape, C)).astype("f4")
    dy = rng.integers(-4, 5, (2, 8, *geometry.output_shape(shape))).astype("f4")
    for quantity, got, want, *_ in against_reference(layer, geometry, x, dy):
        assert np.array_equal(got, want), quantity
        if quantity == "y":
            assert np.array_equal(first(layer(x)), got)  # compiled as eager


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_batch_axes(batch):
    """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
    layer = fill(build((3, 2), "xyr", strides=2))
    x = integers(*batch, 5, 1, C)
    y = layer(x)
    assert y.shape == (*batch, 3, 1, 8)
    one_by_one = [layer(sample) for sample in x.reshape(-1, 5, 1, C)]
    assert np.array_equal(y.reshape(-1, 3, 1, 8), np.reshape(one_by_one, (-1, 3, 1, 8)))


def test_mask_is_for_the_features():
    mask = np.tril(np.ones((3, 3, C, 8), "f4"))
    masked, plain = build((3, 3), mask=jnp.asarray(mask)), build((3, 3))
    plain.kernel[...] *= mask
    assert np.array_equal(masked(draw((4, 5))), plain(draw((4, 5))))
    wrong = build((3, 3), mask=jnp.ones((3, 3, C + 2, 8)))
    with pytest.raises(ValueError, match="Mask"):
        wrong(draw((4, 5)))


@pytest.mark.parametrize("kernel", [(), (3, 3, 3, 3)])
def test_a_kernel_of_no_rank_that_there_is(kernel):
    with pytest.raises(ValueError, match=f"1, 2 or 3 axes, got {len(kernel)}"):
        build(kernel)


def test_own_errors_of_flax():
    with pytest.raises(ValueError, match="padding"):
        build((3, 3), padding=(1, 2, 3))(draw((4, 5)))
    with pytest.raises(ValueError, match="String padding is not implemented"):
        build((3, 3), padding="CIRCULAR", input_dilation=2)(draw((4, 5)))
    with pytest.raises(ValueError, match="Causal"):
        build((3, 3), padding="CAUSAL")(draw((4, 5)))
    with pytest.raises(TypeError, match="positional"):
        CoordConv(4, 8, (3, 3), 1, "SAME", rngs=nnx.Rngs(0))  # keyword only from padding on


def test_fan_in_draws_one_kernel():
    options = {"kernel_size": (3, 2), "bias_init": init}
    layer = CoordConv(4, 8, **options, coords="xyr", rngs=nnx.Rngs(0))
    plain = nnx.Conv(4 + 3, 8, **options, rngs=nnx.Rngs(0))
    kernel = jnp.concatenate([layer.kernel[...], layer.coord_kernel[...]], axis=-2)
    assert np.array_equal(kernel, plain.kernel[...])
    assert np.array_equal(layer.bias[...], plain.bias[...])


def test_kernel_init_sees_the_fused_shape():
    asked = []

    def count(key, shape, dtype):
        asked.append((shape, dtype))
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    layer = build((3, 3), "xyr", kernel_init=count, feature_group_count=2)
    assert asked == [((3, 3, C // 2 + 3, 8), jnp.float32)]
    assert layer.kernel.shape == layer.kernel_shape == (3, 3, 2, 8)
    fused = np.arange(9 * 5 * 8, dtype="f4").reshape(3, 3, 5, 8)
    assert np.array_equal(layer.kernel[...], fused[:, :, :2])
    assert np.array_equal(layer.coord_kernel[...], fused[:, :, 2:])
    assert len(asked) == 1
    assert len(nnx.clone(layer).kernel.shape) == 4


def test_zeros_is_the_plain_layer():
    options = {"kernel_size": (3, 2), "bias_init": init}
    layer = CoordConv(7, 8, **options, coords="xyr", coord_init="zeros", rngs=nnx.Rngs(0))
    plain = nnx.Conv(7, 8, **options, rngs=nnx.Rngs(0))
    assert np.array_equal(layer.kernel[...], plain.kernel[...])
    assert np.array_equal(layer.bias[...], plain.bias[...])
    assert layer.coord_kernel.shape == (3, 2, 3, 8)
    assert not layer.coord_kernel[...].any()
    assert np.array_equal(layer(draw((4, 5), 7)), plain(draw((4, 5), 7)))


@pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
def test_metadata(coord_init):
    layer = build(
        (3, 3), kernel_metadata={"mine": 1}, bias_metadata={"other": 2}, coord_init=coord_init
    )
    assert layer.kernel.mine == layer.coord_kernel.mine == 1
    assert layer.bias.other == 2
    assert not layer.coord_kernel.has_metadata("other")
    with jax.set_mesh(jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))):
        names = (None, None, "m", None)
        by_metadata = build(
            (3, 3), kernel_metadata={"out_sharding": names, "mine": 1}, coord_init=coord_init
        )
        by_init = build(
            (3, 3),
            kernel_init=nnx.with_partitioning(init, names, mine=1),
            coord_init=coord_init,
        )
    for layer in (by_metadata, by_init):
        assert layer.kernel.out_sharding == names
        assert layer.kernel.mine == 1
        # a mesh that divides C channels seldom divides n
        assert not layer.coord_kernel.has_metadata("out_sharding")
        assert layer.coord_kernel.mine == 1
        assert layer(draw((4, 5))).shape == (2, 4, 5, 8)


def test_out_sharding():
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        y = build((3, 3), "xyr")(draw((4, 5)), out_sharding=jax.P("m"))
        assert y.sharding.spec[0] == "m"


@pytest.mark.parametrize(("dtype", "u"), [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
def test_narrow_dtypes(dtype, u):
    """Within the bound of the narrow dtype, both of its parameters and of its arithmetic."""
    layer = build((3, 3), "xyr", param_dtype=dtype)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(dtype)}
    x, weights = draw((6, 7)).astype(dtype), layer.export_weights()
    assert weights["coord_weight"].dtype == (np.float32 if dtype == jnp.bfloat16 else np.float16)
    arguments = (first(x).astype("f4"), weights["weight"], weights["coord_weight"], weights["bias"])
    reference = Reference(ConvGeometry((3, 3), padding="same"), layer.coords)
    y = layer(x)
    assert y.dtype == dtype
    bound = reference.forward(*arguments, magnitudes=True)
    check(first(y).astype("f4"), reference.forward(*arguments), bound, (C + 3) * 9 + 1, u)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_neighbours_differ_in_bfloat16(param_dtype):
    """Summed in float32 and cast once: the coordinates themselves lie closer than bfloat16 has.

    All 1025 of them are multiples of 1/512, and exact in float32.
    """
    options = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "use_bias": False}
    layer = build((1, 2), "x", padding="VALID", **options)
    step = jnp.array([-1.0, 1.0], param_dtype).reshape(1, 2, 1, 1)
    layer.coord_kernel[...] = jnp.broadcast_to(step, (1, 2, 1, 8))
    y = layer(np.zeros((1, 1, 1025, C), "f4"))  # the difference of neighbours, times one
    assert y.dtype == jnp.bfloat16
    assert (y == 2 / 1024).all()


def test_dtype_options():
    x = draw((4, 5))
    assert build((3, 3), dtype=jnp.float16)(x).dtype == jnp.float16
    wide = build((3, 3), param_dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert wide(x.astype(jnp.bfloat16)).dtype == jnp.float32
    custom = build(
        (3, 3), promote_dtype=lambda args, dtype: tuple(a.astype("bfloat16") for a in args)
    )
    assert custom(x).dtype == jnp.bfloat16
    called = []

    def convolution(*args, out_sharding, **kwargs):
        called.append(kwargs["precision"])
        return lax.conv_general_dilated(*args, **kwargs)

    options = {"conv_general_dilated": convolution, "precision": lax.Precision.HIGH}
    assert np.array_equal(build((3, 3), **options)(x), build((3, 3))(x))
    assert called == [lax.Precision.HIGH]


def test_float64():
    with jax.enable_x64(True):
        layer = build((3, 3), "xyr", param_dtype=jnp.float64)
        x = np.random.default_rng(0).normal(size=(2, 6, 7, C))
        arguments = [first(x), *layer.export_weights().values()]
        reference = Reference(ConvGeometry((3, 3), padding="same"), layer.coords)
        bound = reference.forward(*arguments, magnitudes=True)
        # the reference rounds as much as the layer does
        check(
            first(layer(x)), reference.forward(*arguments), bound, 2 * ((C + 3) * 9 + 1), 2.0**-53
        )


@pytest.mark.parametrize(("kernel", "count"), [((3, 3), 7), ((3, 7), 8)])
def test_products_are_of_float32(kernel, count):
    """Whatever the layer's own precision: accelerators would shorten the coordinates."""
    layer = build(kernel, "xyr", precision=lax.Precision.DEFAULT)
    shape = (64, 80)  # too large for one table, so that every kind of product is in it
    geometry = common.geometry(layer, shape)

    def total(coord_kernel):
        return (common.position_bias(coord_kernel, geometry, layer.coords, shape) ** 2).sum()

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(inner)

    jaxpr = jax.make_jaxpr(jax.grad(total))(layer.coord_kernel[...]).jaxpr
    kinds = "dot_general", "conv_general_dilated"
    products = [e for e in equations(jaxpr) if e.primitive.name in kinds]
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert len(products) == count  # of a short axis, the last product is written as sums
    assert all(e.params["precision"] == highest for e in products)


def test_transformations():
    layer, x = fill(build((1, 3), "xyr", padding="REFLECT")), integers(2, 1, 5, C)
    with jax.checking_leaks():
        compiled = nnx.jit(lambda layer, x: layer(x))(layer, x)
    y = layer(x)  # what the trace made was not kept
    assert np.array_equal(compiled, y)
    assert np.array_equal(jax.jit(jax.vmap(layer))(x), y)
    gradients = nnx.jit(nnx.grad(lambda layer: (layer(x) ** 2).sum()))(layer)
    assert gradients.coord_kernel.shape == layer.coord_kernel.shape
    assert all(np.abs(g).max() > 0 for g in map(np.asarray, jax.tree.leaves(gradients)))
    # an ensemble: drawn, and called, under vmap
    keys = jax.random.split(jax.random.key(0), 3)

    def constant(key, shape, dtype):
        return jnp.full(shape, jax.random.key_data(key)[0], dtype)

    @nnx.jit
    @nnx.vmap
    def make(key):
        return CoordConv(C, 8, 3, kernel_init=constant, rngs=nnx.Rngs(params=key))

    many = make(keys)
    assert len(np.unique(many.coord_kernel)) == 3
    assert many.coord_kernel.shape == (3, 3, 1, 8)
    call = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))
    assert call(many, draw((5, 6))).shape == (3, 2, 5, 6, 8)


def test_module_tools():
    layer, x = build((3, 3), "xyr", use_bias=False), draw((4, 5))
    assert isinstance(layer, nnx.Conv)
    assert layer.bias is None
    assert set(nnx.to_pure_dict(nnx.state(layer))) == {"kernel", "coord_kernel"}
    graph, state = nnx.split(layer)
    assert np.array_equal(nnx.merge(graph, state)(x), layer(x))
    assert np.array_equal(nnx.clone(layer)(x), layer(x))
    assert hash(graph) == hash(nnx.graphdef(build((3, 3), "xyr", use_bias=False, seed=1)))
    assert "coords=Coordinates('xyr')" in repr(layer)
    other = build((3, 3), "xyr", use_bias=False, seed=1)
    nnx.update(other, state)
    for twin in (copy.deepcopy(layer), other):
        assert np.array_equal(twin(x), layer(x))
    twin = pickle.loads(pickle.dumps(CoordConv(C, 8, 3, rngs=nnx.Rngs(0))))
    assert twin.coords == Coordinates("x")
    assert twin(integers(5, C)).shape == (5, 8)
    abstract = nnx.eval_shape(lambda: CoordConv(C, 8, (3, 3), rngs=nnx.Rngs(0)))
    assert abstract.coord_kernel.shape == (3, 3, 2, 8)


def test_each_parameter_is_listed_once():
    model = nnx.Sequential(build((3, 3)), nnx.relu)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert sorted(path[-1] for path, _ in flat) == ["bias", "coord_kernel", "kernel"]


@pytest.mark.parametrize("frozen", ["kernel", "coord_kernel", "bias"])
def test_a_frozen_parameter_stays_while_others_move(frozen):
    layer, x = fill(build((1, 3))), integers(2, 1, 5, C)
    trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(frozen)))
    before = nnx.to_pure_dict(nnx.state(layer))
    wrt = nnx.DiffState(0, trained)
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum(), argnums=wrt)(layer)
    assert set(nnx.to_pure_dict(gradients)) == {"kernel", "coord_kernel", "bias"} - {frozen}
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=trained)
    optimizer.update(layer, gradients)
    after = nnx.to_pure_dict(nnx.state(layer))
    assert {name for name in before if np.array_equal(after[name], before[name])} == {frozen}


def test_weight_decay_of_kernels_alone():
    layer = fill(build((1, 3)))
    before = nnx.to_pure_dict(nnx.state(layer))
    decay = optax.add_decayed_weights(0.5, mask=lambda params: jax.tree.map(is_kernel, params))
    optimizer = nnx.Optimizer(layer, optax.chain(decay, optax.sgd(0.5)), wrt=nnx.Param)
    optimizer.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer, nnx.Param)))
    for name, value in nnx.to_pure_dict(nnx.state(layer)).items():
        factor = 1 if name == "bias" else 0.75  # by learning rate and decay
        assert np.array_equal(value, before[name] * factor)


def is_kernel(parameter):
    return parameter.ndim > 1


def test_initialisers_of_flaxs_class_find_the_feature_kernel():
    model = nnx.Sequential(build((3, 3)), nnx.relu)
    layer = model.layers[0]
    before = layer.coord_kernel[...]
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.kernel[...] = jnp.full_like(module.kernel[...], 0.5)
    assert (layer.kernel[...] == 0.5).all()
    assert np.array_equal(layer.coord_kernel[...], before)


@pytest.mark.filterwarnings("error")  # JAX warns of a cast that it makes by itself
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_round_trip(dtype, tmp_path):
    options = {"param_dtype": dtype, "feature_group_count": 2}
    layer = build((3, 2), "xyr", **options)
    weights = layer.export_weights()
    assert {name: a.shape for name, a in weights.items()} == {
        "weight": (8, 2, 3, 2),
        "coord_weight": (8, 3, 3, 2),
        "bias": (8,),
    }
    kernel = np.asarray(layer.kernel[...], "f4")
    assert np.array_equal(weights["weight"][5, 1, 2, 0], kernel[2, 0, 1, 5])
    weights["bias"][:] += 0  # a copy, not a read-only view
    save_weights(tmp_path / "layer", weights)
    other = build((3, 2), "xyr", seed=7, **options)
    other.import_weights(load_weights(tmp_path / "layer"))
    assert other.kernel.dtype == dtype
    assert np.array_equal(other(draw((4, 5))), layer(draw((4, 5))))
    swapped = Weights(
        {**weights, "coord_weight": weights["coord_weight"][:, [1, 0, 2]]}, {"": Coordinates("yxr")}
    )
    other.import_weights(swapped)
    assert np.array_equal(other.coord_kernel[...], layer.coord_kernel[...])


def test_import_lists_all_problems_and_changes_nothing():
    layer = build((3, 3))
    before = layer.export_weights()
    wrong = Weights(
        {"weight": np.ones((8, 4, 3, 2)), "bias": np.ones(8, int), "kernel": np.ones(1)},
        {"": Coordinates("xr")},
    )
    with pytest.raises(ValueError, match="cannot import") as caught:
        layer.import_weights(wrong)
    message = str(caught.value)
    for problem in (
        "missing: coord_weight, shape (8, 2, 3, 3)",
        "unexpected: kernel",
        "weight is (8, 4, 3, 2), want (8, 4, 3, 3)",
        "not floating-point: bias",
        "made for Coordinates('xr'), want Coordinates('xy')",
    ):
        assert problem in message
    after = layer.export_weights()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    with pytest.raises(TypeError, match="mapping"):
        layer.import_weights([1])


def test_add_coords():
    x = draw((5, 3))
    y = AddCoords("yx")(x)
    grid = np.moveaxis(coordinate_grid((5, 3), "yx"), 0, -1)
    assert np.array_equal(y, np.concatenate([x, np.stack([grid, grid])], axis=-1))
    assert AddCoords()(np.ones((2, 4, 1), "f2")).dtype == jnp.float16
    assert AddCoords()(np.ones((2, 2, 3, 4, 1), "f4")).shape == (2, 2, 3, 4, 4)
    assert jax.jit(AddCoords("r"))(x).shape == (2, 5, 3, 5)
    for bad, error, message in (
        (np.ones((2, 3, 3, 1), "i4"), TypeError, "floating-point"),
        (np.ones((2, 3), "f4"), ValueError, "1, 2 or 3 axes"),
        (np.ones((2, 0, 3), "f4"), ValueError, "no empty axis"),
        (np.ones((2, 3, 1), "f4"), ValueError, "name axis 'y'"),
    ):
        with pytest.raises(error, match=message):
            AddCoords("xy")(bad)
    with pytest.raises(ValueError, match="unknown token"):
        AddCoords("q")


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2},
        {"stride": (3, 2), "padding": (1, 0), "output_padding": (1, 0)},
        {"stride": 2, "padding": ((2, 1), (0, -1)), "dilation": (1, 2), "output_padding": 1},
    ],
)
def test_transposed_kernels(geometry):
    """Flax's plain transposed convolution is torch's, reversed along its spatial axes."""
    geometry = ConvGeometry((3, 2), transposed=True, **geometry)
    layer = networks.Conv("up", C, 8, geometry)
    network = networks.Network("one", (C, 4, 5), (layer,))
    weights, x = networks.initial_weights(network), first(draw((4, 5)))
    dy = np.random.default_rng(2).normal(size=(2, *layer.output_shape((C, 4, 5)))).astype("f4")
    module = adapter.build(network, weights)
    assert isinstance(module.up, nnx.ConvTranspose)
    y, gradients = adapter.evaluate(module, weights, x, dy)
    reference, arrays = Reference(geometry), (weights["up.weight"], None, weights["up.bias"])
    check(
        y, reference.forward(x, *arrays), reference.forward(x, *arrays, magnitudes=True), C * 6 + 1
    )
    want = reference.weight_gradients(x, dy)
    magnitudes = reference.weight_gradients(x, dy, magnitudes=True)
    for name in ("weight", "bias"):
        check(gradients[f"up.{name}"], want[name], magnitudes[name], dy[:, 0].size + 2)
    assert module.export_weights()["up.weight"].shape == (C, 8, 3, 2)
    assert np.array_equal(module.export_weights()["up.weight"], weights["up.weight"])


@pytest.mark.parametrize(("name", "count"), [("coord_cnn", 160065), ("plain_cnn", 158913)])
def test_parameter_counts(name, count):
    module = networks.build(name, "flax")
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param))) == count
    assert module(draw((32, 32), 3)).shape == (2, 1)


def hold(network, backend, weights, x, dy=None):
    """Hold a network's output, and all gradients if asked for, to their bounds."""
    module = networks.build(network, backend)
    y, gradients = backends.load(backend).evaluate(module, weights, x, dy)
    shape = (len(x), *list(network.shapes())[-1][2])
    results = expected(network, weights, x, np.zeros(shape) if dy is None else dy)
    assert list(gradients) == ([] if dy is None else ["x", *weights])
    for name, found in {"y": y, **gradients}.items():
        assert results[name].error(found) <= 1, name


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks(name):
    network, weights = networks.get(name), networks.initial_weights(name, 3)
    module = networks.build(name, "flax", seed=3)
    exported = module.export_weights()
    assert list(exported) == list(weights)
    assert exported.coordinates == network.coordinates()
    assert all(np.array_equal(exported[key], weights[key]) for key in weights)
    x = np.random.default_rng(0).normal(size=(2, *network.input_shape)).astype("f4")
    hold(network, "flax", weights, x)


def test_network_gradients():
    network = networks.get("coord_cnn")
    weights = networks.initial_weights(network)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 32, 32)).astype("f4"), rng.normal(size=(2, 1)).astype("f4")
    hold(network, "flax", weights, x, dy)


def test_network_import_errors():
    module = networks.build("plain_cnn", "flax")
    before = module.export_weights()
    weights = dict(before)
    del weights["conv1.bias"]
    with pytest.raises(ValueError, match=r"missing: conv1.bias, shape \(32,\)"):
        module.import_weights({k: w * 2 for k, w in weights.items()})
    assert all(np.array_equal(before[k], w) for k, w in module.export_weights().items())


def one(in_channels=C, coords=None, **geometry):
    """A network of one convolution."""
    conv = networks.Conv("conv", in_channels, 8, ConvGeometry((3, 2), **geometry), coords)
    return networks.Network("one", (in_channels, 6, 7), (conv,))


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular", "stride": 2},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": "same", "stride": 2, "input_dilation": 2},
        {"transposed": True, "groups": 2},
    ],
)
@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_options_that_flax_lacks(geometry, backend):
    with pytest.raises(NotImplementedError, match="Flax (transposed )?convolutions have no"):
        networks.build(one(**geometry), backend)


@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_padding_that_xla_gets_wrong(backend):
    for geometry in ({"transposed": True, "padding": ((3, 0), 0)}, {"padding": ((-1, 1), 0)}):
        with pytest.raises(NotImplementedError, match="XLA's gradient of a kernel is wrong"):
            networks.build(one(**geometry), backend)
        networks.build(one(**geometry, stride=2), backend)


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": "same", "stride": 2, "groups": 2},
        {"padding": ((2, -1), (0, 3)), "input_dilation": 2},
        {"padding": ((2, 2), (1, 2)), "dilation": (2, 3), "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": "same", "input_dilation": 2},
        {"padding": 0, "padding_mode": "replicate"},
    ],
)
@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_options_that_flax_has(geometry, backend):
    network = one(coords=Coordinates("xyr"), **geometry)
    weights, x = networks.initial_weights(network), first(draw((6, 7)))
    hold(network, backend, weights, x)


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
    module = adapter.build(network, weights)
    step, export = adapter.trainer(module, weights)
    assert all(np.array_equal(export()[name], weights[name]) for name in weights)
    x = np.random.default_rng(0).normal(size=(6, 2, 4, 5)).astype("f4")
    labels = np.arange(6) % 3
    logits = expected(network, weights, x, np.zeros((6, 3)))["y"].value
    chosen = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    losses = [step(x, labels, 0.01)]
    assert isinstance(losses[0], float)
    assert losses[0] == pytest.approx((np.log(np.exp(logits).sum(axis=1)) - chosen).mean())
    # Adam's first step is the learning rate, along the sign of the gradient
    moved = np.abs(export()["conv.coord_weight"] - weights["conv.coord_weight"])
    assert np.allclose(moved, 0.01, rtol=1e-3)
    losses += [step(x, labels, 0.01) for _ in range(9)]
    assert losses == sorted(losses, reverse=True)
    trained = export()
    assert list(trained) == list(weights)
    assert trained.coordinates == {"conv": coords}
