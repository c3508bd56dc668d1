"""The transposed layers of NNX and Linen, held to Flax's own on features and coordinates."""

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
from flax import nnx
from flax_cases import appended, check, integers
from harness import WAYS
from jax import numpy as jnp

from coordconv import Coordinates, coordinate_grid, position_bias
from coordconv.backends import flax, linen
from coordconv.backends.jax import options
from coordconv.reference import Reference

SHAPES = {1: (9,), 2: (5, 3), 3: (3, 5, 2)}  # whose coordinates are multiples of 1/4
PADDINGS = ["SAME", "VALID", "CIRCULAR", 2, "pairs"]
C, OUT = 3, 4


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", request.param)
    return request.param


def build(rank, padding, kernel=3, **given):
    if padding == "pairs":
        padding = [(2, 0), (1, 3), (4, 2)][:rank]
    # Zeros: JAX would compile the drawing of random numbers anew for every shape.
    defaults = {"coords": "yx"[-rank:], "kernel_init": nnx.initializers.zeros}
    given = {"padding": padding, **defaults, **given}
    return flax.CoordConvTranspose(C, OUT, (kernel,) * rank, rngs=nnx.Rngs(0), **given)


def fill(layer):
    """Small integers for all weights, on which no sum has any rounding; and the layer."""
    layer.import_weights({k: integers(*a.shape) for k, a in layer.export_weights().items()})
    return layer


def plain(layer):
    """Flax's own transposed convolution over features and coordinates, with the same kernel."""
    names = ("strides", "padding", "kernel_dilation", "transpose_kernel", "use_bias")
    given = {name: getattr(layer, name) for name in names}
    given |= {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    fused = nnx.ConvTranspose(C + len(layer.coords), OUT, layer.kernel_size, **given)
    nnx.update(fused, nnx.state(layer))
    return fused


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "given",
    [
        {"transpose_kernel": True},
        {"strides": 2, "use_bias": False},
        {"strides": 3, "kernel": 2, "transpose_kernel": True},
        {"strides": 2, "kernel": 4, "kernel_dilation": 2},
    ],
    ids=["stride 1", "stride 2", "stride over kernel", "dilated"],
)
def test_equals_the_plain_one_to_the_last_bit(rank, padding, given, monkeypatch):
    for name in {"strides", "kernel_dilation"} & given.keys():
        given = {**given, name: (given[name],) * rank}
    layer = fill(build(rank, padding, **given))
    x = integers(2, *SHAPES[rank], C)
    wanted = plain(layer)(appended(x, layer.coords))
    for way in WAYS:
        monkeypatch.setattr(position_bias, "FORCED", way)
        np.testing.assert_array_equal(layer(x), wanted, err_msg=way)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("outside", ["zero", "extend"])
def test_radius_and_extension_are_the_references(padding, outside, way):
    layer = build(2, padding, strides=(2, 1), coords=Coordinates("xr", outside=outside))
    layer.import_weights(
        {
            name: np.random.default_rng(1).normal(size=a.shape).astype("f4")
            for name, a in layer.export_weights().items()
        }
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 7, C)).astype(np.float32)
    reference = Reference(options.geometry(layer, (5, 7)), layer.coords)
    arguments = (np.moveaxis(x, -1, 1), *layer.export_weights().values())
    bound = reference.forward(*arguments, magnitudes=True)
    got = np.moveaxis(np.asarray(layer(jnp.asarray(x))), -1, 1)
    check(got, reference.forward(*arguments), bound, (C + 2) * 9 + 1)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_gradients_are_those_of_the_plain_one(transpose_kernel, way):
    layer = fill(build(2, "SAME", strides=(2, 2), transpose_kernel=transpose_kernel))
    x, dy = integers(2, 5, 3, C), integers(2, 10, 6, OUT)

    def gradients(layer, x):
        return nnx.grad(lambda layer, x: (layer(x) * dy).sum(), argnums=(0, 1))(layer, x)

    found, found_x = nnx.jit(gradients)(layer, jnp.asarray(x))
    wanted, wanted_x = gradients(plain(layer), jnp.asarray(appended(x, layer.coords)))
    np.testing.assert_array_equal(found_x, wanted_x[..., :C])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(found[name][...], wanted[name][...], err_msg=name)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_linen_equals_nnx(transpose_kernel, way):
    layer = fill(build(2, "SAME", strides=(2, 1), transpose_kernel=transpose_kernel, coords="xyr"))
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
    """``weight (C + n, out, *k)`` as torch keeps it, whichever way Flax keeps the kernel."""
    layers = [build(2, "VALID", transpose_kernel=flag) for flag in (False, True)]
    weights = fill(layers[0]).export_weights()
    assert weights["weight"].shape == (C + 2, OUT, 3, 3)
    layers[1].import_weights(weights)
    x = jnp.asarray(integers(1, 4, 4, C))
    np.testing.assert_array_equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_init(transpose_kernel):
    """One kernel is drawn over features and coordinates, or the plain layer's with zeros."""
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jnp.ones(shape, dtype)

    def whole(channels):
        return (3, OUT, channels) if transpose_kernel else (3, channels, OUT)

    given = {"kernel_init": init, "transpose_kernel": transpose_kernel}
    layer = build(1, "SAME", **given)
    assert seen == [whole(C + 1)] == [layer.kernel.shape]
    layer = build(1, "SAME", coord_init="zeros", **given)
    assert seen[1] == whole(C)
    module = linen.CoordConvTranspose(OUT, (3,), coord_init="zeros", **given)
    params = module.init(jax.random.key(0), jnp.zeros((1, 5, C)))["params"]
    for kernel in (layer.kernel[...], params["kernel"]):
        assert kernel.shape == whole(C + 1)
        features, coordinates = jnp.split(kernel, [C], axis=-1 if transpose_kernel else -2)
        assert features.all()
        assert not coordinates.any()


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_fan_in_is_the_plain_ones_draw(transpose_kernel):
    given = {"transpose_kernel": transpose_kernel, "rngs": nnx.Rngs(3)}
    layer = flax.CoordConvTranspose(C, OUT, (3, 2), **given)
    fused = nnx.ConvTranspose(C + 2, OUT, (3, 2), **{**given, "rngs": nnx.Rngs(3)})
    np.testing.assert_array_equal(layer.kernel[...], fused.kernel[...])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_batch_axes(batch, way):
    """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
    layer = fill(build(2, "SAME", strides=(2, 1), coords="yr"))
    x = integers(*batch, 5, 1, C)
    y = layer(jnp.asarray(x))
    assert y.shape == (*batch, 10, 1, OUT)
    for sample, found in zip(x.reshape(-1, 5, 1, C), y.reshape(-1, 10, 1, OUT), strict=True):
        np.testing.assert_array_equal(layer(jnp.asarray(sample)), found)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_compiled_and_mapped_as_eager(rank, way):
    layer = fill(build(rank, "VALID", strides=(2,) * rank, coords="rx"))
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
    given = {"dtype": dtype, "param_dtype": param_dtype}
    given = {name: jnp.dtype(value) for name, value in given.items() if value}
    wide = build(2, "SAME", strides=(2, 1), coords=coords)
    layer = build(2, "SAME", strides=(2, 1), coords=coords, **given)
    weights = {name: small(*a.shape) for name, a in wide.export_weights().items()}
    wide.import_weights(weights)
    layer.import_weights(weights)
    assert layer.kernel.dtype == given.get("param_dtype", jnp.float32)
    x = jnp.asarray(small(2, 3, 1 if "r" in coords else 2, C))
    y = layer(x)
    assert y.dtype == given.get("dtype", jnp.float32)
    np.testing.assert_array_equal(y.astype(jnp.float32), wide(x))
    module = linen.CoordConvTranspose(OUT, (3, 3), (2, 1), coords=coords, **given)
    again = module.apply(module.import_weights(weights), x)
    assert again.dtype == y.dtype
    np.testing.assert_array_equal(again, y)


def test_circular_reads_the_coordinates_all_round(way):
    """On a circle every output meets as many samples as any other."""
    layer = build(1, "CIRCULAR", kernel=3, strides=(2,), use_bias=False)
    kernel = np.zeros((3, C + 1, OUT), "f4")
    kernel[:, C:] = 1
    layer.kernel[...] = kernel
    y = np.asarray(layer(jnp.zeros((1, 5, C))))[0, :, 0]
    grid = coordinate_grid((5,))[0]
    assert y.shape == (10,)
    assert sorted(y) == sorted([*(grid + np.roll(grid, 1)), *grid])
