"""``python -m coordconv``, and what the ``coordconv`` script starts."""

import sys


def main() -> None:
    """Run the command, or say how to install what the command needs."""
    try:
        from coordconv.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"the coordconv command needs {error.name}: pip install 'coordconv-layers[cli]'")
    app(prog_name="coordconv")


if __name__ == "__main__":
    main()
