"""The ``coordconv`` command: each group of commands has a file here."""

from __future__ import annotations

import logging

import typer

from coordconv.cli import demo, files, inspecting, proving

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def common_start() -> None:
    """CoordConv for PyTorch, Paddle and Flax: one set of weights, identical outputs."""
    logging.disable(logging.INFO)  # what frameworks log would land in the middle of our tables


for command in (
    inspecting.info,
    inspecting.summary,
    files.weights,
    files.convert,
    proving.parity,
    proving.exchange,
    proving.training,
    demo.demo,
):
    app.command()(command)
