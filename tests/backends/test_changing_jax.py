"""Networks of Flax that are given coordinates, and lose them: all that a convolution had stays."""

import copy
import inspect
import json
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

from flax import core as flax_core
from flax import linen
from jax import export
from jax import numpy as jnp

from coordconv import Coordinates, Window
from coordconv.backends import linen as linen_backend
from coordconv.backends.flax import (
    CoordConv,
    CoordConvTranspose,
    add_coords,
    fuse,
    remove_coords,
    with_coords,
)

PLAIN = (nnx.Conv, nnx.ConvTranspose)
data = getattr(nnx, "data", lambda value: value)  # which older releases need not be told
jitted = nnx.jit(lambda model, x: model(x))


class Branch(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (1, 1), feature_group_count=2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.conv(x)


class Net(nnx.Module):
    """Each kind of place that a network holds a convolution in, and each kind of convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.body = nnx.Sequential(Branch(rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs))
        self.pair = data((nnx.Conv(8, 16, (3, 3), 2, padding="CIRCULAR", rngs=rngs),))
        options = {"strides": (2, 2), "transpose_kernel": True}
        self.by_name = nnx.Dict(
            up=nnx.ConvTranspose(16, 6, (2, 2), rngs=rngs, **options),
            out=nnx.Conv(6, 6, (3, 3), padding="REFLECT", rngs=rngs),
        )

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.pair[0](self.body(x))
        return self.by_name["out"](self.by_name["up"](x))


NAMES = ["body.layers.0.conv", "by_name.out", "by_name.up", "pair.0", "stem"]


def network():
    return Net(nnx.Rngs(0))


def images(*shape):
    shape = shape or (4, 18, 22, 3)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype("f4"))


def layer(model, name):
    for key in name.split("."):
        model = model[int(key)] if key.isdigit() else _attribute(model, key)
    return model


def _attribute(model, key):
    return model[key] if isinstance(model, nnx.Dict) else getattr(model, key)


def coordinates(layer):
    """The coordinates' part of a layer's kernel, and the features' part."""
    axis = -1 if getattr(layer, "transpose_kernel", False) else -2
    kernel = np.moveaxis(np.asarray(layer.kernel[...], "f8"), axis, 0)
    n = len(layer.coords)
    return kernel[-n:], kernel[:-n]


def leaves(model):
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    return {jax.tree_util.keystr(path): np.asarray(leaf, "f8") for path, leaf in paths(state)}


def paths(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def equal_leaves(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def refused(model, message, error=ValueError, **options):
    before = leaves(model), nnx.graphdef(model)
    with pytest.raises(error, match=message):
        add_coords(model, **options)
    assert equal_leaves(leaves(model), before[0])
    assert nnx.graphdef(model) == before[1]


def update(model, optimizer, grads):
    both = "model" in inspect.signature(nnx.Optimizer.update).parameters
    optimizer.update(*((model, grads) if both else (grads,)))


def give_coordinates_values(model):
    """Numbers for the coordinates' parts, so that they are seen if they are lost."""
    for node in [node for _, node in nnx.iter_graph(model)]:
        if isinstance(node, (CoordConv, CoordConvTranspose)):
            shape = node.kernel[...].shape
            values = np.random.default_rng(2).normal(size=shape)
            node.kernel[...] = jnp.asarray(values, node.kernel[...].dtype)


# In training JAX 0.6 compiles the statistics' sums into others, which differ in the last bits.
@pytest.mark.parametrize(
    ("run", "training"),
    [(lambda model, x: model(x), False), (lambda model, x: model(x), True), (jitted, False)],
    ids=["eager", "eager, training", "jit"],
)
def test_outputs_are_what_they_were_to_the_bit(run, training):
    model, before, x = network(), network(), images()
    for each in (model, before):
        each.train() if training else each.eval()
    changes = add_coords(model)
    assert sorted(change.name for change in changes.layers) == NAMES
    assert np.array_equal(run(model, x), run(before, x))
    kinds = [type(layer(model, name)) for name in NAMES]
    assert kinds == [CoordConv, CoordConv, CoordConvTranspose, CoordConv, CoordConv]
    one, other = leaves(model), leaves(before)  # the statistics of training, too
    assert one.keys() == other.keys()
    for name in one:
        if not name.endswith("['kernel']"):
            assert np.array_equal(one[name], other[name])


@pytest.mark.parametrize("seed", range(24))
def test_outputs_of_one_layer_are_what_they_were_to_the_bit(seed):
    draw = random.Random(seed)
    rank, transposed = draw.choice([1, 2, 2, 3]), draw.random() < 0.3
    groups = 1 if transposed else draw.choice([1, 1, 4])
    modes = ["SAME", "VALID", "CIRCULAR", [(1, 2)] * rank] + ["REFLECT"] * (not transposed)
    options = {
        "strides": draw.choice([1, 2]),
        "padding": draw.choice(modes),
        "kernel_dilation": draw.choice([1, 1, 2]),
        "use_bias": draw.random() < 0.7,
        "dtype": draw.choice([None, None, jnp.bfloat16]),
        "param_dtype": draw.choice([jnp.float32, jnp.float32, jnp.bfloat16]),
    }
    if transposed:
        options["transpose_kernel"] = draw.random() < 0.5
    else:
        options["feature_group_count"] = groups
    kind, ours = PLAIN[transposed], (CoordConv, CoordConvTranspose)[transposed]
    channels = draw.choice([4, 16, 64])
    kernel = (draw.choice([1, 3]),) * rank
    conv = kind(channels, 4 * draw.choice([1, 8]), kernel, rngs=nnx.Rngs(seed), **options)
    made = ours.from_conv(conv, draw.choice([None, "x", "xr"]))
    x = images(draw.choice([1, 2]), *[draw.choice([7, 9]) for _ in range(rank)], channels)
    assert made.kernel.dtype == conv.kernel.dtype
    for run in (lambda model, x: model(x), jitted):
        got, want = run(made, x), run(conv, x)
        assert got.dtype == want.dtype
        assert np.array_equal(np.asarray(got, "f4"), np.asarray(want, "f4"))
    give_coordinates_values(made)
    assert not np.array_equal(np.asarray(made(x), "f4"), np.asarray(conv(x), "f4"))


def test_map_only_is_a_choice():
    """Without it, the compiler may have one sum over features and coordinates, in its order."""
    conv, x = nnx.Conv(32, 64, (1, 1), rngs=nnx.Rngs(0)), images(1, 5, 6, 32)
    made = CoordConv.from_conv(conv)
    assert made.map_only
    made.map_only = False
    kernel = np.abs(np.asarray(conv.kernel[...])).sum((0, 1, 2)).max()
    bound = 35 * 2**-24 * (kernel * np.abs(x).max() + 1)
    assert np.abs(np.asarray(made(x)) - np.asarray(conv(x))).max() <= bound


def test_a_module_in_two_places_stays_one():
    conv = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    model = nnx.Sequential(conv, nnx.Sequential(conv, nnx.relu))
    model.again = conv
    model.back = model  # a circle
    changes = add_coords(model)
    assert len(changes.layers) == 1
    assert model.layers[0] is model.layers[1].layers[0] is model.again
    assert model.again.kernel is conv.kernel
    assert conv.kernel.shape == (3, 3, 6, 4)
    with pytest.raises(Exception, match="feature"):  # the old module: not silent
        conv(images(1, 5, 5, 4))
    changes.undo()
    assert model.layers[0] is model.layers[1].layers[0] is model.again


def test_tied_kernels_stay_one_or_are_refused_by_name():
    rngs = nnx.Rngs(0)
    convs = [nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)]
    convs.append(nnx.Conv(4, 4, (3, 3), 2, rngs=rngs))
    convs[1].kernel = kernel = convs[0].kernel
    model = nnx.Sequential(*convs)
    tied = "layers.0.kernel and layers.1.kernel are one parameter"
    refused(model, tied, layers="layers.0")
    refused(model, tied, exclude="layers.1")
    add_coords(model, layers=["layers.0", "layers.1"])
    assert model.layers[0].kernel is model.layers[1].kernel is kernel
    assert kernel.shape == (3, 3, 6, 4)
    with pytest.raises(ValueError, match=tied):
        remove_coords(model, layers="layers.0")
    remove_coords(model)
    assert model.layers[0].kernel is model.layers[1].kernel is kernel
    assert kernel.shape == (3, 3, 4, 4)


def test_a_kernel_tied_to_what_is_no_convolution_is_refused():
    model = nnx.Sequential(nnx.Conv(4, 4, (1,), rngs=nnx.Rngs(0)))
    model.table = model.layers[0].kernel
    refused(model, "layers.0.kernel and table are one parameter", coords="x")


def test_what_a_convolution_had_stays():
    rngs = nnx.Rngs(0)

    class Frozen(nnx.Param):
        pass

    conv = nnx.Conv(4, 8, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs)
    conv.kernel = nnx.Param(conv.kernel[...], mine=1)
    conv.note, conv.scale = "mine", nnx.Param(jnp.ones(8))
    other = nnx.Conv(8, 8, (1, 1), mask=jnp.zeros((1, 1, 8, 8)).at[..., 0].set(1), rngs=rngs)
    other.kernel = Frozen(other.kernel[...])
    model = nnx.Sequential(conv, other)
    wanted, kernel, kept = model(images(2, 5, 5, 4)), conv.kernel, conv.kernel.get_metadata()
    add_coords(model, "xyr")
    first, second = model.layers
    assert first.kernel is kernel
    assert first.kernel.dtype == jnp.bfloat16
    assert first.kernel.get_metadata() == kept
    assert kept["mine"] == 1
    assert first.bias is conv.bias
    assert first.note == "mine"
    assert first.scale is conv.scale
    assert type(second.kernel) is Frozen
    assert second.mask.shape == second.kernel.shape == (1, 1, 11, 8)
    assert second.mask[..., :8, :].sum() == 8
    assert second.mask[..., 8:, :].all()
    assert np.array_equal(model(images(2, 5, 5, 4)), wanted)
    remove_coords(model)
    assert kernel.get_metadata() == kept
    assert kernel.shape == (3, 3, 4, 8)
    assert model.layers[1].mask.shape == (1, 1, 8, 8)
    assert np.array_equal(model(images(2, 5, 5, 4)), wanted)


SPREAD = """
import numpy as np, jax, sys
from flax import nnx
from jax import numpy as jnp
from coordconv.backends.flax import add_coords, remove_coords
for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(kind,))
    for axis, channels in ((3, 3), (2, 4), (2, 3)):
        names = tuple("m" if i == axis else None for i in range(4))
        model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
        sharding = jax.NamedSharding(mesh, jax.P(*names))
        start = np.asarray(model.layers[0].kernel[...])
        kernel = model.layers[0].kernel = nnx.Param(jax.device_put(start, sharding))
        coords = "xyr"[: 2 if channels == 4 else 3]
        with jax.set_mesh(mesh):
            if axis == 2 and channels == 3:  # 7 channels are not two equal parts
                try:
                    add_coords(model, coords)
                except ValueError as error:
                    assert str(error).startswith("layers.0: ") and "divi" in str(error), error
                    assert kernel.shape == start.shape and type(model.layers[0]) is nnx.Conv
                else:
                    raise AssertionError("not refused")
                continue
            add_coords(model, coords)
            assert kernel[...].sharding.is_equivalent_to(sharding, 4), kernel[...].sharding
            assert np.array_equal(np.asarray(kernel[...])[:, :, :4], start)
            remove_coords(model)
            assert kernel[...].sharding.is_equivalent_to(sharding, 4), kernel[...].sharding
            assert np.array_equal(kernel[...], start)
"""


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no shardings in its types")
def test_a_sharding_stays():
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    found = subprocess.run(
        [sys.executable, "-c", SPREAD], capture_output=True, text=True, env=flags, check=False
    )
    assert found.returncode == 0, found.stderr


def test_no_random_number_is_drawn():
    model = network()
    before = nnx.to_pure_dict(nnx.state(model, nnx.RngState))
    add_coords(model)
    after = nnx.to_pure_dict(nnx.state(model, nnx.RngState))
    for (path, one), (_, other) in zip(paths(before), paths(after), strict=True):
        assert one == other, path


def test_an_abstract_network():
    model = nnx.eval_shape(network)
    changes = add_coords(model)
    kernel = nnx.to_pure_dict(nnx.state(model))["stem"]["kernel"]
    assert kernel == jax.ShapeDtypeStruct((3, 3, 5, 8), jnp.float32)
    changes.undo()
    assert nnx.graphdef(model) == nnx.graphdef(nnx.eval_shape(network))


def test_what_a_vmap_stacked():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(key))

    model = nnx.Sequential(stack(jax.random.split(jax.random.key(0), 3)))

    @nnx.vmap(in_axes=(0, None))
    def run(conv, x):
        return conv(x)

    x = images(2, 6, 6, 4)
    wanted = run(model.layers[0], x)
    changes = add_coords(model)
    assert changes.layers[0].parameters == 3 * 2 * 9 * 4
    assert model.layers[0].kernel.shape == (3, 3, 3, 6, 4)
    assert np.array_equal(run(model.layers[0], x), wanted)
    remove_coords(model)
    with pytest.raises(ValueError, match="init must be"):
        add_coords(model, init="fan_in", rngs=nnx.Rngs(0))


def own(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


def test_computed_kernels_are_refused_by_name():
    model, rngs = network(), nnx.Rngs(0)
    model.stem = nnx.Conv(3, 8, (3, 3), conv_general_dilated=own, rngs=rngs)
    refused(model, "stem: it has a conv_general_dilated of its own")
    add_coords(model, exclude="stem")
    assert type(model.pair[0]) is CoordConv

    class Doubled(nnx.Param):
        def get_value(self, **kwargs):
            return 2 * super().get_value(**kwargs)

    if hasattr(nnx.Variable, "get_value"):
        model = network()
        model.stem.kernel = Doubled(model.stem.kernel[...])
        refused(model, "stem: its kernel is computed when it is read", layers="stem")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flax deprecates hooks
        model = network()
        hooks = {"on_get_value": lambda _, value: 2 * value}
        model.stem.kernel = nnx.Param(model.stem.kernel[...], **hooks)
        refused(model, "stem: its kernel is computed when it is read")


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_norms_of_kernels_are_refused_by_name(name):
    if not hasattr(nnx, name):
        pytest.skip(f"this Flax has no {name}")
    rngs = nnx.Rngs(0)
    inner = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    model = nnx.Sequential(getattr(nnx, name)(inner, rngs=rngs), nnx.Conv(8, 8, (1, 1), rngs=rngs))
    refused(model, rf"layers.0.layer_instance: layers.0 \({name}\) computes its kernel")
    assert len(add_coords(model, exclude="layers.0").layers) == 1
    layers = CoordConv(3, 8, (3, 3), rngs=rngs), nnx.relu
    model = nnx.Sequential(getattr(nnx, name)(layers[0], rngs=rngs))
    with pytest.raises(ValueError, match="computes its kernel"):
        remove_coords(model)


def test_a_subclass_and_an_inconsistent_kernel_are_left_or_refused():
    class Mine(nnx.Conv):
        pass

    model = nnx.Sequential(Mine(3, 8, (3, 3), rngs=nnx.Rngs(0)))
    refused(model, "nothing to change\n  layers.0: Mine is a subclass")
    refused(model, "layers.0: Mine is a subclass", layers="layers.0")
    model = network()
    model.stem.kernel = nnx.Param(jnp.ones((3, 3, 4, 8)))
    refused(model, r"stem: its kernel has shape \(3, 3, 4, 8\), and should have \(3, 3, 3, 8\)")


@pytest.mark.parametrize("name", ["adam", "momentum", "lion", "masked", "adagrad"])
def test_an_optimizer_of_before(name):
    def by_rank(params):
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)

    make = {
        "adam": lambda: optax.adam(0.01),
        "momentum": lambda: optax.chain(optax.clip(1.0), optax.sgd(0.05, momentum=0.9)),
        "lion": lambda: optax.lion(0.01),
        "masked": lambda: optax.masked(optax.adam(0.01), by_rank),
        "adagrad": lambda: optax.adagrad(0.01),
    }[name]
    x, models = images(), [network(), network()]
    optimizers = [nnx.Optimizer(model, make(), wrt=nnx.Param) for model in models]

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
        update(model, optimizer, grads)

    for model, optimizer in zip(models, optimizers, strict=True):
        model.eval()
        step(model, optimizer)
    (model, twin), (optimizer, other) = models, optimizers
    changes = add_coords(model)
    with pytest.raises((TypeError, ValueError), match="shape"):
        step(model, optimizer)
    changes.update_optimizer(optimizer)
    changes.update_optimizer(optimizer)  # there is nothing left to do
    step(model, optimizer)
    step(twin, other)
    for each in NAMES:
        moved, features = coordinates(layer(model, each))
        kept = np.asarray(layer(twin, each).kernel[...], "f8")
        axis = -1 if each == "by_name.up" else -2
        assert np.allclose(features, np.moveaxis(kept, axis, 0), atol=1e-5)
        assert np.abs(moved).max() > 0
    changes.undo()
    with pytest.raises((TypeError, ValueError), match="shape"):
        step(model, optimizer)
    changes.update_optimizer(optimizer)
    step(model, optimizer)


def test_momenta_of_one_feature_are_not_taken_for_those_of_coordinates():
    conv = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    model, x = nnx.Sequential(conv), images(2, 5, 5, 4)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
    update(model, optimizer, grads)
    with pytest.warns(UserWarning, match="optimizer keeps momenta for layers.0.kernel"):
        changes = add_coords(model)
    changes.update_optimizer(optimizer)
    momenta = optimizer.opt_state[0].trace["layers"][0]["kernel"][...]
    assert momenta.shape == (3, 3, 3, 4)
    assert momenta[..., :1, :].all()
    assert not momenta[..., 1:, :].any()
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_coords(nnx.Sequential(nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)))))


def test_a_state_of_other_channels_is_not_cut_or_filled():
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    changes = add_coords(model, "xy")
    of_seven = nnx.state(nnx.Sequential(nnx.Conv(7, 4, (3, 3), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"state has layers.0.kernel of shape \(3, 3, 7, 4\)"):
        changes.fit(of_seven)
    changes.undo()
    of_one = nnx.state(nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"state has layers.0.kernel of shape \(3, 3, 1, 4\)"):
        changes.fit(of_one)


@pytest.mark.parametrize("remove", [False, True])
def test_momenta_of_other_coordinates_are_warned_of(remove):
    model, x = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))), images(2, 5, 5, 3)
    changes = add_coords(model, "xy")
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    update(model, optimizer, nnx.grad(lambda model: (model(x) ** 2).mean())(model))
    removed = remove_coords(model) if remove else changes
    if not remove:
        changes.undo()
    with pytest.warns(UserWarning, match="momenta for layers.0.kernel, and for the coordinates"):
        again = add_coords(model, "yr")
    again.undo()
    removed.update_optimizer(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_coords(model, "yr").update_optimizer(optimizer)
    momenta = optimizer.opt_state[0].trace["layers"][0]["kernel"][...]
    assert momenta[..., :3, :].any()
    assert not momenta[..., 3:, :].any()


def test_an_optimizer_that_cannot_be_updated():
    model = nnx.Sequential(nnx.Conv(128, 128, (1, 1), rngs=nnx.Rngs(0)))
    factored = nnx.Optimizer(model, optax.adafactor(0.01), wrt=nnx.Param)
    elsewhere = nnx.Optimizer(network(), optax.adam(0.01), wrt=nnx.Param)
    plain = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    changes = add_coords(model)
    with pytest.raises(ValueError, match=r"layers.0.kernel of shape .* make a new one"):
        changes.update_optimizer(factored)
    with pytest.raises(ValueError, match="optimizer has none of the kernels that changed"):
        changes.update_optimizer(elsewhere)
    with pytest.raises(TypeError, match=r"optimizer must be a flax.nnx.Optimizer, got dict"):
        changes.update_optimizer({})
    changes.update_optimizer(plain)  # it keeps nothing


@pytest.mark.parametrize("pure", [False, True])
def test_a_state_of_before(pure, tmp_path):
    model, x = network(), images()
    model.eval()
    wanted, state = model(x), nnx.state(network())
    changes = add_coords(model)
    give_coordinates_values(model)
    kept = nnx.to_pure_dict(state)
    if pure:
        fitted = changes.fit(kept)
        new = nnx.state(model)
        nnx.replace_by_pure_dict(new, fitted)
        nnx.update(model, new)
    else:
        nnx.update(model, changes.fit(state))
    assert np.array_equal(model(x), wanted)
    assert nnx.to_pure_dict(state)["stem"]["kernel"].shape == (3, 3, 3, 8)  # is not changed
    with pytest.raises(ValueError, match="state has none of the kernels that changed"):
        changes.fit({"elsewhere": kept})
    kept["stem"]["kernel"] = jnp.ones((5, 5, 3, 8))
    with pytest.raises(ValueError, match=r"stem.kernel of shape \(5, 5, 3, 8\)"):
        changes.fit(kept)
    nnx.update(model, state)  # a plain kernel, as it is
    for run in (lambda model, x: model(x), jitted):
        with pytest.raises(ValueError, match="kernel must have 5 input channels"):
            run(model, x)


def test_states_and_copies_of_after():
    model, x = network(), images()
    model.eval()
    f = nnx.jit(lambda model, x: model(x))
    f(model, x)  # compiled for the network before
    add_coords(model, "xyr")
    give_coordinates_values(model)
    wanted = np.asarray(model(x))
    assert np.array_equal(f(model, x), nnx.jit(lambda model, x: model(x))(model, x))
    merged = nnx.merge(*nnx.split(model))
    for copied in (nnx.clone(model), copy.deepcopy(model), merged):
        assert np.array_equal(copied(x), wanted)
    if not hasattr(model.stem, "kernel_init"):  # which older releases keep, and no pickle takes
        assert np.array_equal(pickle.loads(pickle.dumps(model.stem))(x), model.stem(x))
    other = network()
    other.eval()
    add_coords(other, "xyr")
    assert nnx.graphdef(other) == nnx.graphdef(model)
    nnx.update(other, nnx.state(model))
    assert np.array_equal(other(x), wanted)


def test_training_goes_on_and_the_network_is_fused_and_exported():
    model, x = network(), images()
    add_coords(model, "xyr")
    model.eval()
    target = jnp.broadcast_to(jnp.linspace(-1, 1, 22)[:, None], (4, 18, 22, 6))
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - target) ** 2).mean())(model)
        update(model, optimizer, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(np.abs(coordinates(layer(model, name))[0]).max() > 0 for name in NAMES)
    wanted = model(x)
    assert np.allclose(fuse(model, size=x)(x), wanted, atol=1e-4)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    exported = export.export(run)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert np.allclose(exported.call(x), wanted, atol=1e-4)


def test_fan_in_draws_the_coordinates_alone():
    for transposed, options in enumerate(({}, {"transpose_kernel": True})):
        kind, ours = PLAIN[transposed], (CoordConv, CoordConvTranspose)[transposed]
        model = nnx.Sequential(kind(3, 8, (3, 3), rngs=nnx.Rngs(0), **options))
        features = np.asarray(model.layers[0].kernel[...])
        refused(model, 'rngs must be given with init="fan_in"', init="fan_in")
        add_coords(model, "xyr", init="fan_in", rngs=nnx.Rngs(3))
        new = ours(3, 8, (3, 3), coords="xyr", rngs=nnx.Rngs(3), **options)
        drawn, kept = coordinates(model.layers[0])
        axis = -1 if transposed else -2
        assert np.array_equal(drawn, coordinates(new)[0])
        assert np.array_equal(kept, np.moveaxis(features, axis, 0))
        assert not model.layers[0].map_only


def test_layers_are_chosen():
    model = network()
    changes = add_coords(model, layers=re.compile("(stem|pair.*)"))
    assert {change.name for change in changes.layers} == {"pair.0", "stem"}
    changes = add_coords(model, "yx", layers=["stem", "by_name"])
    assert {change.name for change in changes.layers} == {"by_name.out", "by_name.up"}
    assert changes.skipped == {"stem": f"has coordinates already, {Coordinates('xy')}"}
    assert model.stem.coords == Coordinates("xy")
    json.loads(changes.to_json())
    changes = add_coords(model, layers=lambda name, module: module.use_bias is False)
    assert [change.name for change in changes.layers] == ["body.layers.0.conv"]
    again = add_coords(model)
    assert not again.layers
    assert len(again.skipped) == 5
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(2, 2, (3,), rngs=rngs), nnx.Conv(2, 2, (3, 3), rngs=rngs))
    refused(model, "layers.0: .*'y'", layers="layers.0")
    assert "'y'" in add_coords(model).skipped["layers.0"]
    assert type(model.layers[0]) is nnx.Conv


def test_bad_arguments():
    model = network()
    refused(model, "coords 'q'", coords="q")
    refused(model, "init must be one of", init="ones")
    refused(model, "no layer 'conv7'; there are", layers="conv7")
    refused(model, "layers must be names", error=TypeError, layers=7)
    refused(nnx.Sequential(nnx.relu), "no layer that could be changed")
    conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    refused(conv, "got a Conv alone: CoordConv.from_conv")
    for function in (add_coords, with_coords, remove_coords):
        with pytest.raises(TypeError, match=r"model must be a flax.nnx.Module, got State"):
            function(nnx.state(model))
        with pytest.raises(ValueError, match="alone: CoordConv.from_conv"):
            function(conv)
    with pytest.raises(ValueError, match="no layer that could be changed"):
        remove_coords(model)


def test_a_module_that_nothing_can_replace_is_refused():
    struct = pytest.importorskip("flax.struct")

    @struct.dataclass
    class Holder:
        conv: nnx.Conv

    model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
    model.holder = data(Holder(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))))
    refused(model, "holder.conv must be in modules, lists, tuples and dicts alone")


def test_a_copy():
    model, x = network(), images()
    model.eval()
    model.again = model.stem
    before = nnx.graphdef(model)
    new, changes = with_coords(model, "xyr", exclude="pair.0")
    assert nnx.graphdef(model) == before
    assert new.again is new.stem
    assert np.array_equal(new(x), model(x))
    give_coordinates_values(new)
    assert model.stem.kernel.shape == (3, 3, 3, 8)
    changes.undo()
    assert type(new.stem) is nnx.Conv


def test_removing_gives_the_start_back():
    model, before = network(), network()
    add_coords(model)
    changes = remove_coords(model)
    assert equal_leaves(leaves(model), leaves(before))
    assert nnx.graphdef(model) == nnx.graphdef(before)  # no program is compiled anew
    assert changes.layers[0].variance_share is None
    assert {change.name: change.parameters for change in changes.layers}["stem"] == -144
    with pytest.raises(RuntimeError, match="nothing to undo"):
        changes.undo()
    layers = CoordConv(3, 8, (3, 3), mask=jnp.ones((3, 3, 5, 8)), rngs=nnx.Rngs(0))
    model = nnx.Sequential(layers)
    remove_coords(model)
    assert model.layers[0](images()).shape == (4, 18, 22, 8)


def test_undo_keeps_what_training_made_of_the_features():
    model, before, x = network(), network(), images()
    changes = add_coords(model)
    give_coordinates_values(model)
    features = np.asarray(model.stem.kernel[...])[:, :, :3]
    changes.undo()
    assert type(model.stem) is nnx.Conv
    assert np.array_equal(model.stem.kernel[...], features)
    assert nnx.graphdef(model) == nnx.graphdef(before)
    assert model(x).shape == (4, 18, 22, 6)
    with pytest.raises(RuntimeError, match="nothing to undo"):
        changes.undo()


def test_the_share_of_the_variance():
    model, x = network(), images()
    model.eval()
    add_coords(model, exclude="pair.0")
    kernel = model.stem.kernel[...]
    model.stem.kernel[...] = kernel.at[:, :, 3:].set(0.3)
    before = leaves(model)
    features = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    features.kernel[...], features.bias[...] = kernel[:, :, :3], model.stem.bias[...]
    rest = np.asarray(features(x), "f8")
    position = np.asarray(model.stem(x), "f8") - rest
    variances = [part.var((0, 1, 2)).sum() for part in (position, rest)]
    model.unused = CoordConv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    model.train()  # a copy is run: the statistics of this one stay
    changes = {change.name: change for change in remove_coords(model, x).layers}
    share = changes["stem"].variance_share
    assert share == pytest.approx(variances[0] / sum(variances), rel=1e-4)
    assert changes["by_name.up"].variance_share == 0.0
    assert changes["unused"].variance_share is None
    after = leaves(model)
    assert all(np.array_equal(before[k], after[k]) for k in before if "kernel" not in k)


def test_the_share_of_the_variance_in_a_window():
    class Seen(nnx.Module):
        def __init__(self, rngs):
            self.conv = CoordConv(3, 8, (3, 3), rngs=rngs)

        def __call__(self, x, window=None):
            return self.conv(x, window=window)

    shares = [
        remove_coords(Seen(nnx.Rngs(0)), given).layers[0].variance_share
        for given in (images(), (images(), Window(0.25, 0.75)))
    ]
    assert 0 < shares[1] < shares[0]  # a part of the frame has less of the coordinates


def test_a_layer_of_a_class_of_its_own_is_not_removed():
    class Mine(CoordConv):
        pass

    with pytest.raises(ValueError, match=r"layers.0: it is a Mine, a class of its own"):
        remove_coords(nnx.Sequential(Mine(3, 4, (1, 1), rngs=nnx.Rngs(0))))


def test_from_conv():
    conv, x = nnx.Conv(3, 8, (3, 3), 2, rngs=nnx.Rngs(0)), images()
    made = CoordConv.from_conv(conv, "xyr")
    assert np.array_equal(made(x), conv(x))
    assert type(conv) is nnx.Conv
    assert conv.kernel.shape == (3, 3, 3, 8)
    assert made.coords == Coordinates("xyr")
    assert made.kernel is not conv.kernel
    assert made.bias is not conv.bias
    assert CoordConv.from_conv(conv).coords == Coordinates("xy")
    drawn = CoordConv.from_conv(conv, init="fan_in", rngs=nnx.Rngs(1))
    assert np.abs(coordinates(drawn)[0]).min() > 0
    rngs = nnx.Rngs(0)
    for wrong in (nnx.ConvTranspose(3, 8, (3, 3), rngs=rngs), nnx.Linear(3, 8, rngs=rngs), "conv"):
        with pytest.raises(TypeError, match=r"conv must be a flax.nnx.Conv, got a"):
            CoordConv.from_conv(wrong)
    with pytest.raises(ValueError, match="'z'"):
        CoordConv.from_conv(conv, "xz")
    with pytest.raises(ValueError, match="init must be"):
        CoordConv.from_conv(conv, init="random")
    with pytest.raises(ValueError, match="rngs must be given"):
        CoordConv.from_conv(conv, init="fan_in")
    conv.conv_general_dilated = own
    with pytest.raises(ValueError, match="conv cannot be given coordinates: .* of its own"):
        CoordConv.from_conv(conv)


class LinenNet(linen.Module):
    conv: Any = linen.Conv
    up: Any = linen.ConvTranspose

    @linen.compact
    def __call__(self, x, train=False):
        boxed = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None, "i", "o"))
        x = self.conv(8, (3, 3), name="stem", kernel_init=boxed)(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = self.conv(8, (1, 1), feature_group_count=2, use_bias=False, name="block_0")(x)
        x = self.up(6, (2, 2), (2, 2), transpose_kernel=True, name="up")(x)
        return linen.Dense(3, name="head")(x)


class MapOnly(linen_backend.CoordConv):
    map_only = True


class MapOnlyTranspose(linen_backend.CoordConvTranspose):
    map_only = True


LINEN = LinenNet(partial(MapOnly, coords="xyr"), partial(MapOnlyTranspose, coords="xyr"))


def linen_variables():
    return LinenNet().init(jax.random.key(0), images())


def with_linen_coordinates(variables, **options):
    new = linen_backend.add_coords(variables, ["stem", "block_0"], "xyr", **options)
    return linen_backend.add_coords(new, "up", "xyr", transpose_kernel=True, **options)


@pytest.mark.parametrize("frozen", [False, True])
def test_linen_outputs_are_what_they_were_to_the_bit(frozen):
    variables, x = linen_variables(), images()
    if frozen:
        variables = flax_core.freeze(variables)
    kept = jax.tree.map(np.asarray, variables)
    new = with_linen_coordinates(variables)
    assert type(new) is type(variables)
    assert type(new["params"]) is type(variables["params"])
    assert isinstance(new["params"]["stem"]["kernel"], linen.Partitioned)
    assert new["params"]["stem"]["kernel"].names == (None, None, "i", "o")
    assert new["batch_stats"] is variables["batch_stats"] or frozen
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, kept))  # are not changed
    for run in (LinenNet.apply, jax.jit(LinenNet.apply, static_argnums=0)):
        assert np.array_equal(run(LINEN, new, x), run(LinenNet(), variables, x))
    back = linen_backend.remove_coords(new, ["stem", "block_0"], "xyr")
    back = linen_backend.remove_coords(back, "up", "xyr", transpose_kernel=True)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, kept))


def test_linen_variables_of_before_or_of_a_second_call_are_refused():
    variables, x = linen_variables(), images()
    again = linen_backend.add_coords(with_linen_coordinates(variables), "stem", "xyr")
    for wrong in (variables, again):
        with pytest.raises(Exception, match=r"channels|shape"):
            LINEN.apply(wrong, x)


def test_linen_training_and_momenta():
    x, tx = images(), optax.adam(0.01)
    variables = linen_variables()
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(params, net):
        return (net.apply({"params": params, **rest}, x) ** 2).mean()

    state = tx.init(params)
    updates, state = tx.update(jax.grad(loss)(params, LinenNet()), state, params)
    params = optax.apply_updates(params, updates)

    def fit(tree):
        return with_linen_coordinates({"params": tree})["params"]

    losses, adam = [], state[0]
    params, state = fit(params), (adam._replace(mu=fit(adam.mu), nu=fit(adam.nu)), *state[1:])
    for _ in range(10):
        value, grads = jax.value_and_grad(loss)(params, LINEN)
        updates, state = tx.update(grads, state, params)
        params, losses = optax.apply_updates(params, updates), [*losses, float(value)]
    assert losses[-1] < losses[0]
    assert np.abs(params["stem"]["kernel"].value[:, :, 3:]).min() > 0
    assert np.abs(params["block_0"]["kernel"][:, :, 4:]).min() > 0
    assert np.abs(params["up"]["kernel"][..., 8:]).min() > 0


def test_linen_fan_in():
    variables = linen_variables()
    new = with_linen_coordinates(variables, init="fan_in", rng=jax.random.key(1))
    for name, axis, width in (("block_0", -2, 4), ("up", -1, 8)):
        before, after = (
            np.moveaxis(v["params"][name]["kernel"], axis, 0) for v in (variables, new)
        )
        assert np.array_equal(after[:width], before)
        assert np.abs(after[width:]).max() > 0
    with pytest.raises(ValueError, match="rng must be given"):
        linen_backend.add_coords(variables, "stem", init="fan_in")


def test_linen_bad_input():
    variables = linen_variables()
    add, remove = linen_backend.add_coords, linen_backend.remove_coords
    for wrong, layers, message in (
        (variables, "stam", "no layer 'stam'; there are stem"),
        (variables, "head", r"head: its kernel must have 3 to 5 axes, got shape \(6, 3\)"),
        (variables, "norm", "'norm' is a"),
        ({}, "stem", r"variables must have a collection 'params', got \[\]"),
        (variables["params"], "stem", "variables must have a collection 'params'"),
        ({**variables, "coordconv": {}}, "stem", "variables are fused"),
    ):
        for function in (add, remove):
            with pytest.raises(ValueError, match=message):
                function(wrong, layers)
    with pytest.raises(ValueError, match="stem: .*'z'"):
        add(variables, "stem", "xyz")
    with pytest.raises(ValueError, match="stem: .* more input channels than the 3 coordinates"):
        remove(variables, "stem", "xyr")
    with pytest.raises(TypeError, match="variables must be a mapping, got list"):
        add([], "stem")
    with pytest.raises(TypeError, match="layers must be names"):
        add(variables, 3)
    nested = {"params": {"outer": variables["params"]}}
    new = add(nested, "outer/stem")["params"]["outer"]
    assert new["stem"]["kernel"].value.shape == (3, 3, 5, 8)
    assert new["block_0"]["kernel"].shape == (1, 1, 4, 8)
    whole = add(variables, None)["params"]
    assert whole["up"]["kernel"].shape == (2, 2, 8, 8)
    assert whole["head"]["kernel"].shape == (6, 3)
