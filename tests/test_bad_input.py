"""What a wrong argument or input is told: each backend and rank, plain and transposed.

What a framework refuses by itself it refuses in its own words; which those are is said here, too.
"""

import re
from functools import partial

import numpy as np
import pytest

from coordconv import Coordinates
from layers import FLAX, as_given, make, zeros

SPACE = {1: "L", 2: "H, W", 3: "D, H, W"}
FORM = {
    "torch": "(N, C, {0}) or (C, {0})",
    "paddle": "(N, C, {0})",
    "flax": "(..., {0}, C)",
    "linen": "(..., {0}, C)",
}


@pytest.fixture(params=[1, 2, 3], ids="{}-D".format)
def rank(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "transposed"])
def transposed(request):
    return request.param


@pytest.fixture
def build(backend, rank, transposed):
    """What makes a layer of three channels."""
    return partial(make, backend, rank, transposed)


def ones(*shape):
    return np.ones(shape, np.float32)


def told(error, message):
    """The whole first line of it: JAX adds lines of its own."""
    return pytest.raises(error, match=f"(?m)\\A{re.escape(message)}$")


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_not_floating_point(build, backend, rank, dtype):
    _, call = build()
    shown = f"{backend}.{dtype}" if backend not in FLAX else dtype
    with told(TypeError, f"input must be floating-point, got {shown}"):
        call(ones(1, 3, *[5] * rank).astype(dtype))


def test_wrong_rank(build, backend, rank):
    _, call = build()
    wrong = {
        "torch": [(3,), (1, 3, *[5] * (rank + 1))],  # an axis fewer is read as no batch
        "paddle": [(1, 3, *[5] * (rank - 1)), (1, 3, *[5] * (rank + 1))],
    }
    # whatever leads is a batch to Flax, so that only too few axes are wrong
    for shape in wrong.get(backend, [(3,) * rank]):
        form = FORM[backend].format(SPACE[rank])
        message = f"input must have shape {form}, got {as_given(backend, shape)}"
        with told(ValueError, message):
            call(ones(*shape))


@pytest.mark.parametrize(
    ("channels", "hint"),
    [(2, ""), (5, ""), (4, ": pass the features alone, the layer adds the coordinates itself")],
)
def test_wrong_channels(build, backend, rank, channels, hint):
    _, call = build(coords="r")
    shape = (2, channels, 5, 6, 7)[: rank + 2]
    given = as_given(backend, shape)
    message = f"input must have 3 channels, got {channels} in shape {given}{hint}"
    with told(ValueError, message):
        call(ones(*shape))


def test_an_empty_axis(build, backend, rank):
    _, call = build()
    for axis in range(2, rank + 2):
        shape = tuple(0 if i == axis else n for i, n in enumerate((1, 3, *[5] * rank)))
        message = f"input must have no empty axis, got shape {as_given(backend, shape)}"
        with told(ValueError, message):
            call(ones(*shape))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coords", "error", "message"),
    [
        ("xw", ValueError, "coords 'xw': unknown token 'w', want x, y, z or r"),
        (["x", "X"], ValueError, "coords ['x', 'X']: unknown token 'X', want x, y, z or r"),
        ("xrx", ValueError, "coords 'xrx': repeated token 'x'"),
        ("", ValueError, "coords must name at least one of x, y, z, r, got none"),
        (7, TypeError, "coords must be a string or a sequence of the tokens x, y, z, r, got 7"),
    ],
)
def test_wrong_tokens(build, coords, error, message):
    with told(error, message):
        build(coords=coords)


@pytest.mark.parametrize(
    ("rank", "coords", "beyond", "axes"),
    [
        (1, "y", "'y'", "xr"),
        (1, ("z", "x", "y"), "'z', 'y'", "xr"),
        (2, "xyz", "'z'", "xyr"),
        (2, Coordinates("rz", align="edges"), "'z'", "xyr"),
    ],
)
def test_tokens_beyond_the_rank(build, rank, coords, beyond, axes):
    shown = "".join(getattr(coords, "channels", coords))
    message = (
        f"coords '{shown}' name axis {beyond}, which a {rank}-D grid does not have: want {axes}"
    )
    with told(ValueError, message):
        build(coords=coords)


def test_wrong_start(build):
    message = "coord_init must be one of ('fan_in', 'zeros'), got 'ones'"
    with told(ValueError, message):
        build(coord_init="ones")


@pytest.mark.parametrize("option", [{"span": (0, 1)}, {"align": "edges"}, {"outside": "extend"}])
def test_options_of_the_coordinates_are_no_options_of_the_layer(build, option):
    (name,) = option
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        build(**option)


def test_weights_that_do_not_fit(build, backend, rank, transposed):
    layer, call = build(coords="xr")
    x = ones(1, 3, *[4] * rank)
    before = call(x)
    right = zeros(layer.coords, rank, transposed, 3, 4, 3)
    wrong = {"weight": right["weight"] + 1, "bias": np.ones(5), "kernel": np.ones(2)}
    with pytest.raises(ValueError, match="^cannot import weights") as caught:
        layer.import_weights(wrong)
    for problem in (
        f"missing: coord_weight, shape {right['coord_weight'].shape}",
        "unexpected: kernel, shape (2,)",
        "wrong shape: bias is (5,), want (4,)",
    ):
        assert problem in str(caught.value)
    assert np.array_equal(call(x), before)


# --- shapes that do not fit ----------------------------------------------------------------------


def test_an_output_that_would_be_empty(build, backend, rank, transposed):
    """On the last axis alone, where there are more."""
    shape = (5,) * (rank - 1) + (2,)
    options = {}
    if transposed:  # every axis loses a sample at either end
        options = {"kernel": 1, "padding": [(-1, -1)] * rank if backend in FLAX else 1}
    _, call = build(**options)
    lengths = (3,) * (rank - 1) + (0,)
    error, message = (
        ValueError,
        (
            f"output would be empty, of spatial shape {lengths}: "
            f"kernel {(1 if transposed else 3,) * rank} with dilation {(1,) * rank} "
            f"does not fit an input of spatial shape {shape} padded by "
        ),
    )
    if backend == "torch":
        seen = (1, *shape) if rank == 1 and transposed else shape  # torch goes by 2-D there
        sizes = " x ".join(map(str, seen))
        error, message = (
            RuntimeError,
            (
                f"Given input size per channel: ({sizes}). Calculated output size per channel: "
                if transposed
                else f"Calculated padded input size per channel: ({sizes}). Kernel size: "
            ),
        )
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call(ones(1, 3, *shape))


@pytest.mark.parametrize("transposed", [False])
def test_reflect_padding_wider_than_the_axis(build, backend, rank):
    options = {"kernel": 7, "padding": "REFLECT"}
    if backend not in FLAX:
        options = {"padding": 3, "padding_mode": "reflect"}
    _, call = build(**options)
    shape, pads = (4,) * (rank - 1) + (3,), ((3, 3),) * rank
    error, message = (
        ValueError,
        (
            f"reflect padding {pads} is too wide for an input of spatial shape {shape}: "
            "it must be narrower than the axis"
        ),
    )
    if backend == "torch":
        error, message = (
            RuntimeError,
            (
                "Padding size should be less than the corresponding input dimension, "
                f"but got: padding (3, 3) at dimension {rank + 1} of input {[1, 3, *shape]}"
            ),
        )
    with pytest.raises(error, match=re.escape(message)):
        call(ones(1, 3, *shape))
    assert call(ones(1, 3, *(4,) * rank)).shape[2:] == (4 if backend in FLAX else 8,) * rank


ONLY_TRANSPOSED = pytest.mark.parametrize("transposed", [True])
NOT_FLAX = pytest.mark.parametrize("backend", ["torch", "paddle"], indirect=True)


@ONLY_TRANSPOSED
@NOT_FLAX
@pytest.mark.parametrize(
    ("extra", "torchs", "paddles"),
    [
        (2, "output padding must be smaller than either stride or dilation, .* 2 stride_", "less"),
        (-1, "negative output_padding is not supported", r"must be at least 0, got \(-1,"),
    ],
)
def test_output_padding_that_the_framework_refuses(build, backend, rank, extra, torchs, paddles):
    _, call = build(stride=2, output_padding=extra)
    error, message = {
        "torch": (RuntimeError, torchs),
        "paddle": (ValueError, f"output_padding .*{paddles}"),
    }[backend]
    with pytest.raises(error, match=message):
        call(ones(1, 3, *[4] * rank))


@ONLY_TRANSPOSED
@NOT_FLAX
@pytest.mark.parametrize("size", [8, 11])
def test_output_size_that_the_stride_does_not_leave_open(build, backend, rank, size):
    _, call = build(stride=2)  # which leaves 9 and 10
    wanted = [size] * rank
    message = {
        "torch": re.escape(f"requested an output size of {wanted}, but valid sizes range from"),
        "paddle": "output_size of Op",
    }[backend]
    with pytest.raises(ValueError, match=message):
        call(ones(1, 3, *[4] * rank), output_size=wanted)


@ONLY_TRANSPOSED
@NOT_FLAX
def test_padding_that_no_transposed_convolution_has(build, backend):
    error, message = {
        "torch": (ValueError, 'Only "zeros" padding mode is supported'),
        "paddle": (TypeError, "unexpected keyword argument 'padding_mode'"),
    }[backend]
    with pytest.raises(error, match=message):
        build(padding_mode="reflect")


@pytest.mark.parametrize("backend", ["torch", "paddle"], indirect=True)
def test_groups_that_do_not_divide_the_channels(build):
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        build(groups=2)
