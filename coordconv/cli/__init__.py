"""The ``coordconv`` command: each group of commands has a file here."""

from __future__ import annotations

import logging

import typer

from coordconv.cli import demo, files, inspecting, proving

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def common_start() -> None:
    """CoordConv for PyTorch, Paddle and Flax: one set of weights, identical outputs."""
    logging.disable(logging.INFO)  # what frameworks log would land in the middle of our tables


app.command()(inspecting.info)
app.command()(inspecting.summary)
app.command()(files.weights)
app.command()(files.convert)
app.command()(proving.parity)
app.command()(proving.exchange)
app.command()(proving.training)
app.command("demo")(demo.run_demo)
