"""Windows: the coordinates of a part of a frame, by the definition; and what mistakes are told."""

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv import Coordinates, Function, Given, Window, coordinate_grid, fourier, window
from coordconv.geometry import ConvGeometry
from coordconv.position_bias import MapPlan, known
from coordconv.reference import Reference
from coordconv.windows import called, check_fused, current
from definition import coordinates_of_rank, geometries

FRAME = (9, 17)
ALIGNS = ("corners", "edges", "start")


class TestCoordinates:
    @pytest.mark.parametrize("tokens", ["xy", "yxr"])
    @pytest.mark.parametrize("align", ALIGNS)
    @pytest.mark.parametrize("outside", ["zero", "extend"])
    def test_a_crop_has_the_coordinates_of_its_pixels(self, tokens, align, outside):
        coords = Coordinates(tokens, align=align, outside=outside, span=(0, 3))
        whole = coordinate_grid(FRAME, coords, dtype=np.float64)
        boxes = [[4, 2, 9, 7], [0, 0, 5, 5], [12, 4, 17, 9]]
        crops = coordinate_grid((5, 5), coords, window=Window.from_boxes(boxes, FRAME))
        for crop, (x0, y0, x1, y1) in zip(crops, boxes, strict=True):
            assert np.array_equal(crop, whole[:, y0:y1, x0:x1].astype(np.float32))

    @pytest.mark.parametrize("align", ALIGNS)
    def test_a_flipped_crop_has_them_flipped(self, align):
        coords = Coordinates("xy", align=align)
        crop = coordinate_grid((5, 5), coords, window=Window.from_boxes([4, 2, 9, 7], FRAME))
        flipped = coordinate_grid((5, 5), coords, window=Window.from_boxes([9, 2, 4, 7], FRAME))
        assert np.array_equal(flipped, crop[..., ::-1])

    def test_the_whole_frame_is_no_window(self):
        for coords in ("xyr", Coordinates("yx", align="edges", aspect="diagonal")):
            one = coordinate_grid(FRAME, coords, window=Window(0, 1))
            assert np.array_equal(one[0], coordinate_grid(FRAME, coords))
        assert Window(0, 1).is_whole(2)
        assert not Window([0, 0], [1, 0.5]).is_whole(2)
        assert not Window([[0, 0], [0, 0.5]]).is_whole(2)

    @settings(max_examples=100, deadline=None)
    @given(
        st.integers(1, 9),
        st.fractions(-2, 2, max_denominator=64),
        st.fractions(Fraction(1, 64), 2, max_denominator=64),
        st.sampled_from(ALIGNS),
        st.booleans(),
    )
    def test_the_definition(self, n, start, share, align, flipped):
        """Sample ``i`` of ``n`` is at place ``start * F + i`` of a frame of ``F`` samples."""
        frame = n / share
        place = [start * frame + i for i in range(n)]
        ends = (start, start + share)
        if flipped:
            place, ends = place[::-1], ends[::-1]
        coords = Coordinates("x", align=align, span=(0, 1))
        wanted = {
            "corners": [j / (frame - 1) if frame > 1 else Fraction(0) for j in place],
            "edges": [(j + Fraction(1, 2)) / frame for j in place],
            "start": [j / frame for j in place],
        }[align]
        given = Window(*map(float, ends))
        (found,) = coordinate_grid((n,), coords, window=given, dtype=np.float64)[0]
        # Close to one sample the frame of corners is as small as the difference of two numbers.
        reach = 1 if align != "corners" or frame <= 1 else 1 / min(1, abs(frame - 1))
        if align == "corners" and abs(frame - 1) < 1e-9:
            return
        largest = max(1, *(abs(float(w)) for w in wanted))
        assert np.abs(found - [float(w) for w in wanted]).max() <= 64 * 2.0**-53 * reach * largest

    def test_an_input_that_was_resized(self):
        """Half of the frame, at twice the resolution: edges lie where they lay."""
        coords = Coordinates("x", align="edges", span=(0, 16))
        crop = coordinate_grid((16,), coords, window=Window(0.25, 0.75))
        assert np.array_equal(crop[0, 0], 4 + (np.arange(16) + 0.5) / 2)

    def test_a_shard_and_its_halo(self):
        whole = coordinate_grid((16, 3), "yx")
        shard = Window.of_shard(1, 4, "y")
        assert np.array_equal(coordinate_grid((4, 3), "yx", window=shard)[0], whole[:, 4:8])
        halo = coordinate_grid((7, 3), "yx", window=shard.widened(1, 2, "y", 4))
        np.testing.assert_allclose(halo[0], whole[:, 3:10], rtol=1e-6)

    def test_one_axis_for_each_sample_and_another_for_all(self):
        mixed = Window({"x": np.array([0, 0.5]), "y": 0.25}, {"x": np.array([0.5, 1]), "y": 0.75})
        found = coordinate_grid((2, 4), Coordinates("yx", align="edges", span=(0, 8)), window=mixed)
        assert found.shape == (2, 2, 2, 4)
        assert np.array_equal(found[0, 0], found[1, 0])
        assert np.array_equal(found[:, 1, 0], [[0.5, 1.5, 2.5, 3.5], [4.5, 5.5, 6.5, 7.5]])

    def test_functions_see_the_frame(self):
        coords = Coordinates([*fourier("x", 1), Function("xy", "xy", np.multiply)], align="edges")
        whole = coordinate_grid((8, 8), coords)
        crop = coordinate_grid((4, 4), coords, window=Window.from_boxes([2, 3, 6, 7], (8, 8)))
        assert np.array_equal(crop[0], whole[:, 3:7, 2:6])

    @pytest.mark.parametrize(
        ("format", "box"),
        [
            ("xyxy", [2, 3, 6, 4]),
            ("xywh", [2, 3, 4, 1]),
            ("yxyx", [3, 2, 4, 6]),
            ("yxhw", [3, 2, 1, 4]),
        ],
    )
    def test_the_formats_of_boxes(self, format, box):
        found = Window.from_boxes([box], np.array([[8, 10]]), format)
        assert [float(each[0]) for each in found.on("x")] == [2, 6, 10]
        assert [float(each[0]) for each in found.on("y")] == [3, 4, 8]

    def test_its_repr_makes_it_again(self):
        boxes = [[4, 2, 9, 7], [0, 0, 5, 5]]
        made = Window.from_boxes(boxes, FRAME)
        again = eval(repr(made), {"Window": Window})
        for token in "xy":
            for one, other in zip(made.on(token), again.on(token), strict=True):
                assert np.array_equal(one, other)


class TestMaps:
    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_two_maps_for_each_channel_are_every_window(self, data):
        rank = data.draw(st.integers(1, 3))
        shape = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
        coords = data.draw(coordinates_of_rank[rank])
        if not coords.along_axes:
            return
        coords = coords.only(coords.along_axes)
        geometry = data.draw(geometries(shape))
        starts = data.draw(st.lists(st.floats(-1, 0.4), min_size=2 * rank, max_size=2 * rank))
        shares = data.draw(st.lists(st.floats(0.1, 0.5), min_size=2 * rank, max_size=2 * rank))
        start = np.reshape(starts, (2, rank))
        frame = Window(start, start + np.reshape(shares, (2, rank))).in_frame
        plan = MapPlan(geometry, coords, shape, geometry.lengths(shape))
        wanted = plan.padded_grid(np.arange, np, frame)
        factors = plan.coefficients(np.arange, np, frame)
        basis = known(MapPlan.basis, plan, np.float64)
        assert basis.shape[:2] == (2, len(coords))
        pairs = factors.reshape(2, len(coords), 2, *[1] * rank)
        ramps, ones = basis
        found = pairs[:, :, 0] * ramps + pairs[:, :, 1] * ones
        size = np.abs(pairs[:, :, 0] * ramps) + np.abs(pairs[:, :, 1] * ones)
        assert (np.abs(found - wanted) <= 64 * 2.0**-53 * (size + np.abs(factors).max())).all()

    def test_the_reference_of_a_crop_is_that_of_the_whole(self):
        rng = np.random.default_rng(0)
        geometry, coords = ConvGeometry((3, 3)), Coordinates("xyr", outside="extend")
        x, weight = rng.standard_normal((1, 2, *FRAME)), rng.standard_normal((4, 5, 3, 3))
        whole = Reference(geometry, coords).forward(x, weight)
        crop = Reference(geometry, coords, Window.from_boxes([4, 2, 9, 7], FRAME))
        found = crop.forward(x[:, :, 2:7, 4:9], weight)
        np.testing.assert_allclose(found, whole[:, :, 2:5, 4:7], rtol=1e-12)


class TestContext:
    def test_nested_and_restored(self):
        one, other = Window(0, 0.5), Window(0.5, 1)
        assert current() is None
        with window(one):
            assert current() is one
            with window(other):
                assert current() is other
                assert current(one) is one  # a layer's own comes first
                with window(None):
                    assert current() is None
                assert called(one, current) is one
            assert current() is one
            with pytest.raises(KeyError), window(other):
                raise KeyError
            assert current() is one
        assert current() is None

    def test_threads_have_their_own(self):
        seen: list[Any] = []
        with window(Window(0, 0.5)):
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_a_fused_layer_has_none(self):
        check_fused()
        with (
            window(Window(0, 0.5)),
            pytest.raises(ValueError, match="fused layer has the maps of whole"),
        ):
            check_fused()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Window("a"), TypeError, "start must be numbers or an array, got 'a'"),
        (lambda: Window(0, None), TypeError, "stop must be numbers or an array, got None"),
        (lambda: Window(np.zeros((2, 4)), 1), ValueError, r"for 1 to 3 axes, got \(2, 4\)"),
        (lambda: Window(np.zeros((1, 2, 2)), 1), ValueError, r"got \(1, 2, 2\)"),
        (lambda: Window([0, 0], [1, 1, 1]), ValueError, r"must have as many axes, got \[2, 3\]"),
        (lambda: Window({"w": 0}), ValueError, "for the axes x, y and z, got 'w'"),
        (lambda: Window({"x": np.zeros((2, 1))}), ValueError, r"shape \(\) or \(N,\)"),
        (lambda: Window(0, np.nan), ValueError, "stop on axis 'x' must be finite, got nan"),
        (lambda: Window(0.5, 0.5), ValueError, "start and stop on axis 'x' must differ"),
        (lambda: Window([0, 0.5], [1, 0.5]), ValueError, "on axis 'x' must differ"),
        (lambda: Window(0, 1, frame=0), ValueError, "frame on axis 'x' must be positive"),
        (lambda: Window.of_shard(4, 4, "x"), ValueError, "index must be from 0 to 3, got 4"),
        (lambda: Window.of_shard(-1, 4, "x"), ValueError, "index must be from 0 to 3, got -1"),
        (lambda: Window.from_boxes([1, 2, 3], (8, 8)), ValueError, r"\(4,\) or \(N, 4\), got \(3"),
        (lambda: Window.from_boxes([0, 0, 1, 1], (8, 8), "cxcywh"), ValueError, "format must be"),
        (lambda: Window.from_boxes([3, 0, 3, 1], (8, 8)), ValueError, "axis 'x' must differ"),
        (
            lambda: coordinate_grid((3,), window=Window([0, 0], [1, 1])),
            ValueError,
            "must have 1 axes as the input, got 2",
        ),
        (
            lambda: coordinate_grid((2,), [Given("m", [1, 2])], window=Window(0, 0.5)),
            ValueError,
            "'m' is given for one size, and has no window",
        ),
        (lambda: window("x").__enter__(), TypeError, "must be a coordconv.Window or None"),  # type: ignore[arg-type]
        (lambda: current(3), TypeError, "must be a coordconv.Window or None, got 3"),
    ],
)
def test_mistakes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_samples_that_are_not_the_inputs() -> None:
    with pytest.raises(ValueError, match="for one sample or for the 3 of the input, got 2"):
        Window(np.zeros((2, 2)), 0.5).check(2, 3)
    Window(np.zeros((2, 2)), 0.5).check(2, 2)
    Window(np.zeros((1, 2)), 0.5).check(2, 3)
