"""What the series does to one PyTorch: every new content computed and checked, nothing written."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import disk
from .classes import insert_classes
from .disk import FileState
from .errors import PatchError, raise_all
from .record import Record
from .series import check_classes, Patch, Series
from .store import Step, Store, Transaction
from .target import Target, version_numbers
from .text import sha256
from .weave import weave


Original = Callable[[str], tuple[FileState | None, bytes | None]]


class Plan(NamedTuple):
    transaction: Transaction
    contents: dict[str, bytes]  # by sha256: before and after
    tested: bool  # whether the series was tested on this version


def make_plan(series: Series, target: Target, original: Original, created: Sequence[str] = ()) -> Plan:
    """The transaction that patches `target`; `original` gives the unpatched state and bytes of a path, `created` the
    folders that an earlier patch made.

    Raises PatchError with everything that stands in the way: a version too old, a file that is not as installed, a
    new file that exists, an anchor that is missing.
    """
    numbers = version_numbers(target.version)
    if numbers < version_numbers(series.oldest):
        raise PatchError(f"{target}", f"version {series.oldest} or newer", "patch a newer PyTorch")
    if target.is_checkout:
        check_classes(series)
    planner = _Planner(series, target, original, created)
    for patch in series.patches:
        planner.add(patch)
    raise_all(planner.errors)
    tested = numbers in [version_numbers(version) for version in series.tested]
    return Plan(planner.transaction(), planner.contents, tested)


class _Planner:
    def __init__(self, series: Series, target: Target, original: Original, created: Sequence[str]) -> None:
        self.series, self.target, self.original, self.created = series, target, original, created
        self.groups: dict[str, dict[str, bytes]] = {"new": {}, "record": {}, "replace": {}, "weave": {}}
        self.contents: dict[str, bytes] = {}
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
                f"{path} is already there", "a PyTorch without it", "reinstall torch or restore the checkout"
            )
        self.groups["new"][path] = self.series.source(path).read_bytes()

    def replace(self, path: str) -> None:
        self.pristine(path)
        self.groups["replace"][path] = self.series.source(path).read_bytes()

    def woven(self, path: str) -> None:
        self.groups["weave"][path] = weave(self.pristine(path), self.series.edits(path), path)

    def test_classes(self, path: str, names: list[str]) -> None:
        before = self.groups["new"].get(path) or self.pristine(path)
        self.groups["new"][path] = insert_classes(before, self.series.source(path).read_bytes(), names, path)

    def page(self, page: str) -> None:
        """A page has the suffix that this PyTorch gives it, or gives its index where the page is new."""
        if Path(page).suffix:
            self.new(page)
            return
        ours = [suffix for suffix in (".md", ".rst") if self.series.source(page + suffix).is_file()]
        for place in (page, "docs/source/index"):
            theirs = [suffix for suffix in (".md", ".rst") if self.original(place + suffix)[0] is not None]
            if theirs:
                break
        suffix = next((suffix for suffix in theirs if suffix in ours), None)
        if suffix is None:
            raise PatchError(
                f"{page}: the tree has {theirs}, docs_patch {ours}", "one suffix in common", "add the page"
            )
        self.groups["new"][page + suffix] = self.series.source(page + suffix).read_bytes()

    # --- checks and results

    def pristine(self, path: str) -> bytes:
        """The unpatched bytes of `path`."""
        state, data = self.original(path)
        if state is None or data is None:
            raise PatchError(f"{path} is missing", "a complete PyTorch", "reinstall torch or restore the checkout")
        if self.record and not self.record.matches(path, data):
            found = f"{path} is not the file that was installed (RECORD has another hash, or none)"
            raise PatchError(found, "an unmodified file", "reinstall torch: pip install --force-reinstall --no-deps")
        return data

    def transaction(self) -> Transaction:
        """New files first (nothing imports them yet), then RECORD, then what imports them; woven modules last."""
        if self.record and self.target.record:
            changed = {path: data for group in self.groups.values() for path, data in group.items()}
            self.groups["record"][self.target.record] = self.record.updated(changed)
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
