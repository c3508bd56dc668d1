"""The command ``demo`` and its task."""

import re

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from coordconv import available_backends, load_weights, networks
from coordconv.cli import demo
from coordconv.summary import summary


class TestTask:
    def test_positions_are_the_papers(self):
        data = demo.positions()
        assert len(data.labels) == 3_136
        assert len(np.unique(data.labels)) == 3_136
        assert len(data.trained) == 2_509
        assert set(data.trained).isdisjoint(data.held_out)
        rows, columns = data.labels // 64, data.labels % 64
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 59, 4, 59)
        for found, pixels in zip(data.coordinates.T, (columns, rows), strict=True):
            assert np.array_equal(found, ((2 * pixels - 63) / 63).astype(np.float32))

    def test_inputs_tile_the_position(self):
        data = demo.positions()
        x = data.inputs(np.array([7]), (64, 64))
        assert x.shape == (1, 2, 64, 64)
        assert (x == data.coordinates[7].reshape(1, 2, 1, 1)).all()

    def test_conv_has_at_least_as_many_parameters(self):
        counts = [summary(name).parameters for name in ("coord_classifier", "deconv_classifier")]
        assert counts[0] <= counts[1]


def test_a_short_run_writes_weights_and_a_picture_and_says_that_it_fell_short(
    run, first_backend, tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "SECONDS", 0.5)
    whole, few = demo.positions(), np.arange(224)  # to run in every backend
    data = demo.Positions(whole.coordinates[few], whole.labels[few], few[:112], few[112:])
    monkeypatch.setattr(demo, "positions", lambda seed: data)
    shown = run("demo", "--out", tmp_path / "out")
    assert shown.exit_code == 1, shown.output  # half a second is not enough to learn
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    weights = load_weights(tmp_path / "out" / "coord_classifier.safetensors")
    assert weights.keys() == networks.get("coord_classifier").weight_shapes().keys()
    for name in available_backends():  # half-trained, two logits may be equal but for rounding
        (others,) = re.findall(rf"│ {name}\b.*│ +(\d+) +│", shown.output)
        assert int(others) < len(few) / 2


def test_a_folder_that_cannot_be_written_is_said_before_training(run, first_backend, tmp_path):
    (tmp_path / "file").write_text("")
    shown = run("demo", "--out", tmp_path / "file" / "out")
    assert shown.exit_code == 2
    assert "cannot write to" in shown.output
    assert "training" not in shown.output


def test_without_a_framework_says_what_to_install(run, no_framework, tmp_path):
    shown = run("demo", "--out", tmp_path)
    assert shown.exit_code == 2
    assert "pip install 'torch>=2.4'" in shown.output
