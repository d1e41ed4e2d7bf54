"""Upstream source text as a syntax tree whose positions can be used on its lines."""

import ast

from .errors import PatchError


def decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PatchError(f"{name}: {error}", "UTF-8", "restore the file") from None
    if "\r" in text.replace("\r\n", "\n"):
        raise PatchError(f"{name}: a carriage return within a line", "line ends \\n or \\r\\n", "restore the file")
    return text


def parsed(data: bytes, name: str) -> ast.Module:
    try:
        return ast.parse(data, filename=name)
    except SyntaxError as error:
        raise PatchError(f"{name}: {error}", "Python", "run with the interpreter that runs this PyTorch") from None


def find_function(tree: ast.Module, function: str, name: str) -> ast.FunctionDef:
    """The one function of this name at module level."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if len(found) != 1:
        raise PatchError(
            f"{name}: {len(found)} functions {function} at module level",
            "exactly one",
            "this version of PyTorch is not supported",
        )
    return found[0]


def find_assignment(tree: ast.Module, variable: str, name: str) -> ast.stmt:
    """The one statement at module level that assigns to this variable alone, annotated or not."""
    found: list[ast.stmt] = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value is not None else targets
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == variable:
            found.append(node)
    if len(found) != 1:
        raise PatchError(
            f"{name}: {len(found)} assignments to {variable} at module level",
            "exactly one",
            "this version of PyTorch is not supported",
        )
    return found[0]


def docstring_of(function: ast.FunctionDef) -> ast.Constant | None:
    """The node of the docstring, if the function has one."""
    statement = function.body[0]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value if isinstance(statement.value.value, str) else None
    return None


def text_of(docstring: ast.Constant | None) -> str:
    """The text of a docstring that is there."""
    assert docstring is not None
    assert isinstance(docstring.value, str)
    return docstring.value


def end_of(node: ast.expr | ast.arg | ast.stmt) -> tuple[int, int]:
    """Number of the last line of `node` and the column after it, which counts UTF-8 bytes."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset
