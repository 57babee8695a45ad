"""Check what would be uploaded to an index: its description, the wheel and the sdist.

``python release/check.py [--all]`` builds the sdist, and the wheel from it; renders
the description as an index does; runs README's first block of Python where only the
wheel is installed, and what the block imports besides; and runs the tests of the
sdist, unpacked in an empty folder: a fast part of them, or all.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAST = [
    f"tests/test_{part}.py"
    for part in ("release", "layout", "ascent", "smoothing", "descent", "numerics")
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A link or a picture whose target is a path: an index has no folder to find it in.
RELATIVE = re.compile(r"\]\((?!https?:|mailto:)[^)]*\)|(?:src|href)=\"(?!https?:)")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where they differ from the module's name


class Environment:
    """A new virtual environment, of the Python that runs this script."""

    def __init__(self, folder):
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"

    def run(self, *arguments, folder=None):
        """Run this environment's Python; an error ends the check."""
        # Or the checkout would be imported in place of what is installed.
        unset = ("PYTHONPATH", "PYTHONHOME")
        env = {name: value for name, value in os.environ.items() if name not in unset}
        command = [self.python, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=env, check=False)
        if done.returncode:
            sys.exit(f"failed: python {' '.join(map(str, arguments))}")

    def install(self, *requirements):
        """Install them from the index that pip is configured for."""
        quiet = ("--quiet", "--disable-pip-version-check")
        self.run("-m", "pip", "install", *quiet, *requirements)

    def has(self, module):
        """Whether the module can be imported."""
        code = f"import importlib.util as u; exit(u.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-I", "-c", code]).returncode == 0


def built(folder):
    """The wheel and the sdist, built and checked."""
    tools = Environment(folder / "tools")
    # Without its extra [md], the renderer lets every Markdown pass.
    tools.install("build", "twine", "readme_renderer[md]")
    tools.run("-m", "build", "--outdir", folder / "dist", ROOT)
    files = (wheel, sdist) = [
        next((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz")
    ]
    tools.run("-m", "twine", "check", "--strict", *files)
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        description = message_from_bytes(archive.read(name)).get_payload()
    if found := RELATIVE.findall(description):
        sys.exit(f"the description has relative links: {found}")
    print(f"Description: {len(description.splitlines())} lines, no relative link")
    return wheel, sdist


def quick_start(folder, wheel):
    """Run README's first block where only the wheel is installed."""
    block = BLOCK.search((ROOT / "README.md").read_text())[1]
    bare = Environment(folder / "bare")
    bare.install(wheel)
    imported = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    besides = [name for name in sorted(imported) if not bare.has(name)]
    if besides:
        bare.install(*(DISTRIBUTIONS.get(name, name) for name in besides))
    (folder / "quick_start.py").write_text(block)
    bare.run("quick_start.py", folder=folder)
    print("README's quick start ran with the wheel", *(f"and {b}" for b in besides))


def tests(folder, sdist, paths):
    """Run the tests of the sdist in an empty folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    environment = Environment(folder / "test")
    environment.install(f"{unpacked}[test]")
    environment.run("-m", "pytest", "-q", "-n", "auto", *paths, folder=unpacked)


def main(argv=None):
    """Build, then check one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="run all tests of the sdist")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = built(folder)
        quick_start(folder, wheel)
        tests(folder, sdist, ["tests"] if options.all else FAST)
        print(f"Ready: {wheel.name}, {sdist.name}")


if __name__ == "__main__":
    main()
