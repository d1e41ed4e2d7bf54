"""Test classes of this project inserted into an upstream test file, before its `if __name__ == "__main__":`.

Named definitions travel with the imports they use (where upstream's file lacks them) and with the module-level calls
that mention them. Nothing else travels: a definition that needs a helper must have it named as well.
"""

import ast
import builtins
import sys
from collections.abc import Iterable, Sequence

from .errors import PatchError
from .source import decoded, end_of, parsed
from .text import comma_list, newline_of, split_lines


def insert_classes(
    theirs: bytes, ours: bytes, names: list[str], name: str = "<test>", earlier: Sequence[str] = ()
) -> bytes:
    """`theirs`, which has the definitions `earlier` of `ours` already, with `names` too. Raises PatchError on a clash
    of names or an unmet need."""
    upstream, own = parsed(theirs, name), parsed(ours, name)
    lines = split_lines(decoded(theirs, name))
    place = _main_line(upstream, name)
    newline = newline_of(lines[place])
    selected = _selected(own, names, name)
    imports = _needed_imports(upstream, own, selected, names, name, earlier)
    own_lines = split_lines(decoded(ours, name).replace("\r\n", "\n"))
    groups = [[node for node in imports if _is_standard(node) == kind] for kind in (True, False)]
    lines_of = ["\n".join(ast.unparse(node) for node in group) for group in groups if group]
    texts = ["\n\n".join(lines_of)] if imports else []
    texts += [_text(own_lines, node) for node in selected]
    blank = next((n for n in (0, 1) if lines[:place] and lines[place - 1 - n].strip()), 2)  # lines above, up to 2
    inserted = "\n" * (2 - blank) + "\n\n\n".join(texts) + "\n\n\n"
    result = "".join(lines[:place] + [inserted.replace("\n", newline)] + lines[place:]).encode("utf-8")
    _prove(upstream, parsed(result, name), place, inserted.count("\n"), name)
    return result


def part_of(ours: bytes, names: list[str], name: str = "<test>") -> bytes:
    """The test file `ours` reduced to the classes `names` and to what these use; whole where it names every class."""
    tree = parsed(ours, name)
    if set(class_names(ours, name)) <= set(names):
        return ours
    kept = _closure(tree, names)
    lines, chosen, start = split_lines(decoded(ours, name)), [], 0
    blank: list[str] = []  # lines above what is left out
    for node in tree.body:
        first, end = node.lineno - 1, end_of(node)[0]
        above, text = lines[start:first], lines[first:end]
        start = end
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            used = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in kept]
            if used and used != node.names:
                node.names = used
                text = [ast.unparse(node) + "\n"]
        if _stays(node, kept, names):
            chosen += (above if "".join(above).strip() else max(blank, above, key=len)) + text
            blank = []
        elif not "".join(above).strip():
            blank = max(blank, above, key=len)
    return "".join(chosen).encode("utf-8")


def _closure(tree: ast.Module, names: list[str]) -> set[str]:
    """`names`, what the file always needs, and what these use of its own definitions and imports."""
    own, kept = _bound(tree.body), set(names)
    kept |= _used([node for node in tree.body if not _bound([node]) and not _is_call(node)])
    while more := _used([node for node in tree.body if _defines(node, kept) or _calls_with(node, names)]) & own - kept:
        kept |= more
    return kept


def _stays(node: ast.stmt, kept: set[str], names: list[str]) -> bool:
    if _is_call(node):
        return _calls_with(node, names)
    bound = _bound([node])
    return not bound or bool(bound & kept)


def class_names(data: bytes, name: str) -> list[str]:
    """The classes at module level of a test file, in order."""
    return [node.name for node in parsed(data, name).body if isinstance(node, ast.ClassDef)]


def _main_line(tree: ast.Module, name: str) -> int:
    wanted = ast.dump(ast.parse("__name__ == '__main__'", mode="eval").body)
    found = [node for node in tree.body if isinstance(node, ast.If) and ast.dump(node.test) == wanted]
    if len(found) != 1:
        raise PatchError(
            f"{name}: {len(found)} times if __name__ == '__main__'", "once", "this version of PyTorch is not supported"
        )
    return found[0].lineno - 1


def _selected(own: ast.Module, names: list[str], name: str) -> list[ast.stmt]:
    missing = [wanted for wanted in names if wanted not in _bound(own.body)]
    if missing:
        raise PatchError(
            f"{name}: no {comma_list(missing)} in this project's file", "its definition", "correct series.toml"
        )
    return [node for node in own.body if _defines(node, names) or _calls_with(node, names)]


def _defines(node: ast.stmt, names: Iterable[str]) -> bool:
    return not isinstance(node, (ast.Import, ast.ImportFrom)) and bool(_bound([node]) & set(names))


def _is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _calls_with(node: ast.stmt, names: Iterable[str]) -> bool:
    return _is_call(node) and bool(_used([node]) & set(names))


def _needed_imports(
    upstream: ast.Module,
    own: ast.Module,
    selected: list[ast.stmt],
    names: list[str],
    name: str,
    earlier: Sequence[str],
) -> list[ast.stmt]:
    theirs, there = _imports(upstream), _bound(upstream.body)
    clash = sorted(there & set(names))
    if clash:
        raise PatchError(f"{name} already defines {comma_list(clash)}", "an unpatched file", "restore the file")
    used = _used(selected) - _stored(selected) - set(dir(builtins))
    unnamed = sorted(used & _bound(own.body) - set(_imports(own)) - set(names) - set(earlier))
    if unnamed:
        raise PatchError(
            f"{name}: {comma_list(names)} need {comma_list(unnamed)}", "it named too", "add it to series.toml"
        )
    needed = []
    for bound, nodes in _imports(own).items():
        if bound in used and bound in there:
            if {_origin(node) for node in theirs.get(bound, [])} != {_origin(node) for node in nodes}:
                found = f"{name} binds {bound} otherwise than by {ast.unparse(nodes[0])}"
                raise PatchError(
                    found, "the same import", "import it in the class's own methods, or under another name"
                )
        elif bound in used:
            needed += nodes
    return needed


def _imports(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """Each name that module-level imports bind -> imports of this name alone."""
    found: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found.setdefault(bound, []).append(ast.Import([ast.alias(alias.name, alias.asname)]))
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                one = ast.ImportFrom(node.module, [ast.alias(alias.name, alias.asname)], node.level)
                found.setdefault(alias.asname or alias.name, []).append(one)
    return found


def _origin(node: ast.stmt) -> str:
    """What an import of one name binds it to: `import a.b` binds the name a to the package a."""
    if isinstance(node, ast.Import):
        return node.names[0].name if node.names[0].asname else node.names[0].name.split(".")[0]
    assert isinstance(node, ast.ImportFrom)
    return "." * node.level + f"{node.module or ''}.{node.names[0].name}"


def _is_standard(node: ast.stmt) -> bool:
    """Whether an import is of the standard library, which stands in a group of its own."""
    return _origin(node).lstrip(".").split(".")[0] in sys.stdlib_module_names


def _bound(body: list[ast.stmt]) -> set[str]:
    names = set(_imports(ast.Module(body, [])))
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            names |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


def _used(nodes: list[ast.stmt]) -> set[str]:
    every = (part for node in nodes for part in ast.walk(node))
    return {part.id for part in every if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def _stored(nodes: list[ast.stmt]) -> set[str]:
    names = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
                names.add(part.id)
            elif isinstance(part, ast.arg):
                names.add(part.arg)
            elif isinstance(part, ast.alias):
                names.add(part.asname or part.name.split(".")[0])
    return names


def _text(lines: list[str], node: ast.stmt) -> str:
    """The lines of `node`, with its decorators and the comment right above it."""
    decorators = getattr(node, "decorator_list", [])
    start = min([node.lineno] + [part.lineno for part in decorators]) - 1
    while start > 0 and lines[start - 1].startswith("#"):
        start -= 1
    return "".join(lines[start : node.end_lineno]).rstrip("\n")


def _prove(upstream: ast.Module, result: ast.Module, place: int, added: int, name: str) -> None:
    """Upstream's statements lie in `result` on the lines they had, or `added` lines below from line `place` on.

    Whole lines went in between two statements, so equal positions are equal statements; comparing the trees of files
    of ten thousand lines would take seconds.
    """
    wanted = [_moved(node, added if node.lineno > place else 0) for node in upstream.body]
    found = [_moved(node, 0) for node in result.body if not place < node.lineno <= place + added]
    if found != wanted:
        raise PatchError(f"{name}: the result means something else", "insertions only", "report this, with the file")


def _moved(node: ast.stmt, by: int) -> tuple[type, int, int]:
    return type(node), node.lineno + by, end_of(node)[0] + by
