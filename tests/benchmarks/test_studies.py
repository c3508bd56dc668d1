"""Three studies of ``benchmarks/evidence``: their data, their measure, and what they print."""

import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from evidence import article, dense, sizes, study
from evidence.study import Run


def square(left, right, size=8):
    """A mask that is filled between two columns."""
    mask = np.zeros((size, size), bool)
    mask[:, left:right] = True
    return mask


class TestDense:
    def test_scenes_are_what_they_say(self):
        for each in dense.scenes(3, 20):
            assert 2 <= len(each.masks) <= 5
            assert each.masks.sum(0).max() == 1  # visible parts do not overlap
            assert all(mask.sum() > 20 for mask in each.masks)
            ground = each.picture[~each.masks.any(0)]
            assert abs(ground).max() < 0.3 < each.picture[each.masks.any(0)].mean()

    def test_instances_look_alike_and_some_are_hidden(self):
        masks = [mask for each in dense.scenes(0, 50) for mask in each.masks]
        touched = [dense.cells_of(mask) for mask in masks]
        assert min(map(len, touched)) == 1
        assert max(map(len, touched)) <= 4
        assert len({cell for cells in touched for cell in cells}) > 30

    def test_the_cells_of_a_mask_are_those_of_its_middle(self):
        mask = np.zeros((64, 64), bool)
        mask[18:23, 32:37] = True  # the middle is row 20.5, column 34.5, in the cell (2, 4)
        assert dense.cells_of(mask) == [2 * 8 + 4]
        mask = np.zeros((64, 64), bool)
        mask[8:24, 8:24] = True  # the middle is a corner of four cells
        assert dense.cells_of(mask) == [9, 10, 17, 18]

    def test_ap_of_what_is_known(self):
        one, other = square(0, 4), square(4, 8)
        truth = [np.stack([one, other])]

        def ap(masks, scores, thresholds=dense.THRESHOLDS):
            found = dense.Found(np.array(masks, bool).reshape(-1, 8, 8), np.array(scores, float))
            return dense.average_precision([found], truth, thresholds)

        assert ap([one, other], [0.9, 0.8]) == 1
        assert ap([], []) == 0
        assert ap([one], [0.9]) == pytest.approx(51 / 101)  # the recalls from 0 to 0.5
        assert ap([one, one], [0.9, 0.8]) == pytest.approx(51 / 101)  # each is found once
        # A wrong one before two right ones: precision 1/2 and 2/3, the best at or after.
        wrong = square(0, 1)
        assert ap([wrong, one, other], [0.9, 0.8, 0.7]) == pytest.approx(2 / 3)
        # A wrong one between: 1 up to a recall of 1/2, and 2/3 beyond.
        expected = (51 + 50 * 2 / 3) / 101
        assert ap([one, wrong, other], [0.9, 0.8, 0.7]) == pytest.approx(expected)
        # An overlap of 3/4 is enough for thresholds up to 0.75, six of the ten.
        part = square(0, 3)
        assert ap([part, other], [0.9, 0.8], [0.75]) == 1
        assert ap([part, other], [0.9, 0.8], [0.8]) == pytest.approx(0.5 * 51 / 101)

    def test_ap_is_over_pictures_in_the_order_of_scores(self):
        one, wrong = square(0, 4)[None], square(5, 8)[None]
        truth = [one, one]
        good, bad = dense.Found(one, np.array([0.6])), dense.Found(wrong, np.array([0.7]))
        assert dense.average_precision([good, bad], truth) == pytest.approx(0.5 * 51 / 101)
        nothing = dense.Found(np.zeros((0, 8, 8), bool), np.zeros(0))
        assert dense.average_precision([good, nothing], truth) == pytest.approx(51 / 101)

    def test_suppression_keeps_the_best(self):
        masks = np.stack([square(0, 4), square(0, 5), square(4, 8)])
        kept = dense.suppressed(dense.Found(masks, np.array([0.5, 0.9, 0.7])))
        assert kept.scores.tolist() == [0.9, 0.7]

    def test_truth_as_an_answer_scores_fully(self):
        test = dense.scenes(1, 10)
        found = [dense.Found(s.masks, np.linspace(1, 0.5, len(s.masks))) for s in test]
        assert dense.average_precision(found, [s.masks for s in test]) == 1

    def test_where_a_network_can_know_positions_from(self):
        torch = pytest.importorskip("torch")
        from evidence.solo import Solo

        picture = torch.randn(1, 1, 64, 64)
        for name, variant in dense.VARIANTS.items():
            torch.manual_seed(0)
            network = Solo(variant).eval()
            with torch.no_grad():
                _, masks = network(picture)
                _, moved = network(picture.roll((16, 24), (2, 3)))
            same = torch.allclose(masks.roll((8, 12), (2, 3)), moved, atol=1e-4)
            # With circular padding and no coordinates a channel cannot mean a place.
            assert same == (name == "none-circular")


class TestSizes:
    def test_a_picture_has_one_disc_where_the_answer_is(self):
        drawn = sizes.batch(np.random.default_rng(0), "canvas", 64, 8, np.full(8, 5.0))
        for picture, (x, y) in zip(drawn.pictures[:, 0], (drawn.answers + 1) * 32, strict=True):
            assert picture[int(y), int(x)] == 1
            rows, columns = np.mgrid[:64, :64] + 0.5
            assert (picture[np.hypot(rows - y, columns - x) < 4] > 0.99).all()

    def test_resized_scenes_have_objects_that_grow_and_larger_canvases_more_of_them(self):
        def areas(reading, size):
            drawn = sizes.batch(np.random.default_rng(0), reading, size, 16, np.full(16, 4.0))
            return drawn.pictures.mean()

        assert areas("resized", 128) == pytest.approx(areas("resized", 64), rel=0.15)
        assert areas("canvas", 128) == pytest.approx(areas("canvas", 64), rel=0.25)

    def test_a_crop_is_the_part_of_the_whole_that_its_box_says(self):
        rng = np.random.default_rng(0)
        found = sizes.scenes(rng, 4, 128, np.full(4, 6.0), 12)
        whole, corner = found.pictures(128), sizes.corners(rng, found, 64)
        for crop, picture, (x, y), middle in zip(
            found.pictures(64, corner), whole, corner, found.middles[:, 0], strict=True
        ):
            np.testing.assert_allclose(crop[0], picture[0, y : y + 64, x : x + 64], atol=1e-5)
            assert (middle - 6 >= (x, y)).all()
            assert (middle + 6 <= (x + 64, y + 64)).all()

    def test_in_its_window_a_crop_has_the_maps_of_the_whole(self):
        torch = pytest.importorskip("torch")
        from coordconv import Coordinates, Window, window
        from evidence.pointer import Pointer

        torch.manual_seed(0)
        network = Pointer(Coordinates("xy", align="edges")).eval()
        picture = torch.rand(1, 1, 128, 128)
        x, y = 20, 36
        with torch.no_grad():
            whole = network.last(network.features(picture))
            with window(Window.from_boxes([x, y, x + 64, y + 64], (128, 128))):
                part = network.last(network.features(picture[..., y : y + 64, x : x + 64]))
        halo = 6  # of what the border of the crop reaches, at stride 2
        inner = slice(halo, 32 - halo)
        cut = whole[..., y // 2 : y // 2 + 32, x // 2 : x // 2 + 32]
        torch.testing.assert_close(part[..., inner, inner], cut[..., inner, inner])
        assert not torch.allclose(part[..., 0, :], cut[..., 0, :])


class TestArticle:
    def test_places_are_apart_and_whole(self):
        for split in article.SPLITS:
            trained, held_out = (set(map(tuple, each)) for each in article.places(split))
            assert not trained & held_out
            assert len(trained) + len(held_out) == article.PLACES**2
        assert all(y > 12 and x > 12 for y, x in held_out)

    def test_the_digits_are_apart_and_where_the_answer_says(self):
        pytest.importorskip("sklearn")
        seen, unseen = article.digits()
        assert len(seen.labels) + len(unseen.labels) == 1797
        for task in article.TASKS:
            where = article.places("uniform")[0]
            drawn = article.sample(np.random.default_rng(0), 32, unseen, where, task)
            assert drawn.pictures.shape == (32, 3, 32, 32)
            for picture, answer, (y, x) in zip(
                drawn.pictures, drawn.answers, drawn.places, strict=True
            ):
                pixels = (answer[0] + 1) * 16
                assert pixels in ((x + 4,) if task == "x" else (x + 4, y + 4))
                outside = picture.copy()
                outside[:, y : y + 8, x : x + 8] = picture[:, -1:, -1:]
                if y < 24 and x < 24:  # the last pixel is ground
                    assert (outside == picture[:, -1:, -1:]).all()

    def test_without_scikit_learn_it_says_what_to_install(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(BaseException) as caught:  # noqa: PT011  # typer's Exit, or Click's
            article.digits()
        assert type(caught.value).__name__ == "Exit"
        assert "pip install scikit-learn" in capsys.readouterr().err


def runs_of(name):
    """Tiny runs of all that a study trains, two seeds each."""
    found = []
    for split in study.load(name).SPLITS:
        for job in study.load(name).jobs(split, "torch", 2, False):
            if name == "dense":
                measures = {"AP": 50.0 + job.seed, "AP50": 80.0, "AP75": 40.0, "steps": 200}
                rows = ["0" * 32 + "1" * 32] * 64
                details = {"examples": [rows] * dense.EXAMPLES} if job.seed == 0 else {}
            elif name == "sizes":
                readings = [f"{r} {n}" for r in sizes.READINGS[split] for n in sizes.SIZES]
                measures = dict.fromkeys(readings, 1.5 + job.seed) | {"steps": 200}
                details = {}
            else:
                measures = {"held out": 2.0 + job.seed, "trained": 0.25, "steps": 200}
                details = {"map": [[0.5] * 4] * 4}
            found.append(
                Run(job, 1234, 5.0, [(100, 1.0 + job.seed), (200, 9.0)], measures, details)
            )
    return found


@pytest.mark.parametrize("name", ["article", "sizes", "dense"])
def test_sheets_and_pictures_come_from_files_of_runs(name, tmp_path):
    runs = runs_of(name)
    study.save(tmp_path / "found.json", runs)
    _, read = study.read(tmp_path / "found.json")
    assert read == runs
    pages = [each.markdown() for each in study.load(name).sheets(read)]
    expected = {
        "article": ["| x or y, quadrant, coord_cnn | 1,234 | 0.25 | 2.50 (2.00-3.00) |"],
        "sizes": ['| align="edges" | 2 (1.5-2.5) |', "| those of its window |"],
        "dense": ["| none | 1,234 | 50.5 (50.0-51.0) |", "| in every one | 0.0 |"],
    }[name]
    for line in expected:
        assert any(line in page for page in pages), pages
    if name == "article":
        pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    study.load(name).draw(tmp_path / "found.png", read)
    assert (tmp_path / "found.png").stat().st_size > 10_000
