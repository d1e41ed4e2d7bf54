"""status, apply, verify and revert: each rolls an interrupted run back first, then looks, then acts."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Callable, Iterator, List, Optional

from . import disk
from .errors import PatchError, Problems
from .lock import locked
from .plan import Plan, make_plan, originals
from .record import Record
from .series import Series, load_series
from .store import Step, Store, Transaction, inverse
from .target import Target, changed_in_git, find_target
from .text import comma_list

REINSTALL = "reinstall torch (pip install --force-reinstall --no-deps) or restore the checkout, then apply"


class Patcher:
    """One command on one PyTorch, with its lock held. `say` receives the lines for the user."""

    def __init__(self, project: Path, target: Target, say: Callable[[str], object]) -> None:
        self.project, self.target, self.say = project, target, say
        self.store = Store(target.root)
        if self.store.recover():
            say("an interrupted run was rolled back")
        self.applied = self.store.applied()

    @functools.cached_property
    def series(self) -> Series:
        return load_series(self.project)  # not needed to revert

    # --- commands: each returns the exit status

    def status(self) -> int:
        word, details = self.look()
        self.say(f"{word}: {self.target}")
        for detail in details:
            self.say("  " + detail)
        return 0

    def apply(self) -> int:
        if self.applied and self.superseded():
            self.clear()
            self.say("torch was reinstalled since it was patched: applying anew")
        if self.applied:
            self.refuse_edits()
        plan = self.plan()
        if self.applied and plan.transaction == self.applied:
            self.say(f"already patched, nothing to do: {self.target}")
            return 0
        self.refuse_unready(plan.transaction)
        if self.applied:  # by another state of this patch set: the unpatched PyTorch lies between the two
            self.store.run(inverse(self.applied), {})
        self.store.run(plan.transaction, plan.contents)
        self.say(f"patched {len(plan.transaction.steps)} files: {self.target}")
        if not plan.tested:
            self.say(self.untested())
        return 0

    def verify(self) -> int:
        if not self.applied:
            raise PatchError(f"{self.target} is not patched", "a patched PyTorch", "run apply")
        if self.superseded():
            raise PatchError(f"{self.target} was reinstalled since it was patched", "the patched files", "run apply")
        problems = [self.difference(step) for step in self.edited()] + self.outdated()
        if problems:
            raise problems[0] if len(problems) == 1 else Problems(problems)
        self.say(f"verified {len(self.applied.steps)} files, byte for byte: {self.target}")
        return 0

    def revert(self) -> int:
        if not self.applied:
            self.say(f"not patched, nothing to do: {self.target}")
            return 0
        if self.superseded():
            self.clear()
            self.say(f"torch was reinstalled since it was patched; deleted the backups: {self.target}")
            return 0
        self.refuse_edits()
        self.refuse_unwritable(self.applied.steps)
        self.store.run(inverse(self.applied), {})
        self.say(f"restored {len(self.applied.steps)} files: {self.target}")
        return 0

    # --- looking

    def look(self) -> tuple:
        """One word for the state, and what belongs to it."""
        if self.applied is None:
            try:
                plan = self.plan()
            except PatchError as error:
                return "unpatchable", str(error).split("\n")
            return "unpatched", [] if plan.tested else [self.untested()]
        if self.superseded():
            return "superseded", ["torch was reinstalled since it was patched; apply patches it again"]
        edited = self.edited()
        if edited:
            return "edited", [str(self.difference(step)) for step in edited]
        outdated = self.outdated()
        return ("outdated", [str(error) for error in outdated]) if outdated else ("patched", [])

    def plan(self) -> Plan:
        created = self.applied.folders if self.applied else []
        return make_plan(self.series, self.target, originals(self.store, self.applied), created)

    def edited(self) -> List[Step]:
        return [step for step in self.applied.steps if disk.state_of(self.store.root / step.path) != step.after]

    def outdated(self) -> List[PatchError]:
        """Why `apply` would change the patched PyTorch; empty if it would not."""
        wanted = {step.path: step for step in self.plan().transaction.steps}
        found = {step.path: step for step in self.applied.steps}
        paths = [path for path in {**found, **wanted} if found.get(path) != wanted.get(path)]
        if not paths:
            return []
        found = f"{comma_list(paths)}: from another state of this patch set"
        return [PatchError(found, "what it produces now", "run apply")]

    def superseded(self) -> bool:
        """Whether an installation replaced the patched files: none is left, all are as installed."""
        root = self.store.root
        record = Record(disk.read(root / self.target.record)) if self.target.record else None
        old = [step for step in self.applied.steps if step.before is not None and not step.path.endswith("/RECORD")]
        if any(disk.state_of(root / step.path) == step.after for step in old if step.before != step.after):
            return False
        if any(disk.state_of(root / s.path) not in (None, s.after) for s in self.applied.steps if s.before is None):
            return False
        if record is None:
            changed = changed_in_git(root, [step.path for step in old])
            if changed is None:
                return all(disk.state_of(root / step.path) == step.before for step in old)
            return not changed
        return all(record.matches(step.path, disk.read(root / step.path) or b"") for step in old)

    def clear(self) -> None:
        """Delete new files that outlived a reinstallation, and the backups."""
        left = [s for s in self.applied.steps if s.before is None and disk.state_of(self.store.root / s.path)]
        self.refuse_unwritable(left)
        self.store.run(inverse(self.applied._replace(steps=left)), {})
        self.applied = None

    def difference(self, step: Step) -> PatchError:
        place = self.store.root / step.path
        state, data = disk.state_of(place), disk.read(place)
        if state is None or data is None:
            return PatchError(f"{step.path} is missing", "the patched file", REINSTALL)
        lines, wanted = data.split(b"\n"), self.store.content(step.after).split(b"\n")
        pairs = enumerate(zip(lines, wanted), 1)
        line = next((i for i, (a, b) in pairs if a != b), min(len(lines), len(wanted)) + 1)
        if state.sha256 == step.after.sha256:
            return PatchError(f"{step.path} has mode {state.mode:o}", f"{step.after.mode:o}", "restore it with chmod")
        return PatchError(f"{step.path} was changed in line {line}", "the patched bytes", REINSTALL)

    def untested(self) -> str:
        return f"untested: {self.target.version} has every anchor, but the tests ran on {comma_list(self.series.tested)}"

    # --- refusing

    def refuse_edits(self) -> None:
        edited = self.edited()
        if edited:
            raise Problems([self.difference(step) for step in edited])

    def refuse_unready(self, transaction: Transaction) -> None:
        if self.target.is_checkout and not self.applied:
            changed = changed_in_git(self.store.root, [step.path for step in transaction.steps])
            if changed:
                raise PatchError(f"uncommitted changes in {comma_list(changed)}", "clean files", "commit or stash them")
        for step in transaction.steps:
            place = self.store.root / step.path
            if place.parent.exists() and place.parent.resolve() != self.store.root.resolve() / Path(step.path).parent:
                remedy = f"give as TARGET the folder that really holds it ({place.parent.resolve()})"
                raise PatchError(f"{place.parent} is reached through a symbolic link", "folders of this PyTorch", remedy)
        self.refuse_unwritable(transaction.steps)

    def refuse_unwritable(self, steps: List[Step]) -> None:
        folders = {self.store.root} | {_existing((self.store.root / step.path).parent) for step in steps}
        effective = os.access in os.supports_effective_ids
        closed = [str(f) for f in sorted(folders) if not os.access(f, os.W_OK | os.X_OK, effective_ids=effective)]
        if closed:
            remedy = "run this as the owner, or patch a virtual environment of your own"
            raise PatchError(f"no permission to write in {comma_list(closed)}", "write permission", remedy)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def patcher(project: Path, given: Optional[str], say: Callable[[str], object] = print) -> Iterator[Patcher]:
    """Find the PyTorch, lock it, roll back what was interrupted."""
    target = find_target(given)
    with locked(target.root):
        yield Patcher(project, target, say)
