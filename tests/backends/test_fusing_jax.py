"""NNX networks and Linen variables fused for inference: the same outputs, and what is refused.

``test_fusing.py`` is that of PyTorch.
"""

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.export
from flax import linen as nn
from flax import nnx
from flax_cases import check, draw, first, init
from jax import numpy as jnp

from coordconv import Coordinates
from coordconv.backends import flax, linen
from coordconv.backends.flax.fusing import Constant, Folded, FusedCoordConv
from coordconv.backends.jax import options
from coordconv.backends.jax.networks import precision
from coordconv.fusing import FusedLayer
from coordconv.reference import Reference

EXTEND = Coordinates("xy", outside="extend")
# (spatial shape, kernel, options): lengths of which every coordinate is a multiple of a power of
# two, so that all sums are exact.
CONVS = {
    "1-D": ((9,), (3,), {}),
    "1-D int": ((9,), 3, {"strides": 2}),
    "2-D": ((9, 5), (3, 3), {"coords": "yx"}),
    "3-D": ((3, 5, 3), (2, 3, 1), {}),
    "groups": ((9, 5), (3, 3), {"feature_group_count": 2, "strides": (2, 1)}),
    "valid": ((5, 9), (3, 2), {"padding": "VALID", "coords": "y"}),
    "circular": ((5, 9), (3, 4), {"padding": "CIRCULAR", "strides": 2}),
    "reflect": ((5, 9), (3, 3), {"padding": "REFLECT"}),
    "causal": ((17,), (3,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "pairs": ((9, 5), (3, 3), {"padding": ((2, 0), (1, 3))}),
    "dilation": ((9, 5), (3, 3), {"kernel_dilation": (2, 1)}),
    "holes": ((3, 5), (3, 3), {"padding": (2, 1), "input_dilation": (2, 3)}),
    "pointwise": ((9, 5), (1, 1), {}),
    "extend": ((9, 5), (3, 3), {"coords": EXTEND}),
    "no bias": ((9, 5), (3, 3), {"use_bias": False}),
    "mask": ((9, 5), (3, 3), {"mask": np.arange(3 * 3 * 6 * 4).reshape(3, 3, 6, 4) % 3 > 0}),
    "bfloat16": ((9, 5), (3, 3), {"dtype": "bfloat16"}),
    "bfloat16 kernel": ((9, 5), (3, 3), {"param_dtype": "bfloat16"}),
}
TRANSPOSED = {
    "transposed 1-D": ((9,), (3,), {"strides": (2,)}),
    "transposed 2-D": ((5, 3), (3, 3), {"strides": (2, 1), "padding": "VALID", "coords": "yx"}),
    "transposed 3-D": ((3, 5, 3), (2, 3, 1), {}),
    "transposed circular": ((5, 3), (3, 3), {"strides": (2, 2), "padding": "CIRCULAR"}),
    "transposed pairs": ((5, 3), (3, 3), {"padding": ((2, 1), (0, 3))}),
    "transposed dilation": ((5, 3), (3, 3), {"kernel_dilation": (2, 1)}),
    "transposed kernel": ((5, 3), (3, 2), {"strides": (2, 2), "transpose_kernel": True}),
}
LAYERS = CONVS | TRANSPOSED
C, OUT = 4, 4


def integers(key, shape, dtype):
    """Small ones for weights, so that no order of a sum makes a difference."""
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.integers(-3, 4, shape), dtype)


def inputs(shape, channels=C, batch=(2,)):
    x = np.random.default_rng(1).integers(-3, 4, (*batch, *shape, channels))
    return jnp.asarray(x, "float32")


def nnx_layer(name, draw=integers, **more):
    _, kernel, given = LAYERS[name]
    kind = flax.CoordConvTranspose if name in TRANSPOSED else flax.CoordConv
    drawn = {"kernel_init": draw, "bias_init": draw, "rngs": nnx.Rngs(0)}
    return kind(C, OUT, kernel, **{**drawn, **given, **more})


def linen_layer(name, draw=integers):
    _, kernel, given = LAYERS[name]
    kind = linen.CoordConvTranspose if name in TRANSPOSED else linen.CoordConv
    return kind(OUT, kernel, kernel_init=draw, bias_init=draw, **given)


def plain(array):
    return np.asarray(array, np.float64)


def is_compiled(name, batch):
    """Every layer once, and two with every kind of batch, as each is a program of its own."""
    return batch == (2,) or "2-D" in name


@pytest.mark.parametrize("name", LAYERS)
def test_an_nnx_layer(name):
    layer, shape = nnx_layer(name), LAYERS[name][0]
    one, any_size = layer.fuse(shape), layer.fuse()
    for batch in ((2,), (1,), (), (2, 2)):
        x = inputs(shape, batch=batch)
        want = layer(x)
        for fused in (one, any_size):
            jitted = (nnx.jit(fused), jax.jit(fused)) if is_compiled(name, batch) else ()
            for call in (fused, *jitted):
                got = call(x)
                assert got.dtype == want.dtype
                assert np.array_equal(plain(got), plain(want))
    assert one.map.shape == layer(inputs(shape, batch=())).shape
    assert one.map[...].dtype == jnp.float32
    other = inputs([n + 2 if n == 3 else n * 2 - 1 for n in shape])
    assert np.array_equal(plain(any_size(other)), plain(layer(other)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_linen_layer(name):
    layer, shape = linen_layer(name), LAYERS[name][0]
    x = inputs(shape)
    variables = layer.init(jax.random.key(0), x)
    fused, report = linen.fuse(layer, variables, x)
    axis = options.input_axis(layer)
    assert fused["params"]["kernel"].shape[axis] == C // options.groups(layer)
    (size, made), *rest = fused["coordconv"].items()
    assert not rest
    assert size == "x".join(map(str, shape))
    assert made.dtype == jnp.float32
    assert report.layers == (FusedLayer("", type(layer).__name__, shape),)
    for batch in ((2,), (1,), ()):
        x = inputs(shape, batch=batch)
        want = layer.apply(variables, x)
        jitted = (jax.jit(layer.apply),) if is_compiled(name, batch) else ()
        for call in (layer.apply, *jitted):
            got = call(fused, x)
            assert got.dtype == want.dtype
            assert np.array_equal(plain(got), plain(want))


def test_float64():
    with precision("float64"):
        x = inputs((9, 5)).astype("float64")
        layer = nnx_layer("2-D", param_dtype="float64")
        fused = layer.fuse((9, 5))
        assert fused.map[...].dtype == fused(x).dtype == jnp.float64
        assert np.array_equal(fused(x), layer(x))
        narrow = nnx_layer("2-D").fuse((9, 5))
        with pytest.raises(
            ValueError, match="must not make the output float64, as the map .* is f"
        ):
            narrow(x)
        assert np.array_equal(nnx_layer("2-D").fuse()(x), nnx_layer("2-D")(x))


def test_what_a_fused_layer_is_made_of():
    fused, x = nnx_layer("2-D").fuse((9, 5)), inputs((9, 5))
    assert type(fused.conv) is nnx.Conv
    assert set(nnx.to_flat_state(nnx.state(fused, nnx.Param)).paths) == {
        ("conv", "kernel"),
        ("conv", "bias"),
    }
    assert nnx.state(fused, Constant)["map"][...].shape == (9, 5, OUT)
    graph, state = nnx.split(fused)
    assert np.array_equal(nnx.merge(graph, state)(x), fused(x))
    loss = nnx.grad(lambda model: model(x).sum())(fused)  # by the parameters alone
    assert set(loss) == {"conv"}


def test_a_bias_that_is_switched_off():
    layer, x = nnx_layer("2-D"), inputs((9, 5))
    layer.bias[...] = jnp.ones(OUT)
    layer.use_bias = False
    for size in (None, (9, 5)):
        assert np.allclose(layer.fuse(size)(x), layer(x), atol=1e-5)


def test_the_metadata_of_parameters_stays():
    layer = nnx_layer("2-D")
    layer.kernel = nnx.Param(layer.kernel[...], note="kept")
    kernel = layer.fuse((9, 5)).conv.kernel
    assert kernel.get_metadata() == layer.kernel.get_metadata()
    assert kernel.note == "kept"


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_an_exported_program_has_the_map_as_a_constant(kind):
    x = inputs((9, 5))
    if kind == "nnx":
        layer = nnx_layer("2-D")
        run, fused = layer, layer.fuse((9, 5))
    else:
        module = linen_layer("2-D")
        variables = module.init(jax.random.key(0), x)
        found, _ = linen.fuse(module, variables, x)
        run, fused = (lambda x, v=v: module.apply(v, x) for v in (variables, found))
    exported = jax.export.export(jax.jit(fused))(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert np.array_equal(exported.call(x), run(x))
    text = exported.mlir_module()
    assert "iota" not in text
    assert text.count("stablehlo.convolution") == 1
    assert f"9x5x{OUT}xf32" in text
    assert text.count("stablehlo.constant") <= 3  # the kernel, the bias and the map


def test_an_export_of_open_sizes():
    layer = nnx_layer("2-D")
    b, h, w = jax.export.symbolic_shape("b, h, w")
    shape = jax.ShapeDtypeStruct((b, h, w, C), jnp.float32)
    exported = jax.export.export(jax.jit(layer.fuse()))(shape)
    for size in ((9, 5), (3, 17)):
        assert np.array_equal(exported.call(inputs(size)), layer(inputs(size)))
    with pytest.raises(ValueError, match=r"the size that was fused, \(9, 5\), got \(h, w\)"):
        jax.export.export(jax.jit(layer.fuse((9, 5))))(shape)


def test_an_export_of_open_sizes_whose_output_might_be_empty():
    options = {"strides": (2, 1), "padding": ((1, 1), (1, 0)), "rngs": nnx.Rngs(0)}
    layer = flax.CoordConv.from_conv(
        nnx.Conv(C, OUT, (3, 3), **options), "xy", init="fan_in", rngs=options["rngs"]
    )
    layer.map_only = True
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, h, w, {C}"), jnp.float32)
    exported = jax.export.export(jax.jit(layer))(shape)
    for size in ((9, 5), (3, 17)):
        assert np.allclose(exported.call(inputs(size)), layer(inputs(size)), atol=1e-5)


# A layer and the batch normalization after it.


def statistics(use_bias=True, use_scale=True):
    rng = np.random.default_rng(3)
    found = {"mean": rng.normal(size=OUT), "var": rng.uniform(0.5, 2, OUT)}
    found |= {"scale": rng.uniform(0.5, 2, OUT)} if use_scale else {}
    found |= {"bias": rng.normal(size=OUT)} if use_bias else {}
    return {name: jnp.asarray(values, "float32") for name, values in found.items()}


def nnx_norm(**given):
    norm = nnx.BatchNorm(OUT, use_running_average=True, rngs=nnx.Rngs(0), **given)
    found = statistics(**{k: v for k, v in given.items() if k.startswith("use_")})
    for name, values in found.items():
        getattr(norm, name)[...] = values
    return norm


FOLDED = ["2-D", "groups", "no bias", "extend", "transposed 1-D", "transposed kernel", "mask"]


def folded_to(layer, weights, x, found, epsilon=1e-5):
    """What layer and norm compute by their definitions in float64, its magnitudes, and terms."""
    geometry = options.geometry(layer, x.shape[1:-1])
    reference = Reference(geometry, layer.coords)
    found = {name: plain(values) for name, values in found.items()}
    factor = found.get("scale", 1) / np.sqrt(found["var"] + epsilon)
    mean, shift = found["mean"], found.get("bias", 0)
    columns = (-1, *(1,) * geometry.rank)
    weight, bias = plain(weights["weight"]), plain(weights.get("bias", np.zeros(OUT)))
    output = reference.forward(first(x), weight, bias)
    want = (output - mean.reshape(columns)) * factor.reshape(columns)
    want = want + np.broadcast_to(shift, OUT).reshape(columns)
    at = 1 if geometry.transposed else 0
    scaled = weight * np.expand_dims(factor, [a for a in range(weight.ndim) if a != at])
    shifted = (bias - mean) * factor + shift
    magnitudes = reference.forward(first(x), scaled, shifted, magnitudes=True)
    inner = weight.shape[0] if geometry.transposed else weight.shape[1]
    # Each folded weight is rounded once, and each coordinate up to twice; P is one sum more.
    return want, magnitudes, inner * geometry.taps + 1 + 4


@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize("given", [{}, {"use_scale": False}, {"use_bias": False, "epsilon": 1e-3}])
@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_normalization_in_nnx(name, given, with_input):
    shape = LAYERS[name][0]
    layer, norm, x = nnx_layer(name, init), nnx_norm(**given), draw(shape)
    fused = flax.fuse(nnx.Sequential(layer, norm), shape if with_input else None)
    assert [type(each) for each in fused.layers] == [FusedCoordConv, Folded]
    size = shape if with_input else None
    assert fused.fuse_report.layers == (
        FusedLayer("layers.0", type(layer).__name__, size, "layers.1"),
    )
    weights = layer.export_weights()
    if layer.mask is not None:
        weights = {**weights, "weight": np.moveaxis(layer.kernel[...] * layer.mask, (3, 2), (0, 1))}
    epsilon = given.get("epsilon", 1e-5)
    check(first(fused(x)), *folded_to(layer, weights, x, collected(norm), epsilon))


def collected(norm):
    found = {name: getattr(norm, name) for name in ("mean", "var", "scale", "bias")}
    return {name: value[...] for name, value in found.items() if value is not None}


@pytest.mark.parametrize("given", [{}, {"use_scale": False}, {"use_bias": False, "epsilon": 1e-3}])
@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_normalization_in_linen(name, given):
    layer, x = linen_layer(name, init), draw(LAYERS[name][0])
    net = nn.Sequential([layer, nn.BatchNorm(use_running_average=True, **given)])
    variables = net.init(jax.random.key(0), x)
    found = statistics(**{k: v for k, v in given.items() if k.startswith("use_")})
    own = {"batch_stats": ("mean", "var"), "params": ("scale", "bias")}
    for collection, names in own.items():
        variables[collection].setdefault("layers_1", {})
        variables[collection]["layers_1"] = {n: found[n] for n in names if n in found}
    fused, report = linen.fuse(net, variables, x)
    assert [row.batch_norm for row in report.layers] == ["layers_1"]
    params = variables["params"]["layers_0"]
    weights = layer.export_weights({"params": params})
    if layer.mask is not None:
        weights = {**weights, "weight": np.moveaxis(params["kernel"] * layer.mask, (3, 2), (0, 1))}
    epsilon = given.get("epsilon", 1e-5)
    got = net.apply(fused, x)
    check(first(got), *folded_to(layer, weights, x, found, epsilon))
    # The norm has become the identity, to the bit.
    y = {"layers_0": fused["params"]["layers_0"]}
    alone = layer.apply({"params": y["layers_0"], "coordconv": fused["coordconv"]["layers_0"]}, x)
    assert np.array_equal(got, alone)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-7, 1e-5, 0.001, 0.3])
def test_a_folded_norm_of_linen_is_the_identity(epsilon):
    net = nn.Sequential([linen_layer("2-D", init), nn.BatchNorm(True, epsilon=epsilon)])
    x = draw((9, 5))
    fused, report = linen.fuse(net, net.init(jax.random.key(0), x), x)
    assert report.layers[0].batch_norm == "layers_1"
    norm = {name: fused[name]["layers_1"] for name in ("params", "batch_stats")}
    assert np.array_equal(net.layers[1].apply(norm, x), x)


# Networks.


class Block(nnx.Module):
    """Its order of calls is not the alphabet's."""

    def __init__(self, rngs):
        self.stem = flax.CoordConv(3, 4, (3, 3), rngs=rngs)
        self.norm, self.other = nnx_norm(), nnx_norm()
        self.conv = flax.CoordConv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.seen_twice = flax.CoordConv(4, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm(self.conv(nnx.relu(self.stem(x)))))
        y = self.seen_twice(y)
        return self.other(y) + y


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(linen.CoordConv(4, (3, 3), name="stem")(x))
        x = linen.CoordConv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        y = linen.CoordConv(4, (3, 3), name="seen_twice")(x)
        return nn.BatchNorm(name="other")(y, use_running_average=not train) + y


@pytest.mark.parametrize("size", [(17, 9), draw((17, 9), 3), (draw((17, 9), 3),), None])
def test_an_nnx_network(size):
    model = Block(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    fused, x = flax.fuse(model, size), draw((17, 9), 3)
    report = fused.fuse_report
    batch_norms = {row.name: row.batch_norm for row in report.layers}
    if size is None:
        assert batch_norms == {"conv": None, "seen_twice": None, "stem": None}
        assert "no size was given" in str(report)
    else:
        assert batch_norms == {"conv": "norm", "seen_twice": None, "stem": None}
        assert report.notes == (
            "other is left: it could not be shown that nothing else takes the output of seen_twice",
        )
        assert isinstance(fused.norm, Folded)
    assert all(row.size == (None if size is None else (17, 9)) for row in report.layers)
    assert isinstance(fused.other, nnx.BatchNorm)
    for call in (fused, nnx.jit(fused)):
        assert np.allclose(call(x), model(x), atol=1e-5)
    assert nnx.merge(*nnx.split(fused)).fuse_report == report
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("how", ["made", "jit", "clone"])
def test_the_order_of_attributes_does_not_matter(how):
    """``nnx.jit`` and ``nnx.clone`` sort them: the first is not what takes the input any more."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = flax.CoordConv(3, 8, (3, 3), rngs=rngs)
            self.body = flax.CoordConv(8, 16, (3, 3), 2, rngs=rngs)
            self.a_head = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.a_head(self.body(self.stem(x)))

    net, x = Net(nnx.Rngs(0)), inputs((9, 5), 3)
    if how == "jit":
        nnx.jit(lambda net, x: net(x))(net, x)
    elif how == "clone":
        net = nnx.clone(net)
    fused = flax.fuse(net, (9, 5))
    assert (fused.stem.size, fused.body.size) == ((9, 5), (9, 5))
    assert np.allclose(fused(x), net(x), atol=1e-5)


def test_a_linen_network():
    model, x = LinenBlock(), draw((17, 9), 3)
    variables = model.init(jax.random.key(0), x)
    before = jax.tree.map(np.array, variables)
    fused, report = linen.fuse(model, variables, x)
    assert {row.name: row.batch_norm for row in report.layers} == {
        "stem": None,
        "conv": "norm",
        "seen_twice": None,
    }
    assert report.notes == (
        "other is left: it could not be shown that nothing else takes the output of seen_twice",
    )
    for call in (model.apply, jax.jit(model.apply)):
        assert np.allclose(call(fused, x), model.apply(variables, x), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    # The old variables still train.
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert set(updated) == {"batch_stats"}


def test_a_linen_network_with_a_layer_of_position_alone():
    model, x = (
        nn.Sequential([linen.CoordConv(OUT, (3, 3)), linen.PositionBias("xyr")]),
        draw((9, 5), C),
    )
    variables = model.init(jax.random.key(0), x)
    fused, report = linen.fuse(model, variables, x)
    assert [row.name for row in report.layers] == ["layers_0"]
    assert np.allclose(model.apply(fused, x), model.apply(variables, x), atol=1e-5)


def test_a_layer_that_sees_two_sizes():
    class Net(nnx.Module):
        def __init__(self):
            self.conv = flax.CoordConv(C, C, (3, 3), rngs=nnx.Rngs(0))
            self.layers = nnx.List([self.conv]) if hasattr(nnx, "List") else [self.conv]

        def __call__(self, x):
            return self.layers[0](self.conv(x)[:, ::2])

    model, x = Net(), draw((9, 5))
    fused = flax.fuse(model, (9, 5))
    assert fused.conv is fused.layers[0]
    assert [row.size for row in fused.fuse_report.layers] == [None]
    assert np.allclose(fused(x), model(x), atol=1e-5)

    class Linen(nn.Module):
        def setup(self):
            self.conv = linen.CoordConv(C, (3, 3))

        def __call__(self, x):
            return self.conv(self.conv(x)[:, ::2])

    model = Linen()
    variables = model.init(jax.random.key(0), x)
    found, report = linen.fuse(model, variables, x)
    assert set(found["coordconv"]["conv"]) == {"9x5", "5x5"}
    assert [row.size for row in report.layers] == [(9, 5), (5, 5)]
    assert np.allclose(model.apply(found, x), model.apply(variables, x), atol=1e-5)


def test_a_layer_as_the_network():
    layer, x = nnx_layer("2-D"), inputs((9, 5))
    fused = flax.fuse(layer, (9, 5))
    assert isinstance(fused, FusedCoordConv)
    assert np.array_equal(fused(x), layer(x))
    assert str(fused.fuse_report) == "(itself)  CoordConv  one map for 9x5"


def test_without_batch_norms():
    net = nnx.Sequential(nnx_layer("2-D"), nnx_norm())
    fused = flax.fuse(net, (9, 5), batch_norm=False)
    assert isinstance(fused.layers[1], nnx.BatchNorm)
    assert not fused.fuse_report.notes
    net, x = nn.Sequential([linen_layer("2-D"), nn.BatchNorm(True)]), inputs((9, 5))
    variables = net.init(jax.random.key(0), x)
    fused, report = linen.fuse(net, variables, x, batch_norm=False)
    assert report.layers[0].batch_norm is None
    for name in ("params", "batch_stats"):
        jax.tree.map(np.array_equal, fused[name]["layers_1"], variables[name]["layers_1"])


# What else may use a layer's output or weights, or a norm.


class Uses(nnx.Module):
    """A layer, the norm after it, and ``what`` else there is to them."""

    def __init__(self, what):
        self.what, rngs = what, nnx.Rngs(0)
        self.conv, self.norm = flax.CoordConv(C, C, (1, 1), rngs=rngs), nnx_norm()

    def __call__(self, x):
        y = self.conv(x)
        if self.what == "sown":
            self.sow(nnx.Intermediate, "seen", y)
        z = self.norm(y)
        match self.what:
            case "the weights":
                return z + self.conv.kernel[...].sum()
            case "the statistics":
                return z + self.norm.mean[...].sum()
            case "in a jit":
                return z + nnx.jit(lambda conv, x: conv(x))(self.conv, x)
            case "the norm in a jit":
                return z + nnx.jit(lambda norm, x: norm(x))(self.norm, x)
            case "in a vmap":
                return z + jax.vmap(self.conv)(x)
            case "a bound":  # which NaN is not beyond
                return z + (y > 100)
        return z


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize(
    "what",
    [
        "sown",
        "the weights",
        "the statistics",
        "in a jit",
        "the norm in a jit",
        "in a vmap",
        "a bound",
    ],
)
def test_what_is_used_elsewhere_in_nnx_is_not_folded(what):
    model, x = Uses(what), draw((9, 5))
    fused = flax.fuse(model, (9, 5))
    assert [row.batch_norm for row in fused.fuse_report.layers] == [None]
    if what not in ("the weights",):  # whose place is another now
        assert np.allclose(fused(x), model(x), atol=1e-5)
    assert flax.fuse(Uses("nothing"), (9, 5)).fuse_report.layers[0].batch_norm == "norm"


class Tapped(nnx.Module):
    def __init__(self):
        self.parts = nnx.Sequential(flax.CoordConv(C, C, (1, 1), rngs=nnx.Rngs(0)), nnx_norm())

    def __call__(self, x):
        y = self.parts.layers[0](x)
        return self.parts.layers[1](y) + y


def test_a_sequence_that_is_run_in_parts():
    model, x = Tapped(), draw((9, 5))
    assert np.allclose(flax.fuse(model)(x), model(x), atol=1e-5)
    report = flax.fuse(nnx.Sequential(model.parts)).fuse_report
    assert report.layers[0].batch_norm == "layers.0.layers.1"


class LinenUses(nn.Module):
    what: str = "nothing"

    @nn.compact
    def __call__(self, x):
        if self.what == "a remat":
            x = nn.remat(linen.CoordConv)(C, (1, 1))(x)
        conv, norm = linen.CoordConv(C, (1, 1), name="conv"), nn.BatchNorm(True, name="norm")
        y = conv(x)
        if self.what == "sown":
            self.sow("intermediates", "seen", y)
        z = norm(y)
        match self.what:
            case "the weights":
                return z + conv.variables["params"]["bias"].sum()
            case "the statistics":
                return z + norm.variables["batch_stats"]["mean"].sum()
            case "in a vmap":
                return z + jax.vmap(lambda row: conv(row))(x)
            case "in a jit":
                return z + nn.jit(lambda conv, x: conv(x))(conv, x)
            case "a bound":
                return z + (y > 100)
        return z


@pytest.mark.parametrize(
    "what", ["sown", "the weights", "the statistics", "in a vmap", "in a jit", "a bound"]
)
def test_what_is_used_elsewhere_in_linen_is_not_folded(what):
    model, x = LinenUses(what), draw((9, 5))
    variables = model.init(jax.random.key(0), x)
    jax.jit(model.apply)(variables, x)  # whose traces are in JAX's caches now
    model.apply(variables, x)
    fused, report = linen.fuse(model, variables, x)
    assert [row.batch_norm for row in report.layers] == [None]
    assert np.allclose(model.apply(fused, x), model.apply(variables, x), atol=1e-5)
    _, report = linen.fuse(LinenUses(), variables, x)
    assert report.layers[0].batch_norm == "norm"


def test_layers_that_a_transformation_stands_before_are_left():
    model, x = LinenUses("a remat"), draw((9, 5))
    variables = model.init(jax.random.key(0), x)
    fused, report = linen.fuse(model, variables, x)
    assert "CheckpointCoordConv_0 is left: a transformation stands between" in str(report)
    assert [(row.name, row.batch_norm) for row in report.layers] == [("conv", "norm")]
    assert np.allclose(model.apply(fused, x), model.apply(variables, x), atol=1e-5)

    model = nn.Sequential([nn.WeightNorm(linen.CoordConv(C, (1, 1))), linen.CoordConv(C, (1, 1))])
    variables = model.init(jax.random.key(0), x)
    fused, report = linen.fuse(model, variables, x)
    assert len(report.layers) == len(report.notes) == 1
    assert np.allclose(model.apply(fused, x), model.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_a_transformation_stands_before_in_one_call_is_left(first):
    def normed(params):
        return jax.tree.map(lambda array: array / (1 + jnp.linalg.norm(array)), params)

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen.CoordConv(OUT, (3, 3))

            def call(layer, x):
                return layer(x)

            given = {"init": self.is_initializing(), "mutable": True}
            calls = [nn.map_variables(call, "params", normed, **given), call]
            return sum(each(layer, x) for each in (calls if first else calls[::-1]))

    model, x = Twice(), draw((9, 5))
    variables = model.init(jax.random.key(0), x)
    fused, report = linen.fuse(model, variables, x)
    assert not report.layers
    assert np.array_equal(model.apply(fused, x), model.apply(variables, x))


def test_a_norm_of_another_type_or_axis_is_left():
    for norm in (nnx_norm(dtype="bfloat16"), nnx.BatchNorm(5, axis=-2, rngs=nnx.Rngs(0))):
        norm.use_running_average = True
        net, x = nnx.Sequential(nnx_layer("2-D", init), norm), draw((9, 5))
        for size in ((9, 5), None):
            fused = flax.fuse(net, size)
            assert isinstance(fused.layers[1], nnx.BatchNorm)
            assert np.allclose(plain(fused(x)), plain(net(x)), atol=1e-5)


def test_boxes_of_linen_stay():
    boxed = nn.with_partitioning(integers, (None, None, None, "out"))
    layer, x = linen.CoordConv(OUT, (3, 3), kernel_init=boxed), inputs((9, 5))
    variables = layer.init(jax.random.key(0), x)
    fused, _ = linen.fuse(layer, variables, x)
    kernel = fused["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == (None, None, None, "out")
    assert np.array_equal(layer.apply(fused, x), layer.apply(variables, x))


# Bad input.


class OfItsOwn(flax.CoordConv):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class LinenOfItsOwn(linen.CoordConv):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Scaled(nnx.Module):
    def __init__(self):
        self.conv = nnx_layer("2-D")

    def __call__(self, x, scale):
        return self.conv(x) * scale


def own_step(*args, **kwargs):
    return 2 * jax.lax.conv_general_dilated(*args, **kwargs)


def test_what_cannot_be_fused_in_nnx():
    layer = nnx_layer("2-D")
    with pytest.raises(ValueError, match=r"size must have 2 lengths of at least 1, got \(5,\)"):
        layer.fuse((5,))
    with pytest.raises(ValueError, match=r"size must have 2 lengths of at least 1, got \(5, 0\)"):
        layer.fuse((5, 0))
    with pytest.raises(TypeError, match="size must be a spatial shape, got 5"):
        layer.fuse(5)
    with pytest.raises(ValueError, match="kernel"):
        nnx_layer("valid").fuse((1, 1))
    fused = layer.fuse((9, 5))
    with pytest.raises(ValueError, match=r"the size that was fused, \(9, 5\), got \(5, 9\)"):
        fused(inputs((5, 9)))
    with pytest.raises(ValueError, match="4 channels"):
        fused(inputs((9, 5), 3))
    with pytest.raises(ValueError, match="'layers.1' is not: call model.eval()"):
        flax.fuse(nnx.Sequential(layer, nnx.BatchNorm(OUT, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="OfItsOwn has a __call__ of its own"):
        OfItsOwn(C, OUT, (3, 3), rngs=nnx.Rngs(0)).fuse()
    net = nnx.Sequential(nnx.relu, nnx_layer("2-D", conv_general_dilated=own_step))
    with pytest.raises(ValueError, match="'layers.1' .* has a conv_general_dilated of its own"):
        flax.fuse(net)
    many = nnx.vmap(lambda key: flax.CoordConv(C, OUT, (3, 3), rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 2)
    )
    with pytest.raises(ValueError, match="must have a kernel of 4 axes, got .* a scan or vmap"):
        many.fuse()
    hooked = nnx_layer("2-D")
    hooked.kernel = nnx.Param(hooked.kernel[...], on_get_value=lambda _, value: value / value.max())
    with pytest.raises(ValueError, match="kernel of layers.0 must hold its values, and computes"):
        flax.fuse(nnx.Sequential(hooked))
    for kind in ("WeightNorm", "SpectralNorm"):
        if hasattr(nnx, kind):
            computed = getattr(nnx, kind)(nnx_layer("2-D"), rngs=nnx.Rngs(0))
            with pytest.raises(
                ValueError, match=f"'layers.0' .{kind}. computes the kernel of a Co"
            ):
                flax.fuse(nnx.Sequential(computed))
    with pytest.raises(ValueError, match=r"takes no noise of\n  4 features: .*missing .* 'scale'"):
        flax.fuse(Scaled(), (9, 5))
    with pytest.raises(ValueError, match="model has no CoordConv to fuse"):
        flax.fuse(nnx.Sequential(flax.AddCoords(), nnx.relu), (9, 5))
    with pytest.raises(TypeError, match="model must be a flax.nnx.Module, got int"):
        flax.fuse(3)
    for size in (5, "55"):
        with pytest.raises(TypeError, match="size must be a spatial shape or an example of the in"):
            flax.fuse(layer, size)


def test_what_cannot_be_fused_in_linen():
    x = inputs((9, 5))

    def refuse(module, error, message, **given):
        variables = module.init(jax.random.key(0), x)
        with pytest.raises(error, match=message):
            linen.fuse(module, variables, x, **given)

    layer = linen_layer("2-D")
    variables = layer.init(jax.random.key(0), x)
    fused, _ = linen.fuse(layer, variables, x)
    for other in (inputs((5, 9)), inputs((9, 6))):
        with pytest.raises(ValueError, match="must have a size that was fused, 9x5, got "):
            layer.apply(fused, other)
    with pytest.raises(ValueError, match="4 channels"):
        layer.apply(fused, inputs((9, 5), 3))
    with pytest.raises(ValueError, match="channels"):  # the collection of the maps was lost
        layer.apply({"params": fused["params"]}, x)
    with pytest.raises(ValueError, match="channels"):  # other parameters
        layer.apply(fused | {"params": variables["params"]}, x)
    with pytest.raises(ValueError, match="variables must be those from before fuse"):
        layer.export_weights(fused)
    with pytest.raises(ValueError, match="variables are fused"):
        linen.fuse(layer, fused, x)
    with pytest.raises(TypeError, match="model must be a flax.linen.Module, got int"):
        linen.fuse(3, fused, x)
    refuse(nn.Conv(3, (3, 3)), ValueError, "model has no CoordConv to fuse, or called none")
    refuse(LinenOfItsOwn(3, (3, 3)), ValueError, "LinenOfItsOwn has a __call__ of its own")
    own = nn.Sequential([linen.CoordConv(3, (3, 3), conv_general_dilated_cls=lambda: own_step)])
    refuse(own, ValueError, "'layers_0' .* has a conv_general_dilated of its own")
    refuse(LinenBlock(), ValueError, "use_running_average=True .* 'norm' is not", train=True)
