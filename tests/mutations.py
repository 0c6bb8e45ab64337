"""Mutations: every one-line change of a module that its tests ought to notice, found on its syntax tree.

A mutation replaces a part of one line and leaves all else as it stands. The kinds: a comparison, an arithmetic or a
boolean operator becomes its neighbour; `not` goes; a condition or a boolean result is negated; an optional result is
None; a number or a bool changes; a call made for its effect, or an assignment in place, is deleted; a keyword argument
goes; min is max; the end of a slice moves by one; break is continue.

Passed over, for no test should notice: strings, annotations, decorators, assertions (`strict` of `zip` is one), what is
raised and its message, logging, `__repr__` and `__str__`, `if TYPE_CHECKING`. Outside functions only numbers and bools
change: other mutations there break the import, which no test needs to notice.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

COMPARISONS = {
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")},
    **{ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
}
OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//")},
}
BOOLEANS = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
EXTREMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "minimum": "maximum", "maximum": "minimum"}
LOGGING = ("logger", "logging", "warnings")
# `not (a == b)` is `a != b`: one mutation, not two.
NEGATIONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)


@dataclass(frozen=True)
class Mutation:
    """Bytes `start` to `end` of a line (numbered from 1) become `text`; `before` and `after` are the line, stripped."""

    line: int
    start: int
    end: int
    text: str
    kind: str
    before: str
    after: str

    def apply(self, source: str) -> str:
        lines = source.split("\n")
        old = lines[self.line - 1].encode()
        lines[self.line - 1] = (old[: self.start] + self.text.encode() + old[self.end :]).decode()
        return "\n".join(lines)


def mutations(source: str) -> list[Mutation]:
    """Every mutation of a module, in the order of its lines; each compiles, and no two give the same line."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    found = {(m.line, m.after): m for m in reversed(finder.found) if _compiles(m.apply(source))}
    return sorted(found.values(), key=lambda m: (m.line, m.start, m.kind, m.after))


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def slots(available: Mapping[str, int], count: int, seed: int) -> list[str]:
    """The module of each of `count` mutations: round after round one of each, in an order that the seed decides.

    `available` says how many mutations a module has; fewer are returned where there are fewer.
    """
    order = sorted(path for path in available if available[path])
    random.Random(seed).shuffle(order)
    found: list[str] = []
    taken = 0
    while len(found) < count and (order := [path for path in order if available[path] > taken]):
        found += order[: count - len(found)]
        taken += 1
    return found


def draw(found: Sequence[Mutation], seed: str) -> Iterator[Mutation]:
    """Every mutation of a module once, in an order that the seed decides and in which its kinds are equally likely."""
    dice = random.Random(seed)
    kinds = defaultdict(list)
    for mutation in found:
        kinds[mutation.kind].append(mutation)
    while kinds:
        kind = dice.choice(sorted(kinds))
        yield kinds[kind].pop(dice.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.lines = [line.encode() for line in source.split("\n")]
        self.found: list[Mutation] = []
        self.results: list[str] = []  # annotated results of the functions around a node, outermost first

    def add(self, kind: str, line: int, start: int, end: int, text: str) -> None:
        if self.results or kind == "constant":
            old = self.lines[line - 1]
            new = old[:start] + text.encode() + old[end:]
            before, after = old.decode().strip(), new.decode().strip()
            self.found.append(Mutation(line, start, end, text, kind, before, after or "(nothing)"))

    def replace(self, kind: str, node: ast.expr | ast.stmt | ast.keyword, text: str) -> None:
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            self.add(kind, node.lineno, node.col_offset, node.end_col_offset, text)

    def wrap(self, kind: str, node: ast.expr, before: str, after: str) -> None:
        if node.lineno == node.end_lineno:
            text = self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
            self.replace(kind, node, f"{before}{text}{after}")

    def between(self, kind: str, left: ast.expr, right: ast.expr, words: tuple[str, str] | None) -> None:
        """Replace the operator between two operands that stand on its line."""
        if words is None or left.end_lineno != right.lineno or left.end_col_offset is None:
            return
        gap = self.lines[right.lineno - 1][left.end_col_offset : right.col_offset]
        at = gap.find(words[0].encode())
        if at >= 0:
            start = left.end_col_offset + at
            self.add(kind, right.lineno, start, start + len(words[0]), words[1])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        self.results.append(ast.unparse(node.returns) if node.returns else "")
        for part in (*node.args.defaults, *node.args.kw_defaults, *node.body):
            if part is not None:
                self.visit(part)
        self.results.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def passed_over(self, node: ast.AST) -> None:
        """Nothing in it is changed."""

    visit_Import = visit_ImportFrom = visit_Assert = visit_Raise = visit_JoinedStr = passed_over

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test) and "__name__" not in ast.unparse(node.test):
            self.condition(node)

    def condition(self, node: ast.If | ast.While | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Constant) and not _negated_elsewhere(node.test):
            self.wrap("condition", node.test, "not (", ")")
        self.generic_visit(node)

    visit_While = visit_IfExp = condition

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.between("comparison", left, right, COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("boolean", left, right, BOOLEANS[type(node.op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not isinstance(node.left, ast.JoinedStr) and not _is_text(node.left) and not _is_text(node.right):
            self.between("arithmetic", node.left, node.right, OPERATORS.get(type(node.op)))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not) and node.lineno == node.end_lineno:
            self.add("not removed", node.lineno, node.col_offset, node.operand.col_offset, "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", node, str(not value))
        elif isinstance(value, int | float):
            new = 1 - value if value in (0, 1) else value + 1 if isinstance(value, int) else 2 * value
            self.replace("constant", node, repr(new))

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            if self.results[-1] == "bool" and not _negated_elsewhere(node.value):
                self.wrap("result", node.value, "not (", ")")
            elif "None" in self.results[-1].split(" | "):
                self.replace("result", node.value, "None")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and not _is_logging(node.value):
            self.replace("deleted", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace("deleted", node, "pass")
        if words := OPERATORS.get(type(node.op)):
            self.between("arithmetic", node.target, node.value, (f"{words[0]}=", f"{words[1]}="))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_logging(node):
            return
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in EXTREMES and node.func.end_lineno is not None and node.func.end_col_offset is not None:
            end = node.func.end_col_offset
            self.add("min and max", node.func.end_lineno, end - len(name), end, EXTREMES[name])
        keywords = [keyword for keyword in node.keywords if (name, keyword.arg) != ("zip", "strict")]
        for keyword in keywords:
            if keyword.arg is not None and keyword.lineno == keyword.end_lineno:
                self.drop(keyword)
        for part in (node.func, *node.args, *keywords):
            self.visit(part)

    def drop(self, keyword: ast.keyword) -> None:
        line, start, end = self.lines[keyword.lineno - 1], keyword.col_offset, keyword.end_col_offset or 0
        rest, head = line[end:].lstrip(), line[:start].rstrip()
        if rest.startswith(b","):
            end = len(line) - len(rest[1:].lstrip())
        elif head.endswith(b","):
            start = len(head) - 1
        self.add("argument dropped", keyword.lineno, start, end, "")

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self.wrap("slice", bound, "(", ") + 1")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace("loop", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace("loop", node, "break")


def _negated_elsewhere(node: ast.expr) -> bool:
    """Whether another mutation already negates it: the comparison's own, or that `not` goes."""
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and isinstance(node.ops[0], NEGATIONS)
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_logging(node: ast.Call) -> bool:
    function = ast.unparse(node.func)
    return function.partition(".")[0] in LOGGING or function == "super().__init__"
