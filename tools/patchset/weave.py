"""Insertions into an upstream module, at places found by `ast`.

An edit names a function at module level and gives up to three texts: parameters for the end of its keyword-only
section, an entry for its docstring, a block of code for the top of its body. Or it names a variable that is assigned
at module level, and gives a block of code to follow the assignment. Whole lines are inserted and none is changed, so
that no upstream line need be stored and one edit serves every version that still has the anchors.
"""

import ast
import re
from typing import Any

from .errors import PatchError, raise_all
from .proof import prove_insertions
from .source import decoded, docstring_of, end_of, find_assignment, find_function, parsed
from .text import comma_list, indented, leading_space, newline_of, split_lines


_KEYS = {"function", "parameters", "docstring_after", "docstring", "block"}
_AFTER_ARGUMENT = re.compile(rb"[ \t]*,[ \t]*(#.*)?\r?\n?\Z")

_UNSUPPORTED = "this version of PyTorch is not supported"

Edit = dict[str, Any]  # one [[edit]] of a manifest
Insertions = dict[int, list[str]]  # number of the line that the texts follow -> lines


def weave(data: bytes, edits: list[Edit], name: str = "<woven>") -> bytes:
    """`data` with all `edits`. Raises PatchError where an anchor is missing or ambiguous, or a parameter exists.

    Guarantee: the result compiles, and its syntax tree without the inserted nodes is that of `data`.
    """
    text = decoded(data, name)
    lines = split_lines(text)
    tree = parsed(data, name)
    insertions: Insertions = {}
    raise_all([error for edit in edits if (error := _obstacle(tree, lines, edit, name, insertions))])
    woven = list(lines)
    for number in sorted(insertions, reverse=True):
        woven[number:number] = insertions[number]
    result = "".join(woven).encode("utf-8")
    prove_insertions(data, result, edits, name)
    return result


def _obstacle(tree: ast.Module, lines: list[str], edit: Edit, name: str, insertions: Insertions) -> PatchError | None:
    try:
        check_edit(edit, name)
        _insert_edit(tree, lines, edit, name, insertions)
    except PatchError as error:
        return error
    return None


def check_edit(edit: Edit, name: str) -> None:
    """Refuse an edit that is not written as this module's first lines say."""
    if "assignment" in edit:
        if set(edit) != {"assignment", "block"}:
            found = f"{name}: an edit with the keys {comma_list(sorted(edit))}"
            raise PatchError(found, "assignment and block", "correct the edit")
        return
    unknown = sorted(set(edit) - _KEYS)
    if unknown or "function" not in edit or not set(edit) & {"parameters", "docstring", "block"}:
        raise PatchError(
            f"{name}: an edit with the keys {comma_list(sorted(edit)) or '(none)'}",
            "function and at least one of parameters, docstring (with docstring_after), block; or assignment and block",
            "correct the edit",
        )
    function = edit["function"]
    for parameter in edit.get("parameters", []):
        _argument(parameter, name, function)
    if "docstring" in edit and not edit.get("docstring_after"):
        raise PatchError(f"{name}: {function}: docstring without docstring_after", "an anchor", "name a parameter")
    if '"""' in edit.get("docstring", "") or "'''" in edit.get("docstring", "") or "\\" in edit.get("docstring", ""):
        raise PatchError(f"{name}: {function}: quotes or a backslash in docstring", "plain text", "reword the entry")


def _insert_edit(tree: ast.Module, lines: list[str], edit: Edit, name: str, insertions: Insertions) -> None:
    if "assignment" in edit:
        number, texts = _assignment_place(tree, lines, edit, name)
        insertions.setdefault(number, []).extend(texts)
        return
    function = find_function(tree, edit["function"], name)
    places = []
    if edit.get("parameters"):
        places.append(_parameters_place(function, lines, edit, name))
    if edit.get("docstring"):
        places.append(_docstring_place(function, lines, edit, name))
    if edit.get("block"):
        places.append(_block_place(function, lines, edit, name))
    for number, texts in places:
        insertions.setdefault(number, []).extend(texts)


def _assignment_place(tree: ast.Module, lines: list[str], edit: Edit, name: str) -> tuple[int, list[str]]:
    end, column_after = end_of(find_assignment(tree, edit["assignment"], name))
    rest = lines[end - 1].encode("utf-8")[column_after:]
    if rest.strip() and not rest.strip().startswith(b"#"):
        found = f"{name}: {edit['assignment']}: {rest.decode('utf-8').strip()!r} after the assignment"
        raise PatchError(found, "the end of the line", _UNSUPPORTED)
    if not lines[end - 1].endswith("\n"):
        raise PatchError(f"{name}: no end of line after {edit['assignment']}", "one", _UNSUPPORTED)
    return end, indented(edit["block"], "", newline_of(lines[end - 1]))


def _parameters_place(function: ast.FunctionDef, lines: list[str], edit: Edit, name: str) -> tuple[int, list[str]]:
    arguments = function.args
    names = _argument_names(arguments)
    new = [_argument(parameter, name, function.name) for parameter in edit["parameters"]]
    present = [argument for argument in new if argument in names]
    if present:
        raise PatchError(
            f"{name}: {function.name} already has {comma_list(present)}",
            "an unpatched function",
            "restore the file, or use this PyTorch without the patch",
        )
    if not arguments.kwonlyargs:
        raise PatchError(f"{name}: {function.name} has no keyword-only parameter", "one", _UNSUPPORTED)
    last, default = arguments.kwonlyargs[-1], arguments.kw_defaults[-1]
    end, column_after = end_of(default if default is not None else last)
    rest = lines[end - 1].encode("utf-8")[column_after:]
    if not _AFTER_ARGUMENT.match(rest):
        raise PatchError(
            f"{name}: {function.name}: {rest.decode('utf-8').strip()!r} after the parameter {last.arg}",
            "a comma and the end of the line",
            _UNSUPPORTED,
        )
    first_line = lines[last.lineno - 1]
    column, newline = leading_space(first_line), newline_of(first_line)
    return end, [f"{column}{parameter},{newline}" for parameter in edit["parameters"]]


def _docstring_place(function: ast.FunctionDef, lines: list[str], edit: Edit, name: str) -> tuple[int, list[str]]:
    node = docstring_of(function)
    if node is None:
        raise PatchError(f"{name}: {function.name} has no docstring", "one", _UNSUPPORTED)
    first, last = node.lineno, end_of(node)[0] - 1  # the lines before that of the closing quotes
    for anchor in edit["docstring_after"]:
        entry = re.compile(rf"[ \t]+{re.escape(anchor)}[ \t]*(\(|:)")
        found = [i for i in range(first, last) if entry.match(lines[i])]
        if len(found) > 1:
            raise PatchError(
                f"{name}: {function.name}: {len(found)} entries for {anchor} in the docstring",
                "one",
                _UNSUPPORTED,
            )
        if found:
            return _entry_end(lines, found[0], last), _entry_lines(lines[found[0]], edit["docstring"])
    raise PatchError(
        f"{name}: {function.name}: no docstring entry for {comma_list(edit['docstring_after'])}",
        "an entry for one of them on lines of its own",
        _UNSUPPORTED,
    )


def _entry_end(lines: list[str], start: int, stop: int) -> int:
    """One past the last line of the entry that begins at `start`: it owns the lines that are indented deeper."""
    column, end = len(leading_space(lines[start])), start + 1
    for i in range(start + 1, stop):
        if lines[i].strip():
            if len(leading_space(lines[i])) <= column:
                break
            end = i + 1
    return end


def _entry_lines(anchor_line: str, text: str) -> list[str]:
    return indented(text, leading_space(anchor_line), newline_of(anchor_line))


def _block_place(function: ast.FunctionDef, lines: list[str], edit: Edit, name: str) -> tuple[int, list[str]]:
    documentation = docstring_of(function)
    if documentation is None:
        first = function.body[0].lineno - 1
        return first, indented(edit["block"], leading_space(lines[first]), newline_of(lines[first]))
    end, column_after = end_of(documentation)
    rest = lines[end - 1].encode("utf-8")[column_after:].strip()
    if rest and not rest.startswith(b"#"):
        raise PatchError(f"{name}: {function.name}: code on the docstring's line", "the end of the line", _UNSUPPORTED)
    line = lines[documentation.lineno - 1]
    return end, indented(edit["block"], leading_space(line), newline_of(line))


def _argument(parameter: str, name: str, function: str) -> str:
    """The name of a parameter that is written with its default."""
    try:
        definition = ast.parse(f"def f(*, {parameter}): pass").body[0]
    except SyntaxError:
        definition = ast.Pass()
    if isinstance(definition, ast.FunctionDef) and "\n" not in parameter:
        arguments = definition.args
        if len(arguments.kwonlyargs) == 1 and arguments.kw_defaults[0] is not None:
            return arguments.kwonlyargs[0].arg
    raise PatchError(f"{name}: {function}: parameter {parameter!r}", "'name: annotation = default'", "correct the edit")


def _argument_names(arguments: ast.arguments) -> list[str]:
    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return [argument.arg for argument in every + [a for a in (arguments.vararg, arguments.kwarg) if a]]
