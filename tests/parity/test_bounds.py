"""What networks must compute, and the bounds on how far rounding may be from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import channel_values
from coordconv.networks import Conv, Linear, MeanPool, Network, ReLU, get
from coordconv.parity import Case, generate
from coordconv.parity.bounds import COORDINATE_ROUNDINGS, PRECISIONS, Expected, expected
from coordconv.reference import Reference
from coordconv.weights import split_kernel

_MEAN = Network(
    "mean",
    (2, 5, 4),
    (
        Conv("conv", 2, 6, ConvGeometry((3, 3)), Coordinates("xy")),
        ReLU(),
        MeanPool(),
        Linear("linear", 6, 3),
    ),
)


class TestExpected:
    def test_a_mean_in_float32_is_within_its_bound_and_the_bound_is_no_larger_than_it_must(self):
        x = np.random.default_rng(0).uniform(0, 1, (3, 2, 50, 60)).astype("f4")
        dy = np.random.default_rng(1).standard_normal((3, 2)).astype("f4")
        wanted = expected(Network("mean", (2, 50, 60), (MeanPool(),)), {}, x, dy)
        one_by_one = np.add.accumulate(x.reshape(3, 2, -1), axis=2, dtype="f4")[..., -1]
        assert 0 < wanted["y"].error(one_by_one / np.float32(3000)) <= 1
        shares = np.broadcast_to((dy / np.float32(3000))[..., None, None], x.shape)
        assert 0 < wanted["x"].error(shares) <= 1
        assert (wanted["y"].bound < 3005 * 2.0**-24 * wanted["y"].value).all()

    def test_an_element_whose_bound_is_zero_must_be_exact(self):
        wanted = Expected(np.zeros(2), np.array([0.0, 1.0]))
        assert wanted.error(np.array([0.0, 0.5])) == 0.5
        assert wanted.error(np.array([1e-30, 0.0])) == np.inf

    def test_another_shape_and_what_is_not_finite_are_beyond_any_bound(self):
        wanted = Expected(np.zeros(2), np.full(2, 1e300))
        assert wanted.error(np.zeros((1, 2))) == np.inf
        assert wanted.error(np.array([0.0, np.nan])) == np.inf

    def test_exact_data_leaves_no_error_in_float64_either(self):
        case = next(case for case in generate(10, seed=1) if case.exact)
        wanted = expected(case.network, *case.data())
        for value in wanted.values():
            assert np.array_equal(value.value, value.value.astype(np.float32))

    @pytest.mark.parametrize(
        ("name", "target"),
        [
            ("coord_cnn", "x"),
            ("coord_cnn", "conv4.weight"),
            ("coord_cnn", "linear1.bias"),
            ("coord_classifier", "conv1.weight"),
            ("deconv_classifier", "deconv2.weight"),
            (_MEAN, "x"),
            (_MEAN, "conv.weight"),
        ],
    )
    def test_gradients_of_a_network_are_its_finite_differences(self, name, target):
        """Along a random direction, central differences in float64."""
        network = get(name)
        weights, x, dy = Case(network, 1, 7).data()
        wanted = expected(network, weights, x, dy)[target].value
        direction = np.random.default_rng(0).standard_normal(wanted.shape)
        step = 1e-7

        def loss(sign):
            moved = {**weights, "x": x}
            moved[target] = moved[target].astype(np.float64) + sign * step * direction
            return (expected(network, moved, moved.pop("x"), dy)["y"].value * dy).sum()

        slope = (loss(1) - loss(-1)) / (2 * step)
        assert slope == pytest.approx((wanted * direction).sum(), rel=1e-4)


class TestCoordinates:
    """A coordinate is held to the terms that it is computed from, with a few roundings."""

    @given(
        lengths=st.lists(st.integers(1, 600), min_size=1, max_size=2)
        | st.lists(st.integers(1, 20), min_size=3, max_size=3),
        span=st.sampled_from([(-1, 1), (0, 1), (-1, -0.5), (0.1, 0.7), (3.3, -1.7), (0, 255)]),
        align=st.sampled_from(["corners", "edges"]),
        r_center=st.sampled_from([0.0, 0.5, 0.3, -1.1]),
    )
    @settings(deadline=None)
    def test_a_grid_computed_in_float32_is_within_its_roundings(
        self, lengths, span, align, r_center
    ):
        rank = len(lengths)
        coords = Coordinates("xyz"[:rank] + "r", span=span, align=align, r_center=r_center)
        # Both ends of each axis and what is near its middle, as a grid of few samples.
        indices = [np.unique([0, n // 3, n // 2, n - 1]) for n in lengths]
        rounded = channel_values(coords, [i.astype(np.float32) for i in indices], lengths, np.sqrt)
        exact = channel_values(coords, indices, lengths, np.sqrt)
        reference = Reference(ConvGeometry((1,) * rank), coords)
        (z,) = reference.padded(np.zeros((1, 1, *lengths)), magnitudes=True)
        magnitudes = z[0, 1:][(slice(None), *np.ix_(*indices))]
        for channel, (found, wanted) in enumerate(zip(rounded, exact, strict=True)):
            assert found.dtype == np.float32
            bound = COORDINATE_ROUNDINGS * 2.0**-24 * (1 + 1e-6) * magnitudes[channel]
            assert (np.abs(found.astype(np.float64) - wanted) <= bound).all()

    def test_one_sample_misplaced_by_a_hundredth_of_a_step_is_beyond_the_bound(self):
        """The bound grows with the magnitudes alone, and is far below the steps of the grid."""
        layer = Conv("conv", 2, 3, ConvGeometry((3, 3), padding=1), Coordinates("yxr"))
        weights, x, _ = Case(Network("layer", (2, 17, 33), (layer,)), 2, 0).data()
        wanted = expected(Network("layer", (2, 17, 33), (layer,)), weights, x, None)["y"]
        _, coordinates = split_kernel(weights["conv.weight"], layer.coords)
        off = wanted.value.copy()
        off[0, 0, 5, 5] += 0.01 * (2 / 32) * coordinates[0, 1, 1, 1]
        assert wanted.error(wanted.value) == 0
        assert wanted.error(off) > 1


class TestPrecision:
    @pytest.mark.parametrize(
        ("value", "nearest"),
        [
            (1 + 2.0**-8, 1.0),  # half-way, to even
            (1 + 3 * 2.0**-8, 1 + 2.0**-6),
            (1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-7),
            (-3.0, -3.0),
            (2.0**-133, 2.0**-133),  # the smallest there is
            (0.0, 0.0),
        ],
    )
    def test_bfloat16_is_rounded_to_nearest(self, value, nearest):
        assert PRECISIONS["bfloat16"].rounded(np.array([value])) == nearest

    @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
    def test_rounding_is_within_the_unit_roundoff(self, precision):
        values = np.random.default_rng(0).standard_normal(10_000)
        rounded = precision.rounded(values)
        assert np.array_equal(precision.rounded(rounded), rounded)
        unit = precision.rounding or precision.unit
        error = np.abs(rounded.astype(np.float64) - values)
        assert (error <= unit * np.abs(values) + precision.tiny).all()

    def test_an_unknown_type_is_refused(self):
        with pytest.raises(ValueError, match="dtype must be one of float32, .*, got 'int8'"):
            generate(1, dtype="int8")
