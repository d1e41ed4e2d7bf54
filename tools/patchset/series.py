"""The series: what torch_patch/series.toml says, checked against the files it names."""

from pathlib import Path
from typing import List, NamedTuple

from . import disk, toml
from .errors import PatchError, Problems
from .text import comma_list
from .weave import check_edit

_LISTS = ("resolves", "tests", "new", "replace", "weave", "classes", "docs")
_HERE = "torch_patch/series.toml"


class Patch(NamedTuple):
    """One logical patch. Paths are upstream's: torch/..., test/..., docs/source/... (pages without their suffix)."""

    subject: str
    why: str
    resolves: List[str]
    tests: List[str]  # that show it works, as arguments of pytest
    new: List[str]  # whole files that upstream does not have
    replace: List[str]  # whole files that take the place of upstream's
    weave: List[str]  # upstream modules that receive insertions
    classes: List[str]  # test/FILE.py::Name, for upstream's test files
    docs: List[str]  # documentation pages


class Series(NamedTuple):
    folder: Path  # of this project
    oldest: str
    tested: List[str]
    patches: List[Patch]

    def source(self, path: str) -> Path:
        """The file of this project that belongs to upstream's `path`."""
        for theirs, ours in (("torch/", "torch_patch/"), ("docs/", "docs_patch/"), ("test/", "test/")):
            if path.startswith(theirs):
                return self.folder / ours / path[len(theirs) :]
        raise PatchError(f"{_HERE}: {path}", "a path in torch/, test/ or docs/", "correct it")

    def edits(self, path: str) -> List[dict]:
        """The woven edits for the module `path`."""
        source = self.source(path).with_suffix(".toml")
        edits = _parsed(source).get("edit", [])
        for edit in edits:
            check_edit(edit, str(source))
        return edits


def load_series(folder: Path) -> Series:
    """Read and check the series of the project in `folder`."""
    fields = _parsed(folder / _HERE)
    supported = fields.pop("supported", {})
    rows = fields.pop("patch", [])
    if fields or sorted(supported) != ["oldest", "tested"] or not rows:
        raise PatchError(f"{_HERE}: the keys {comma_list(sorted(fields)) or '(none)'}", "[supported] and [[patch]]", "see there")
    series = Series(folder, supported["oldest"], supported["tested"], [_patch(row) for row in rows])
    _check_files(series)
    return series


def _parsed(path: Path) -> dict:
    data = disk.read(path)
    if data is None:
        raise PatchError(f"{path} is missing", "a manifest", "restore this project's files")
    try:
        return toml.loads(data.decode("utf-8"))
    except toml.TOMLError as error:
        raise PatchError(f"{path}: {error}", "the TOML subset", "correct the manifest") from None


def _patch(row: dict) -> Patch:
    unknown = sorted(set(row) - {"subject", "why", *_LISTS})
    if unknown or not row.get("subject") or not row.get("why"):
        found = f"{_HERE}: patch {row.get('subject')!r} with unknown keys: {comma_list(unknown) or 'none'}"
        raise PatchError(found, "a subject, a reason (why) and the lists " + comma_list(_LISTS), "correct the manifest")
    return Patch(row["subject"], row["why"], *(row.get(name, []) for name in _LISTS))


def _check_files(series: Series) -> None:
    """Every file under torch_patch/ is named once, and every file named exists."""
    whole = [path for patch in series.patches for path in patch.new + patch.replace]
    woven = [path for patch in series.patches for path in patch.weave]
    named = [series.source(path) for path in whole] + [series.source(path).with_suffix(".toml") for path in woven]
    named += [series.source(entry.split("::")[0]) for patch in series.patches for entry in patch.classes]
    errors = [
        PatchError(f"{_HERE} names {file.relative_to(series.folder)}, which is missing", "every file", "add it or its line")
        for file in dict.fromkeys(named)
        if not file.is_file()
    ]
    errors += [
        PatchError(f"{_HERE} names {path} {(whole + woven).count(path)} times", "once", "keep it in one patch")
        for path in dict.fromkeys(whole + woven)
        if (whole + woven).count(path) > 1
    ]
    top = series.folder / "torch_patch"
    here = [file for kind in ("*.py", "*.toml") for file in sorted(top.rglob(kind)) if file != series.folder / _HERE]
    errors += [
        PatchError(f"{file.relative_to(series.folder)} is in no patch of {_HERE}", "every file named", "name it or delete it")
        for file in here
        if file not in named and "__pycache__" not in file.parts
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
