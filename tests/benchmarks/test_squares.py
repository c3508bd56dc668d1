"""The studies behind docs/evidence.md: their data, their search, and what they print of runs."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from evidence import classification, frameworks, regression, rendering, squares, study
from evidence.study import Job, Run

PAPERS = classification, regression, rendering


@pytest.mark.parametrize("name", squares.SPLITS)
def test_a_split_is_disjoint_and_complete(name):
    data = squares.split(name, 3)
    both = np.concatenate([data.trained, data.held_out])
    assert np.array_equal(np.sort(both), np.arange(56 * 56))
    assert len(data.held_out) == (627 if name == squares.UNIFORM else 28 * 28)


def test_the_quadrant_is_one():
    data = squares.split(squares.QUADRANT, 0)
    assert (data.coordinates[data.held_out] > 0).all()
    assert (data.coordinates[data.trained] < 0).any(axis=1).all()


def test_pictures_have_the_square_at_its_centre():
    data = squares.split(squares.UNIFORM, 0)
    which = np.array([0, 57, 3135])
    for picture, label in zip(squares.pictures(data, which), data.labels[which], strict=True):
        rows, columns = np.nonzero(picture)
        assert picture.sum() == 81
        assert (rows.mean(), columns.mean()) == divmod(label, 64)
        assert (np.ptp(rows), np.ptp(columns)) == (8, 8)


@pytest.mark.parametrize("module", PAPERS)
@pytest.mark.parametrize("split", squares.SPLITS)
def test_right_outputs_get_the_best_score_and_others_do_not(module, split):
    job = module.jobs(split, "torch", 1, False)[0]
    problem = module.problem(job)
    which = problem.data.held_out[:20]
    targets = problem.targets(which)
    right = np.eye(4096)[targets] if module is classification else targets
    scores = problem.scores(right, which)
    assert (scores == (0 if module is regression else 1)).all()
    assert problem.shades(scores).min() == 1
    assert problem.shades(problem.scores(right[::-1], which)).max() < 1
    assert problem.inputs(which).shape == (20, *problem.network.input_shape)


@pytest.mark.parametrize("module", PAPERS)
def test_a_network_without_coordinates_is_searched_and_has_as_many_parameters(module):
    jobs = module.jobs(squares.UNIFORM, "torch", 5, False)
    sizes = {job.variant: squares.parameters(module.problem(job).network) for job in jobs}
    coord = sizes.pop(squares.COORD)
    assert all(size >= coord for size in sizes.values())
    searches = [job for job in jobs if squares.is_search(job)]
    assert len({(job.variant, *job.options.values()) for job in searches}) == len(searches)
    assert all(job.seed == 0 for job in searches)
    assert len(jobs) - len(searches) == 5


def searched(module, highest: bool) -> Iterator[Run]:
    """Runs whose third search of each variant is the best one."""
    for split in squares.SPLITS:
        count: dict[str, int] = {}
        for job in module.jobs(split, "torch", 2, False):
            count[job.variant] = count.get(job.variant, 0) + 1
            score = (0.9 if highest else 0.1) if count[job.variant] == 3 else 0.5
            measures = {"test": score, "trained": 0.5, "steps": 20}
            yield Run(job, 1000, 3.0, [(10, 0.4), (20, score)], measures, {"digits": "9" * 3136})


@pytest.mark.parametrize("module", PAPERS)
def test_the_best_settings_are_run_with_all_seeds_and_reported(module, tmp_path):
    runs = [*searched(module, highest=module is not regression)]
    further = module.chosen(runs, 2)
    for variant in {job.variant for job in further}:
        for split in squares.SPLITS:
            found = [job for job in further if (job.variant, job.split) == (variant, split)]
            tried = [
                run.job
                for run in runs
                if (run.job.variant, run.job.split) == (squares.SEARCH + variant, split)
            ]
            assert [job.seed for job in found] == [0, 1]
            assert module.problem(found[0]).network == module.problem(tried[2]).network
            for key in ("rate", "width"):
                assert found[0].options[key] == tried[2].options[key]
            assert found[0].options["epochs"] > tried[2].options["epochs"]
    runs += [replace(runs[0], job=job) for job in further]
    path = tmp_path / "runs.json"
    study.save(path, runs)
    _, again = study.read(path)
    assert again == runs
    results, search, claims = module.sheets(again)
    assert len(results.rows) == 2 * (1 + len({job.variant for job in further}))
    assert [row[1] for row in search.rows] == [str(len(tried))] * len(search.rows)
    assert {row[3] for row in claims.rows} <= {"yes", "no"}
    module.draw(tmp_path / "picture.png", again)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_claims_that_no_run_is_about_are_not_confirmed():
    assert {row[3] for row in classification.sheets([])[2].rows} == {"not measured"}


def test_quick_runs_confirm_nothing():
    runs = [
        replace(run, job=replace(run.job, quick=True)) for run in searched(classification, True)
    ]
    said = {row[3] for row in classification.sheets(runs)[2].rows}
    assert said == {"too short to tell", "not measured"}


def test_the_frameworks_are_held_to_the_bound_and_reported(monkeypatch, tmp_path):
    """The real parity run of the cheapest task, and runs to the end that were made up."""
    pytest.importorskip("torch")
    monkeypatch.setattr(frameworks, "FRAMEWORKS", ("torch",))
    job = next(
        job
        for job in frameworks.jobs(frameworks.PARITY, "torch", 5, quick=True)
        if job.variant == "regression"
    )
    parity = frameworks.run(job)
    assert 0 < parity.details["torch"]["10"] <= 1
    assert parity.measures["torch holds"] == parity.measures["steps"] == 10
    whole = [
        Run(job, 10, 1.0, [(5, 0.5)], {"test": 0.5, "trained": 0.6, "steps": 5})
        for job in frameworks.jobs(frameworks.WHOLE, "torch", 5, quick=True)
    ]
    held, ended = frameworks.sheets([parity, *whole])
    assert [row[:2] for row in held.rows] == [("regression", "torch")]
    assert [row[3] for row in ended.rows] == ["0.5", "0.6", "5"] * 3
    frameworks.draw(tmp_path / "picture.png", [parity, *whole])
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_training_improves_and_is_the_same_again():
    pytest.importorskip("torch")
    options = {"rate": 0.003, "width": 8, "epochs": 0.5}
    job = Job("regression", squares.UNIFORM, "strided, linear", 0, options=options)
    first, again = regression.run(job), regression.run(job)
    assert first.curve[-1][1] < 0.8 * first.curve[0][1]
    assert first.curve == again.curve
    assert first.measures == again.measures
    assert len(first.details["digits"]) == 3136
