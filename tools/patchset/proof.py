"""Proof that woven source is the original and the insertions, nothing else: takes them out of the tree again."""

import ast
from typing import Any

from .errors import PatchError
from .source import docstring_of, find_assignment, find_function, parsed, text_of


def prove_insertions(old: bytes, new: bytes, edits: list[dict[str, Any]], name: str) -> None:
    """Raise PatchError unless `new` compiles and its tree without the nodes of `edits` is that of `old`."""
    before, after = parsed(old, name), parsed(new, name)
    compile(new, name, "exec", dont_inherit=True)
    for edit in edits:
        if "assignment" in edit:
            find_assignment(before, edit["assignment"], name)
            anchor = after.body.index(find_assignment(after, edit["assignment"], name))
            _take_statements(after.body, anchor + 1, edit["block"], f"{name}: {edit['assignment']}")
            continue
        original = find_function(before, edit["function"], name)
        function = find_function(after, edit["function"], name)
        _take_parameters(function, len(edit.get("parameters", [])))
        if edit.get("docstring"):
            _take_entry(function, original, edit["docstring"], name)
        _take_block(function, edit.get("block", ""), name)
    if ast.dump(after) != ast.dump(before):
        raise PatchError(
            f"{name}: the woven file means something else", "insertions only", "report this, with the file"
        )


def _take_parameters(function: ast.FunctionDef, count: int) -> None:
    for items in (function.args.kwonlyargs, function.args.kw_defaults):
        del items[len(items) - count :]


def _take_entry(function: ast.FunctionDef, original: ast.FunctionDef, text: str, name: str) -> None:
    node = docstring_of(function)
    assert node is not None
    old, new = text_of(docstring_of(original)).split("\n"), text_of(node).split("\n")
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    count = len(text.strip("\n").split("\n"))
    # Where the insertion begins with a line that follows it too, the first difference comes late.
    for first in range(start, max(start - count, -1), -1):
        if new[:first] + new[first + count :] == old:
            node.value = "\n".join(old)
            return
    raise PatchError(f"{name}: {function.name}: the docstring lost text", "an insertion only", "report this")


def _take_block(function: ast.FunctionDef, block: str, name: str) -> None:
    start = 1 if docstring_of(function) is not None else 0
    _take_statements(function.body, start, block, f"{name}: {function.name}")


def _take_statements(body: list[ast.stmt], start: int, block: str, place: str) -> None:
    try:
        statements = ast.parse(block).body
    except SyntaxError as error:
        raise PatchError(f"{place}: block: {error}", "complete statements", "correct the edit") from None
    inserted = body[start : start + len(statements)]
    if [ast.dump(node) for node in inserted] != [ast.dump(node) for node in statements]:
        raise PatchError(
            f"{place}: the block changed its meaning when indented",
            "no string over several lines in a block",
            "correct the edit",
        )
    del body[start : start + len(statements)]
