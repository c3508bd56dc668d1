"""CoordConv for Flax Linen: what is special to it.

What it shares with NNX is tested there with more options.
"""

import copy

import numpy as np
import pytest

pytest.importorskip("flax")

import flax
import jax
import optax
from flax import linen as nn
from flax import nnx
from flax_cases import (
    CASES,
    OUT,
    C,
    appended,
    check_all,
    draw,
    equal_all,
    gradient,
    init,
    integers,
    normal,
    signature_is_the_plain_ones,
)
from harness import WAYS
from jax import lax
from jax import numpy as jnp

from coordconv import Coordinates, position_bias
from coordconv.backends import flax as other
from coordconv.backends.linen import AddCoords, CoordConv, CoordConvTranspose
from coordconv.weights import Weights

KEY = jax.random.key(0)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", request.param)
    return request.param


def build(kernel=(3, 3), coords=None, **options):
    options = {"kernel_init": init, "bias_init": init, **options}
    return CoordConv(OUT, kernel, coords=coords, **options)


def filled(layer, x):
    """Variables of integers."""
    weights = layer.export_weights(layer.init(KEY, x))
    return layer.import_weights({name: integers(*a.shape) for name, a in weights.items()})


def gradients_of(layer, variables, x, dy):
    """The output, and the gradients of ``x`` and of the parameters, canonical."""

    def pulled(variables, x, dy):
        y, pull_back = jax.vjp(layer.apply, variables, x)
        return y, pull_back(dy)

    y, (of_variables, of_x) = jax.jit(pulled)(variables, x, np.moveaxis(dy, 1, -1))
    return y, of_x, layer.export_weights(of_variables)


class TestOutput:
    @pytest.mark.parametrize(
        "name", ["default", "none", "groups", "circular, all options", "causal, all options"]
    )
    def test_and_gradients(self, name, way):
        shape, kernel, coords, geometry, options = CASES[name]
        layer, x = build(kernel, coords, **options), draw(shape)
        variables = layer.init(KEY, x)
        dy = gradient(geometry, shape, normal)
        found = gradients_of(layer, variables, x, dy)
        check_all(geometry, layer.coords, layer.export_weights(variables), x, dy, *found)

    def test_exact_arithmetic_is_bitwise(self, way):
        _, kernel, coords, geometry, options = CASES["valid"]
        layer, x = build(kernel, coords, **options), integers(2, 17, 5, C)
        variables, dy = filled(layer, x), gradient(geometry, (17, 5))
        found = gradients_of(layer, variables, x, dy)
        equal_all(geometry, layer.coords, layer.export_weights(variables), x, dy, *found)
        assert np.array_equal(layer.apply(variables, x), found[0])

    @pytest.mark.parametrize("name", ["default", "circular", "causal"])
    def test_is_nnxs_to_the_last_bit(self, name, way):
        shape, kernel, coords, _, options = CASES[name]
        layer, x = build(kernel, coords, **options), draw(shape)
        variables = layer.init(KEY, x)
        module = other.CoordConv(
            C, OUT, kernel, coords=coords, **options, rngs=nnx.Rngs(0), kernel_init=init
        )
        module.import_weights(layer.export_weights(variables))
        assert np.array_equal(layer.apply(variables, x), module(x))

    @pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
    def test_batch_axes(self, batch, way):
        """Bitwise: where one axis alone is longer than one sample, the radius is exact, too."""
        layer, x = build((3, 2), "xyr", strides=2), integers(*batch, 5, 1, C)
        variables = filled(layer, x)
        y = layer.apply(variables, x)
        assert y.shape == (*batch, 3, 1, OUT)
        one_by_one = [layer.apply(variables, sample) for sample in x.reshape(-1, 5, 1, C)]
        assert np.array_equal(y.reshape(-1, 3, 1, OUT), np.reshape(one_by_one, (-1, 3, 1, OUT)))

    def test_integers_are_promoted_as_flax_does(self, way):
        layer, x = build(), integers(2, 5, 3, C)
        y, variables = layer.init_with_output(KEY, x.astype("i4"))
        assert y.dtype == jnp.float32
        assert np.array_equal(y, layer.apply(variables, x))


class TestMask:
    @pytest.mark.parametrize("kind", [CoordConv, CoordConvTranspose])
    def test_masks_the_whole_kernel(self, kind, way):
        mask = np.tril(np.ones((3, 3, C + 2, OUT), "f4"))
        x, plain = integers(2, 5, 3, C), kind(OUT, (3, 3))
        params = filled(plain, x)["params"]
        y = kind(OUT, (3, 3), mask=jnp.asarray(mask)).apply({"params": params}, x)
        params = {**params, "kernel": params["kernel"] * mask}
        assert np.array_equal(y, plain.apply({"params": params}, x))

    def test_of_another_shape(self):
        message = r"mask must have the shape of the kernel .* \(3, 3, 6, 8\), got \(3, 3, 4, 8\)"
        with pytest.raises(ValueError, match=message):
            build(mask=jnp.ones((3, 3, C, OUT))).init(KEY, draw((4, 5)))


class TestInit:
    def test_sees_the_shape_of_the_whole_kernel(self):
        asked = []

        def count(key, shape, dtype):
            asked.append((shape, dtype))
            return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

        options = {"kernel_init": count, "feature_group_count": 2, "param_dtype": jnp.float16}
        layer = build((3, 3), "xyr", **options).clone().clone()
        variables = layer.init(KEY, draw((4, 5)))
        whole = (3, 3, C // 2 + 3, OUT)
        assert asked == [(whole, jnp.float16)]
        assert variables["params"]["kernel"].shape == whole
        layer.apply(variables, draw((4, 5)))  # Flax asks for the shape again
        assert set(asked) == {(whole, jnp.float16)}

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    @pytest.mark.parametrize("boxed", [False, True])
    def test_another_shape_than_it_is_asked_for(self, coord_init, boxed):
        def wrong(key, shape, dtype):
            return jnp.zeros((*shape[:-1], 1), dtype)

        kernel_init = nn.with_partitioning(wrong, (None,) * 4) if boxed else wrong
        width = C + 2 if coord_init == "fan_in" else C
        message = rf"asked for, \(3, 3, {width}, 8\), got \(3, 3, {width}, 1\)"
        with pytest.raises(ValueError, match=message):
            build(kernel_init=kernel_init, coord_init=coord_init).init(KEY, draw((4, 5)))

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    @pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
    def test_partitioned_kernels(self, box, coord_init):
        names = (None, None, "in", "out")
        layer = build((3, 3), coord_init=coord_init, kernel_init=box(init, names))
        x = draw((4, 5))
        variables = layer.init(KEY, x)
        params = variables["params"]
        assert params["kernel"].names == names
        assert params["kernel"].value.shape == (3, 3, C + 2, OUT)
        assert params["kernel"].value[..., C:, :].any() == (coord_init == "fan_in")
        weights = layer.export_weights(variables)
        plain = build((3, 3), coord_init=coord_init)
        again = plain.apply(plain.import_weights(weights), x)
        assert np.array_equal(layer.apply(variables, x), again)


class TestOptions:
    def test_a_convolution_of_ones_own_is_given_features_and_coordinates(self):
        called = []

        def convolution(lhs, rhs, *args, **kwargs):
            called.append((lhs.shape, rhs.shape, kwargs["precision"]))
            return lax.conv_general_dilated(jnp.sign(lhs), rhs, *args, **kwargs)

        x = draw((5, 3))
        both = (2, 5, 3, C + 2), (3, 3, C + 2, OUT), lax.Precision.HIGH
        for given in (
            {"conv_general_dilated": convolution},
            {"conv_general_dilated_cls": lambda: convolution},
        ):
            layer = build(precision=lax.Precision.HIGH, **given)
            y, variables = layer.init_with_output(KEY, x)
            assert called == [both]
            called.clear()
            fused = nn.Conv(OUT, (3, 3))
            assert np.array_equal(y, fused.apply(variables, np.sign(appended(x, layer.coords))))

    def test_types(self):
        x = draw((4, 5))
        layer = build(param_dtype=jnp.bfloat16, dtype=jnp.float16)
        y, variables = layer.init_with_output(KEY, x)
        assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
        assert y.dtype == jnp.float16
        layer = build(promote_dtype=lambda *args, dtype: [a.astype("bfloat16") for a in args])
        assert layer.apply(variables, x).dtype == jnp.bfloat16

    def test_a_kernel_of_no_rank_that_there_is(self):
        with pytest.raises(ValueError, match="1, 2 or 3 axes, got 4"):
            build((3, 3, 3, 3))

    @pytest.mark.parametrize("kind", [CoordConv, CoordConvTranspose])
    def test_signature(self, kind):
        plain = nn.Conv if kind is CoordConv else nn.ConvTranspose
        signature_is_the_plain_ones(kind, plain)

    def test_own_errors_of_flax(self):
        with pytest.raises(flax.errors.CallCompactUnboundModuleError):
            build()(draw((4, 5)))
        layer = build()
        params = layer.init(KEY, draw((4, 5)))["params"]
        del params["bias"]
        with pytest.raises(flax.errors.ScopeParamNotFoundError, match="bias"):
            layer.apply({"params": params}, draw((4, 5)))
        with pytest.raises(flax.errors.ScopeParamShapeError):
            build((3, 2)).apply(layer.init(KEY, draw((4, 5))), draw((4, 5)))


class TestInput:
    """The features are those of the first input, and then those that the kernel is made for."""

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.ones((2, 5, 5, 3), "f4"), "4 channels, got 3 in shape"),
            (np.ones((2, 5, 5, 6), "f4"), "the features alone, the layer adds"),
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"feature_group_count": 2}])
    def test_of_other_channels(self, x, message, options):
        layer = build(**options)
        variables = layer.init(KEY, draw((4, 5)))
        with pytest.raises(ValueError, match=message):
            layer.apply(variables, x)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.ones((5, 4), "f4"), r"shape \(\.\.\., H, W, C\), got \(5, 4\)"),
            (np.float32(1), r"shape \(\.\.\., H, W, C\), got \(\)"),
            (np.ones((2, 0, 5, 4), "f4"), "no empty axis"),
        ],
    )
    def test_of_other_axes(self, x, message):
        layer = build()
        variables = layer.init(KEY, draw((4, 5)))
        for call in (lambda: layer.apply(variables, x), lambda: layer.init(KEY, x)):
            with pytest.raises(ValueError, match=message):
                call()


class Pair(nn.Module):
    def setup(self):
        self.one = build()

    @nn.compact
    def __call__(self, x):
        return build(name="two")(self.one(x))


class TestModule:
    def test_tools_of_linen(self, way):
        layer, x = build((3, 3), "xyr"), draw((4, 5))
        assert isinstance(layer, nn.Conv)
        assert layer.clone() == layer
        assert hash(layer.clone(strides=2).clone(strides=1)) == hash(layer)
        assert build(coords=["x", "y"]) == build(coords=Coordinates("xy"))
        assert copy.deepcopy(layer) == layer
        variables = layer.init(KEY, x)
        y = layer.apply(variables, x)
        blank = jax.tree.map(jnp.zeros_like, variables)
        state = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
        assert np.array_equal(layer.apply(state, x), y)
        assert np.array_equal(layer.bind(variables)(x), y)
        assert np.array_equal(layer.apply(flax.core.freeze(variables), x), y)
        table = layer.tabulate(KEY, x, console_kwargs={"width": 150})
        assert "kernel: \x1b[2mfloat32\x1b[0m[3,3,7,8]" in table
        assert f"{9 * (4 + 3) * 8 + 8}" in table

    def test_is_one_call_to_what_watches_it(self, way):
        """Its output is the whole output."""
        layer, x = build((3, 3), "xyr"), draw((4, 5))
        calls = []

        def watch(call, args, kwargs, context):
            calls.append((context.method_name, type(context.module)))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            variables = layer.init(KEY, x)
            y = layer.apply(variables, x)
        assert calls == [("__call__", CoordConv)] * 2
        _, state = layer.apply(variables, x, capture_intermediates=True)
        (recorded,) = state["intermediates"]["__call__"]
        assert np.array_equal(recorded, y)

    def test_inside_others(self):
        params = Pair().init(KEY, draw((4, 5)))["params"]
        assert {name: set(p) for name, p in params.items()} == {
            name: {"kernel", "bias"} for name in ("one", "two")
        }
        model = nn.Sequential([AddCoords(), nn.Conv(OUT, (1, 1))])
        kernel = model.init(KEY, draw((4, 5)))["params"]["layers_1"]["kernel"]
        assert kernel.shape == (1, 1, C + 2, OUT)

    @pytest.mark.parametrize("frozen", ["kernel", "bias"])
    def test_a_frozen_parameter_stays_while_others_move(self, frozen):
        layer, x = build((1, 3)), integers(2, 1, 5, C)
        params = filled(layer, x)["params"]
        gradients = jax.grad(lambda p: (layer.apply({"params": p}, x) ** 2).sum())(params)
        label = {name: "frozen" if name == frozen else "trained" for name in params}
        optimizer = optax.multi_transform(
            {"frozen": optax.set_to_zero(), "trained": optax.sgd(0.5)}, label
        )
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        after = optax.apply_updates(params, updates)
        assert {name for name in params if np.array_equal(after[name], params[name])} == {frozen}

    def test_decay_masks_by_name_reach_the_coordinates(self):
        """``path[-1] == "kernel"``, as examples of Flax have it."""
        layer, x = build((1, 3)), integers(2, 1, 5, C)
        params = filled(layer, x)["params"]

        def mask(params):
            flat = flax.traverse_util.flatten_dict(params)
            return flax.traverse_util.unflatten_dict({p: p[-1] == "kernel" for p in flat})

        decay = optax.chain(optax.add_decayed_weights(0.5, mask=mask), optax.sgd(0.5))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = decay.update(zeros, decay.init(params), params)
        after = optax.apply_updates(params, updates)
        assert np.array_equal(after["kernel"], params["kernel"] * 0.75)
        assert np.array_equal(after["bias"], params["bias"])


class TestTransformations:
    def test_compiled_mapped_and_recomputed(self, way):
        layer, x = build((1, 3), "xyr", padding="REFLECT"), integers(2, 1, 5, C)
        variables = filled(layer, x)
        with jax.checking_leaks():
            compiled = jax.jit(layer.apply)(variables, x)
        y = layer.apply(variables, x)  # what the trace made was not kept
        assert np.array_equal(compiled, y)
        assert np.array_equal(jax.jit(jax.vmap(layer.apply, (None, 0)))(variables, x), y)
        again = jax.jit(nn.remat(CoordConv)(OUT, (1, 3), padding="REFLECT", coords="xyr").apply)
        assert np.array_equal(again(variables, x), y)

    def test_lifted(self, way):
        def constant(key, shape, dtype):
            return jnp.full(shape, jax.random.key_data(key)[0], dtype)

        x = integers(2, 1, 5, C)
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        many = nn.vmap(CoordConv, **options, in_axes=None, axis_size=3)(8, 3, kernel_init=constant)
        params = jax.jit(many.init)(KEY, x)["params"]
        assert params["kernel"].shape == (3, 3, C + 1, OUT)
        assert len(np.unique(params["kernel"])) == 3
        abstract = jax.eval_shape(build((1, 3), "xyr").init, KEY, x)["params"]
        assert abstract["kernel"].shape == (1, 3, C + 3, OUT)

    def test_strict_settings_of_jax(self, way):
        layer, x = build(coords="xr"), jnp.asarray(draw((5, 3)))
        variables = layer.init(KEY, x)
        with (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.transfer_guard("disallow"),
        ):
            assert layer.apply(variables, x).shape == (2, 5, 3, OUT)
            assert jax.jit(layer.apply)(variables, x).shape == (2, 5, 3, OUT)


class TestWeights:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_are_variables_of_the_parameters_type(self, dtype):
        layer = build((3, 2), "xyr", param_dtype=dtype, feature_group_count=2)
        variables = layer.init(KEY, draw((4, 5)))
        weights = layer.export_weights(variables)
        assert {name: a.shape for name, a in weights.items()} == {
            "weight": (OUT, 2 + 3, 3, 2),
            "bias": (OUT,),
        }
        loaded = layer.import_weights(weights)
        assert jax.tree.structure(loaded) == jax.tree.structure(variables)
        assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))

    def test_all_problems_at_once(self):
        layer = build(feature_group_count=2)
        wrong = Weights({"bias": np.ones(OUT, int), "kernel": np.ones(1)}, {"": Coordinates("xr")})
        with pytest.raises(ValueError, match="cannot import") as caught:
            layer.import_weights(wrong)
        for problem in (
            "missing: weight, shape (8, 3, 3, 3)",
            "unexpected: kernel",
            "not floating-point: bias",
            "made for Coordinates('xr'), want Coordinates('xy')",
        ):
            assert problem in str(caught.value)

    @pytest.mark.parametrize("shape", [(8, 5), (6, 5, 3, 3), (8, 5, 3, 2), (8, 2, 3, 3)])
    def test_a_kernel_that_cannot_be_the_layers(self, shape):
        """The number of channels is the kernel's own, but for more than the coordinates."""
        with pytest.raises(ValueError, match=rf"weight is \({', '.join(map(str, shape))}\), want"):
            build().import_weights({"weight": np.ones(shape), "bias": np.ones(OUT)})

    def test_channels_are_the_kernels_own(self):
        layer = build()
        variables = layer.import_weights({"weight": np.ones((8, 9, 3, 3)), "bias": np.ones(OUT)})
        assert layer.apply(variables, draw((4, 5), 7)).shape == (2, 4, 5, OUT)


def test_add_coords_has_no_variables_and_takes_any_batch():
    assert AddCoords(rank=1).init(KEY, draw((5,))) == {}
    assert np.array_equal(AddCoords("yx").apply({}, draw((5, 3))), appended(draw((5, 3)), "yx"))
    assert AddCoords().apply({}, np.ones((2, 3, 4, 5, 1), "f4")).shape == (2, 3, 4, 5, 3)
