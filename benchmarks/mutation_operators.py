"""The changes that mutation testing makes: operators, numbers, conditions, omitted calls, swapped or omitted arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator


def both_ways(pairs: str) -> dict[str, str]:
    names = pairs.split()
    return dict(zip(names[::2], names[1::2], strict=True)) | dict(zip(names[1::2], names[::2], strict=True))


OPERATORS = both_ways("Add Sub  Mult Div  Lt LtE  Gt GtE  Eq NotEq  Is IsNot  In NotIn  And Or")
OPERATORS |= {"FloorDiv": "Mult", "Pow": "Mult"}
OPPOSITES = both_ways("min max  any all  argmin argmax  zeros ones  sin cos  amin amax")
MESSAGES = {"print", "log", "log_setup", "print_plan", "warn", "write", "info", "set_postfix", "BadInput"}
SYMMETRIC = {"min", "max", "isinstance", "issubclass", "hasattr", "allclose", "equal"}


def changes(node: ast.AST, function: str = "", line: int = 0) -> Iterator[tuple[str, int, ast.expr | ast.stmt, str]]:
    """Yield (function, first line of the statement, node, replacement as source text) for every change at or below a node."""
    if isinstance(node, ast.stmt):
        line = node.lineno
    if (
        isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr)
        or isinstance(node, ast.Call)
        and name_of(node) in MESSAGES
    ):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict" and function:  # zip's, an assertion
        return
    if isinstance(node, ast.FunctionDef):
        function = f"{function}.{node.name}".lstrip(".")
    elif function and isinstance(node, ast.If) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield function, line, node.test, f"(not ({ast.unparse(node.test)}))"
    elif function and isinstance(node, ast.expr | ast.stmt):
        yield from ((function, line, node, text) for text in replacements(node))
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns", "decorator_list"):
                # defaults are computed at import: the tests that reach the body see them
                yield from changes(
                    child, function, body_line(node) if field == "args" and isinstance(node, ast.FunctionDef) else line
                )


def body_line(node: ast.FunctionDef) -> int:
    """Return the line of a function's first statement after its docstring."""
    return node.body[min(bool(ast.get_docstring(node)), len(node.body) - 1)].lineno


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def replacements(node: ast.expr | ast.stmt) -> Iterator[str]:
    def other(**fields: object) -> str:
        return f"({ast.unparse(type(node)(**{**dict(ast.iter_fields(node)), **fields}))})"

    def opposite(op: ast.AST) -> object:
        return getattr(ast, OPERATORS.get(type(op).__name__, type(op).__name__))()

    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.Compare(ops=[op]) if type(op).__name__ in OPERATORS:
            if not any(
                isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.iter_child_nodes(node)
            ):
                yield other(ops=[opposite(op)]) if isinstance(node, ast.Compare) else other(op=opposite(op))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield repr(value * 2 if isinstance(value, float) and value else value + 1)
        case ast.IfExp(test=test):
            yield other(test=ast.UnaryOp(ast.Not(), test))
        case ast.AugAssign(op=op) if type(op).__name__ in OPERATORS:
            yield other(op=opposite(op))[1:-1]
        case ast.Expr(value=ast.Call() as call) if name_of(call) not in MESSAGES:
            yield "pass"
        case ast.Call(args=args, keywords=keywords):
            alike = name_of(node) in SYMMETRIC or len({ast.unparse(arg) for arg in args[:2]}) < 2
            if not alike and not any(isinstance(arg, ast.Starred) for arg in args[:2]):
                yield other(args=[args[1], args[0], *args[2:]])
            for omitted in (keyword for keyword in keywords if keyword.arg != "strict"):
                yield other(keywords=[each for each in keywords if each is not omitted])
            if name_of(node) in OPPOSITES:
                yield re.sub(rf"\b{name_of(node)}\(", f"{OPPOSITES[name_of(node)]}(", ast.unparse(node), count=1)
