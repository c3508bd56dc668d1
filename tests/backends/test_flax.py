"""CoordConv for Flax NNX: what is special to it, and to the options of Flax.

``test_layers.py`` has what holds for every backend, ``test_linen.py`` what is special to Linen.
"""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.export
import optax
from flax import nnx
from flax_cases import (
    CASES,
    OUT,
    SAME,
    C,
    appended,
    case,
    check,
    check_all,
    draw,
    equal_all,
    first,
    gradient,
    init,
    integers,
    normal,
    signature_is_the_plain_ones,
)
from harness import WAYS
from jax import lax
from jax import numpy as jnp

from coordconv import Coordinates, coordinate_grid, position_bias
from coordconv.backends.flax import AddCoords, CoordConv, CoordConvTranspose
from coordconv.backends.jax import adding, options
from coordconv.backends.jax.arrays import to_torch
from coordconv.backends.jax.networks import precision
from coordconv.geometry import ConvGeometry
from coordconv.reference import Reference

PARAMETERS = inspect.signature(nnx.Conv.__init__).parameters
NEEDS_METADATA = pytest.mark.skipif(
    "kernel_metadata" not in PARAMETERS,
    reason="this Flax takes no metadata, nor shardings at a call",
)
NEEDS_MESH = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this JAX has no shardings in its types"
)


def optimize(layer, gradients, rule, wrt):
    """One step; what Flax calls it with has changed."""
    optimizer = nnx.Optimizer(layer, rule, wrt=wrt)
    takes_model = "model" in inspect.signature(optimizer.update).parameters
    optimizer.update(*[layer] * takes_model, gradients)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", request.param)
    return request.param


def build(kernel=(3, 3), coords=None, seed=0, **further):
    further = {"kernel_init": init, "bias_init": init, "rngs": nnx.Rngs(seed), **further}
    return CoordConv(C, OUT, kernel, coords=coords, **further)


def fill(layer):
    """Integers for all weights; and the layer."""
    weights = layer.export_weights()
    layer.import_weights({name: integers(*a.shape) for name, a in weights.items()})
    return layer


def gradients_of(layer, x, dy):
    """The output, and the gradients of ``x`` and of the parameters, canonical."""

    @nnx.jit  # anew for each call: which way is taken is found out as it is traced
    def run(layer, x, dy):
        graph, params = nnx.split(layer)
        y, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        of_params, of_x = pull_back(dy)
        return y, of_x, nnx.to_pure_dict(of_params)

    y, of_x, found = run(layer, x, np.moveaxis(dy, 1, -1))
    names = {"kernel": "weight", "bias": "bias"}
    return y, of_x, {names[name]: to_torch(np.asarray(a)) for name, a in found.items()}


# They say what another says: to compile each takes long.
SAID = ("lower case", "int padding", "ints padding", "none", "negative", "circular", "3-D", "edges")


class TestOptions:
    @pytest.mark.parametrize("name", CASES)
    def test_their_geometry(self, name):
        shape, kernel, coords, geometry, given = CASES[name]
        assert options.geometry(build(kernel, coords, **given), shape) == geometry

    @pytest.mark.parametrize("name", [name for name in CASES if name not in SAID])
    def test_output_and_gradients(self, name, way):
        shape, kernel, coords, geometry, given = CASES[name]
        layer, x = build(kernel, coords, **given), draw(shape)
        dy = gradient(geometry, shape, normal)
        found = gradients_of(layer, x, dy)
        check_all(geometry, layer.coords, layer.export_weights(), x, dy, *found)

    @pytest.mark.parametrize(
        "name",
        [
            name
            for name, (_, _, coords, _, _) in CASES.items()
            if getattr(coords, "outside", "zero") == "zero"
        ],
    )
    def test_append_is_flaxs_own_convolution_of_both(self, name, monkeypatch):
        """Under the very same options, and to the last bit: it is the definition."""
        monkeypatch.setattr(position_bias, "FORCED", position_bias.APPEND)
        shape, kernel, coords, geometry, given = CASES[name]
        layer, x, groups = build(kernel, coords, **given), draw(shape), geometry.groups
        given = {**given, "kernel_init": init, "bias_init": init, "rngs": nnx.Rngs(0)}
        fused = nnx.Conv(C + groups * len(layer.coords), OUT, kernel, **given)
        assert np.array_equal(layer(x), fused(appended(x, layer.coords, groups)))

    @pytest.mark.parametrize(
        ("shape", "kernel", "coords", "geometry", "given"),
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
            case((5, 3, 2), (4, 2, 1), "zx", SAME),  # more terms than are added one by one
            case((4, 8), (3, 3), Coordinates("xy", align="edges"), SAME),
        ],
    )
    def test_exact_arithmetic_is_bitwise(self, shape, kernel, coords, geometry, given, way):
        layer = fill(build(kernel, coords, **given))
        x, dy = integers(2, *shape, C), gradient(geometry, shape)
        found = gradients_of(layer, x, dy)
        equal_all(geometry, layer.coords, layer.export_weights(), x, dy, *found)
        assert np.array_equal(layer(x), found[0])  # compiled as eager

    def test_own_errors_of_flax(self):
        with pytest.raises(ValueError, match="String padding is not implemented"):
            build(padding="CIRCULAR", input_dilation=2)(draw((4, 5)))
        with pytest.raises(ValueError, match="Causal"):
            build(padding="CAUSAL")(draw((4, 5)))
        with pytest.raises(TypeError, match="padding must be .* got \\(1, 2, 3\\)"):
            build(padding=(1, 2, 3))(draw((4, 5)))
        with pytest.raises(TypeError, match="positional"):
            CoordConv(4, 8, (3, 3), 1, "SAME", rngs=nnx.Rngs(0))  # keyword only from padding on

    @pytest.mark.parametrize("kernel", [(), (3, 3, 3, 3)])
    def test_a_kernel_of_no_rank_that_there_is(self, kernel):
        with pytest.raises(ValueError, match=f"1, 2 or 3 axes, got {len(kernel)}"):
            build(kernel)

    def test_a_changed_option_is_obeyed(self, way):
        layer, x = fill(build()), integers(2, 5, 3, C)
        layer.padding, layer.strides = "CIRCULAR", 2
        wanted = fill(build(padding="CIRCULAR", strides=2))
        assert np.array_equal(layer(x), wanted(x))

    @pytest.mark.parametrize("kind", [CoordConv, CoordConvTranspose])
    def test_signature(self, kind):
        plain = nnx.Conv if kind is CoordConv else nnx.ConvTranspose
        signature_is_the_plain_ones(kind, plain)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_batch_axes(batch, way):
    """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
    layer = fill(build((3, 2), "xyr", strides=2))
    x = integers(*batch, 5, 1, C)
    y = layer(x)
    assert y.shape == (*batch, 3, 1, OUT)
    assert np.array_equal(jax.jit(layer)(x), y)
    one_by_one = [layer(sample) for sample in x.reshape(-1, 5, 1, C)]
    assert np.array_equal(y.reshape(-1, 3, 1, OUT), np.reshape(one_by_one, (-1, 3, 1, OUT)))


class TestMask:
    """It has the kernel's shape: that of features and coordinates."""

    def test_masks_the_whole_kernel(self, way):
        mask = np.tril(np.ones((3, 3, C + 2, OUT), "f4"))
        assert not mask[:, :, C:].all()
        masked, plain = fill(build(mask=jnp.asarray(mask))), fill(build())
        plain.kernel[...] *= mask
        x = integers(2, 5, 3, C)
        assert np.array_equal(masked(x), plain(x))

    @pytest.mark.parametrize("kind", [CoordConv, CoordConvTranspose])
    def test_of_another_shape(self, kind):
        layer = kind(C, OUT, (3, 3), mask=jnp.ones((3, 3, C, OUT)), rngs=nnx.Rngs(0))
        message = r"mask must have the shape of the kernel .* \(3, 3, 6, 8\), got \(3, 3, 4, 8\)"
        with pytest.raises(ValueError, match=message):
            layer(draw((4, 5)))


class TestInit:
    def test_sees_the_shape_of_the_whole_kernel(self):
        asked = []

        def count(key, shape, dtype):
            asked.append((shape, dtype))
            return jnp.zeros(shape, dtype)

        layer = build((3, 3), "xyr", kernel_init=count, feature_group_count=2)
        assert asked == [((3, 3, C // 2 + 3, OUT), jnp.float32)]
        assert layer.kernel.shape == layer.kernel_shape == (3, 3, 5, OUT)
        build((3, 3), "xyr", kernel_init=count, feature_group_count=2, coord_init="zeros")
        assert asked[1:] == [((3, 3, C // 2, OUT), jnp.float32)]

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    @pytest.mark.parametrize("boxed", [False, True])
    def test_another_shape_than_it_is_asked_for(self, coord_init, boxed):
        def wrong(key, shape, dtype):
            return jnp.zeros((*shape[:-1], 1), dtype)

        init = nnx.with_metadata(wrong, mine=1) if boxed else wrong
        width = C + 2 if coord_init == "fan_in" else C
        message = rf"asked for, \(3, 3, {width}, 8\), got \(3, 3, {width}, 1\)"
        with pytest.raises(ValueError, match=message):
            build(kernel_init=init, coord_init=coord_init)

    @NEEDS_METADATA
    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_metadata_is_the_whole_kernels(self, coord_init):
        with jax.set_mesh(jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))):
            names = (None, None, "m", None)
            metadata = {"out_sharding": names, "mine": 1}
            by_metadata = build(
                kernel_metadata=metadata, bias_metadata={"other": 2}, coord_init=coord_init
            )
            by_init = build(
                kernel_init=nnx.with_partitioning(init, names, mine=1), coord_init=coord_init
            )
        assert by_metadata.bias.other == 2
        for layer in (by_metadata, by_init):
            assert layer.kernel.out_sharding == names
            assert layer.kernel.mine == 1
            assert layer.kernel.shape == (3, 3, C + 2, OUT)
            assert layer.kernel[..., C:, :].any() == (coord_init == "fan_in")
            assert layer(draw((4, 5))).shape == (2, 4, 5, OUT)


class TestTypes:
    @pytest.mark.parametrize(("dtype", "u"), [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
    def test_within_the_bound_of_16_bits(self, dtype, u):
        """Of its parameters as of its arithmetic."""
        layer = build((3, 3), "xyr", param_dtype=dtype)
        assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(dtype)}
        x, weights = draw((6, 7)).astype(dtype), layer.export_weights()
        assert weights["weight"].dtype == (np.float32 if dtype == jnp.bfloat16 else np.float16)
        arguments = first(x).astype("f4"), weights["weight"], weights["bias"]
        reference = Reference(ConvGeometry((3, 3), padding="same"), layer.coords)
        y = layer(x)
        assert y.dtype == dtype
        bound = reference.forward(*arguments, magnitudes=True)
        check(first(y).astype("f4"), reference.forward(*arguments), bound, (C + 3) * 9 + 1, u)

    @pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
    def test_neighbours_differ_in_bfloat16(self, param_dtype):
        """Summed in float32 and cast once: the coordinates themselves lie closer than bfloat16 has.

        All 1025 of them are multiples of 1/512, and exact in float32.
        """
        given = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "use_bias": False}
        layer = build((1, 2), "x", padding="VALID", **given)
        step = jnp.array([-1.0, 1.0], param_dtype).reshape(1, 2, 1, 1)
        layer.kernel[...] = jnp.broadcast_to(step, layer.kernel.shape)
        y = layer(np.zeros((1, 1, 1025, C), "f4"))  # the difference of neighbours, times one
        assert y.dtype == jnp.bfloat16
        assert (y == 2 / 1024).all()

    def test_options(self, way):
        x = draw((4, 5))
        assert build(dtype=jnp.float16)(x).dtype == jnp.float16
        if "preferred_element_type" in PARAMETERS:
            wide = build(param_dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
            assert wide(x.astype(jnp.bfloat16)).dtype == jnp.float32
        called = []

        def promote(arrays, dtype):
            called.append(dtype)
            return tuple(array.astype("bfloat16") for array in arrays)

        assert build(promote_dtype=promote, dtype="float16")(x).dtype == jnp.bfloat16
        assert called == ["float16"]

    def test_float64(self, way):
        with precision("float64"):
            layer = build((3, 3), "xyr", param_dtype=jnp.float64)
            x = np.random.default_rng(0).normal(size=(2, 6, 7, C))
            arguments = [first(x), *layer.export_weights().values()]
            reference = Reference(ConvGeometry((3, 3), padding="same"), layer.coords)
            bound = reference.forward(*arguments, magnitudes=True)
            terms = 2 * ((C + 3) * 9 + 1)  # the reference rounds as much as the layer does
            check(first(layer(x)), reference.forward(*arguments), bound, terms, 2.0**-53)

    @pytest.mark.parametrize("kind", [CoordConv, CoordConvTranspose])
    def test_integers_are_promoted_as_flax_does(self, kind, way):
        layer = fill(kind(C, OUT, (3, 3), rngs=nnx.Rngs(0)))
        x = integers(2, 5, 3, C)
        y = layer(x.astype("i4"))
        assert y.dtype == jnp.float32
        assert np.array_equal(y, layer(x))

    @pytest.mark.parametrize("kernel", [(3, 3), (7, 3), (3,), (3, 3, 3)])
    def test_products_are_of_float32(self, kernel):
        """Whatever the layer's own precision: accelerators would shorten the coordinates."""
        layer = build(kernel, "xr", precision=lax.Precision.DEFAULT)
        shape = (6, 5, 4)[: len(kernel)]
        geometry = options.geometry(layer, shape)

        def total(kernel):
            bias = adding.position_bias(geometry, layer.coords, shape, kernel)
            return (adding.add(jnp.zeros((2, *bias.shape)), bias) ** 2).sum()

        def equations(jaxpr):
            for equation in jaxpr.eqns:
                yield equation
                for inner in jax.tree.leaves(list(equation.params.values())):
                    inner = getattr(inner, "jaxpr", inner)
                    yield from equations(inner) if hasattr(inner, "eqns") else ()

        coordinates = layer.kernel[..., C:, :]
        jaxpr = jax.make_jaxpr(jax.grad(total))(coordinates).jaxpr
        kinds = "dot_general", "conv_general_dilated"
        products = [e for e in equations(jaxpr) if e.primitive.name in kinds]
        assert len(products) >= 4
        highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
        assert all(e.params["precision"] == highest for e in products)


class TestConvolutionOfOnesOwn:
    def test_is_given_features_and_coordinates(self):
        """Whatever it computes then: here what is not linear in the channels."""
        called = []

        def convolution(lhs, rhs, *args, out_sharding=None, **kwargs):
            called.append((lhs.shape, rhs.shape, kwargs["precision"]))
            return lax.conv_general_dilated(jnp.sign(lhs), rhs, *args, **kwargs)

        given = {"conv_general_dilated": convolution, "precision": lax.Precision.HIGH}
        x = draw((5, 3))
        y = fill(build(**given))(x)
        assert called == [((2, 5, 3, C + 2), (3, 3, C + 2, OUT), lax.Precision.HIGH)]
        fused = nnx.Conv(C + 2, OUT, (3, 3), rngs=nnx.Rngs(0))
        layer = fill(build())
        fused.kernel[...], fused.bias[...] = layer.kernel[...], layer.bias[...]
        assert np.array_equal(y, fused(np.sign(appended(x, layer.coords))))

    @pytest.mark.parametrize("map_only", [False, True])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_is_obeyed_in_16_bits_and_by_a_layer_that_maps(self, dtype, map_only):
        """Here one that scales the kernel by the length of the whole of it."""

        def convolution(lhs, rhs, *args, out_sharding=None, **kwargs):
            return lax.conv_general_dilated(lhs, rhs / jnp.linalg.norm(rhs), *args, **kwargs)

        given = {"conv_general_dilated": convolution, "dtype": dtype}
        x, layer = draw((5, 3)), fill(build(**given))
        layer.map_only = map_only
        plain = nnx.Conv(C + 2, OUT, (3, 3), **given, rngs=nnx.Rngs(0))
        plain.kernel[...], plain.bias[...] = layer.kernel[...], layer.bias[...]
        assert np.array_equal(layer(x), plain(appended(x, layer.coords)))

    def test_is_refused_where_nothing_can_be_appended(self):
        coords = Coordinates("xy", outside="extend")
        layer = build(coords=coords, conv_general_dilated=lambda *args, **kwargs: None)
        with pytest.raises(ValueError, match="a conv_general_dilated of one's own.*want outside="):
            layer(integers(2, 5, 3, C))


class TestTransformations:
    @pytest.mark.parametrize(
        ("kind", "rank"),
        [(CoordConv, 1), (CoordConv, 2), (CoordConv, 3), (CoordConvTranspose, 2)],
    )
    def test_strict_settings_of_jax(self, kind, rank, way):
        layer = kind(C, OUT, (3,) * rank, coords="xr", rngs=nnx.Rngs(0))
        half = kind(C, OUT, (3,) * rank, coords="rx", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        x = jnp.asarray(draw((5, 4, 3)[:rank]))

        def gradients(layer, x):
            return nnx.grad(lambda layer: jnp.sum(jnp.square(layer(x))))(layer)

        with (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.transfer_guard("disallow"),
        ):
            for each in (layer, half):
                assert each(x).shape[0] == 2
                assert nnx.jit(lambda layer, x: layer(x))(each, x).shape[0] == 2
                found = nnx.to_pure_dict(nnx.jit(gradients)(each, x))
                assert found["kernel"].shape == layer.kernel.shape

    def test_compiled_mapped_and_differentiated(self, way):
        layer, x = fill(build((1, 3), "xyr", padding="REFLECT")), integers(2, 1, 5, C)
        with jax.checking_leaks():
            compiled = nnx.jit(lambda layer, x: layer(x))(layer, x)
        y = layer(x)  # what the trace made was not kept
        assert np.array_equal(compiled, y)
        assert np.array_equal(jax.jit(jax.vmap(layer))(x), y)

    def test_what_one_way_compiled_does_not_outlive_it(self, monkeypatch):
        """There is no cache of compiled functions but the user's own."""
        layer, x = fill(build()), jnp.asarray(integers(2, 5, 3, C))
        found = []
        for way in WAYS:
            monkeypatch.setattr(position_bias, "FORCED", way)
            found.append(str(jax.make_jaxpr(lambda x: layer(x))(x)))
        assert "concatenate" in found[0]
        assert found[0] != found[1]

    def test_derivatives_of_derivatives(self, way):
        layer, x = fill(build((3, 3), "xyr")), jnp.asarray(integers(2, 3, 2, C))
        graph, params = nnx.split(layer)

        def loss(params, forward):
            return (forward(params) ** 3).sum()

        def ours(params):
            return nnx.merge(graph, params)(x)

        def definition(params):
            state = nnx.to_pure_dict(params)
            z = appended(np.asarray(x), layer.coords)
            y = lax.conv_general_dilated(
                z, state["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return y + state["bias"]

        along = jax.tree.map(jnp.ones_like, params)
        second = [
            jax.jvp(jax.grad(lambda p, f=f: loss(p, f)), (params,), (along,))[1]
            for f in (ours, definition)
        ]
        for got, want in zip(*map(jax.tree.leaves, second), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        again = jax.grad(lambda p: loss(p, jax.checkpoint(ours)))(params)
        want = jax.grad(lambda p: loss(p, ours))(params)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    def test_an_ensemble_is_drawn_and_called_under_vmap(self, way):
        def constant(key, shape, dtype):
            return jnp.full(shape, jax.random.key_data(key)[0], dtype)

        @nnx.jit
        @nnx.vmap
        def make(key):
            return CoordConv(C, OUT, 3, kernel_init=constant, rngs=nnx.Rngs(params=key))

        many = make(jax.random.split(jax.random.key(0), 3))
        assert len(np.unique(many.kernel)) == 3
        assert many.kernel.shape == (3, 3, C + 1, OUT)
        call = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))
        assert call(many, draw((5, 6))).shape == (3, 2, 5, 6, OUT)

    @pytest.mark.parametrize(
        ("kind", "sizes", "coords"),
        [
            (CoordConv, "b, 5, 3", "yx"),
            (CoordConv, "b, h, w", "xr"),
            (CoordConv, "b, h, w", Coordinates("xy", outside="extend")),
            (CoordConvTranspose, "b, h, w", "yx"),
        ],
    )
    def test_exported_with_symbolic_sizes(self, kind, sizes, coords, way):
        layer = fill(kind(C, OUT, (3, 2), coords=coords, rngs=nnx.Rngs(0)))
        (spec,) = jax.export.symbolic_args_specs((jnp.zeros((2, 5, 3, C)),), f"{sizes}, {C}")
        exported = jax.export.export(jax.jit(lambda x: layer(x)))(spec)
        shapes = [(2, 5, 3), (1, 5, 3)] + [(2, 1, 9), (3, 3, 1)] * ("h" in sizes)
        for shape in shapes:
            x = jnp.asarray(integers(*shape, C))
            y = exported.call(x)
            np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-4)
            if "r" not in Coordinates.resolve(coords, 2).channels:
                assert np.array_equal(y, layer(x))

    @NEEDS_METADATA
    def test_out_sharding(self, way):
        mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            y = build((3, 3), "xyr")(draw((4, 5)), out_sharding=jax.P("m"))
            assert y.sharding.spec[0] == "m"

    @NEEDS_MESH
    def test_a_batch_on_two_devices(self):
        """By the compiler, and under a mesh whose shardings are part of the types."""
        code = """
            import jax, numpy as np
            from flax import nnx
            from coordconv import position_bias
            from coordconv.backends.flax import CoordConv, CoordConvTranspose

            types = jax.sharding.AxisType
            x = np.random.default_rng(0).normal(size=(4, 5, 3, 4)).astype("f4")
            for position_bias.FORCED in ("append", "map"):
                for kind in (CoordConv, CoordConvTranspose):
                    layer = kind(4, 8, (3, 3), coords="xyr", rngs=nnx.Rngs(0))
                    graph, state = nnx.split(layer)

                    def loss(state, x):
                        return (nnx.merge(graph, state)(x) ** 2).sum()

                    wanted, of_x = jax.grad(loss, argnums=(0, 1))(state, x)
                    for kinds in (types.Auto, types.Explicit):
                        with jax.set_mesh(jax.make_mesh((2,), ("b",), axis_types=(kinds,))):
                            spread, everywhere = jax.P("b"), jax.P()
                            xs = jax.device_put(x, spread)
                            states = jax.device_put(state, everywhere)
                            y = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(states, xs)
                            assert y.sharding.spec[0] == "b", y.sharding
                            found, of_xs = jax.jit(jax.grad(loss, argnums=(0, 1)))(states, xs)
                        pairs = jax.tree.leaves((found, of_xs)), jax.tree.leaves((wanted, of_x))
                        for a, b in zip(*pairs, strict=True):
                            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        """
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        environment["JAX_PLATFORMS"] = "cpu"
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


class TestModule:
    def test_tools_of_nnx(self, way):
        layer, x = build((3, 3), "xyr", use_bias=False), draw((4, 5))
        assert layer.bias is None
        assert set(nnx.to_pure_dict(nnx.state(layer))) == {"kernel"}
        graph, state = nnx.split(layer)
        assert np.array_equal(nnx.merge(graph, state)(x), layer(x))
        other = build((3, 3), "xyr", use_bias=False, seed=1)
        assert graph == nnx.graphdef(other)
        assert hash(graph) == hash(nnx.graphdef(other))
        assert nnx.graphdef(build((3, 3), "yxr", use_bias=False)) != graph
        nnx.update(other, state)
        for twin in (copy.deepcopy(layer), other, nnx.clone(layer)):
            assert np.array_equal(twin(x), layer(x))
        twin = CoordConv(C, OUT, 3, rngs=nnx.Rngs(0), kernel_init=init, bias_init=init)
        twin = pickle.loads(pickle.dumps(twin))
        assert twin.coords == Coordinates("x")
        assert twin(integers(5, C)).shape == (5, OUT)
        abstract = nnx.eval_shape(lambda: CoordConv(C, OUT, (3, 3), rngs=nnx.Rngs(0)))
        assert abstract.kernel.shape == (3, 3, C + 2, OUT)

    @pytest.mark.parametrize("frozen", ["kernel", "bias"])
    def test_a_frozen_parameter_stays_while_others_move(self, frozen):
        layer, x = fill(build((1, 3))), integers(2, 1, 5, C)
        trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(frozen)))
        before = nnx.to_pure_dict(nnx.state(layer))
        wrt = nnx.DiffState(0, trained)
        gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum(), argnums=wrt)(layer)
        assert set(nnx.to_pure_dict(gradients)) == {"kernel", "bias"} - {frozen}
        optimize(layer, gradients, optax.sgd(0.5), trained)
        after = nnx.to_pure_dict(nnx.state(layer))
        assert {name for name in before if np.array_equal(after[name], before[name])} == {frozen}

    def test_weight_decay_by_name_reaches_the_coordinates(self):
        layer = fill(build((1, 3)))
        before = nnx.to_pure_dict(nnx.state(layer))

        def is_kernel(path, _):
            return "kernel" in jax.tree_util.keystr(path)

        def mask(params):
            return jax.tree_util.tree_map_with_path(is_kernel, params)

        decay = optax.add_decayed_weights(0.5, mask=mask)
        gradients = jax.tree.map(jnp.zeros_like, nnx.state(layer, nnx.Param))
        optimize(layer, gradients, optax.chain(decay, optax.sgd(0.5)), nnx.Param)
        for name, value in nnx.to_pure_dict(nnx.state(layer)).items():
            factor = 1 if name == "bias" else 0.75  # by learning rate and decay
            assert np.array_equal(value, before[name] * factor)

    def test_a_head_that_is_set_to_zero_is_constant(self, way):
        """As its users do it to a convolution: by class and name."""
        model = nnx.Sequential(build(), nnx.relu)
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.Conv):
                module.kernel[...] = jnp.zeros_like(module.kernel[...])
        y = model.layers[0](draw((4, 5)))
        assert np.array_equal(y, np.broadcast_to(model.layers[0].bias[...], y.shape))

    def test_a_low_rank_adapter_starts_as_the_identity(self, way):
        """LoRA on the kernel, as projects' own code has it: ``kernel + a @ b`` with b zero."""
        layer, x = build(), draw((4, 5))
        y = layer(x)
        a, b = normal(9 * (C + 2), 2), np.zeros((2, OUT), "f4")
        layer.kernel[...] += (a @ b).reshape(layer.kernel.shape)
        assert np.array_equal(layer(x), y)
        b[:] = 1
        change = (a @ b).reshape(layer.kernel.shape)
        layer.kernel[...] += change
        fused = lax.conv_general_dilated(
            appended(x, layer.coords),
            jnp.asarray(change),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(layer(x) - y, fused, atol=1e-4)

    @pytest.mark.filterwarnings("error")  # JAX warns of a cast that it makes by itself
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_weights_are_in_the_parameters_type(self, dtype):
        given = {"param_dtype": dtype, "feature_group_count": 2}
        layer, other = (build((3, 2), "xyr", seed, **given) for seed in (0, 7))
        weights = layer.export_weights()
        kernel = np.asarray(layer.kernel[...], "f4")
        assert np.array_equal(weights["weight"][5, 1, 2, 0], kernel[2, 0, 1, 5])
        other.import_weights(weights)
        assert other.kernel.dtype == dtype
        assert np.array_equal(other.kernel[...], layer.kernel[...])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_grid_of_open_size_is_rounded_once_in_16_bits(self, dtype):
        """Which have not all of the whole numbers that samples are counted with."""
        layer, shape = AddCoords("x", rank=1), jax.export.symbolic_shape("n, w, 1")
        exported = jax.export.export(jax.jit(lambda x: layer(x)))(
            jax.ShapeDtypeStruct(shape, dtype)
        )
        y = exported.call(jnp.zeros((2, 5000, 1), dtype))
        assert np.array_equal(y[0, :, 1], jnp.asarray(coordinate_grid((5000,), "x")[0], dtype))

    def test_add_coords_of_any_batch(self):
        assert AddCoords()(np.ones((2, 4, 3, 1), "f2")).dtype == jnp.float16
        assert AddCoords()(np.ones((2, 2, 3, 4, 1), "f4")).shape == (2, 2, 3, 4, 3)
        assert jax.jit(AddCoords("r"))(draw((5, 3))).shape == (2, 5, 3, 5)
