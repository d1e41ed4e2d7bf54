"""What the series does to one PyTorch: every new content computed and checked, nothing written."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import disk
from .classes import insert_classes, part_of
from .disk import FileState
from .errors import PatchError, raise_all
from .record import Record
from .series import check_classes, Patch, Series
from .store import Step, Store, Transaction
from .symbols import lost, missing, missing_private, Names
from .target import Target, version_numbers
from .text import comma_list, sha256
from .weave import weave


Original = Callable[[str], tuple[FileState | None, bytes | None]]


class Stage(NamedTuple):
    """One patch of the series and the whole contents of the files that it changes."""

    patch: Patch
    files: dict[str, bytes]


class Plan(NamedTuple):
    transaction: Transaction
    contents: dict[str, bytes]  # by sha256: before and after
    caution: str | None  # what to say of a version that the tests did not run on


def make_plan(series: Series, target: Target, original: Original, created: Sequence[str] = ()) -> Plan:
    """The transaction that patches `target`; `original` gives the unpatched state and bytes of a path, `created` the
    folders that an earlier patch made.

    Raises PatchError with everything that stands in the way: a version too old, a file that is not as installed, a
    new file that exists, an anchor that is missing.
    """
    planner, _ = _staged(series, target, original, created)
    transaction = planner.transaction()
    for step in transaction.steps:
        if step.before is not None and step.before.mode > 0o777:
            raise PatchError(
                f"{step.path} has mode {step.before.mode:o}", "a plain file", "take the extra bits with chmod"
            )
    return Plan(transaction, planner.contents, _caution(series, target.version))


def _caution(series: Series, version: str) -> str | None:
    tested, patched = ([version_numbers(v) for v in versions] for versions in (series.tested, series.patched))
    if version_numbers(version) in tested:
        return None
    ran = f"the tests ran on {comma_list(series.tested)}"
    if version_numbers(version) in patched:
        return f"not run: {version} was patched, verified and reverted, but {ran}"
    return f"untested: {version} has every anchor and every name that is needed, but {ran}"


def make_stages(series: Series, target: Target, original: Original) -> list[Stage]:
    """The series one patch at a time; raises as make_plan does."""
    return _staged(series, target, original, ())[1]


def _staged(
    series: Series, target: Target, original: Original, created: Sequence[str]
) -> tuple["_Planner", list[Stage]]:
    if version_numbers(target.version) < version_numbers(series.oldest):
        raise PatchError(f"{target}", f"version {series.oldest} or newer", "patch a newer PyTorch")
    if target.is_checkout:
        check_classes(series)
    planner, stages = _Planner(series, target, original, created), []
    before: dict[str, bytes] = {}
    for patch in series.patches:
        planner.add(patch)
        after = planner.files()
        stages.append(Stage(patch, {path: data for path, data in after.items() if before.get(path) != data}))
        before = after
    later: set[str] = set()
    names: Names = {}
    for stage in reversed(stages):
        planner.errors += missing(stage.files, later, planner.exists, planner.read, names)
        later |= {path for path in stage.files if original(path)[0] is None}
    ours = planner.groups["new"] | planner.groups["replace"]
    planner.errors += missing_private(ours, planner.exists, functools.cache(planner.read), names)
    raise_all(planner.errors)
    return planner, stages


class _Planner:
    def __init__(self, series: Series, target: Target, original: Original, created: Sequence[str]) -> None:
        self.series, self.target, self.original, self.created = series, target, original, created
        self.groups: dict[str, dict[str, bytes]] = {"record": {}, "new": {}, "replace": {}, "weave": {}}
        self.contents: dict[str, bytes] = {}
        self.classes: dict[str, list[str]] = {}  # named so far, by test file
        self.errors: list[PatchError] = []
        self.record = Record(original(target.record)[1] or b"") if target.record else None

    def add(self, patch: Patch) -> None:
        for path in patch.new:
            self.attempt(self.new, path)
        for path in patch.replace:
            self.attempt(self.replace, path)
        for path in patch.weave:
            self.attempt(self.woven, path)
        if self.target.is_checkout:  # an installed wheel has neither tests nor documentation
            for path in dict.fromkeys(entry.split("::")[0] for entry in patch.classes):
                names = [name for file, name in (entry.split("::") for entry in patch.classes) if file == path]
                self.attempt(self.test_classes, path, names)
            for page in patch.docs:
                self.attempt(self.page, page)

    def attempt(self, operation: Callable[..., None], *arguments: object) -> None:
        try:
            operation(*arguments)
        except PatchError as error:
            self.errors.append(error)

    # --- operations

    def new(self, path: str) -> None:
        if self.original(path)[0] is not None or (self.record and path in self.record):
            raise PatchError(
                f"{path} is already there", "a PyTorch without it", f"move it away, or {self.target.restore}"
            )
        self.groups["new"][path] = self.series.source(path).read_bytes()

    def replace(self, path: str) -> None:
        ours = self.series.source(path).read_bytes()
        raise_all(lost(self.pristine(path), ours, path))
        self.groups["replace"][path] = ours

    def woven(self, path: str) -> None:
        self.groups["weave"][path] = weave(self.pristine(path), self.series.edits(path), path)

    def test_classes(self, path: str, names: list[str]) -> None:
        ours = self.series.source(path).read_bytes()
        earlier = list(self.classes.get(path, []))
        self.classes[path] = earlier + names
        if self.original(path)[0] is None:
            self.groups["new"][path] = part_of(ours, self.classes[path], path)
        else:
            before = self.groups["new"].get(path) or self.pristine(path)
            self.groups["new"][path] = insert_classes(before, ours, names, path, earlier)

    def page(self, page: str) -> None:
        """A new page, in the markup of this PyTorch's index if it is there in both: Sphinx reads either in any tree."""
        if Path(page).suffix:
            return self.new(page)
        ours = [suffix for suffix in (".md", ".rst") if self.series.source(page + suffix).is_file()]
        present = [page + suffix for suffix in (".md", ".rst") if self.original(page + suffix)[0] is not None]
        if present:
            raise PatchError(f"{present[0]} is already there", "a PyTorch without it", self.target.restore)
        theirs = [suffix for suffix in ours if self.original("docs/source/index" + suffix)[0] is not None]
        return self.new(page + (theirs or ours)[0])

    # --- checks and results

    def read(self, path: str) -> bytes | None:
        """What the patched PyTorch has at `path`, if it lies there to be read."""
        return self.files().get(path) or self.original(path)[1]

    def exists(self, path: str) -> bool:
        """Whether the patched PyTorch has `path`, if only by RECORD."""
        return self.read(path) is not None or (self.record is not None and path in self.record)

    def pristine(self, path: str) -> bytes:
        """The unpatched bytes of `path`."""
        state, data = self.original(path)
        if state is None or data is None:
            raise PatchError(f"{path} is missing", "a complete PyTorch", self.target.restore)
        if self.record and not self.record.matches(path, data):
            found = f"{path} is not the file that was installed (RECORD has another hash, or none)"
            raise PatchError(found, "an unmodified file", self.target.restore)
        return data

    def files(self) -> dict[str, bytes]:
        """Every file changed so far, in the order of writing; RECORD aside."""
        return {path: data for group in self.groups.values() for path, data in group.items()}

    def transaction(self) -> Transaction:
        """RECORD first, which so names every file that is there at any time, then new files (nothing imports them yet),
        then what imports them; woven modules last."""
        if self.record and self.target.record:
            self.groups["record"][self.target.record] = self.record.updated(self.files())
        steps = [self.step(path, data) for group in self.groups.values() for path, data in group.items()]
        return Transaction("apply", self.target.version, steps, self.missing_folders(steps))

    def step(self, path: str, data: bytes) -> Step:
        state, before = self.original(path)
        mode = _mode(self.target.root / path, self.target.root / "torch/__init__.py", state)
        after = FileState(sha256(data), mode)
        self.contents[after.sha256] = data
        if state is not None and before is not None:
            self.contents[state.sha256] = before
        return Step(path, state, after)

    def missing_folders(self, steps: list[Step]) -> list[str]:
        parents = {parent.as_posix() for step in steps for parent in list(Path(step.path).parents)[:-1]}
        return sorted(p for p in parents if p in self.created or not (self.target.root / p).is_dir())


def _mode(path: Path, sibling: Path, state: FileState | None) -> int:
    if state is not None and state.link is None:
        return state.mode
    return os.stat(path if state is not None else sibling).st_mode & 0o777


def originals(store: Store, applied: Transaction | None) -> Original:
    """The unpatched files: from the backups of `applied` where it changed them, else as they lie there."""
    steps = {step.path: step for step in applied.steps} if applied else {}

    def original(path: str) -> tuple[FileState | None, bytes | None]:
        if path in steps:
            before = steps[path].before
            return before, None if before is None else store.content(before)
        place = store.root / path
        return disk.state_of(place), disk.read(place)

    return original


def unpatched_stages(series: Series, target: Target) -> tuple[list[Stage], Original]:
    """What each patch writes on the PyTorch as it was before any of them, and what the files held then."""
    store = Store(target, lambda: series.paths)
    original = originals(store, store.applied())
    return make_stages(series, target, original), original
