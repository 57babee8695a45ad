"""Print the versions that are installed as a row of a table, with the tests' outcome.

``python release/versions.py OUTCOME``; .github/workflows/nightly.yml adds the row to
the summary of its run.
"""

import platform
import sys
from importlib.metadata import version

PACKAGES = ("jax", "optax", "flax", "numpy", "orbax-checkpoint")


def main():
    """Print the header and one row."""
    cells = [platform.python_version(), *map(version, PACKAGES), sys.argv[1]]
    for row in (("python", *PACKAGES, "tests"), ["---"] * len(cells), cells):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
