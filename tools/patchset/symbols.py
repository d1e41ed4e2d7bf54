"""What the patch needs of a PyTorch beyond the lines that it changes: the names it imports, the functions it replaces.

Read from this project's own files, so there is no list to keep; a version that nobody tried is judged by it.
"""

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .errors import PatchError
from .source import parsed
from .text import comma_list


UNSUPPORTED = "this version of PyTorch is not supported"

Read = Callable[[str], bytes | None]  # bytes of a path, None where it cannot be read
Exists = Callable[[str], bool]
Names = dict[str, set[str]]  # what each module binds that was looked at: parsing is what takes the time


class Need(NamedTuple):
    """A module of torch that a file imports, and the name it takes from it, if any."""

    module: str
    name: str | None


def needs(data: bytes, path: str) -> list[Need]:
    """What a file imports of torch, anywhere in it; compiled modules aside, which have no source to look at."""
    found = []
    for node in ast.walk(parsed(data, path)):
        if isinstance(node, ast.Import):
            found += [Need(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [Need(node.module or "", alias.name) for alias in node.names]
    ours = [need for need in found if need.module.split(".")[0] == "torch" and not need.module.startswith("torch._C")]
    return list(dict.fromkeys(ours))


def missing(files: dict[str, bytes], later: set[str], exists: Exists, read: Read, names: Names) -> list[PatchError]:
    """What the Python files of a step import and nothing binds. `later`: files that only a later step brings."""
    errors = []
    for path, data in files.items():
        for need in needs(data, path) if path.startswith("torch/") and path.endswith(".py") else []:
            places = _places(need.module)
            if set(places) & later:
                found = f"{path} imports {need.module}, which a later patch brings"
                errors.append(PatchError(found, "what is there", "change the order in torch_patch/series.toml"))
            elif not any(map(exists, places)):
                errors.append(PatchError(f"{path} imports {need.module}, which is missing", "it", UNSUPPORTED))
            elif need.name is not None and not _has(need, places, exists, read, names):
                found = f"{path} imports {need.name} from {need.module}, which does not define it"
                errors.append(PatchError(found, "the definition", UNSUPPORTED))
    return errors


def _places(module: str) -> list[str]:
    base = module.replace(".", "/")
    return [base + ".py", base + "/__init__.py"]


def _has(need: Need, places: list[str], exists: Exists, read: Read, names: Names) -> bool:
    if need.module not in names:
        data = next((data for data in map(read, places) if data is not None), None)
        names[need.module] = {"*"} if data is None else set(_bound(parsed(data, need.module).body))
    if need.name in names[need.module] or "*" in names[need.module]:
        return True
    return any(map(exists, _places(f"{need.module}.{need.name}")))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """The names that module-level statements bind, within their branches too."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _bound(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _bound(handler.body)


def lost(theirs: bytes, ours: bytes, path: str) -> list[PatchError]:
    """What a replaced module offers, by its __all__, and the file in its place does not: functions and parameters."""
    old, new = parsed(theirs, path), parsed(ours, path)
    offered, kept = _functions(old), _functions(new)
    errors = []
    for name in _public(old):
        if name not in set(_bound(new.body)):
            errors.append(PatchError(f"{path} defines {name}", "what this patch set knows of", UNSUPPORTED))
        elif name in offered and kept.get(name, [])[: len(offered[name])] != offered[name]:
            found = f"{path}: {name} has the parameters {comma_list(offered[name])}"
            errors.append(PatchError(found, comma_list(kept.get(name, [])) + ", or the first of them", UNSUPPORTED))
    return errors


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _functions(tree: ast.Module) -> dict[str, list[str]]:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: [argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        for node in functions
    }
