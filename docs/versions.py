"""Write docs/versions.md from what tox's environments kept of their runs.

tox && python docs/versions.py
"""

import argparse
import json
from pathlib import Path

NAMES = ("python", "numpy", "safetensors", "torch", "paddlepaddle", "jax", "flax")

HEAD = """# Versions

What the tests of each environment of `tox.ini` ran with, written by `python docs/versions.py` after
`tox`. The `oldest` environments run the lower bounds of `pyproject.toml`, the others what
`constraints.txt` pins, the `newest` ones what the package index had. There are no upper bounds.

"""

TAIL = """
An old Flax breaks by itself with a newer JAX, and pip may pick an orbax-checkpoint that is too new
for an old JAX: `constraints-oldest.txt` has a set that works, to be installed with
`pip install -c constraints-oldest.txt ...`. Flax 0.12.1 with JAX 0.8.3 fails in Flax's own layers.
Paddle imports setuptools without requiring it, so our extra does, where Python does not bring it.
What an old version lacks is in the last column of [Options](options.md).
"""


def main() -> None:
    """Read every environment's file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".tox/versions"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("versions.md"))
    arguments = parser.parse_args()
    runs = {file.stem: json.loads(file.read_text()) for file in arguments.folder.glob("*.json")}
    if not runs:
        parser.error(f"{arguments.folder} has no environment's file: run tox first")
    rows = [("environment", *NAMES, "passed", "failed", "skipped")]
    rows.append(("---",) * len(rows[0]))
    for name, run in sorted(runs.items()):
        tests = run["tests"]
        counts = tests["passed"], tests["failed"] + tests["error"], tests["skipped"]
        found = (run["versions"].get(each, "") for each in NAMES)
        rows.append((name, *found, *(str(count) for count in counts)))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    arguments.out.write_text(HEAD + table + TAIL, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
