"""What a wrong argument or input is told: each backend and rank, plain and transposed.

What a framework refuses by itself it refuses in its own words; which those are is said here, too.
"""

import re
from functools import partial

import numpy as np
import pytest
from harness import FLAX

from coordconv import Coordinates, backends

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


def make(backend, rank, transposed, *, channels=3, kernel=3, coords=None, weights=None, **options):
    """A layer of 3 channels to 4, and its call with arrays that have the channels first.

    ``options`` are the framework's own. The weights are canonical; None leaves them to the layer,
    in Flax at zero: JAX would compile the drawing of random numbers for every shape.
    """
    kind = "Transpose" if transposed else ""
    module = backends.load(backend)
    if backend in FLAX:
        from flax import nnx

        options = {"padding": "VALID", "kernel_init": nnx.initializers.zeros, **options}
        sizes = (4, (kernel,) * rank)
        if backend == "flax":
            sizes, options["rngs"] = (channels, *sizes), nnx.Rngs(0)
        layer = bound = getattr(module, f"CoordConv{kind}")(*sizes, coords=coords, **options)
        if backend == "linen":
            given = weights or zeros(layer.coords, rank, transposed, kernel)
            bound = partial(layer.apply, layer.import_weights(given))
        elif weights:
            layer.import_weights(weights)
        return layer, lambda x: np.moveaxis(np.asarray(bound(channels_last(x))), -1, 1)
    if backend == "torch":
        from torch import tensor

        name = f"CoordConv{kind}{rank}d"
    else:
        from paddle import to_tensor as tensor

        name = f"CoordConv{rank}D{kind}"
    layer = getattr(module, name)(channels, 4, kernel, coords=coords, **options)
    if weights:
        layer.import_weights(weights)
    return layer, lambda x, **at_call: layer(tensor(x), **at_call).detach().numpy()


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim > 1 else x


def zeros(coords, rank, transposed, kernel=3):
    """Canonical weights of the right shapes."""
    width = 3 + len(coords)
    sides = (width, 4) if transposed else (4, width)
    weight = np.zeros((*sides, *(kernel,) * rank), np.float32)
    return {"weight": weight, "bias": np.zeros(4, np.float32)}


def as_given(backend, shape):
    """The shape of an array as the layer sees it: in Flax with the channels last."""
    if backend in FLAX and len(shape) > 1:
        return (shape[0], *shape[2:], shape[1])
    return shape


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
    x = ones(1, 3, *[5] * rank)
    if backend in FLAX:  # whose own convolutions take them for floats
        assert np.array_equal(call(x.astype(dtype)), call(x))
        return
    with told(TypeError, f"input must be floating-point, got {backend}.{dtype}"):
        call(x.astype(dtype))


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


@pytest.mark.parametrize("coords", ["xyr", "x", Coordinates("yx")])
def test_coordinates_among_the_frameworks_own_arguments(backend, coords):
    """In the place of a stride, or where the kernel's size was forgotten, of that."""
    size = {"torch": 3, "paddle": 3}.get(backend, (3, 3))
    name = {"torch": "CoordConv2d", "paddle": "CoordConv2D"}.get(backend, "CoordConv")
    layer = getattr(backends.load(backend), name)
    channels = (8,) if backend == "linen" else (3, 8)
    shown = f'"{coords}"' if isinstance(coords, str) else repr(coords)
    message = f"pass coords={shown} by keyword: in this place it is another argument"
    for arguments in ((*channels, size, coords), (*channels, coords)):
        with told(TypeError, message):
            layer(*arguments)


def test_the_radius_is_one_of_the_coordinates(build):
    with told(TypeError, 'there is no with_r: for the radius pass coords="xyr"'):
        build(with_r=True)


def test_coordinates_are_those_of_the_construction(build, rank):
    layer, _ = build(coords="xr")
    message = (
        "coords are fixed at construction, here Coordinates('xr'), as the kernel is made for them: "
        "make a new layer with coords='rx'; import_weights of it takes exported weights for the "
        "same coordinates in any order"
    )
    with told(AttributeError, message):
        layer.coords = "rx"
    assert layer.coords == Coordinates("xr")
    layer.coords = layer.coords  # as what copies attributes does


def test_weights_that_do_not_fit(build, rank, transposed):
    layer, call = build(coords="xr")
    x = ones(1, 3, *[4] * rank)
    before = call(x)
    wrong = {**zeros(layer.coords, rank, transposed, 2), "kernel": np.ones(2)}
    del wrong["bias"]
    shape = (5, 4) if transposed else (4, 5)
    with pytest.raises(ValueError, match="^cannot import weights") as caught:
        layer.import_weights(wrong)
    for problem in (
        "missing: bias, shape (4,)",
        "unexpected: kernel, shape (2,)",
        f"wrong shape: weight is {(*shape, *(2,) * rank)}, want {(*shape, *(3,) * rank)}",
    ):
        assert problem in str(caught.value)
    assert np.array_equal(call(x), before)


# --- AddCoords -----------------------------------------------------------------------------------


def add_coords(backend, *args, **kwargs):
    """The module and its call with arrays that have the channels first."""
    module = backends.load(backend).AddCoords(*args, **kwargs)
    if backend == "torch":
        from torch import tensor

        return module, lambda x: module(tensor(x))
    if backend == "paddle":
        from paddle import to_tensor

        return module, lambda x: module(to_tensor(x))
    call = partial(module.apply, {}) if backend == "linen" else module
    return module, lambda x: call(channels_last(x))


@pytest.mark.parametrize("given", [0, 4, -1])
def test_a_rank_that_no_grid_has(backend, given):
    with told(ValueError, f"a grid has 1, 2 or 3 axes, got {given}"):
        add_coords(backend, rank=given)[1](ones(1, 1, 3, 3))


@pytest.mark.parametrize(("given", "coords"), [(1, "y"), (2, "zx"), (1, Coordinates("rxy"))])
def test_coordinates_that_the_rank_does_not_have(backend, given, coords):
    with pytest.raises(ValueError, match=f"which a {given}-D grid does not have: want"):
        add_coords(backend, coords, rank=given)[1](ones(1, 1, *[3] * given))


def test_an_input_of_another_rank(backend, rank):
    _, call = add_coords(backend, "x", rank=rank)
    shape = (1, 1, *[3] * (rank - 1)) if backend == "paddle" else (1, *[3] * (rank - 1))
    form = FORM[backend].format(SPACE[rank])
    with told(ValueError, f"input must have shape {form}, got {as_given(backend, shape)}"):
        call(ones(*shape))


def test_an_input_with_an_empty_axis(backend, rank):
    _, call = add_coords(backend, "x", rank=rank)
    shape = (1, 1, *[3] * (rank - 1), 0)
    with told(ValueError, f"input must have no empty axis, got shape {as_given(backend, shape)}"):
        call(ones(*shape))


def test_integers_have_no_coordinates(backend):
    _, call = add_coords(backend)
    shown = "int32" if backend in FLAX else f"{backend}.int32"
    with told(TypeError, f"input must be floating-point, got {shown}"):
        call(ones(1, 1, 3, 3).astype(np.int32))


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
                f"but got: padding (3, 3) at dimension {rank + 1} of input [1, "
            ),
        )
    with pytest.raises(error, match=re.escape(message)):
        call(ones(1, 3, *shape))
    assert call(ones(1, 3, *(4,) * rank)).shape[2:] == (4 if backend in FLAX else 8,) * rank


ONLY_TRANSPOSED = pytest.mark.parametrize("transposed", [True])
NOT_FLAX = pytest.mark.parametrize("backend", ["torch", "paddle"], indirect=True)


@ONLY_TRANSPOSED
@NOT_FLAX
@pytest.mark.parametrize("extra", [2, -1])
def test_output_padding_that_there_is_not(build, backend, rank, extra):
    _, call = build(stride=2, output_padding=extra)
    error, message = ValueError, r"output_padding must be at least 0, got \(-1,"
    if extra > 0:  # for the framework to refuse
        error, message = {
            "torch": (RuntimeError, "output padding must be smaller than either stride or dil"),
            "paddle": (ValueError, "output_padding .*less"),
        }[backend]
    with pytest.raises(error, match=message):
        call(ones(1, 3, *[4] * rank))


@ONLY_TRANSPOSED
@NOT_FLAX
@pytest.mark.parametrize("size", [8, 11])
def test_output_size_that_the_stride_does_not_leave_open(build, backend, rank, size):
    _, call = build(stride=2)  # which leaves 9 and 10
    message = {
        "torch": f"output_size must be from {(9,) * rank} to {(10,) * rank} for an input of "
        f"spatial shape {(4,) * rank}, got {(size,) * rank}",
        "paddle": "output_size of Op",
    }[backend]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(ones(1, 3, *[4] * rank), output_size=[size] * rank)


@ONLY_TRANSPOSED
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("batched", [True, False])
def test_output_size_of_another_rank(build, rank, batched):
    _, call = build(stride=2)
    whole = rank + 1 + batched
    x = ones(1, 3, *[4] * rank) if batched else ones(3, *[4] * rank)
    for length in set(range(7)) - {rank, whole}:
        size = (9,) * length
        with told(ValueError, f"output_size must have {rank} or {whole} elements, got {size}"):
            call(x, output_size=size)
    for length in (rank, whole):
        assert call(x, output_size=[9] * length).shape[-rank:] == (9,) * rank


@ONLY_TRANSPOSED
@NOT_FLAX
def test_padding_that_no_transposed_convolution_has(build, backend):
    error, message = {
        "torch": (ValueError, 'Only "zeros" padding mode is supported'),
        "paddle": (TypeError, "unexpected keyword argument 'padding_mode'"),
    }[backend]
    with pytest.raises(error, match=message):
        build(padding_mode="reflect")


@pytest.mark.parametrize("backend", ["torch", "paddle", "flax"], indirect=True)
@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        (-1, ValueError, "must be at least 1, got -1"),
        (3.0, TypeError, "must be an int, got 3.0"),
        ("3", TypeError, "must be an int, got '3'"),
    ],
)
def test_input_channels_that_there_are_not(build, backend, channels, error, message):
    """The coordinates' channels would make them a number that the framework takes."""
    name = "in_features" if backend == "flax" else "in_channels"
    with told(error, f"{name} {message}"):
        build(channels=channels)


@pytest.mark.parametrize("backend", ["torch", "paddle"], indirect=True)
def test_groups_that_do_not_divide_the_channels(build):
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        build(groups=2)
