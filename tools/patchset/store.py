"""The store beside torch/: originals by content, the journal of a running transaction, the state of a finished one.

A transaction is a list of steps, each taking one path from `before` to `after`. Invariants:
- every content a step names lies in objects/ before the journal is written;
- the journal is on the disk before the first step, so that a killed run can be rolled back by whoever comes next;
- renaming journal.json to state.json is the commit: before it the transaction did not happen, after it it did.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from . import disk
from .disk import FileState
from .errors import PatchError
from .text import comma_list, sha256


FOLDER = ".torch_lobpcg_patch"
FORMAT = 1


class Step(NamedTuple):
    """One path (with slashes, relative to the folder that holds torch/) before and after; None is absence."""

    path: str
    before: FileState | None
    after: FileState | None


class Transaction(NamedTuple):
    action: str  # "apply" or "revert"
    version: str  # of the PyTorch
    steps: list[Step]
    folders: list[str]  # that do not exist without the patch, outermost first
    commits: tuple[str, ...] = ()  # HEAD before and after, where the patch is committed as well


class Store:
    """All changes of files under `root` go through this object; call it with the lock held."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / FOLDER
        self.objects = self.folder / "objects"
        self.journal = self.folder / "journal.json"
        self.committed = self.folder / "state.json"

    # --- what is there

    def applied(self) -> Transaction | None:
        """The transaction that patched this PyTorch, if one did."""
        state = _load(self.committed)
        return state if state is not None and state.action == "apply" else None

    def content(self, state: FileState) -> bytes:
        """The bytes of `state`. Raises PatchError if the store no longer has them."""
        data = disk.read(self.objects / state.sha256)
        if data is None or sha256(data) != state.sha256:
            raise PatchError(
                f"{self.objects / state.sha256} is missing or damaged",
                "a backup",
                "reinstall torch or restore the checkout",
            )
        return data

    def foreign(self, steps: list[Step]) -> list[str]:
        """The paths that hold neither what they held before nor what they should hold after."""
        return [s.path for s in steps if disk.state_of(self.root / s.path) not in (s.before, s.after)]

    # --- transactions

    def run(self, transaction: Transaction, contents: dict[str, bytes]) -> None:
        """Carry out `transaction`; `contents` has the bytes of each sha256 that objects/ lacks. All or nothing."""
        try:
            self._prepare(transaction, contents)
            if transaction.action == "apply":
                self._make_folders(transaction.folders)
            for step in transaction.steps:
                self._put(step.path, step.after)
            if transaction.action == "revert":
                self._remove_folders(transaction.folders)
            disk.move(self.journal, self.committed)
        except BaseException:
            self.recover()
            raise
        self.tidy()

    def recover(self) -> bool:
        """Roll an unfinished transaction back. True if there was one. Raises PatchError if files changed since."""
        transaction = _load(self.journal)
        if transaction is None:
            self.tidy()
            return False
        foreign = self.foreign(transaction.steps)
        if foreign:
            raise PatchError(
                f"an interrupted {transaction.action}, and files changed since: {comma_list(foreign)}",
                f"files as they were left, to be rolled back from {self.objects}",
                "reinstall torch or restore the checkout, and delete " + str(self.folder),
            )
        if transaction.action == "revert":
            self._make_folders(transaction.folders)
        for step in reversed(transaction.steps):
            if disk.state_of(self.root / step.path) != step.before:
                self._put(step.path, step.before)
            disk.remove_bytecode(self.root / step.path)
        if transaction.action == "apply":
            self._remove_folders(transaction.folders)
        disk.remove(self.journal)
        self.tidy()
        return True

    def tidy(self) -> None:
        """Remove the store, or what is left of one, unless something is applied or in progress."""
        if self.folder.exists() and not self.journal.exists() and self.applied() is None:
            shutil.rmtree(self.folder)

    # --- steps

    def _prepare(self, transaction: Transaction, contents: dict[str, bytes]) -> None:
        os.makedirs(self.objects, exist_ok=True)
        # A checkout's `git status` stays clean without touching upstream's ignore file.
        self._save(self.folder / ".gitignore", b"*\n")
        for step in transaction.steps:
            for state in (step.before, step.after):
                if state is not None and state.sha256 in contents:
                    self._save(self.objects / state.sha256, contents[state.sha256])
                elif state is not None:
                    self.content(state)
        disk.sync_folder(self.root)
        self._save(self.journal, _dump(transaction))

    def _save(self, path: Path, data: bytes) -> None:
        temporary = self.folder / "saving"
        disk.write(temporary, data, 0o644)
        disk.move(temporary, path)

    def _put(self, path: str, state: FileState | None) -> None:
        """Make `path` hold `state`, by one rename or one removal; the store is on the same file system."""
        place = self.root / path
        staged = self.folder / "staged"
        if state is None:
            disk.remove(place)
        elif state.link is not None and sha256(disk.read(place.parent / state.link) or b"") == state.sha256:
            if os.path.lexists(staged):
                os.unlink(staged)
            os.symlink(state.link, staged)
            disk.move(staged, place)
        else:
            # A link whose cache has been emptied comes back as a file.
            mode = state.mode if state.link is None else 0o644
            disk.write(staged, self.content(state), mode, os.stat(place.parent))
            disk.move(staged, place)
        disk.remove_bytecode(place)

    def _make_folders(self, folders: list[str]) -> None:
        for folder in folders:
            self.root.joinpath(folder).mkdir(exist_ok=True)

    def _remove_folders(self, folders: list[str]) -> None:
        for folder in reversed(folders):
            for path in (self.root / folder / "__pycache__", self.root / folder):
                with contextlib.suppress(OSError):  # absent, or holds files of the user's
                    path.rmdir()


def inverse(transaction: Transaction) -> Transaction:
    steps = [Step(s.path, s.after, s.before) for s in reversed(transaction.steps)]
    return transaction._replace(action="revert", steps=steps)


def _dump(transaction: Transaction) -> bytes:
    return json.dumps({"format": FORMAT, **transaction._asdict()}, indent=1).encode("utf-8")


def _load(path: Path) -> Transaction | None:
    data = disk.read(path)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        steps = [Step(name, _state(before), _state(after)) for name, before, after in fields.pop("steps")]
        commits = tuple(fields.pop("commits", ()))
        return Transaction(steps=steps, commits=commits, **fields)
    except (ValueError, TypeError, KeyError):
        raise PatchError(
            f"{path} is not readable", f"JSON of format {FORMAT}", "use the patch set that wrote it, or reinstall torch"
        ) from None


def _state(fields: list[Any] | None) -> FileState | None:
    return None if fields is None else FileState(*fields)
