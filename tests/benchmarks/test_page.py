"""docs/evidence.md has no result that the committed files of results do not hold."""

import re
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from evidence import frameworks, squares, study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")

# What the page quotes of others, and of how a study is set up, and where that is from.
QUOTED = {
    "100%": "the paper, section 4: CoordConv on both splits",
    "86%": "the paper, section 4.1: convolutions on the uniform split",
    "3.6": "SOLO, section 4.3",
    "35.8": "SOLO, section 4.3",
    "32.2": "SOLO, section 4.3",
    "0.5": "the page: a threshold of overlap",
    "0.95": "the page: a threshold of overlap",
}


def sheets():
    for name in study.STUDIES:
        _, runs = study.read(ROOT / f"benchmarks/results/{name}.json")
        yield from study.load(name).sheets(runs)


def test_every_table_is_what_the_command_prints():
    printed = {sheet.markdown() for sheet in sheets()}
    tables = re.findall(r"(?:^\|.*\|$\n?)+", PAGE, re.MULTILINE)
    assert {table.strip() for table in tables} == printed


def test_every_number_with_a_fraction_is_in_a_table_or_quoted():
    text = re.sub(r"^\|.*$|^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    printed = " ".join(sheet.markdown() for sheet in sheets())
    known = {*re.findall(r"\d[\d.,]*%?", printed), *QUOTED}
    found = re.findall(r"(?<![\w.])\d+(?:\.\d+%?|%)", text)
    assert [number for number in found if number not in known] == []


def test_the_results_of_the_frameworks_are_of_todays_networks():
    _, runs = study.read(ROOT / "benchmarks/results/frameworks.json")
    for run in runs:
        network = frameworks._problem(frameworks._setting(run.job)).network
        assert squares.parameters(network) == run.parameters
