"""The store beside torch/: originals by content, the journal of a running transaction, the state of a finished one.

A transaction is a list of steps, each taking one path from `before` to `after`. Invariants:
- every content a step names lies in objects/ before the journal is written;
- the journal is on the disk before the first step, so that a killed run can be rolled back by whoever comes next;
- renaming journal.json to state.json is the commit: before it the transaction did not happen, after it it did.

The store may have come with somebody's checkout or environment, so it is believed no more than any other input: what is
read from it is checked in form, and no path is written that neither the series nor RECORD names.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from . import disk
from .disk import FileState
from .errors import PatchError
from .record import Record
from .target import Target
from .text import comma_list, sha256


FOLDER = ".torch_lobpcg_patch"
FORMAT = 1
_RECORD = re.compile(r"torch-[^/]+\.dist-info/RECORD")  # of this installation or of an earlier one
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


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
    """All changes of files in `target` go through this object; call it with the lock held.

    `named` gives the paths that the series names; it is asked only where RECORD does not name one.
    """

    def __init__(self, target: Target, named: Callable[[], Collection[str]]) -> None:
        self.target, self.root, self.named = target, target.root, named
        self.folder = self.root / FOLDER
        self.objects = self.folder / "objects"
        self.journal = self.folder / "journal.json"
        self.committed = self.folder / "state.json"
        self.refuse_strange()

    # --- what is there

    def applied(self) -> Transaction | None:
        """The transaction that patched this PyTorch, if one did."""
        state = self._load(self.committed)
        return state if state is not None and state.action == "apply" else None

    def interrupted(self) -> Transaction | None:
        """The transaction that was killed before its end, if one was."""
        return self._load(self.journal)

    def content(self, state: FileState) -> bytes:
        """The bytes of `state`. Raises PatchError if the store no longer has them."""
        data = disk.read(self.objects / state.sha256)
        if data is None or sha256(data) != state.sha256:
            raise PatchError(f"{self.objects / state.sha256} is missing or damaged", "a backup", self.target.restore)
        return data

    def holds(self, path: str, state: FileState | None) -> bool:
        """Whether `path` is as `state` says; a link that could not be restored counts where its content is there."""
        found = disk.state_of(self.root / path)
        return found == state or (
            found is not None and state is not None and state.link is not None and found == _as_file(state)
        )

    def foreign(self, steps: list[Step]) -> list[str]:
        """The paths that hold neither what they held before nor what they should hold after."""
        return [s.path for s in steps if not self.holds(s.path, s.before) and not self.holds(s.path, s.after)]

    # --- what is refused

    def refuse_strange(self) -> None:
        """Raise PatchError unless the store is made of folders and files of its own, by somebody who may patch."""
        kinds = {self.folder: stat.S_ISDIR, self.objects: stat.S_ISDIR}
        kinds |= {self.journal: stat.S_ISREG, self.committed: stat.S_ISREG}
        for path, right in kinds.items():
            if not os.path.lexists(path):
                continue
            status = os.lstat(path)
            if not right(status.st_mode):
                raise PatchError(f"{path} is a link or of another kind", "what this tool makes", self.without_store)
            if hasattr(os, "geteuid"):
                owners = {os.geteuid(), os.stat(self.root).st_uid, 0}
                if status.st_uid not in owners:
                    found = f"{path} belongs to user {status.st_uid}"
                    raise PatchError(found, "the owner of this PyTorch, root or you", self.without_store)

    def refuse_paths(self, transaction: Transaction) -> None:
        """Raise PatchError if a step leads out of this PyTorch, or to a file that the patch has nothing to do with."""
        steps, folders = [step.path for step in transaction.steps], transaction.folders
        for folder in {Path(path).parent.as_posix() for path in steps} | set(folders):
            self._refuse_linked(folder)
        unnamed = _unnamed(steps, folders, self.record())
        if unnamed:
            unnamed = _unnamed(steps, folders, {*self.record(), *self.named()})
        if unnamed:
            found = f"{self.folder} names {comma_list(unnamed)}, and neither the series nor RECORD does"
            remedy = f"use the version of this patch set that wrote it, or {self.without_store}"
            raise PatchError(found, "files of the patch", remedy)

    def _refuse_linked(self, folder: str) -> None:
        found = (self.root / folder).resolve()
        if found != self.root.resolve() / folder:
            remedy = f"give as TARGET the folder that really holds it ({found})"
            raise PatchError(f"{self.root / folder} is reached through a symbolic link", "folders of its own", remedy)

    def record(self) -> Collection[str]:
        """RECORD and the paths that it names; a checkout has none."""
        path = self.target.record
        return {path, *Record(disk.read(self.root / path) or b"").index} if path else ()

    @property
    def without_store(self) -> str:
        return f"{self.target.restore}, and delete {self.folder}"

    def check(self, transaction: Transaction) -> None:
        """Raise ValueError, which says why, unless every field is one that this tool could have written."""
        paths = [step.path for step in transaction.steps]
        tops = ("torch/",) if self.target.record else ("torch/", "test/", "docs/")
        for path in paths + transaction.folders:
            if not _plain(path) or not ((path + "/").startswith(tops) or _RECORD.fullmatch(path)):
                raise ValueError(f"the path {path!r}, not one inside this PyTorch")
        if len(set(paths)) < len(paths):
            raise ValueError("a path twice")
        for step in transaction.steps:
            for state in (step.before, step.after):
                if state is not None and not _plain_state(state):
                    raise ValueError(f"for {step.path} the state {tuple(state)!r}, not that of a plain file")

    def _load(self, path: Path) -> Transaction | None:
        data = disk.read(path)
        if data is None:
            return None
        try:
            transaction = _decoded(data)
            self.check(transaction)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            remedy = f"use the version of this patch set that wrote it, or {self.without_store}"
            raise PatchError(f"{path} holds {error}", f"a transaction of format {FORMAT}", remedy) from None
        return transaction

    # --- transactions

    def run(
        self, transaction: Transaction, contents: dict[str, bytes], proof: Callable[[], object] = lambda: None
    ) -> None:
        """Carry out `transaction`; `contents` has the bytes of each sha256 that objects/ lacks. All or nothing.

        `proof` is called when every file is in its place and the transaction can still be rolled back: it is, where
        `proof` raises or the process is killed in it.
        """
        self.refuse_paths(transaction)
        try:
            self.check(transaction)
        except ValueError as error:
            raise PatchError(f"{self.root} has {error}", "plain files and folders", "see its permissions") from None
        try:
            self._prepare(transaction, contents)
            if transaction.action == "apply":
                self._make_folders(transaction.folders)
            for step in transaction.steps:
                self._put(step.path, step.after)
            proof()
            self._finish(transaction)
        except BaseException:
            self.recover()
            raise

    def recover(self) -> str:
        """Roll an unfinished transaction back; says what became of it, "" if there was none. Raises PatchError if files
        changed since."""
        transaction = self.interrupted()
        if transaction is None:
            self.tidy()
            return ""
        for folder in transaction.folders:
            self._refuse_linked(folder)
        if transaction.action == "revert" and all(self.holds(step.path, step.after) for step in transaction.steps):
            self._finish(transaction)  # killed when RECORD, the last step, no longer named what had been new
            return "finished"
        foreign = self.foreign(transaction.steps)
        if foreign:
            found = f"an interrupted {transaction.action}, and files changed since: {comma_list(foreign)}"
            wanted = f"files as they were left, to be rolled back from {self.objects}"
            raise PatchError(found, wanted, self.without_store)
        changed = [step for step in transaction.steps if not self.holds(step.path, step.before)]
        self.refuse_paths(transaction._replace(steps=changed))
        if transaction.action == "revert":
            self._make_folders(transaction.folders)
        for step in reversed(transaction.steps):
            if not self.holds(step.path, step.before):
                self._put(step.path, step.before)
            disk.remove_bytecode(self.root / step.path)
        if transaction.action == "apply":
            self._remove_folders(transaction.folders)
        disk.remove(self.journal)
        self.tidy()
        return "rolled back"

    def _finish(self, transaction: Transaction) -> None:
        if transaction.action == "revert":
            self._remove_folders(transaction.folders)
        disk.move(self.journal, self.committed)
        self.tidy()

    def tidy(self) -> None:
        """Remove the store, or what is left of one, unless something is applied or in progress. A file that this tool
        does not make stays, and the folder with it."""
        if not self.folder.exists() or self.journal.exists() or self.applied() is not None:
            return
        names = os.listdir(self.objects) if self.objects.exists() else []
        ours = [self.objects / name for name in names if _DIGEST.fullmatch(name)]
        for path in (*ours, *(self.folder / name for name in ("saving", "staged", ".gitignore")), self.committed):
            path.unlink(missing_ok=True)
        for folder in (self.objects, self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()

    # --- steps

    def _prepare(self, transaction: Transaction, contents: dict[str, bytes]) -> None:
        disk.make_folder(self.folder)
        disk.make_folder(self.objects)
        # A checkout's `git status` stays clean without touching upstream's ignore file.
        self._save(self.folder / ".gitignore", b"*\n")
        for step in transaction.steps:
            for state in (step.before, step.after):
                if state is not None and state.sha256 in contents:
                    self._save(self.objects / state.sha256, contents[state.sha256])
                elif state is not None:
                    self.content(state)
        self._save(self.journal, _dump(transaction))

    def _save(self, path: Path, data: bytes) -> None:
        temporary = self.folder / "saving"
        disk.write(temporary, data, 0o644, os.stat(self.folder))
        disk.move(temporary, path)

    def _put(self, path: str, state: FileState | None) -> None:
        """Make `path` hold `state`, by one rename or one removal; the store is on the same file system."""
        place = self.root / path
        staged = self.folder / "staged"
        if state is None:
            disk.remove(place)
        elif state.link is not None and self._leads_to(place.parent / state.link, state):
            if os.path.lexists(staged):
                os.unlink(staged)
            os.symlink(state.link, staged)
            disk.move(staged, place)
        else:
            data, file = self.content(state), _as_file(state)
            disk.write(staged, data, file.mode, os.stat(place.parent))
            disk.move(staged, place)
        disk.remove_bytecode(place)

    def _leads_to(self, path: Path, state: FileState) -> bool:
        """Whether a link to `path` stays in this PyTorch and has the content of `state`."""
        return path.resolve().is_relative_to(self.root.resolve()) and sha256(disk.read(path) or b"") == state.sha256

    def _make_folders(self, folders: list[str]) -> None:
        for folder in folders:
            disk.make_folder(self.root / folder)

    def _remove_folders(self, folders: list[str]) -> None:
        for folder in reversed(folders):
            for path in (self.root / folder / "__pycache__", self.root / folder):
                with contextlib.suppress(OSError):  # absent, or holds files of the user's
                    path.rmdir()


def inverse(transaction: Transaction) -> Transaction:
    steps = [Step(s.path, s.after, s.before) for s in reversed(transaction.steps)]
    return transaction._replace(action="revert", steps=steps)


def _unnamed(steps: list[str], folders: list[str], names: Collection[str]) -> list[str]:
    """The files that are not among `names`, and the folders that hold none of these."""
    empty = [folder for folder in folders if not any(name.startswith(folder + "/") for name in names)]
    return [path for path in steps if path not in names] + empty


def _as_file(state: FileState) -> FileState:
    """What comes back of a link that leads out of this PyTorch or nowhere: a file of the same content."""
    return state if state.link is None else FileState(state.sha256, 0o644)


def _plain(path: str) -> bool:
    """Whether `path` is relative, stays below its folder, and is one line on every system."""
    parts = path.split("/")
    return path.isprintable() and not set(path) & {"\\", ":"} and not set(parts) & {"", ".", ".."}


def _plain_state(state: FileState) -> bool:
    link = state.link
    right = isinstance(state.sha256, str) and _DIGEST.fullmatch(state.sha256) and type(state.mode) is int
    return bool(right) and 0 <= state.mode <= 0o777 and (link is None or (isinstance(link, str) and "\0" not in link))


def _dump(transaction: Transaction) -> bytes:
    return json.dumps({"format": FORMAT, **transaction._asdict()}, indent=1).encode("utf-8")


def _decoded(data: bytes) -> Transaction:
    """Raises ValueError, TypeError, KeyError or AttributeError where `data` is not what _dump writes."""
    fields = json.loads(data)
    if fields.pop("format") != FORMAT:
        raise ValueError("another format")
    steps = [Step(name, _state(before), _state(after)) for name, before, after in fields.pop("steps")]
    found = Transaction(steps=steps, commits=tuple(fields.pop("commits", ())), **fields)
    words = [found.action, found.version, *found.folders, *found.commits, *(step.path for step in steps)]
    if not all(isinstance(word, str) for word in words) or not isinstance(found.folders, list):
        raise ValueError("something other than text")
    if found.action not in ("apply", "revert"):
        raise ValueError(f"the action {found.action!r}")
    if len(found.commits) not in (0, 2) or not all(map(_COMMIT.fullmatch, found.commits)):
        raise ValueError("something other than two commits")
    return found


def _state(fields: list[Any] | None) -> FileState | None:
    return None if fields is None else FileState(*fields)
