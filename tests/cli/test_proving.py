"""The commands ``parity``, ``exchange`` and ``training``, as a user meets them."""

import dataclasses
import json
import re

import pytest

from coordconv import available_backends, backends, networks, position_bias, windows
from coordconv.parity import training


def test_without_a_framework_they_say_what_to_install(run, no_framework, tmp_path):
    for command in ("parity", "exchange", "training"):
        shown = run(command, *(("--out", tmp_path) if command == "training" else ()))
        assert shown.exit_code == 2
        for needed in ("'torch>=2.4'", "'paddlepaddle>=3.2'", "'flax>=0.10.7' 'jax>=0.6'"):
            assert f"pip install {needed}" in shown.output


@pytest.mark.parametrize("command", ["parity", "exchange"])
def test_a_negative_seed_is_no_failed_proof(run, command):
    result = run(command, "--seed", "-1")
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_unknown_and_missing_backends(run, monkeypatch):
    shown = run("parity", "--backends", "keras")
    assert shown.exit_code == 2
    assert "backend must be one of torch" in shown.output
    missing = backends.BackendInfo("torch", ("no_such_package",), (), ("torch>=2.4",))
    monkeypatch.setitem(backends.BACKENDS, "torch", missing)
    shown = run("parity", "--backends", "torch")
    assert shown.exit_code == 2
    assert "needs no_such_package: pip install 'torch>=2.4'" in shown.output


class TestParity:
    def test_table_and_report(self, run, first_backend, tmp_path):
        file = tmp_path / "parity.json"
        shown = run("parity", "--backends", first_backend, "--cases", 4, "--json", file)
        assert shown.exit_code == 0, shown.output
        assert re.search(rf"{first_backend} .* 0 ", shown.output)
        assert json.loads(file.read_text())["ok"] is True

    def test_the_report_is_alone_on_standard_output(self, run, first_backend):
        shown = run("parity", "--backends", first_backend, "--cases", 1, "--json", "-")
        assert json.loads(shown.stdout)["ok"] is True
        assert f"cases through {first_backend}" in shown.stderr
        assert "bitwise" in shown.stderr

    @pytest.mark.parametrize("way", [position_bias.APPEND, position_bias.MAP])
    def test_a_developer_can_force_a_way(self, run, first_backend, way, monkeypatch):
        asked = []
        module = backends.load(first_backend)
        build = module.build

        def spy(*arguments):
            asked.append(position_bias.FORCED)
            return build(*arguments)

        monkeypatch.setattr(module, "build", spy)
        shown = run("parity", "--backends", first_backend, "--cases", 1, "--way", way)
        assert shown.exit_code == 0, shown.output
        assert set(asked) == {way}
        assert run("parity", "--way", "neither").exit_code == 2

    def test_windows(self, run, first_backend, monkeypatch):
        module, shown_parts = backends.load(first_backend), []
        build = module.build

        def spy(*arguments):
            shown_parts.append(windows.current(None) is not None)
            return build(*arguments)

        monkeypatch.setattr(module, "build", spy)
        for options in ([], ["--windows"]):
            shown = run("parity", "--backends", first_backend, "--cases", 20, *options)
            assert shown.exit_code == 0, shown.output
            assert any(shown_parts) == bool(options)

    @pytest.mark.parametrize("mode", ["eager", "compiled"])
    def test_the_mode_is_what_is_counted(self, run, first_backend, mode, tmp_path):
        file = tmp_path / "parity.json"
        options = "--cases", 2, "--mode", mode, "--workers", 2, "--json", file
        shown = run("parity", "--backends", first_backend, *options)
        assert shown.exit_code == 0, shown.output
        (tally,) = json.loads(file.read_text())["backends"]
        assert set(tally["modes"]) == {f"float32, {mode}"}

    def test_exits_with_1_if_a_case_fails(self, run, first_backend, monkeypatch):
        module = backends.load(first_backend)
        evaluate = module.evaluate

        def wrong(*arguments, **options):
            y, gradients = evaluate(*arguments, **options)
            return y + 1, gradients

        monkeypatch.setattr(module, "evaluate", wrong)
        shown = run("parity", "--backends", first_backend, "--cases", 3)
        assert shown.exit_code == 1
        assert "failed in " + first_backend in shown.output
        assert "y: error" in shown.output
        assert "Case(network=" in shown.output

    def test_a_report_that_cannot_be_written_is_said_before_the_work(
        self, run, first_backend, tmp_path
    ):
        (tmp_path / "file").write_text("")
        shown = run("parity", "--json", tmp_path / "file" / "parity.json")
        assert shown.exit_code == 2
        assert "cannot write to" in shown.output
        assert "cases through" not in shown.output

    def test_an_unknown_type(self, run, first_backend):
        shown = run("parity", "--backends", first_backend, "--dtype", "int8")
        assert shown.exit_code == 2
        assert "dtype must be one of float32, " in shown.output


class TestExchange:
    def test_table_and_report(self, run, first_backend, tmp_path):
        file = tmp_path / "exchange.json"
        shown = run("exchange", "--network", "coord_cnn", "--inputs", 3, "--json", file)
        assert shown.exit_code == 0, shown.output
        found = json.loads(file.read_text())
        assert found["ok"] is True
        assert len(found["pairs"]) == len(available_backends()) ** 2
        for name in available_backends():
            assert re.search(rf"{name} .* 0\.\d+, 3 ", shown.output)
        lines = shown.output.replace(str(file), "exchange.json").splitlines()
        assert max(map(len, lines)) <= 80

    def test_exits_with_1_if_an_answer_differs(self, run, first_backend, monkeypatch):
        module = backends.load(first_backend)
        evaluate = module.evaluate
        monkeypatch.setattr(module, "evaluate", lambda *a: (evaluate(*a)[0] + 1, None))
        asked = ("--backends", first_backend, "--network", "coord_cnn", "--inputs", 1)
        shown = run("exchange", *asked, "--json", "-")
        assert shown.exit_code == 1
        assert json.loads(shown.stdout)["ok"] is False

    def test_unknown_network(self, run, first_backend):
        shown = run("exchange", "--network", "coord_cnn,no_such_network")
        assert shown.exit_code == 2
        assert "network must be one of plain_cnn" in shown.output


class TestTraining:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        network = dataclasses.replace(networks.get("coord_classifier"), input_shape=(2, 9, 9))
        task = training.Task(network, "adam", 0.001, epsilon=1e-4)
        monkeypatch.setattr(training, "TASKS", (task,))

    def test_table_picture_and_report(self, run, first_backend, tmp_path):
        out, file = tmp_path / "new folder", tmp_path / "training.json"
        asked = ("--steps", 20, "--out", out, "--json", file)
        shown = run("training", "--backends", first_backend, *asked)
        assert shown.exit_code == 0, shown.output
        assert "coord_classifier 9x9, adam" in shown.output
        assert re.search(rf"{first_backend} .* [\d.]+ .* [\d.e-]+ ", shown.output)
        assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
        assert list(json.loads(file.read_text())["outcomes"][0]["errors"]) == ["10", "20"]

    def test_exits_with_1_and_names_the_weight(self, run, first_backend, monkeypatch, tmp_path):
        module = backends.load(first_backend)
        trainer = module.trainer

        def wrong(*arguments):
            step, export = trainer(*arguments)
            return lambda x, target, rate: step(x, target, 1.01 * rate), export

        monkeypatch.setattr(module, "trainer", wrong)
        shown = run("training", "--backends", first_backend, "--steps", 10, "--out", tmp_path)
        assert shown.exit_code == 1
        assert f"failed in {first_backend}: coord_classifier 9x9, adam: conv" in shown.output
        assert (tmp_path / "training.png").exists()

    def test_a_file_in_the_place_of_the_folder_is_said_before_training(
        self, run, first_backend, tmp_path
    ):
        (tmp_path / "file").write_text("")
        shown = run("training", "--out", tmp_path / "file")
        assert shown.exit_code == 2
        assert "cannot write to" in shown.output
        assert "steps" not in shown.output
