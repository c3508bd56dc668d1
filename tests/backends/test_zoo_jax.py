"""A network of NNX that another project has on PyPI, with random weights: as in ``test_zoo.py``."""

import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
lpips = pytest.importorskip("lpips_nnx")

import jax
from jax import export
from jax import numpy as jnp

from coordconv.backends.flax import add_coords, fuse, remove_coords
from coordconv.backends.jax import adding
from coordconv.layers import CoordLayer

STEPS = 10


class VGG16(lpips.VGG16Features):
    def _load_weights(self):
        """Random ones stay."""


@nnx.jit
def run(model, x):
    return model(x)


def near(one, other):
    return all(np.allclose(a, b, atol=1e-4 * jnp.abs(b).max()) for a, b in pairs(one, other))


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in pairs(one, other))


def pairs(one, other):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


@pytest.mark.parametrize(
    ("layers", "count"),
    [(None, 13), ("conv_0", 1), (["conv_10", "conv_12", "conv_14"], 3)],
    ids=["all", "first", "block"],
)
def test_vgg16(layers, count):
    model = VGG16(rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)), "float32")
    before, wanted = jax.tree.map(jnp.copy, nnx.state(model)), model(x)
    changes = add_coords(model, layers=layers)
    assert len(changes.layers) == count
    assert equal(model(x), wanted)
    nnx.update(model, changes.fit(before))
    assert equal(model(x), wanted)
    restored = nnx.clone(model)
    remove_coords(restored)
    assert nnx.graphdef(restored) == nnx.graphdef(VGG16(rngs=nnx.Rngs(0)))
    assert equal(nnx.state(restored), before)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.square(model(x)[-1] - 0.1).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    optimizer = nnx.Optimizer(model, optax.adam(1e-4), wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    coord = [node for _, node in nnx.iter_graph(model) if isinstance(node, CoordLayer)]
    assert all(adding.split(layer, layer.kernel[...])[1].any() for layer in coord)
    trained = run(model, x)
    assert near(fuse(model, size=(64, 64))(x), trained)
    graph, state = nnx.split(model)
    program = export.export(jax.jit(lambda x: nnx.merge(graph, state)(x)))
    assert near(program(jax.ShapeDtypeStruct(x.shape, x.dtype)).call(x), trained)
