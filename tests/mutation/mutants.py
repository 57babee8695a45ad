"""Small errors in the library's code: at random by its syntax, and by hand.

A mutant is one replacement in one file that leaves the file's text outside of it alone.
Messages, docstrings, annotations and imports are never changed: no test of behaviour
has to notice those.
"""

import ast
import difflib
import itertools
import random
import warnings
from pathlib import Path
from typing import NamedTuple

from tests.mutation.by_hand import BY_HAND
from tests.mutation.equivalent import EQUIVALENT

PACKAGE = "optax_vasso"

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
}
NAMES = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "any": "all",
    "all": "any",
    "psum": "pmean",
    "pmean": "psum",
    "sum": "mean",
    "mean": "sum",
    "float32": "bfloat16",
    "int32": "float32",
    "uint32": "int32",
    "real": "imag",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "zeros": "ones",
    "ones": "zeros",
}
# What is called to speak to people or to type checkers.
SPEAKS = {"warn", "cast", "TypeVar", "NewType", "debug", "info"}

# Functions of two things of one kind: elsewhere a swap is nothing but a type error.
SWAPPED = {
    *("_combine", "add_scaled", "cast_like", "clip", "cosine", "divide", "fill_none"),
    *("finite_or", "fold_in", "orthogonal_to", "overlap", "power", "setdefault"),
    *("subtract", "where", "without", "xor"),
}
# Those that map over trees of one kind, behind a function.
MAPS = {"map", "map_updates", "zip"}
# What would be left of these is of another type than what they return.
NOT_DROPPED = {
    *("callable", "dict", "enumerate", "flatten", "getattr", "hasattr", "id"),
    *("iscomplexobj", "isinstance", "issubclass", "items", "iter", "leaves", "len"),
    *("leaves_with_path", "list", "next", "partial", "range", "result_type", "set"),
    *("shape", "split", "structure", "tuple", "type", "zip"),
}
# Functions of several things that could be left out: the first of them stays.
OF_FIRST = {
    "asarray",
    "clip",
    "fold_in",
    "full_like",
    "maximum",
    "minimum",
    "pcast",
    "pmax",
    "pmean",
    "psum",
    "with_sharding_constraint",
}


class Mutant(NamedTuple):
    """Some bytes of a file of the package, and what stands there instead."""

    file: str  # below the package
    function: str  # where it is, by name
    line: int
    start: int
    end: int
    new: bytes
    kind: str

    @property
    def key(self):
        """What tells it from others, wherever its lines have moved."""
        return (self.file, self.function, *self.lines())

    def text(self, source):
        """The file with the error in it."""
        return source[: self.start] + self.new + source[self.end :]

    def lines(self):
        """What changes, as the lines that go and those that come."""
        old = source_of(self.file)
        gone, come = [], []
        for line in difflib.ndiff(
            old.decode().splitlines(), self.text(old).decode().splitlines()
        ):
            if line.startswith("- "):
                gone.append(line[2:].strip())
            elif line.startswith("+ "):
                come.append(line[2:].strip())
        return "\n".join(gone), "\n".join(come)


class _Finder(ast.NodeVisitor):
    """All mutants of one file."""

    def __init__(self, file, source):
        self.file = file
        self.source = source
        starts = itertools.accumulate(map(len, source.splitlines(keepends=True)))
        self.starts = [0, *starts]
        self.names = []
        self.found = []
        self.visit(ast.parse(source))

    def at(self, line, column):
        return self.starts[line - 1] + column

    def span(self, node):
        return (
            self.at(node.lineno, node.col_offset),
            self.at(node.end_lineno, node.end_col_offset),
        )

    def code(self, node):
        start, end = self.span(node)
        return self.source[start:end]

    def add(self, kind, node, new, start=None, end=None):
        first, last = self.span(node)
        start = first if start is None else start
        end = last if end is None else end
        if isinstance(new, str):
            new = new.encode()
        line = self.source.count(b"\n", 0, start) + 1
        if self.source[start:end] == new:
            return
        function = ".".join(self.names)
        self.found.append(Mutant(self.file, function, line, start, end, new, kind))

    def between(self, kind, left, right, words):
        """Replace the operator that stands between two expressions."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end]
        old, new = (word.encode() for word in words)
        if gap.count(old) == 1:
            where = start + gap.index(old)
            self.add(kind, left, new, where, where + len(old))

    # What is never changed.

    def visit_Import(self, node): ...
    def visit_ImportFrom(self, node): ...
    def visit_JoinedStr(self, node): ...
    def visit_Raise(self, node): ...
    def visit_Assert(self, node): ...
    def visit_Global(self, node): ...

    def visit_keyword(self, node):
        if node.arg != "strict":  # it fails where something else is wrong
            self.visit(node.value)

    def visit_Assign(self, node):
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        # __all__, and names of types: Gate = Callable[...]
        if (
            not self.names
            and names
            and (names[0] == "__all__" or names[0][0].isupper())
        ):
            return
        self.dropped_assignment(node, node.value, names)
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                self.visit(target.slice)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def dropped_assignment(self, node, value, names):
        """``x = f(x)`` can go; the name is bound already."""
        used = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
        if names and set(names) <= used and self.names:
            self.add("statement dropped", node, "pass")

    def visit_FunctionDef(self, node):
        self.names.append(node.name)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for decorator in node.decorator_list:
            self.visit(decorator)
        self.body(node.body)
        self.names.pop()

    def visit_Lambda(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.visit(node.body)

    def visit_ClassDef(self, node):
        self.names.append(node.name)
        self.body(node.body)
        self.names.pop()

    def visit_Module(self, node):
        self.body(node.body)

    def body(self, statements):
        for statement in statements:
            self.visit(statement)

    def visit_If(self, node):
        name = node.test.id if isinstance(node.test, ast.Name) else ""
        if name == "TYPE_CHECKING":
            return
        self.add("branch never taken", node.test, "False")
        self.add("branch always taken", node.test, "True")
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.add("one branch", node, b"(" + self.code(node.body) + b")")
        self.add("one branch", node, b"(" + self.code(node.orelse) + b")")
        self.generic_visit(node)

    def visit_comprehension(self, node):
        for test in node.ifs:
            self.add("filter dropped", test, "True")
        self.generic_visit(node)

    def visit_Expr(self, node):
        value = node.value
        if isinstance(value, ast.Constant):  # a docstring, or dots
            return
        if isinstance(value, ast.Call) and _last_name(value.func) in SPEAKS:
            return
        if not isinstance(value, ast.Yield | ast.YieldFrom):
            self.add("statement dropped", node, "pass")
        self.visit(value)

    def visit_Delete(self, node): ...  # it names what is not used

    def visit_AugAssign(self, node):
        self.add("statement dropped", node, "pass")
        pair = ARITHMETIC.get(type(node.op))
        if pair:
            self.between("arithmetic", node.target, node.value, pair)
        self.visit(node.value)

    def visit_Return(self, node):
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            first, second = node.value.elts
            new = self.code(second) + b", " + self.code(first)
            start, end = self.span(first)[0], self.span(second)[1]
            self.add("tuple swapped", node, new, start, end)
        self.generic_visit(node)

    def visit_Compare(self, node):
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            self.between("comparison", left, right, COMPARISONS[type(operator)])
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node):
        text = any(
            isinstance(n, ast.JoinedStr)
            or (isinstance(n, ast.Constant) and isinstance(n.value, str))
            for n in (node.left, node.right)
        )
        pair = ARITHMETIC.get(type(node.op))
        if text:
            return
        if pair:
            self.between("arithmetic", node.left, node.right, pair)
            self.add("one operand", node, b"(" + self.code(node.left) + b")")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        word = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in itertools.pairwise(node.values):
            self.between("and/or", left, right, word)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        self.add("sign or not dropped", node, b"(" + self.code(node.operand) + b")")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, int):
            self.add("constant", node, repr(value + 1))
            if value > 0:
                self.add("constant", node, repr(value - 1))
        elif isinstance(value, float):
            self.add("constant", node, repr(2 * value if value else 1.0))
            if value not in (0.0, float("inf")):
                self.add("constant", node, "0.0" if value != 1 else "0.5")

    def visit_Name(self, node):
        if node.id in NAMES and node.id in {"max", "min", "any", "all", "sum"}:
            new = {"sum": "max"}.get(node.id, NAMES[node.id])
            self.add("name", node, new)

    def visit_Attribute(self, node):
        if node.attr in NAMES:
            end = self.span(node)[1]
            new = NAMES[node.attr]
            kind = "dtype" if "32" in node.attr else "name"
            self.add(kind, node, new, end - len(node.attr), end)
        self.visit(node.value)

    def visit_Call(self, node):
        name = _last_name(node.func)
        if name in SPEAKS:
            return
        arguments = node.args
        plain = not any(isinstance(a, ast.Starred | ast.Constant) for a in arguments)
        if name in {"where", "select"} and len(arguments) == 3:
            for branch in arguments[1:]:
                self.add("one branch", node, b"(" + self.code(branch) + b")")
        first = _last_name(arguments[0]) if arguments else ""
        if (
            plain
            and name in SWAPPED | MAPS
            and len(arguments) >= 2 + (name in MAPS)
            and first not in {"add", "multiply"}  # they commute
        ):
            self.swap(*arguments[-2:])
        kept = name in NOT_DROPPED or name.startswith("check")
        if plain and not kept and (len(arguments) == 1 or name in {"map", *OF_FIRST}):
            which = arguments[name == "map"]
            if not isinstance(which, ast.Lambda | ast.GeneratorExp):
                self.add("call dropped", node, b"(" + self.code(which) + b")")
        method = node.func
        if isinstance(method, ast.Attribute) and method.attr in {
            "astype",
            "reshape",
            "conj",
            "squeeze",
            "copy",
        }:
            self.add("call dropped", node, b"(" + self.code(method.value) + b")")
        self.dropped_keywords(node)
        self.generic_visit(node)

    def dropped_keywords(self, node):
        parts = sorted(
            [*node.args, *node.keywords],
            key=lambda part: (part.lineno, part.col_offset),
        )
        for before, part in zip([None, *parts], parts, strict=False):
            if isinstance(part, ast.keyword) and part.arg not in {
                "strict",
                "stacklevel",
            }:
                start, end = self.span(part)
                if before is not None:
                    start = self.span(before)[1]
                self.add("keyword dropped", part, "", start, end)

    def swap(self, first, second):
        start, end = self.span(first)[0], self.span(second)[1]
        gap = self.source[self.span(first)[1] : self.span(second)[0]]
        new = self.code(second) + gap + self.code(first)
        self.add("arguments swapped", first, new, start, end)


def _last_name(function):
    return getattr(function, "attr", getattr(function, "id", ""))


def root():
    """The folder of the repository."""
    return Path(__file__).parents[2]


def source_of(file):
    """A module of the package, as bytes: columns of syntax trees count those."""
    return (root() / PACKAGE / file).read_bytes()


def modules():
    """All modules, below the package's folder."""
    folder = root() / PACKAGE
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))


def all_of(file):
    """Every mutant of a module that this file can make."""
    return _Finder(file, source_of(file)).found


def sample(number, seed, files=None):
    """Mutants at random: each line of code is as likely, then each kind of error on it.

    Args:
        number: How many, at most one per line.
        seed: The same for the same mutants, as long as the code is the same.
        files: The modules to take them from, all by default.
    """
    lines = {}
    for file in files or modules():
        for mutant in all_of(file):
            kinds = lines.setdefault((file, mutant.line), {})
            kinds.setdefault(mutant.kind, []).append(mutant)
    generator = random.Random(seed)
    order = sorted(lines)
    generator.shuffle(order)
    found = []
    for line in order:
        kinds = lines[line]
        mutant = generator.choice(kinds[generator.choice(sorted(kinds))])
        if len(found) < number and _compiles(mutant):
            found.append(mutant)
    return found


def _compiles(mutant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 'is' with a literal and the like
        try:
            compile(mutant.text(source_of(mutant.file)), mutant.file, "exec")
        except (SyntaxError, SyntaxWarning):
            return False
    return True


def by_hand():
    """The mutants of ``by_hand.py``, and those whose text has moved."""
    found, gone = [], []
    for file, old, new in BY_HAND:
        path = root() / PACKAGE / file
        source = path.read_bytes() if path.exists() else b""
        if source.count(old.encode()) != 1:
            gone.append((file, old, new))
            continue
        start = source.index(old.encode())
        line = source.count(b"\n", 0, start) + 1
        # The first line that changes, for the tests that run it.
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1],
            zip(old.splitlines(), new.splitlines(), strict=False),
        )
        line += sum(1 for _ in same)
        end = start + len(old.encode())
        function = _function_at(source, line)
        found.append(Mutant(file, function, line, start, end, new.encode(), "by hand"))
    return found, gone


def _function_at(source, line):
    names = []

    def walk(node):
        for child in ast.iter_child_nodes(node):
            end = getattr(child, "end_lineno", None)
            if end is not None and child.lineno <= line <= end:
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    names.append(child.name)
                walk(child)

    walk(ast.parse(source))
    return ".".join(names)


def equivalent(key):
    """Why no test can notice a mutant, or None."""
    file, _, old, new = key
    return EQUIVALENT.get((file, old, new))
