"""The rooms of the library, and that its imports run downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top: a module imports from its own room and from those below it.
ROOMS = (
    "train",
    "recipes",
    "metrics",
    "wrappers",
    "factors",
    "steps",
    "descent",
    "gate",
    "ascent",
    "sharpness",
    "_internal",
)


def modules(package):
    """Every module of a package by its dotted name."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path, known):
    """The known modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # From a package either one of its modules or a name that it has itself.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in known)


def room_of(module):
    return ROOMS.index(module.split(".")[1])


@pytest.mark.parametrize("module", [n for n, _ in modules("optax_vasso") if "." in n])
def test_imports_run_downward(module):
    files = dict(modules("optax_vasso"))
    for other in imports(files[module], files):
        assert other != "optax_vasso", f"{module} imports the whole package"
        assert room_of(module) <= room_of(other), f"{module} imports {other}"


@pytest.mark.parametrize("package", ["optax_vasso", "experiments", "benchmarks"])
def test_no_module_imports_itself_in_a_circle(package):
    files = dict(modules(package))
    packages = {n for n, path in files.items() if path.name == "__init__.py"}
    # A package is imported by way of its parts; what counts is a circle of modules.
    arrows = {n: set(imports(path, files)) - packages for n, path in files.items()}
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in arrows[name]:
                visit(other, [*above, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


@pytest.mark.parametrize("module", [n for n, _ in modules("optax_vasso") if "." in n])
def test_every_module_is_in_the_table_of_rooms(module):
    assert f"`{module.split('.')[-1]}" in (ROOT / "CONTRIBUTING.md").read_text()
