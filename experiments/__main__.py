"""``python -m experiments NAME`` runs an experiment; without a name it lists them."""

import ast
import runpy
import sys
from pathlib import Path


def runnable() -> dict[str, str]:
    """Module and first line of its docstring, of every experiment; nothing is run."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            doc = ast.get_docstring(ast.parse(text)) or ""
            found[path.stem] = doc.splitlines()[0]
    return found


def main(arguments: list[str]) -> None:
    """Run the experiment that is named, or list them all."""
    names = runnable()
    if arguments and arguments[0] in names:
        sys.argv = arguments
        runpy.run_module(f"experiments.{arguments[0]}", run_name="__main__")
        return
    if arguments and arguments[0] not in ("-h", "--help"):
        sys.exit(f"No experiment {arguments[0]!r}: choose from {', '.join(names)}.")
    print("Run one with python -m experiments NAME; --help says what it can do.\n")
    for name, line in names.items():
        print(f"  {name:<24} {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
