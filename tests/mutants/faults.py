"""`Mutant`: one small fault in one file; `draw` takes some at random of all that there are.

Docstrings, messages, type hints and what only prints are left alone.
"""

import ast
import difflib
import fnmatch
import functools
import itertools
import pathlib
import random
import sys
import tomllib

import attrs

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = ("rampwrap", "adapters", "kernels")
SILENT = {"__repr__", "__str__"}
"Functions whose text is for people."
MESSAGES = {
    "print",
    "warn",
    "warn_once",
    "info",
    "warning",
    "debug",
    "error",
    "exception",
    "add_argument",
    "add_parser",
}
"Calls whose arguments are mostly messages: only the whole statement may go."
COMPARE = {"Lt": ("<", "<=", ">="), "LtE": ("<=", "<", ">"), "Gt": (">", ">=", "<="), "GtE": (">=", ">", "<")}
COMPARE |= {"Eq": ("==", "!="), "NotEq": ("!=", "=="), "Is": ("is", "is not"), "IsNot": ("is not", "is")}
COMPARE |= {"In": ("in", "not in"), "NotIn": ("not in", "in")}
ARITHMETIC = {"Add": ("+", "-"), "Sub": ("-", "+"), "Mult": ("*", "//"), "FloorDiv": ("//", "*"), "Div": ("/", "*")}
ARITHMETIC |= {
    "Mod": ("%", "//"),
    "LShift": ("<<", ">>"),
    "RShift": (">>", "<<"),
    "BitAnd": ("&", "|"),
    "BitOr": ("|", "&"),
}
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}


@attrs.frozen
class Mutant:
    """One changed span of one file."""

    path: str
    kind: str
    function: str
    "Qualified name of the innermost function or class; empty for the module's own statements."
    lines: tuple[int, ...]
    "Lines whose tests see it: of the statement's head, or of the function's body for its defaults."
    span: tuple[int, int]
    "Bytes of the file."
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.span[0]] + self.new.encode() + source[self.span[1] :]

    def is_another_program(self) -> bool:
        """It parses, and not to what stands there."""
        before = (ROOT / self.path).read_bytes()
        try:
            return ast.dump(ast.parse(self.apply(before))) != ast.dump(ast.parse(before))
        except SyntaxError:
            return False

    def changed(self) -> tuple[str, str]:
        """The first line that differs, before and after, without indentation."""
        before = (ROOT / self.path).read_bytes()
        pairs = zip(before.decode().splitlines(), self.apply(before).decode().splitlines(), strict=False)
        old, new = next((a, b) for a, b in pairs if a != b)
        return old.strip(), new.strip()

    def diff(self) -> str:
        before = (ROOT / self.path).read_bytes()
        lines = (text.decode().splitlines() for text in (before, self.apply(before)))
        shown = list(difflib.unified_diff(*lines, lineterm="", n=1))[3:]
        return f"{self.path}:{self.lines[0]} {self.function} ({self.kind})\n" + "\n".join(
            f"    {line}" for line in shown
        )


class Sites(ast.NodeVisitor):
    """All mutants of one file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.names: list[str] = []
        self.lines: tuple[int, ...] = (1,)
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def at(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.AST) -> str:
        begin, end = self.at(node)
        return self.source[begin:end].decode()

    def add(self, kind: str, span: tuple[int, int], new: str) -> None:
        self.found.append(Mutant(self.path, kind, ".".join(self.names), self.lines, span, new))

    def swap(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Another operator between two operands."""
        span = self.at(left)[1], self.at(right)[0]
        between = self.source[slice(*span)].decode()
        self.add(kind, span, between.replace(old, new, 1))

    # ---- statements

    def visit(self, node: ast.AST) -> None:
        kept = self.lines
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = node.end_lineno if body is None else max(node.lineno, body[0].lineno - 1)
            self.lines = tuple(range(node.lineno, end + 1))
            self.delete(node)
        super().visit(node)
        self.lines = kept

    def delete(self, node: ast.stmt) -> None:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await | ast.Yield)
        if call and self.is_message(node.value):
            return
        if call or isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break):
            self.add("statement deleted", self.at(node), "pass")
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self.add("statement deleted", self.at(node), "pass")
        if isinstance(node, ast.Return) and node.value is not None and self.text(node.value) != "None":
            self.add("returns None", self.at(node.value), "None")

    def is_message(self, node: ast.AST) -> bool:
        name = getattr(node, "func", None)
        return isinstance(node, ast.Call) and getattr(name, "attr", getattr(name, "id", "")) in MESSAGES

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in SILENT:
            return
        self.names.append(node.name)
        for decorator in node.decorator_list:
            self.visit(decorator)
        body = [s for s in node.body if not is_text(s)] or node.body
        head, self.lines = self.lines, tuple(range(body[0].lineno, node.end_lineno + 1))
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        first = body[0]
        if len(body) > 1 and not isinstance(first, ast.Return | ast.Raise | ast.Nonlocal | ast.Global):
            indent = " " * first.col_offset
            begin = self.at(first)[0]
            self.lines = (first.lineno,)
            self.add("early return", (begin, begin), f"return None\n{indent}")
        self.lines = head
        for statement in body:
            self.visit(statement)
        self.names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        for statement in node.body:
            if not is_text(statement):
                self.visit(statement)
        self.names.pop()

    def visit_Expr(self, node: ast.Expr) -> None:
        if not is_text(node):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(self.text(target) in ("__all__", "__slots__") for target in node.targets):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if self.text(node.test) == "TYPE_CHECKING":
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Its text is a message."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text for people, or a key that holds no arithmetic."""

    # ---- expressions

    def negate(self, test: ast.expr) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.add("condition negated", self.at(test), f"({self.text(test.operand)})")
        else:
            self.add("condition negated", self.at(test), f"(not ({self.text(test)}))")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            old, *others = COMPARE[type(op).__name__]
            for new in others:
                self.swap("comparison", left, right, old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        union = isinstance(node.op, ast.BitOr) and self.text(node.right) == "None"
        text = any(isinstance(side, ast.JoinedStr) or is_string(side) for side in (node.left, node.right))
        if not text and not union and type(node.op).__name__ in ARITHMETIC:
            self.swap("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op).__name__])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        begin, end = self.at(node)
        values = [self.text(value) for value in node.values]
        for place in range(1, len(values)):
            sides = f" {old} ".join(f"({v})" for v in values[:place]), f" {old} ".join(f"({v})" for v in values[place:])
            self.add("and <-> or", (begin, end), f"(({sides[0]}) {new} ({sides[1]}))")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Not):
            self.add("sign or not dropped", self.at(node), f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("constant", self.at(node), str(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", self.at(node), str(node.value + 1))
            if node.value:
                self.add("constant", self.at(node), str(node.value - 1))
        elif isinstance(node.value, float):
            self.add("constant", self.at(node), repr(node.value * 2 if node.value else 1.0))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        bounds = [node.slice.lower, node.slice.upper] if isinstance(node.slice, ast.Slice) else [node.slice]
        for bound in filter(None, bounds):
            if isinstance(bound, ast.BinOp) or (isinstance(bound, ast.Name) and isinstance(node.slice, ast.Slice)):
                self.add("index", self.at(bound), f"({self.text(bound)} - 1)")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self.is_message(node):
            return
        name = getattr(node.func, "id", "")
        if name in SWAPPED:
            self.add("min <-> max", self.at(node.func), SWAPPED[name])
        for keyword in node.keywords:
            if keyword.arg and len(node.args) + len(node.keywords) > 1:
                self.drop(keyword)
        if len(node.args) > 1 and not node.keywords and not isinstance(node.args[-1], ast.Starred):
            self.drop(node.args[-1])
        self.generic_visit(node)

    def drop(self, argument: ast.AST) -> None:
        """Without an argument, and the comma before or after it."""
        begin, end = self.at(argument)
        before = self.source[:begin].rstrip()
        if before.endswith(b","):
            begin = len(before) - 1
        elif (rest := self.source[end:]).lstrip().startswith(b","):
            end += rest.index(b",") + 1
        self.add("argument dropped", (begin, end), "")


def is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and is_string(node.value)


@functools.cache
def known() -> dict[str, list[dict[str, str]]]:
    """`known.toml`."""
    return tomllib.loads((pathlib.Path(__file__).parent / "known.toml").read_text())


def listed(mutant: Mutant) -> tuple[str, str] | None:
    """(verdict, reason) of a mutant that the data know: equivalent, or of code that only a GPU executes."""
    for entry in known()["equivalent"]:
        if (entry["path"], entry["before"], entry["after"]) == (mutant.path, *mutant.changed()):
            return "equivalent", entry["why"]
    for entry in known()["device"]:
        if fnmatch.fnmatch(mutant.path, entry["path"]) and fnmatch.fnmatch(mutant.function, entry["function"]):
            return "device only", entry["why"]
    return None


def draw(seed: int, count: int, only: list[str]) -> list[Mutant]:
    """`count` mutants, each as likely as any other."""
    paths = sorted(str(p.relative_to(ROOT)) for root in SOURCES for p in (ROOT / root).rglob("*.py") if inside(p, root))
    every = [m for p in paths if not only or p.startswith(tuple(only)) for m in Sites(p, (ROOT / p).read_bytes()).found]
    print(f"{len(every)} possible mutants in {len(paths)} files", file=sys.stderr)
    random.Random(seed).shuffle(every)
    return list(itertools.islice(filter(Mutant.is_another_program, every), count))


def inside(path: pathlib.Path, root: str) -> bool:
    """Not by way of a link: rampwrap/adapters is adapters."""
    return path.resolve() == (ROOT / path.relative_to(ROOT)).absolute() and path.is_relative_to(ROOT / root)
