"""Insertions into functions of an upstream module, at places found by `ast`.

An edit names a function at module level and gives up to three texts: parameters for the end of its keyword-only section,
an entry for its docstring, a block of code for the top of its body. Whole lines are inserted and none is changed, so that no upstream
line need be stored and one edit serves every version that still has the anchors.
"""

import ast
import re
from typing import Dict, List, Optional, Tuple

from .errors import PatchError, Problems
from .text import comma_list, indented, leading_space, newline_of, split_lines

_KEYS = {"function", "parameters", "docstring_after", "docstring", "block"}
_AFTER_ARGUMENT = re.compile(rb"[ \t]*,[ \t]*(#.*)?\r?\n?\Z")

Insertions = Dict[int, List[str]]  # number of the line that the texts follow -> lines


def weave(data: bytes, edits: List[dict], name: str = "<woven>") -> bytes:
    """`data` with all `edits`. Raises PatchError where an anchor is missing or ambiguous, or a parameter exists.

    Guarantee: the result compiles, and its syntax tree without the inserted nodes is that of `data`.
    """
    text = decoded(data, name)
    lines = split_lines(text)
    tree = parsed(data, name)
    insertions: Insertions = {}
    errors: List[PatchError] = []
    for edit in edits:
        try:
            check_edit(edit, name)
            _insert_edit(tree, lines, edit, name, insertions)
        except PatchError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    woven = list(lines)
    for number in sorted(insertions, reverse=True):
        woven[number:number] = insertions[number]
    result = "".join(woven).encode("utf-8")
    _prove(data, result, edits, name)
    return result


def check_edit(edit: dict, name: str) -> None:
    """Refuse an edit that is not written as this module's first lines say."""
    unknown = sorted(set(edit) - _KEYS)
    if unknown or "function" not in edit or not set(edit) & {"parameters", "docstring", "block"}:
        raise PatchError(
            f"{name}: an edit with the keys {comma_list(sorted(edit)) or '(none)'}",
            "function and at least one of parameters, docstring (with docstring_after), block",
            "correct the edit",
        )
    function = edit["function"]
    for parameter in edit.get("parameters", []):
        _argument(parameter, name, function)
    if "docstring" in edit and not edit.get("docstring_after"):
        raise PatchError(f"{name}: {function}: docstring without docstring_after", "an anchor", "name a parameter")
    if '"""' in edit.get("docstring", "") or "'''" in edit.get("docstring", "") or "\\" in edit.get("docstring", ""):
        raise PatchError(f"{name}: {function}: quotes or a backslash in docstring", "plain text", "reword the entry")


def _insert_edit(tree: ast.Module, lines: List[str], edit: dict, name: str, insertions: Insertions) -> None:
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


def find_function(tree: ast.Module, function: str, name: str) -> ast.FunctionDef:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if len(found) != 1:
        raise PatchError(
            f"{name}: {len(found)} functions {function} at module level", "exactly one", "this version is not supported"
        )
    return found[0]


def _parameters_place(function: ast.FunctionDef, lines: List[str], edit: dict, name: str) -> Tuple[int, List[str]]:
    arguments = function.args
    names = _argument_names(arguments)
    new = [_argument(parameter, name, function.name).args.kwonlyargs[0].arg for parameter in edit["parameters"]]
    present = [argument for argument in new if argument in names]
    if present:
        raise PatchError(
            f"{name}: {function.name} already has {comma_list(present)}",
            "an unpatched function",
            "restore the file, or use this PyTorch without the patch",
        )
    if not arguments.kwonlyargs:
        raise PatchError(f"{name}: {function.name} has no keyword-only parameter", "one", "this version is not supported")
    last, default = arguments.kwonlyargs[-1], arguments.kw_defaults[-1]
    end = default if default is not None else last
    # Columns are counted in UTF-8 bytes.
    rest = lines[end.end_lineno - 1].encode("utf-8")[end.end_col_offset :]
    if not _AFTER_ARGUMENT.match(rest):
        raise PatchError(
            f"{name}: {function.name}: {rest.decode('utf-8').strip()!r} after the parameter {last.arg}",
            "a comma and the end of the line",
            "this version is not supported",
        )
    first_line = lines[last.lineno - 1]
    column, newline = leading_space(first_line), newline_of(first_line)
    return end.end_lineno, [f"{column}{parameter},{newline}" for parameter in edit["parameters"]]


def _docstring_place(function: ast.FunctionDef, lines: List[str], edit: dict, name: str) -> Tuple[int, List[str]]:
    node = _docstring(function)
    if node is None:
        raise PatchError(f"{name}: {function.name} has no docstring", "one", "this version is not supported")
    first, last = node.lineno, node.end_lineno - 1  # the lines before that of the closing quotes
    for anchor in edit["docstring_after"]:
        entry = re.compile(rf"[ \t]+{re.escape(anchor)}[ \t]*(\(|:)")
        found = [i for i in range(first, last) if entry.match(lines[i])]
        if len(found) > 1:
            raise PatchError(
                f"{name}: {function.name}: {len(found)} entries for {anchor} in the docstring",
                "one",
                "this version is not supported",
            )
        if found:
            return _entry_end(lines, found[0], last), _entry_lines(lines[found[0]], edit["docstring"])
    raise PatchError(
        f"{name}: {function.name}: no docstring entry for {comma_list(edit['docstring_after'])}",
        "an entry for one of them on lines of its own",
        "this version is not supported",
    )


def _entry_end(lines: List[str], start: int, stop: int) -> int:
    """One past the last line of the entry that begins at `start`: it owns the lines that are indented deeper."""
    column, end = len(leading_space(lines[start])), start + 1
    for i in range(start + 1, stop):
        if lines[i].strip():
            if len(leading_space(lines[i])) <= column:
                break
            end = i + 1
    return end


def _entry_lines(anchor_line: str, text: str) -> List[str]:
    return indented(text, leading_space(anchor_line), newline_of(anchor_line))


def _block_place(function: ast.FunctionDef, lines: List[str], edit: dict, name: str) -> Tuple[int, List[str]]:
    documentation = _docstring(function)
    if documentation is not None:
        before = documentation
        rest = lines[before.end_lineno - 1].encode("utf-8")[before.end_col_offset :]
        if rest.strip() and not rest.strip().startswith(b"#"):
            raise PatchError(f"{name}: {function.name}: code after the docstring", "a line end", "not supported")
        number, column_line = before.end_lineno, lines[before.lineno - 1]
    else:
        number, column_line = function.body[0].lineno - 1, lines[function.body[0].lineno - 1]
        if number < _header_end(function):
            raise PatchError(f"{name}: {function.name}: a body on the line of def", "its own line", "not supported")
    return number, indented(edit["block"], leading_space(column_line), newline_of(column_line))


def _header_end(function: ast.FunctionDef) -> int:
    ends = [function.lineno] + [node.end_lineno for node in ast.walk(function.args) if hasattr(node, "end_lineno")]
    return max(ends + ([function.returns.end_lineno] if function.returns else []))


def _docstring(function: ast.FunctionDef) -> Optional[ast.Constant]:
    statement = function.body[0]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value if isinstance(statement.value.value, str) else None
    return None


def _argument(parameter: str, name: str, function: str) -> ast.FunctionDef:
    """`parameter` as the one keyword-only argument of a function."""
    try:
        parsed = ast.parse(f"def f(*, {parameter}): pass").body[0]
        if len(parsed.args.kwonlyargs) == 1 and parsed.args.kw_defaults[0] is not None and "\n" not in parameter:
            return parsed
    except SyntaxError:
        pass
    raise PatchError(f"{name}: {function}: parameter {parameter!r}", "'name: annotation = default'", "correct the edit")


def _argument_names(arguments: ast.arguments) -> List[str]:
    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return [argument.arg for argument in every + [a for a in (arguments.vararg, arguments.kwarg) if a]]


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


def _prove(old: bytes, new: bytes, edits: List[dict], name: str) -> None:
    """Take the edits out of the new tree again; what is left must be the old tree."""
    before, after = parsed(old, name), parsed(new, name)
    compile(new, name, "exec", dont_inherit=True)
    for edit in edits:
        original = find_function(before, edit["function"], name)
        function = find_function(after, edit["function"], name)
        _take_parameters(function, len(edit.get("parameters", [])))
        if edit.get("docstring"):
            _take_entry(function, original, edit["docstring"], name)
        _take_block(function, edit.get("block", ""), name)
    if ast.dump(after) != ast.dump(before):
        raise PatchError(f"{name}: the woven file means something else", "insertions only", "report this, with the file")


def _take_parameters(function: ast.FunctionDef, count: int) -> None:
    for items in (function.args.kwonlyargs, function.args.kw_defaults):
        del items[len(items) - count :]


def _take_entry(function: ast.FunctionDef, original: ast.FunctionDef, text: str, name: str) -> None:
    old, new = _docstring(original).value.split("\n"), _docstring(function).value.split("\n")
    start = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), len(old))
    count = len(text.strip("\n").split("\n"))
    # Equal lines at the seam (an empty one, say) can shift the start; the multiset of what is left cannot.
    for first in range(start, max(start - count, -1), -1):
        if new[:first] + new[first + count :] == old:
            _docstring(function).value = "\n".join(old)
            return
    raise PatchError(f"{name}: {function.name}: the docstring lost text", "an insertion only", "report this")


def _take_block(function: ast.FunctionDef, block: str, name: str) -> None:
    try:
        statements = ast.parse(block).body
    except SyntaxError as error:
        raise PatchError(f"{name}: {function.name}: block: {error}", "complete statements", "correct the edit") from None
    start = 1 if _docstring(function) is not None else 0
    inserted = function.body[start : start + len(statements)]
    if [ast.dump(node) for node in inserted] != [ast.dump(node) for node in statements]:
        raise PatchError(
            f"{name}: {function.name}: the block changed its meaning when indented",
            "no string over several lines in a block",
            "correct the edit",
        )
    del function.body[start : start + len(statements)]
