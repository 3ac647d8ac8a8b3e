"""The changes that mutation testing makes to a file, one at a time, on its syntax tree.

What only a reader sees stays as it is: annotations, decorators, docstrings, and the texts of errors and of the log.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_LOGS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Change:
    """One change. ``before`` and ``after``: the statement (of a compound one: its head); ``source``: the whole file."""

    line: int
    kind: str
    before: str
    after: str
    source: str


def changes_of(source: str) -> Iterator[Change]:
    """Every change to a file's source, in the order of its lines."""
    count = len(list(_sites(ast.parse(source))))
    found = []
    for number in range(count):
        tree = ast.parse(source)
        kind, statement, apply = list(_sites(tree))[number]
        line, before = statement.lineno, _head(statement)
        apply()
        ast.fix_missing_locations(tree)
        found.append(Change(line, kind, before, _head(statement), ast.unparse(tree)))
    return iter(sorted(found, key=lambda change: change.line))


def _head(statement: ast.stmt) -> str:
    return ast.unparse(statement).strip().split("\n", 1)[0]


Site = tuple[str, ast.stmt, Callable[[], None]]


def _sites(tree: ast.Module) -> Iterator[Site]:
    """Kind, the statement that it is in, and a function that changes the tree."""
    for statement in _statements(tree):
        for kind, apply in _of_statement(statement):
            yield kind, statement, apply
        for node in _own_nodes(statement):
            for kind, apply in _of_node(node):
                yield kind, statement, apply


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        yield from _statements(child)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that are no statements themselves, and nothing for a reader alone."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.stmt):
                continue
            if isinstance(child, (ast.Constant, ast.JoinedStr)) and (isinstance(node, ast.Expr) or _is_message(node)):
                continue
            yield child
            yield from _own_nodes(child)


def _is_message(node: ast.AST) -> bool:
    """Whether a node's texts are what a person reads: arguments of an error or of the log."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in _LOGS or name.endswith(("Error", "Exception"))


def _of_statement(statement: ast.stmt) -> Iterator[tuple[str, Callable[[], None]]]:
    """Changes to a statement as a whole."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, (ast.Constant, ast.Yield))
    if isinstance(statement, ast.Expr) and not is_text:
        yield "statement left out", _set(statement, "value", ast.Constant(None))
    if isinstance(statement, ast.Return) and getattr(statement.value, "value", ...) is not None:
        yield "returns None", _set(statement, "value", ast.Constant(None))
    if isinstance(statement, ast.Raise):
        yield "raises NameError", _set(statement, "exc", ast.Name("_not_raised", ast.Load()))
    if isinstance(statement, ast.AugAssign) and type(statement.op) in _OPERATORS:
        yield "operator", _set(statement, "op", _OPERATORS[type(statement.op)]())
    if isinstance(statement, (ast.If, ast.While)) and not _negated_elsewhere(statement.test):
        yield "condition negated", _set(statement, "test", ast.UnaryOp(ast.Not(), statement.test))


def _negated_elsewhere(test: ast.expr) -> bool:
    """Whether another of the changes is this test's negation."""
    return isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and len(test.ops) == 1)


def _of_node(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Changes to an expression, a comprehension or an argument list."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield "operator", _set(node, "op", _OPERATORS[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and, or", _set(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "minus left out", _set(node, "op", ast.UAdd())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", _replace_not(node)
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                yield "comparison", _set_item(node.ops, place, other())
    if isinstance(node, ast.IfExp) and not _negated_elsewhere(node.test):
        yield "condition negated", _set(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        for place, test in enumerate(node.ifs):
            if _negated_elsewhere(test):
                continue
            yield "condition negated", _set_item(node.ifs, place, ast.UnaryOp(ast.Not(), test))
    if isinstance(node, ast.Constant):
        yield from (("constant", _set(node, "value", other)) for other in _others(node.value))
    if isinstance(node, ast.Call):
        if len(node.args) > 1 and not any(isinstance(each, ast.Starred) for each in node.args[:2]):
            yield "arguments swapped", _set(node, "args", [node.args[1], node.args[0], *node.args[2:]])
        for place, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                rest = [each for at, each in enumerate(node.keywords) if at != place]
                yield f"argument {keyword.arg} left out", _set(node, "keywords", rest)


def _others(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [2 * value or 1.0]
    return [f"{value}x"] if isinstance(value, str) else []


def _set(node: ast.AST, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _set_item(items: list, place: int, value: object) -> Callable[[], None]:
    return lambda: items.__setitem__(place, value)


def _replace_not(node: ast.UnaryOp) -> Callable[[], None]:
    """`not x` becomes `not not x`, which is the same as leaving it out wherever a truth value is wanted."""
    return lambda: setattr(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
