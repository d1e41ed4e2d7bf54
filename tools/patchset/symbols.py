"""What the patch needs of a PyTorch beyond the lines it changes: names imported, private names, functions replaced.

Read from this project's own files, so there is no list to keep; a version that nobody tried is judged by it. What is
compiled has no source to look at: there the stubs tell, and where a stub lacks a name, the library, which holds each
name that it binds. Nothing of the PyTorch is imported: this interpreter may not be able to, and it is input.
"""

import ast
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .errors import PatchError
from .source import parsed
from .text import comma_list


UNSUPPORTED = "this version of PyTorch is not supported"
LIBRARIES = ("torch/lib/libtorch_python.so", "torch/lib/libtorch_python.dylib", "torch/lib/torch_python.dll")
OPERATORS = "aten/src/ATen/native/native_functions.yaml"  # of which a build of a checkout makes functions of torch

Read = Callable[[str], bytes | None]  # bytes of a path, None where it cannot be read
Exists = Callable[[str], bool]
Names = dict[str, set[str]]  # what each module binds that was looked at: parsing is what takes the time


class Need(NamedTuple):
    """A module of torch that a file imports, and the name it takes from it, if any."""

    module: str
    name: str | None


def needs(data: bytes, path: str) -> list[Need]:
    """What a file imports of torch, anywhere in it."""
    found = []
    for node in ast.walk(parsed(data, path)):
        if isinstance(node, ast.Import):
            found += [Need(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [Need(node.module or "", alias.name) for alias in node.names]
    return list(dict.fromkeys(need for need in found if need.module.split(".")[0] == "torch"))


def private_uses(data: bytes, path: str) -> list[str]:
    """The dotted names with a private part that a file reads as attributes, torch._C._functorch.x, by whatever name it
    has imported or assigned the first parts. What it asks of hasattr or getattr first may be absent."""
    tree = parsed(data, path)
    known: dict[str, str] = {}  # name in the file -> dotted name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or "torch": a.name if a.asname else "torch" for a in node.names if _of_torch(a.name)}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _of_torch(node.module or ""):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and (name := _dotted(node.value, known))
        ):
            known[node.targets[0].id] = name
    optional = {
        str(node.args[1].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
        if len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
    }
    chains = {_dotted(node, known): None for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [name for name in chains if any(map(_private, name.split("."))) and not set(name.split(".")) & optional]


def _of_torch(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] == "torch"


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name that attributes of a known name make; "" for anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    base = _dotted(node.value, known) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else ""


def missing(files: dict[str, bytes], later: set[str], exists: Exists, read: Read, names: Names) -> list[PatchError]:
    """What the Python files of a step need and nothing binds. `later`: files that only a later step brings."""
    errors = []
    for path, data in files.items():
        if not (path.startswith("torch/") and path.endswith(".py")):
            continue
        for need in needs(data, path):
            places = _places(need.module)
            if set(places) & later:
                found = f"{path} imports {need.module}, which a later patch brings"
                errors.append(PatchError(found, "what is there", "change the order in torch_patch/series.toml"))
            elif not _module(need.module, exists):
                errors.append(PatchError(f"{path} imports {need.module}, which is missing", "it", UNSUPPORTED))
            elif need.name is not None and not _has(need.module, need.name, exists, read, names):
                found = f"{path} imports {need.name} from {need.module}, which does not define it"
                errors.append(PatchError(found, "the definition", UNSUPPORTED))
    return errors


def missing_private(files: dict[str, bytes], exists: Exists, read: Read, names: Names) -> list[PatchError]:
    """The private names that whole files of this project use and the PyTorch does not have."""
    errors = []
    for path, data in files.items():
        if path.startswith("torch/") and path.endswith(".py"):
            lacking = dict.fromkeys(_lacking(use, exists, read, names) for use in private_uses(data, path))
            found = [f"{path} uses {name}, which is missing" for name in lacking if name]
            errors += [PatchError(text, "it", UNSUPPORTED) for text in found]
    return errors


def _places(module: str) -> list[str]:
    base = module.replace(".", "/")
    return [base + ".py", base + "/__init__.py"]


def _stubs(module: str) -> list[str]:
    base = module.replace(".", "/")
    return [base + end for end in (".pyi", "/__init__.pyi", "/__init__.pyi.in", ".pyi.in")]


def _module(name: str, exists: Exists) -> bool:
    return any(map(exists, _places(name) + (_stubs(name) if name.startswith("torch._C") else [])))


def _lacking(use: str, exists: Exists, read: Read, names: Names) -> str:
    """The module and the private name in it that is missing; "" if none is. Public names are PyTorch's promise, and
    what stands behind the name, an attribute of a class or of an object, cannot be told from here."""
    parts = use.split(".")
    module, rest = parts[0], parts[1:]
    while rest and _module(f"{module}.{rest[0]}", exists):
        module, rest = f"{module}.{rest[0]}", rest[1:]
    if rest and (_private(rest[0]) or module.startswith("torch._C")) and not _has(module, rest[0], exists, read, names):
        return f"{module}.{rest[0]}"
    return ""


def _has(module: str, name: str, exists: Exists, read: Read, names: Names) -> bool:
    if not module.startswith("torch._C"):
        if module not in names:
            data = next((data for data in map(read, _places(module)) if data is not None), None)
            names[module] = {"*"} if data is None else set(_bound(parsed(data, module).body))
        # torch/__init__.py takes over what is compiled, by a star among other ways
        if name in names[module] or ("*" in names[module] and not (module == "torch" and _private(name))):
            return True
        if _module(f"{module}.{name}", exists):
            return True
        if module != "torch":
            return False
        return any(_has(place, name, exists, read, names) for place in ("torch._C", "torch._C._VariableFunctions"))
    if _module(f"{module}.{name}", exists):
        return True
    word = re.escape(name.encode())
    # of a class, a function, a value, an import; the templates of a checkout have the same lines
    binding = rb"(?m)^[ \t]*(?:(?:def|class)[ \t]+%b\b|%b[ \t]*[:=]|.*\bimport\b.*\b%b\b)|\bas %b\b" % ((word,) * 4)
    asked = [(stub, binding) for stub in _stubs(module)]
    if module == "torch._C._VariableFunctions":  # whose template has no names; a build makes them of the operators
        asked = [("torch/_C/_VariableFunctions.pyi", binding), (OPERATORS, rb"(?m)^- func: %b[.(]" % word)]
    asked += [(library, word + rb"\0") for library in LIBRARIES]
    answers = [re.search(pattern, data) for place, pattern in asked if (data := read(place)) is not None]
    return any(answers) or not answers  # a part of a source tree, without a build, tells nothing


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
