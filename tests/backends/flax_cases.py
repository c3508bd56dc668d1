"""What the tests of NNX and of Linen share: options of Flax, and what they mean."""

from __future__ import annotations

import inspect

import jax
import numpy as np
from jax import numpy as jnp

from coordconv import Coordinates, coordinate_grid
from coordconv.geometry import ConvGeometry
from coordconv.reference import Reference

C, OUT = 4, 8  # channels of every case; a batch is of 2


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
    """An initializer that JAX need not compile, for biases as well; none under a trace."""
    if isinstance(key, jax.core.Tracer):
        return jnp.zeros(shape, dtype)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(0, 0.5, shape), dtype)


def integers(*shape, largest=4):
    return np.random.default_rng(len(shape)).integers(-largest, largest + 1, shape).astype("f4")


def draw(shape, features=C):
    return np.random.default_rng(1).normal(size=(2, *shape, features)).astype("f4")


def first(array):
    """Channels first, in NumPy."""
    return np.moveaxis(np.asarray(array), -1, 1)


def appended(x, coords, groups=1):
    """``x (..., *S, C)`` with the coordinates behind the features of each group."""
    rank = x.ndim - 2
    grid = np.moveaxis(coordinate_grid(x.shape[1 : 1 + rank], coords), 0, -1)
    repeated = np.broadcast_to(grid, (*x.shape[:-1], grid.shape[-1]))
    return np.concatenate([p for g in np.split(x, groups, -1) for p in (g, repeated)], -1)


def check(got, want, magnitudes, terms, u=2.0**-24):
    """The componentwise bound of a sum of so many terms."""
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want)
    excess = error - terms * u / (1 - terms * u) * magnitudes
    assert excess.max() <= 0, excess.max()


def check_all(geometry, coords, weights, x, dy, y, of_x, of_weights):
    """A layer's output and gradients against the definition; ``x`` and ``y`` channels last."""
    reference, x = Reference(geometry, coords), first(x)
    weight, bias = weights["weight"], weights.get("bias")
    inner = weight.shape[0] if geometry.transposed else weight.shape[1]
    out = dy.shape[1]
    check(
        first(y),
        reference.forward(x, weight, bias),
        reference.forward(x, weight, bias, magnitudes=True),
        inner * geometry.taps + 1,
    )
    back = dy, weight, x.shape[2:]
    check(
        first(of_x),
        reference.input_gradient(*back),
        reference.input_gradient(*back, magnitudes=True),
        out // geometry.groups * geometry.taps,
    )
    want = reference.weight_gradients(x, dy)
    magnitudes = reference.weight_gradients(x, dy, magnitudes=True)
    assert set(of_weights) == set(weights)
    for name, got in of_weights.items():
        check(got, want[name], magnitudes[name], dy[:, 0].size + 2)


def equal_all(geometry, coords, weights, x, dy, y, of_x, of_weights):
    """The same, to the last bit."""
    reference, x = Reference(geometry, coords), first(x)
    weight, bias = weights["weight"], weights.get("bias")
    assert np.array_equal(first(y), reference.forward(x, weight, bias))
    assert np.array_equal(first(of_x), reference.input_gradient(dy, weight, x.shape[2:]))
    want = reference.weight_gradients(x, dy)
    assert all(np.array_equal(of_weights[name], want[name]) for name in weights)


def gradient(geometry, shape, make=integers):
    """One for the output of a batch of 2, channels first."""
    return make(2, OUT, *geometry.output_shape(shape))


def normal(*shape):
    return np.random.default_rng(2).normal(size=shape).astype("f4")


def signature_is_the_plain_ones(ours, plain):
    """Order and defaults of the base class, and two keyword-only arguments besides."""
    own = dict(inspect.signature(ours).parameters)
    added = [own.pop(name) for name in ("coords", "coord_init")]
    assert [p.kind for p in added] == [inspect.Parameter.KEYWORD_ONLY] * 2
    assert [p.default for p in added] == [None, "fan_in"]
    _, *wanted = inspect.signature(plain.__init__).parameters.values()
    assert [(p.name, p.kind, p.default) for p in own.values()] == [
        (p.name, p.kind, p.default) for p in wanted
    ]
