"""The transposed layers of both Flax adapters, held to Flax's own on the concatenation."""

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from coordconv import Coordinates, coordinate_grid
from coordconv.backends import flax, linen
from coordconv.backends import jax as common
from coordconv.parity.comparison import Expected
from coordconv.reference import Reference
from definition import gamma

SHAPES = {1: (9,), 2: (5, 3), 3: (3, 5, 2)}  # whose coordinates are multiples of 1/4
PADDINGS = ["SAME", "VALID", "CIRCULAR", 2, "pairs"]
C, OUT = 3, 4


def integers(*shape):
    return np.random.default_rng(len(shape)).integers(-4, 5, shape).astype(np.float32)


def build(rank, padding, kernel=3, **options):
    if padding == "pairs":
        padding = [(2, 0), (1, 3), (4, 2)][:rank]
    # Zeros: JAX would compile the drawing of random numbers anew for every shape.
    defaults = {"coords": "yx"[-rank:], "kernel_init": nnx.initializers.zeros}
    options = {"padding": padding, **defaults, **options}
    return flax.CoordConvTranspose(C, OUT, (kernel,) * rank, rngs=nnx.Rngs(0), **options)


def fill(layer):
    """Small integers for all weights, on which no sum has any rounding."""
    layer.import_weights({k: integers(*a.shape) for k, a in layer.export_weights().items()})


def concatenated(layer, x):
    """The definition in Flax itself: concatenate, then its own transposed convolution."""
    names = ("strides", "padding", "kernel_dilation", "transpose_kernel", "use_bias")
    options = {name: getattr(layer, name) for name in names}
    n = len(layer.coords)
    options |= {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    plain = nnx.ConvTranspose(C + n, OUT, layer.kernel_size, **options)
    coordinates, axis = layer.coord_kernel[...], -2
    if layer.transpose_kernel:
        coordinates, axis = coordinates.swapaxes(-1, -2), -1
    plain.kernel[...] = jnp.concatenate([layer.kernel[...], coordinates], axis)
    if layer.use_bias:
        plain.bias[...] = layer.bias[...]
    return plain(flax.AddCoords(layer.coords)(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"transpose_kernel": True},
        {"strides": 2, "use_bias": False},
        {"strides": 3, "kernel": 2, "transpose_kernel": True},
        {"strides": 2, "kernel": 4, "kernel_dilation": 2},
    ],
    ids=["stride 1", "stride 2", "stride over kernel", "dilated"],
)
def test_equals_the_concatenation_to_the_last_bit(rank, padding, options):
    for name in {"strides", "kernel_dilation"} & options.keys():
        options = {**options, name: (options[name],) * rank}
    layer = build(rank, padding, **options)
    fill(layer)
    x = integers(2, *SHAPES[rank], C)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), concatenated(layer, x))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("outside", ["zero", "extend"])
def test_radius_and_extension_are_the_references(padding, outside):
    layer = build(2, padding, strides=(2, 1), coords=Coordinates("xr", outside=outside))
    x = np.random.default_rng(0).normal(size=(2, 5, 7, C)).astype(np.float32)
    reference = Reference(common.geometry(layer, (5, 7)), layer.coords)
    arrays = layer.export_weights()
    arguments = (np.moveaxis(x, -1, 1), arrays["weight"], arrays["coord_weight"], arrays["bias"])
    terms = (C + 2) * 9 + 1
    bound = gamma(terms, 2.0**-24) * reference.forward(*arguments, magnitudes=True)
    wanted = Expected(reference.forward(*arguments), bound)
    assert wanted.error(np.moveaxis(np.asarray(layer(jnp.asarray(x))), -1, 1)) <= 1


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_gradients_are_those_of_the_concatenation(transpose_kernel):
    layer = build(2, "SAME", strides=(2, 2), transpose_kernel=transpose_kernel)
    fill(layer)
    x, dy = integers(2, 5, 3, C), integers(2, 10, 6, OUT)

    def loss(forward):
        def value(layer, x):
            return (forward(layer, x) * dy).sum()

        return nnx.grad(value, argnums=(0, 1))(layer, jnp.asarray(x))

    found, found_x = loss(lambda layer, x: layer(x))
    wanted, wanted_x = loss(concatenated)
    np.testing.assert_array_equal(found_x, wanted_x)
    for name in ("kernel", "coord_kernel", "bias"):
        np.testing.assert_array_equal(found[name][...], wanted[name][...], err_msg=name)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_linen_equals_nnx(transpose_kernel):
    layer = build(2, "SAME", strides=(2, 1), transpose_kernel=transpose_kernel, coords="xyr")
    module = linen.CoordConvTranspose(
        OUT, (3, 3), (2, 1), coords="xyr", transpose_kernel=transpose_kernel
    )
    x = jnp.asarray(integers(2, 5, 7, C))
    variables = module.import_weights(layer.export_weights())
    np.testing.assert_array_equal(module.apply(variables, x), layer(x))
    exported = module.export_weights(variables)
    for name, array in layer.export_weights().items():
        np.testing.assert_array_equal(exported[name], array)
    drawn = module.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, variables["params"])


def test_canonical_weights_are_torchs():
    """``weight (C, out, *k)`` as torch keeps it, whichever way Flax keeps the kernel."""
    layers = [build(2, "VALID", transpose_kernel=flag) for flag in (False, True)]
    weights = layers[0].export_weights()
    assert weights["weight"].shape == (C, OUT, 3, 3)
    assert weights["coord_weight"].shape == (OUT, 2, 3, 3)
    layers[1].import_weights(weights)
    x = jnp.asarray(integers(1, 4, 4, C))
    fill(layers[0])
    layers[1].import_weights(layers[0].export_weights())
    np.testing.assert_array_equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_init(transpose_kernel):
    """One kernel is drawn over features and coordinates, or the plain layer's with zeros."""
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jax.random.normal(key, shape, dtype)

    options = {"kernel_init": init, "transpose_kernel": transpose_kernel}
    layer = build(1, "SAME", **options)
    assert seen == [(3, OUT, C + 1) if transpose_kernel else (3, C + 1, OUT)]
    assert layer.coord_kernel.shape == (3, 1, OUT)
    layer = build(1, "SAME", coord_init="zeros", **options)
    assert seen[1] == ((3, OUT, C) if transpose_kernel else (3, C, OUT))
    assert not layer.coord_kernel[...].any()
    module = linen.CoordConvTranspose(OUT, (3,), coord_init="zeros", **options)
    params = module.init(jax.random.key(0), jnp.zeros((1, 5, C)))["params"]
    assert not params["coord_kernel"].any()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_batch_axes(batch):
    """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
    layer = build(2, "SAME", strides=(2, 1), coords="yr")
    fill(layer)
    x = integers(*batch, 5, 1, C)
    y = layer(jnp.asarray(x))
    assert y.shape == (*batch, 10, 1, OUT)
    for sample, found in zip(x.reshape(-1, 5, 1, C), y.reshape(-1, 10, 1, OUT), strict=True):
        np.testing.assert_array_equal(layer(jnp.asarray(sample)), found)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_compiled_and_mapped_as_eager(rank):
    layer = build(rank, "VALID", strides=(2,) * rank, coords="rx")
    fill(layer)
    x = jnp.asarray(integers(3, *(1, 1, 5)[-rank:], C))
    y = layer(x)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), y)
    np.testing.assert_array_equal(jax.jit(jax.vmap(layer))(x), y)


def small(*shape):
    """Of one at most: with coordinates of -1, 0 and 1 all sums are exact in 16 bits, too."""
    return np.clip(integers(*shape), -1, 1)


@pytest.mark.parametrize("coords", ["yx", "rx"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(None, "bfloat16"), ("float16", "float32"), ("bfloat16", "float16"), ("bfloat16", None)],
)
def test_dtypes(dtype, param_dtype, coords):
    """The result in ``dtype``, or in what input and parameters promote to; the same numbers."""
    options = {"dtype": dtype, "param_dtype": param_dtype}
    options = {name: jnp.dtype(value) for name, value in options.items() if value}
    plain = build(2, "SAME", strides=(2, 1), coords=coords)
    layer = build(2, "SAME", strides=(2, 1), coords=coords, **options)
    weights = {name: small(*a.shape) for name, a in plain.export_weights().items()}
    plain.import_weights(weights)
    layer.import_weights(weights)
    assert layer.coord_kernel.dtype == options.get("param_dtype", jnp.float32)
    x = jnp.asarray(small(2, 3, 1 if "r" in coords else 2, C))
    y = layer(x)
    assert y.dtype == options.get("dtype", jnp.float32)
    np.testing.assert_array_equal(y.astype(jnp.float32), plain(x))
    module = linen.CoordConvTranspose(OUT, (3, 3), (2, 1), coords=coords, **options)
    again = module.apply(module.import_weights(weights), x)
    assert again.dtype == y.dtype
    np.testing.assert_array_equal(again, y)


def test_is_flaxs_own_class():
    assert isinstance(build(2, "SAME"), nnx.ConvTranspose)
    assert isinstance(linen.CoordConvTranspose(1, (1,)), nn.ConvTranspose)


def test_circular_reads_the_coordinates_all_round():
    """On a circle every output meets as many samples as any other."""
    layer = build(1, "CIRCULAR", kernel=3, strides=(2,), use_bias=False)
    layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    layer.coord_kernel[...] = jnp.ones_like(layer.coord_kernel[...])
    y = np.asarray(layer(jnp.zeros((1, 5, C))))[0, :, 0]
    grid = coordinate_grid((5,))[0]
    assert y.shape == (10,)
    assert sorted(y) == sorted([*(grid + np.roll(grid, 1)), *grid])
