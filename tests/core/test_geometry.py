"""The arithmetic of shapes against counting, and what a wrong option or input is told."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry, check_input
from coordconv.position_bias import MapPlan, known
from coordconv.reference import Reference
from definition import geometries, padding, reads


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_shapes_and_pads(data: st.DataObject) -> None:
    """Output shape and padding, counted one by one."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * rank))
    geometry = data.draw(geometries(shape))
    axes = reads(geometry, shape)
    assert geometry.rank == rank
    assert geometry.output_shape(shape) == tuple(len(outputs) for outputs in axes)
    assert list(geometry.pads(shape)) == padding(geometry, shape)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pointwise(data: st.DataObject) -> None:
    """Where it says so, each output sample reads its own input sample; elsewhere some do not.

    But for strides that skip just the holes between spread samples: those it need not know.
    """
    rank = data.draw(st.integers(1, 3))
    geometry = data.draw(
        st.one_of(
            geometries((5,) * rank),
            st.builds(
                ConvGeometry,
                st.just((1,) * rank),
                stride=st.integers(1, 2),
                padding=st.sampled_from([0, 1, "same", ((0, 1),) * rank]),
                dilation=st.integers(1, 2),
                groups=st.integers(1, 2),
                input_dilation=st.integers(1, 2),
            ),
        )
    )
    own = [[{0: i} for i in range(n)] for n in (5,) * rank]
    same = geometry.taps == geometry.groups == 1 and reads(geometry, (5,) * rank) == own
    same = same and not geometry.transposed
    assert geometry.pointwise == (same and max(geometry.per_axis.input_dilation) == 1)


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({"kernel": (3, 3), "stride": 2, "padding": 1}, (7, 7), (4, 4)),  # the article's fourth
        ({"kernel": (3, 3), "stride": 2}, (32, 31), (15, 15)),
        ({"kernel": (1, 1)}, (64, 48), (64, 48)),
        ({"kernel": (3,), "dilation": 2, "padding": "same"}, (10,), (10,)),
        ({"kernel": (4,), "stride": 3, "padding": "same"}, (10,), (4,)),
        ({"kernel": (3, 5, 1), "padding": (1, 2, 0)}, (4, 5, 6), (4, 5, 6)),
        ({"kernel": (2,), "padding": ((0, 1),)}, (4,), (4,)),
        ({"kernel": (2,), "padding": ((-1, -1),)}, (4,), (1,)),
        ({"kernel": (2,), "input_dilation": 3}, (4,), (9,)),
        ({"kernel": (2, 2), "stride": 2, "transposed": True}, (3, 5), (6, 10)),
        ({"kernel": (3,), "stride": 2, "padding": 1, "transposed": True}, (4,), (7,)),
        (
            {"kernel": (3,), "stride": 2, "padding": 1, "output_padding": 1, "transposed": True},
            (4,),
            (8,),
        ),
        ({"kernel": (5,), "stride": 2, "padding_mode": "circular", "transposed": True}, (4,), (8,)),
    ],
)
def test_known_shapes(options: dict[str, Any], shape: Any, expected: Any) -> None:
    assert ConvGeometry(**options).output_shape(shape) == expected


def test_one_form_for_every_spelling() -> None:
    """So that geometries compare, hash and are cached by what they mean."""
    plain = ConvGeometry((3, 3), stride=2, padding=1, dilation=1)
    spelled = ConvGeometry(
        [3, np.int64(3)],  # type: ignore[arg-type]
        stride=[2, 2],  # type: ignore[arg-type]
        padding=[(1, 1), [1, 1]],  # type: ignore[arg-type]
        dilation=(1, 1),
    )
    assert plain == spelled
    assert hash(plain) == hash(spelled)
    assert plain == ConvGeometry((3, 3), stride=(2, 2), padding=(1, 1))
    assert plain.padding == ((1, 1), (1, 1))
    assert ConvGeometry((2, 3, 4)).taps == 24


def test_same_puts_the_odd_sample_behind() -> None:
    assert ConvGeometry((4,), padding="same").pads((10,)) == ((1, 2),)
    assert ConvGeometry((2, 3), padding="same").pads((5, 5)) == ((0, 1), (1, 1))
    assert ConvGeometry((1,), stride=4, padding="same").pads((9,)) == ((0, 0),)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel": ()}, ValueError, r"kernel must have 1, 2 or 3 axes, got \(\)"),
        ({"kernel": (1, 1, 1, 1)}, ValueError, "kernel must have 1, 2 or 3 axes"),
        ({"kernel": (3, 0)}, ValueError, r"kernel must be at least 1, got \(3, 0\)"),
        ({"kernel": (3.0,)}, TypeError, r"kernel must be an int or 1 ints, got \(3.0,\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 2, 3)}, TypeError, r"stride must be an int or 2 ints, got \(1, 2, 3\)"),
        ({"stride": 1.5}, TypeError, "stride must be an int or 2 ints, got 1.5"),
        ({"stride": True}, TypeError, "stride must be an int or 2 ints, got True"),
        ({"stride": "12"}, TypeError, "stride must be an int or 2 ints, got '12'"),
        ({"dilation": (1, -1)}, ValueError, r"dilation must be at least 1, got \(1, -1\)"),
        ({"input_dilation": 0}, ValueError, "input_dilation must be at least 1"),
        ({"padding": "valid"}, TypeError, "padding must be 'same', an int, 2 ints or 2 .*'valid'"),
        ({"padding": (1, 1, 1)}, TypeError, "padding must be 'same', an int, 2 ints or 2"),
        ({"padding": ((1, 2, 3), 1)}, TypeError, "padding must be 'same', an int"),
        ({"padding": (1, 0.5)}, TypeError, r"padding must be .*, got \(1, 0.5\)"),
        ({"groups": 0}, ValueError, "groups must be positive, got 0"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode must be one of .*, got 'wrap'"),
        ({"output_padding": 1}, ValueError, "output_padding belongs to a transposed convolution"),
        (
            {"output_padding": -1, "transposed": True},
            ValueError,
            "output_padding must be at least 0",
        ),
        ({"padding": "same", "transposed": True}, ValueError, "takes explicit zero or circular"),
        ({"padding_mode": "reflect", "transposed": True}, ValueError, "zero or circular padding"),
        ({"input_dilation": 2, "transposed": True}, ValueError, "and no input_dilation"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvGeometry(**{"kernel": (3, 3), **options})


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (5,), r"2 spatial axes, got shape \(5,\)"),
        ({}, (5, 0), r"no empty axis, got spatial shape \(5, 0\)"),
        ({}, (5, 2), r"output would be empty.* kernel \(3, 3\) with dilation \(1, 1\).*\(5, 2\)"),
        ({"dilation": 3}, (6, 7), "output would be empty"),
        ({"padding": ((-3, -3), (0, 0))}, (6, 6), "output would be empty"),
        ({"padding": 6, "transposed": True}, (4, 9), "output would be empty"),
        ({"padding": 3, "padding_mode": "reflect"}, (3, 9), "reflect padding .* is too wide"),
    ],
)
def test_shapes_that_do_not_fit(options: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvGeometry((3, 3), **options).output_shape(shape)


def test_the_widest_padding_that_fits() -> None:
    for mode, width in (("reflect", 2), ("circular", 3), ("replicate", 9)):
        geometry = ConvGeometry((3,), padding=width, padding_mode=mode)
        assert geometry.output_shape((3,)) == (2 * width + 1,)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_cutting_and_copying_at_once_means_one_thing(mode: str) -> None:
    """Refused, or the same in the definition and in the position bias."""
    for pads in ((-1, 2), (2, -1)):
        try:
            geometry = ConvGeometry((1,), padding=(pads,), padding_mode=mode)
        except ValueError:
            continue
        coords = Coordinates("x")
        reference = Reference(geometry, coords)
        y = reference.forward(np.zeros((1, 1, 3)), np.array([[[0.0], [1.0]]]))
        grid = known(MapPlan.padded_grid, MapPlan(geometry, coords, (3,), y.shape[2:]), np.float64)
        np.testing.assert_array_equal(grid, y[0])


# --- inputs of layers ----------------------------------------------------------------------------

FIRST = {"rank": 2, "channels": 3, "coords": 2, "channel_axis": -3, "batched": 0}
LAST = {"rank": 2, "channels": 3, "coords": 2, "channel_axis": -1, "batched": -1}


@pytest.mark.parametrize(
    ("options", "shape", "spatial"),
    [
        (FIRST, (8, 3, 4, 5), (4, 5)),
        (FIRST, (3, 4, 5), (4, 5)),
        (FIRST, (0, 3, 4, 5), (4, 5)),
        (FIRST | {"batched": 1}, (8, 3, 4, 5), (4, 5)),
        (LAST, (8, 4, 5, 3), (4, 5)),
        (LAST, (4, 5, 3), (4, 5)),
        (LAST, (2, 8, 4, 5, 3), (4, 5)),
        (FIRST | {"rank": 1, "channel_axis": -2}, (8, 3, 5), (5,)),
        (FIRST | {"rank": 3, "channel_axis": -4}, (8, 3, 4, 5, 6), (4, 5, 6)),
        (LAST | {"rank": 1}, (5, 3), (5,)),
    ],
)
def test_inputs(options: dict[str, Any], shape: Any, spatial: Any) -> None:
    assert tuple(check_input(shape, **options)) == spatial


HINT = "pass the features alone, the layer adds the coordinates itself"


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (FIRST, (4, 5), r"input must have shape \(N, C, H, W\) or \(C, H, W\), got \(4, 5\)"),
        (FIRST, (1, 8, 3, 4, 5), r"\(N, C, H, W\) or \(C, H, W\), got \(1, 8, 3, 4, 5\)"),
        (FIRST | {"batched": 1}, (3, 4, 5), r"must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
        (LAST, (5, 3), r"must have shape \(..., H, W, C\), got \(5, 3\)"),
        (LAST | {"rank": 1}, (3,), r"must have shape \(..., L, C\), got \(3,\)"),
        (FIRST | {"rank": 1, "channel_axis": -2}, (3,), r"\(N, C, L\) or \(C, L\), got \(3,\)"),
        (
            FIRST | {"rank": 3, "channel_axis": -4},
            (3, 4, 5),
            r"\(N, C, D, H, W\) or \(C, D, H, W\)",
        ),
        (FIRST, (8, 4, 4, 5), r"input must have 3 channels, got 4 in shape \(8, 4, 4, 5\)$"),
        (FIRST, (8, 5, 4, 4), f"must have 3 channels, got 5 in shape .*: {HINT}"),
        (LAST, (8, 4, 4, 5), f"must have 3 channels, got 5 in shape .*: {HINT}"),
        (FIRST, (8, 3, 0, 5), r"input must have no empty axis, got shape \(8, 3, 0, 5\)"),
        (LAST, (8, 4, 0, 3), "input must have no empty axis"),
    ],
)
def test_wrong_inputs(options: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_input(shape, **options)


def test_values_of_another_kind() -> None:
    with pytest.raises(TypeError, match="kernel must be one int per axis, got 3"):
        ConvGeometry(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="groups must be an int, got 1.5"):
        ConvGeometry((3,), groups=1.5)  # type: ignore[arg-type]
