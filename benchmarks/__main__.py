"""List the benchmarks, or run some of them one after another.

python -m benchmarks                      # list
python -m benchmarks budgets limits       # run these, or 'all'
python -m benchmarks all --smoke          # their options are passed on
"""

import ast
import subprocess
import sys
from pathlib import Path


def runnable() -> dict[str, str]:
    """Module and first line of its docstring, of every benchmark; nothing is run."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        text = path.read_text()
        if "measuring.parser(" in text and path.stem != "measuring":
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """List or run; the exit code is that of the first benchmark that fails."""
    known = runnable()
    names = [argument for argument in arguments if argument[0] != "-"]
    passed_on = [argument for argument in arguments if argument[0] == "-"]
    if not names:
        print("Run one with python -m benchmarks.NAME; --help says what it can do.\n")
        for name, line in known.items():
            print(f"  {name:<16} {line}")
        print("\nCompare two result files with python -m benchmarks.compare OLD NEW.")
        return 0
    for name in known if names == ["all"] else names:
        if name not in known:
            print(f"{name!r} is none of {', '.join(known)}", file=sys.stderr)
            return 2
        command = [sys.executable, "-m", f"benchmarks.{name}", *passed_on]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
