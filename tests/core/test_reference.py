"""The oracle against its definition, term by term, in exact arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.reference import Reference
from definition import UNIT, Case, cases, forward, gradients, largest_end


def coordinate_error(case: Case) -> float:
    """How far a float64 coordinate may lie from the true one.

    A ramp is one division, one product and one sum away from integers; a radius is a norm of ramps,
    so it moves by no more than they do, and rounds a few times more; so does a diagonal.
    """
    if case.coords is None:
        return 0.0
    # the farthest that any sample here lies out, in lengths of the axis, is bounded by 40
    largest = 40 * largest_end(case.coords, case.shape) + abs(case.coords.r_center)
    return 11 * UNIT * largest * np.sqrt(len(case.shape))


@settings(max_examples=120, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_forward_and_gradients(case: Case, seed: int) -> None:
    reference, error = Reference(case.geometry, case.coords), coordinate_error(case)
    y = reference.forward(case.x, **case.weights)
    forward(case).check(y, case.count, error)

    dy = np.random.default_rng(seed).integers(-4, 5, y.shape).astype(np.float64)
    expected = gradients(case, dy)
    expected.pop("x").check(
        reference.input_gradient(dy, case.weights["weight"], case.shape), case.count
    )
    computed = reference.weight_gradients(case.x, dy)
    assert list(computed) == ["weight", "bias"]
    for name, sums in expected.items():
        sums.check(computed[name], y[:, 0].size + 5, error)


@settings(max_examples=30, deadline=None)
@given(cases(with_coords=False))
def test_plain_convolution(case: Case) -> None:
    reference = Reference(case.geometry)
    y = reference.forward(case.x, **case.weights)
    forward(case).check(y, case.count)
    assert list(reference.weight_gradients(case.x, np.ones_like(y))) == ["weight", "bias"]


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_magnitudes_are_the_sums_of_absolute_terms(case: Case, seed: int) -> None:
    reference, absolute = Reference(case.geometry, case.coords), case.absolute()
    error = coordinate_error(case)
    y = reference.forward(case.x, **case.weights, magnitudes=True)
    forward(absolute).check(y, case.count, error)
    dy = np.random.default_rng(seed).integers(-4, 5, y.shape).astype(np.float64)
    expected = gradients(absolute, abs(dy))
    dx = reference.input_gradient(dy, case.weights["weight"], case.shape, magnitudes=True)
    expected["x"].check(dx, case.count)
    computed = reference.weight_gradients(case.x, dy, magnitudes=True)
    expected["weight"].check(computed["weight"], y[:, 0].size + 5, error)
    np.testing.assert_array_equal(computed["bias"], np.abs(dy).sum(axis=(0, *range(2, dy.ndim))))


@settings(max_examples=40, deadline=None)
@given(cases(with_coords=False), st.integers(0, 2**32 - 1))
def test_gradients_are_adjoint(case: Case, seed: int) -> None:
    """<dy, forward(x)> = <input gradient, x>, exactly: the output is linear in the input."""
    plain, weight = Reference(case.geometry), case.weights["weight"]
    y = plain.forward(case.x, weight)
    dy = np.random.default_rng(seed).integers(-4, 5, y.shape).astype(np.float64)
    assert np.vdot(dy, y) == np.vdot(plain.input_gradient(dy, weight, case.shape), case.x)
    assert np.vdot(dy, y) == np.vdot(plain.weight_gradients(case.x, dy)["weight"], weight)


def test_magnitudes_count_what_cancels() -> None:
    """0, 0.5 and 1 are -1, 0 and 1 times 0.5, plus 0.5."""
    coords = Coordinates("xr", span=(0, 1), r_center=0.5)
    reference, x = Reference(ConvGeometry((1,)), coords), np.zeros((1, 1, 3))
    for weight, sizes in (([0, -2, 0], [2, 1, 2]), ([0, 0, -2], [3, 2, 3])):
        kernel = np.array(weight, np.float64).reshape(1, 3, 1)
        np.testing.assert_array_equal(reference.forward(x, kernel, magnitudes=True), [[sizes]])


def test_by_hand() -> None:
    """A 2x3 image, a 2x2 kernel of ones on x and of tens on y, no features to speak of."""
    reference = Reference(ConvGeometry((2, 2), padding=((1, 0), (0, 0))), Coordinates("xy"))
    weight = np.stack([np.zeros((2, 2)), np.ones((2, 2)), np.full((2, 2), 10.0)])[None]
    y = reference.forward(np.zeros((1, 1, 2, 3)), weight)
    #   x = -1 0 1    y = -1 -1 -1    and a row of zeros above
    #       -1 0 1         1  1  1
    np.testing.assert_array_equal(y, [[[[-1 - 20, 1 - 20], [-2, 2]]]])


def test_transposed_by_hand() -> None:
    """Each sample is stamped, times the kernel, onto the output at twice its place."""
    reference = Reference(ConvGeometry((3,), stride=2, transposed=True), Coordinates("x"))
    weight = np.array([[[1.0, 2.0, 3.0]], [[100.0, 200.0, 300.0]]])
    y = reference.forward(np.array([[[1.0, 10.0]]]), weight)
    #   features: 1 2 3+10 20 30     coordinate: -1 at place 0, 1 at place 2
    np.testing.assert_array_equal(y, [[[1 - 100, 2 - 200, 13 - 300 + 100, 20 + 200, 30 + 300]]])


def test_transposed_and_circular_by_hand() -> None:
    """What sticks out behind comes round to the front."""
    geometry = ConvGeometry((3,), stride=2, transposed=True, padding_mode="circular")
    weight = np.array([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 100.0]]])
    y = Reference(geometry, Coordinates("x")).forward(np.array([[[1.0, 10.0]]]), weight)
    np.testing.assert_array_equal(y, [[[1 + 30 + 100, 2, 13 - 100, 20]]])


def test_every_group_sees_all_coordinates() -> None:
    """A depthwise CoordConv: two groups of one channel, each with its own kernel on x and y."""
    reference = Reference(ConvGeometry((1, 1), groups=2), Coordinates("xy"))
    weight = np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]])[..., None, None]
    y = reference.forward(np.zeros((1, 2, 2, 2)), weight)
    np.testing.assert_array_equal(y, [[[[-3, -1], [1, 3]], [[-7, -1], [1, 7]]]])


def test_groups_of_a_transposed_kernel_have_their_coordinates_behind_their_features() -> None:
    geometry = ConvGeometry((1,), groups=2, transposed=True)
    weight = np.array([1.0, 10.0, 2.0, 20.0]).reshape(4, 1, 1)  # feature and x, twice
    y = Reference(geometry, Coordinates("x")).forward(np.array([[[1.0, 1.0], [3.0, 3.0]]]), weight)
    np.testing.assert_array_equal(y, [[[1 - 10, 1 + 10], [6 - 20, 6 + 20]]])


def test_extend_goes_on_where_zero_stops() -> None:
    weight = np.array([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    values = {}
    for outside in ("zero", "extend"):
        reference = Reference(ConvGeometry((3,), padding=2), Coordinates("x", outside=outside))
        values[outside] = reference.forward(np.zeros((1, 1, 3)), weight)[0, 0]
    np.testing.assert_array_equal(values["zero"], [0, 0, -1, 0, 1])
    np.testing.assert_array_equal(values["extend"], [-3, -2, -1, 0, 1])


def test_an_empty_batch_has_an_empty_output() -> None:
    reference = Reference(ConvGeometry((3, 3), padding=1), Coordinates("xy"))
    y = reference.forward(np.zeros((0, 2, 4, 4)), np.ones((5, 4, 3, 3)))
    assert y.shape == (0, 5, 4, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_computes_in_float64_whatever_it_is_given(dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(dtype) for size in ((2, 3, 5), (4, 4, 3), (4,))]
    reference = Reference(ConvGeometry((3,)), Coordinates("x"))
    y = reference.forward(*arrays)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, reference.forward(*(a.astype(np.float64) for a in arrays)))
