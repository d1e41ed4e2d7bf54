"""Test classes of this project inserted into an upstream test file, before its `if __name__ == "__main__":`.

Named definitions travel with the imports they use (where upstream's file lacks them) and with the module-level calls that mention
them. Nothing else travels: a definition that needs a helper must have it named as well.
"""

import ast
import builtins
from typing import Dict, Iterable, List, Set

from .errors import PatchError
from .text import comma_list, newline_of, split_lines
from .weave import decoded, parsed


def insert_classes(theirs: bytes, ours: bytes, names: List[str], name: str = "<test>") -> bytes:
    """`theirs` with the definitions `names` of `ours`. Raises PatchError on a clash of names or an unmet need."""
    upstream, own = parsed(theirs, name), parsed(ours, name)
    lines = split_lines(decoded(theirs, name))
    place = _main_line(upstream, name)
    newline = newline_of(lines[place])
    selected = _selected(own, names, name)
    imports = _needed_imports(upstream, own, selected, names, name)
    own_lines = split_lines(decoded(ours, name).replace("\r\n", "\n"))
    texts = ["\n".join(ast.unparse(node) for node in imports)] if imports else []
    texts += [_text(own_lines, node) for node in selected]
    inserted = "\n\n\n".join(texts) + "\n\n\n"
    result = "".join(lines[:place] + [inserted.replace("\n", newline)] + lines[place:]).encode("utf-8")
    _prove(upstream, parsed(result, name), len(imports) + len(selected), name)
    return result


def _main_line(tree: ast.Module, name: str) -> int:
    wanted = ast.dump(ast.parse("__name__ == '__main__'", mode="eval").body)
    found = [node for node in tree.body if isinstance(node, ast.If) and ast.dump(node.test) == wanted]
    if len(found) != 1:
        raise PatchError(f"{name}: {len(found)} times if __name__ == '__main__'", "once", "this version is not supported")
    return found[0].lineno - 1


def _selected(own: ast.Module, names: List[str], name: str) -> List[ast.stmt]:
    missing = [wanted for wanted in names if wanted not in _bound(own.body)]
    if missing:
        raise PatchError(f"{name}: no {comma_list(missing)} in this project's file", "its definition", "correct series.toml")
    return [node for node in own.body if _defines(node, names) or _calls_with(node, names)]


def _defines(node: ast.stmt, names: Iterable[str]) -> bool:
    return not isinstance(node, (ast.Import, ast.ImportFrom)) and bool(_bound([node]) & set(names))


def _calls_with(node: ast.stmt, names: Iterable[str]) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and bool(_used([node]) & set(names))


def _needed_imports(
    upstream: ast.Module, own: ast.Module, selected: List[ast.stmt], names: List[str], name: str
) -> List[ast.stmt]:
    theirs, there = _imports(upstream), _bound(upstream.body)
    clash = sorted(there & set(names))
    if clash:
        raise PatchError(f"{name} already defines {comma_list(clash)}", "an unpatched file", "restore the file")
    used = _used(selected) - _stored(selected) - set(dir(builtins))
    unnamed = sorted(used & _bound(own.body) - set(_imports(own)) - set(names))
    if unnamed:
        raise PatchError(f"{name}: {comma_list(names)} need {comma_list(unnamed)}", "it named too", "add it to series.toml")
    needed = {bound: node for bound, node in _imports(own).items() if bound in used}
    for bound, node in needed.items():
        if bound in there and ast.dump(theirs.get(bound, ast.Pass())) != ast.dump(node):
            found = f"{name} binds {bound} otherwise than by {ast.unparse(node)}"
            raise PatchError(found, "the same import", "import it in the class's own methods, or under another name")
    return [node for bound, node in needed.items() if bound not in there]


def _imports(tree: ast.Module) -> Dict[str, ast.stmt]:
    """Each name a module-level import binds -> an import of this name alone."""
    found: Dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            for alias in node.names:
                bound = alias.asname or (alias.name.split(".")[0] if isinstance(node, ast.Import) else alias.name)
                if isinstance(node, ast.Import):
                    found[bound] = ast.Import([ast.alias(alias.name, alias.asname)])
                else:
                    found[bound] = ast.ImportFrom(node.module, [ast.alias(alias.name, alias.asname)], node.level)
    return found


def _bound(body: List[ast.stmt]) -> Set[str]:
    names = set(_imports(ast.Module(body, [])))
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return names


def _used(nodes: List[ast.stmt]) -> Set[str]:
    every = (part for node in nodes for part in ast.walk(node))
    return {part.id for part in every if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def _stored(nodes: List[ast.stmt]) -> Set[str]:
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


def _text(lines: List[str], node: ast.stmt) -> str:
    """The lines of `node`, with its decorators and the comment right above it."""
    decorators = getattr(node, "decorator_list", [])
    start = min([node.lineno] + [part.lineno for part in decorators]) - 1
    while start > 0 and lines[start - 1].startswith("#"):
        start -= 1
    return "".join(lines[start : node.end_lineno]).rstrip("\n")


def _prove(upstream: ast.Module, result: ast.Module, count: int, name: str) -> None:
    """Without the `count` statements before the main block, `result` must be upstream's tree."""
    start = next(i for i, node in enumerate(result.body) if node.lineno - 1 == _main_line(result, name)) - count
    del result.body[start : start + count]
    if ast.dump(result) != ast.dump(upstream):
        raise PatchError(f"{name}: the result means something else", "insertions only", "report this, with the file")
