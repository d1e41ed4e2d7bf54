"""The series: what torch_patch/series.toml says, checked against the files it names."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from . import disk
from .classes import class_names
from .errors import PatchError, raise_all
from .text import comma_list
from .weave import check_edit, Edit


if sys.version_info >= (3, 11):
    import tomllib
else:  # where pip carries the same reader
    from pip._vendor import tomli as tomllib


_LISTS = ("resolves", "new", "replace", "weave", "classes", "docs", "plan")
_HERE = "torch_patch/series.toml"


class Patch(NamedTuple):
    """One logical patch. Paths are upstream's: torch/..., test/..., docs/source/... (pages without their suffix)."""

    subject: str
    why: str
    resolves: list[int]  # upstream's issues
    new: list[str]  # whole files that upstream does not have
    replace: list[str]  # whole files that take the place of upstream's
    weave: list[str]  # upstream modules that receive insertions
    classes: list[str]  # test/FILE.py::Name: its tests, for upstream's test files
    docs: list[str]  # documentation: pages without their suffix, other files with it
    plan: list[str]  # further lines of the test plan


class Cover(NamedTuple):
    """The letter that goes with an export."""

    subject: str
    text: str


class Series(NamedTuple):
    folder: Path  # of this project
    cover: Cover
    oldest: str
    tested: list[str]  # versions that the tests ran on
    patched: list[str]  # versions that were patched, verified and reverted, but not run
    patches: list[Patch]

    @property
    def paths(self) -> set[str]:
        """Every file that the series writes; a page in either markup."""
        found = {path for patch in self.patches for path in (*patch.new, *patch.replace, *patch.weave)}
        found |= {entry.split("::")[0] for patch in self.patches for entry in patch.classes}
        pages = [page for patch in self.patches for page in patch.docs]
        return found | {page + suffix for page in pages for suffix in ("", ".md", ".rst")}

    def source(self, path: str) -> Path:
        """The file of this project that belongs to upstream's `path`."""
        for theirs, ours in (("torch/", "torch_patch/"), ("docs/", "docs_patch/"), ("test/", "test/")):
            if path.startswith(theirs):
                return self.folder / ours / path[len(theirs) :]
        raise PatchError(f"{_HERE}: {path}", "a path in torch/, test/ or docs/", "correct it")

    def edits(self, path: str) -> list[Edit]:
        """The woven edits for the module `path`."""
        source = self.source(path).with_suffix(".toml")
        edits: list[Edit] = parsed(source).get("edit", [])
        for edit in edits:
            check_edit(edit, str(source))
        return edits


def load_series(folder: Path) -> Series:
    """Read and check the series of the project in `folder`."""
    fields = parsed(folder / _HERE)
    supported = fields.pop("supported", {})
    cover = fields.pop("cover", {})
    rows = fields.pop("patch", [])
    if (
        fields
        or sorted(supported) != ["oldest", "patched", "tested"]
        or sorted(cover) != ["subject", "text"]
        or not rows
    ):
        found = f"{_HERE}: the keys {comma_list(sorted(fields)) or '(none)'} beside [supported], [cover] and [[patch]]"
        raise PatchError(found, "oldest, tested and patched, subject and text, and patches", "see its first lines")
    patches = [_patch(row) for row in rows]
    series = Series(folder, Cover(**cover), patches=patches, **supported)
    _check_files(series)
    return series


def parsed(path: Path) -> dict[str, Any]:
    """A TOML file."""
    data = disk.read(path)
    if data is None:
        raise PatchError(f"{path} is missing", "a manifest", "restore this project's files")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise PatchError(f"{path}: {error}", "TOML", "correct the manifest") from None


def _patch(row: dict[str, Any]) -> Patch:
    unknown = sorted(set(row) - {"subject", "why", *_LISTS})
    if unknown or not row.get("subject") or not row.get("why"):
        found = f"{_HERE}: patch {row.get('subject')!r} with unknown keys: {comma_list(unknown) or 'none'}"
        raise PatchError(found, "a subject, a reason (why) and the lists " + comma_list(_LISTS), "correct the manifest")
    if not row.get("classes") and not row.get("plan"):
        found = f"{_HERE}: patch {row['subject']!r} with neither classes nor plan"
        raise PatchError(found, "a test plan", "name its test classes, or how it is checked")
    return Patch(row["subject"], row["why"], *(row.get(name, []) for name in _LISTS))


def _check_files(series: Series) -> None:
    """Every file under torch_patch/ is named once, and every file named exists."""
    whole = [path for patch in series.patches for path in patch.new + patch.replace]
    woven = [path for patch in series.patches for path in patch.weave]
    errors = [
        PatchError(f"{_HERE} names {path} {(whole + woven).count(path)} times", "once", "keep it in one patch")
        for path in dict.fromkeys(whole + woven)
        if (whole + woven).count(path) > 1
    ]
    top = series.folder / "torch_patch"
    found = {file for kind in ("*.py", "*.toml") for file in top.rglob(kind)} - {series.folder / _HERE}
    named = {series.source(path) for path in whole} | {series.source(path).with_suffix(".toml") for path in woven}
    errors += _compared(*(sorted(f.relative_to(series.folder).as_posix() for f in files) for files in (named, found)))
    raise_all(errors)


def check_classes(series: Series) -> None:
    """What a checkout needs and an installed torch does not: every class of the test files that the series names is
    named, and exists; so is every file of the documentation."""
    pages = [page for patch in series.patches for page in patch.docs]
    top = series.folder / "docs_patch"
    files = {f"docs/{file.relative_to(top).as_posix()}" for file in top.rglob("*") if is_source(file)}
    found = {name if name in pages else name.removesuffix(Path(name).suffix) for name in files}
    errors = _compared(sorted(pages), sorted(found))
    entries = [entry for patch in series.patches for entry in patch.classes]
    for path in dict.fromkeys(entry.split("::")[0] for entry in entries):
        data = disk.read(series.source(path))
        classes = [] if data is None else class_names(data, path)
        errors += _compared(
            [entry for entry in entries if entry.startswith(path + "::")], [f"{path}::{c}" for c in classes]
        )
    raise_all(errors)


def is_source(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _compared(named: list[str], found: list[str]) -> list[PatchError]:
    missing = [name for name in named if name not in found]
    unnamed = [name for name in found if name not in named]
    return [
        PatchError(f"{_HERE} names {n}, which is missing", "what it names", "add it or drop its line") for n in missing
    ] + [PatchError(f"{n} is in no patch of {_HERE}", "everything named", "name it or delete it") for n in unnamed]
