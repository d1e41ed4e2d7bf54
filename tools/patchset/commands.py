"""status, apply, verify, revert and export. apply and revert roll an interrupted run back first; the rest only look."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from . import commits, disk
from .disk import FileState
from .errors import PatchError, raise_all
from .git import ancestor, changed_in_git, head, is_working_tree
from .lock import locked
from .plan import make_plan, make_stages, originals, Plan, Stage
from .record import Record
from .series import load_series, Series
from .smoke import imports, SmokeError, try_out
from .store import inverse, Step, Store, Transaction
from .target import find_target, Target
from .text import comma_list


class Patcher:
    """One command on one PyTorch, with its lock held. `say` receives the lines for the user."""

    def __init__(self, project: Path, target: Target, say: Callable[[str], object]) -> None:
        self.project, self.target, self.say = project, target, say
        self.store = Store(target, lambda: self.series.paths)
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
        return 1 if word in ("edited", "interrupted", "unpatchable") else 0

    def apply(self, commit: bool = False, interpreter: str | None = None) -> int:
        """Patch; with an interpreter, the patched PyTorch has to pass a smoke call, or nothing has happened."""
        self.recover()
        base = self.base(commit)
        if self.applied and self.superseded():
            self.clear()
            self.say("torch was reinstalled or restored since it was patched: applying anew")
        if self.applied:
            self.refuse_edits()
        if not self.applied and self.committed() is not None:
            self.say(f"the last commits are the series, nothing to do: {self.target}")
            return 0
        plan = self.plan()
        if self.applied and plan.transaction == self.applied._replace(commits=()):
            if self.applied.commits and commit:  # perhaps killed before HEAD moved
                self.move_head(forward=True)
            self.say(f"already patched, nothing to do: {self.target}")
            return 0
        if self.applied and self.applied.commits:
            raise PatchError(f"{self.target} has an earlier state of the series in its commits", "none", "revert first")
        self.refuse_unready(plan.transaction)
        transaction = plan.transaction
        if base is not None:
            built = commits.build(self.store.root, base, self.stages(base))
            transaction = transaction._replace(commits=(base, built[-1]))
        if self.applied:  # by another state of this patch set: the unpatched PyTorch lies between the two
            self.store.run(inverse(self.applied), {})
        self.run_and_try(transaction, plan.contents, interpreter)
        self.say(f"patched {len(plan.transaction.steps)} files: {self.target}")
        if interpreter is None:
            self.say(
                "not tried: no interpreter of this PyTorch was asked; to try it, run this with the one that has it"
            )
        else:
            self.say("tried: one solve with its gradient and one gradcheck are right")
        if base is not None:
            self.applied = transaction
            self.move_head(forward=True)
            self.say(f"{len(self.series.patches)} commits on top of {base}")
        if plan.caution:
            self.say(plan.caution)
        return 0

    def run_and_try(self, transaction: Transaction, contents: dict[str, bytes], interpreter: str | None) -> None:
        if interpreter is None:
            return self.store.run(transaction, contents)
        try:
            return self.store.run(transaction, contents, lambda: try_out(self.target, interpreter))
        except SmokeError:
            if (error := imports(interpreter)) is None:
                raise
            remedy = "repair it and run this again, or patch without trying it: --no-smoke"
            found = f"{self.target}: {interpreter} cannot import torch without the patch either: {error}"
            raise PatchError(found, "a PyTorch that can be imported", remedy) from None

    def verify(self) -> int:
        self.refuse_interrupted()
        if not self.applied and (committed := self.committed()) is not None:
            self.say(f"verified {committed} files of the last {len(self.series.patches)} commits: {self.target}")
            return 0
        if not self.applied:
            raise PatchError(f"{self.target} is not patched", "a patched PyTorch", "run apply")
        if self.superseded():
            raise PatchError(
                f"{self.target} was reinstalled or restored since it was patched", "the patched files", "run apply"
            )
        self.store.refuse_paths(self.applied)
        raise_all([self.difference(step) for step in self.edited()] + self.outdated())
        self.say(f"verified {len(self.steps)} files, byte for byte: {self.target}")
        return 0

    def revert(self, force: bool = False) -> int:
        self.recover()
        if not self.applied:
            if self.target.is_checkout and self.committed() is not None:
                remedy = f"leave it to git: git reset --keep HEAD~{len(self.series.patches)}"
                raise PatchError(f"{self.target} was patched by its commits, not by this tool", "the latter", remedy)
            self.say(f"not patched, nothing to do: {self.target}")
            return 0
        if self.superseded():
            self.clear()
            self.say(f"torch was reinstalled or restored since it was patched; deleted the backups: {self.target}")
            return 0
        if not force:
            self.refuse_edits()
        self.refuse_unwritable(self.steps)
        back, contents = self.keep_edits() if force else (inverse(self.applied), {})
        if self.applied.commits:
            self.move_head(forward=False)
        self.store.run(back, contents)
        self.say(f"restored {len(self.steps)} files: {self.target}")
        return 0

    def keep_edits(self) -> tuple[Transaction, dict[str, bytes]]:
        """The way back from the files as they are, with the bytes that it needs; each edited file is first copied to a
        free name beside it, which ends in .edited, so that Python does not import it."""
        assert self.applied is not None
        self.store.refuse_paths(self.applied)
        contents: dict[str, bytes] = {}
        now: dict[str, FileState | None] = {step.path: step.after for step in self.steps}
        for step in self.edited():
            place = self.store.root / step.path
            state, data = disk.state_of(place), disk.read(place)
            now[step.path] = state
            if state is None or data is None:
                continue
            contents[state.sha256] = data
            if state.sha256 not in {known.sha256 for known in (step.before, step.after) if known}:
                kept = _free_name(place)
                disk.write(kept, data, 0o644, os.stat(place))
                disk.sync_folder(kept.parent)
                self.say(f"kept your {step.path} as {kept.name}")
        steps = [step._replace(before=now[step.path]) for step in inverse(self.applied).steps]
        return inverse(self.applied)._replace(steps=steps), contents

    def export(self, output: Path) -> int:
        """Write the series as mails for `git am`, made for the commit that is checked out."""
        self.refuse_interrupted()
        output = output.resolve()
        if output.is_relative_to(self.project.resolve()) or output.is_relative_to(self.store.root.resolve()):
            remedy = "name a folder elsewhere: these diffs carry lines of PyTorch, and neither repository stores them"
            raise PatchError(f"{output} lies in {self.project} or in {self.store.root}", "a folder outside", remedy)
        base = head(self.store.root)
        if self.applied and self.applied.commits[1:] == (base,):
            base = self.applied.commits[0]
        names = commits.export(self.store.root, base, self.stages(base), self.series.cover, output)
        self.say(f"{len(names) - 1} patches on top of {base}, and a cover letter: {output}")
        self.say(f"to have them on another clone: git am --keep-non-patch {output}/000[1-9]*.patch")
        return 0

    # --- commits

    def base(self, commit: bool) -> str | None:
        """The commit that the series goes on top of, if it is to be committed."""
        if not commit:
            return None
        if not self.target.is_checkout:
            raise PatchError(f"{self.target} is installed", "a git checkout for --commits", "apply without --commits")
        if self.applied and not self.applied.commits:
            raise PatchError(f"{self.target} is patched without commits", "an unpatched checkout", "revert first")
        return head(self.store.root)

    def stages(self, base: str) -> list[Stage]:
        return make_stages(self.series, self.target, commits.originals_at(self.store.root, base))

    def committed(self) -> int | None:
        """How many files the series has in the last commits, as `git am` leaves them; None if these are others."""
        root, count = self.store.root, len(self.series.patches)
        if not self.target.is_checkout or not is_working_tree(root):
            return None
        if not all((root / path).exists() for patch in self.series.patches for path in patch.new):
            return None
        try:
            files = {path: data for stage in self.stages(ancestor(root, count)) for path, data in stage.files.items()}
        except PatchError:
            return None
        return len(files) if all(disk.read(root / path) == data for path, data in files.items()) else None

    def move_head(self, forward: bool) -> None:
        """From the commit before the series to the one after it, or back; done again, it changes nothing."""
        assert self.applied is not None
        before, after = self.applied.commits
        found = head(self.store.root)
        if found not in (before, after):
            remedy = f"leave it to git: git revert {before}..{after}, or git reset --keep {before}"
            raise PatchError(f"{self.target}: HEAD is {found}", f"{after}, the last commit of the series", remedy)
        paths = [step.path for step in self.steps]
        if forward:
            commits.move_head(self.store.root, after, before, paths)
        else:
            commits.move_head(self.store.root, before, after, paths)

    # --- looking

    @property
    def steps(self) -> list[Step]:
        return self.applied.steps if self.applied else []

    def look(self) -> tuple[str, list[str]]:
        """One word for the state, and what belongs to it."""
        if (transaction := self.store.interrupted()) is not None:
            foreign = self.store.foreign(transaction.steps)
            since = [f"changed since: {comma_list(foreign)}"] if foreign else []
            return "interrupted", [
                f"killed in the middle of {transaction.action}; apply and revert roll it back",
                *since,
            ]
        if self.applied is None and self.committed() is not None:
            return "committed", [f"the last {len(self.series.patches)} commits are the series; git can take them back"]
        if self.applied is None:
            try:
                plan = self.plan()
            except PatchError as error:
                return "unpatchable", str(error).split("\n")
            return "unpatched", [plan.caution] if plan.caution else []
        if self.superseded():
            return "superseded", ["torch was reinstalled or restored since it was patched; apply patches it again"]
        self.store.refuse_paths(self.applied)
        edited = self.edited()
        if edited:
            return "edited", [str(self.difference(step)) for step in edited]
        outdated = self.outdated()
        return ("outdated", [str(error) for error in outdated]) if outdated else ("patched", [])

    def plan(self) -> Plan:
        created = self.applied.folders if self.applied else []
        return make_plan(self.series, self.target, originals(self.store, self.applied), created)

    def edited(self) -> list[Step]:
        return [step for step in self.steps if not self.store.holds(step.path, step.after)]

    def outdated(self) -> list[PatchError]:
        """Why `apply` would change the patched PyTorch; empty if it would not."""
        wanted = {step.path: step for step in self.plan().transaction.steps}
        found = {step.path: step for step in self.steps}
        paths = [path for path in {**found, **wanted} if found.get(path) != wanted.get(path)]
        stale = f"{comma_list(paths)}: from another state of this patch set"
        return [PatchError(stale, "what it produces now", "run apply")] if paths else []

    def superseded(self) -> bool:
        """Whether an installation replaced the patched files: none is left, all are as installed."""
        root = self.store.root
        replaced = [s for s in self.steps if s.before not in (None, s.after) and not s.path.endswith("/RECORD")]
        new = [step for step in self.steps if step.before is None]
        if any(disk.state_of(root / step.path) == step.after for step in replaced):
            return False
        if any(disk.state_of(root / step.path) not in (None, step.after) for step in new):
            return False
        if self.target.record is not None:
            record = Record(disk.read(root / self.target.record) or b"")
            return all(record.matches(step.path, disk.read(root / step.path) or b"") for step in replaced)
        changed = changed_in_git(root, [step.path for step in replaced])
        if changed is None:
            return all(disk.state_of(root / step.path) == step.before for step in replaced)
        return not changed

    def clear(self) -> None:
        """Delete new files that outlived a reinstallation, and the backups."""
        assert self.applied is not None
        left = [s for s in self.steps if s.before is None and disk.state_of(self.store.root / s.path)]
        self.refuse_unwritable(left)
        folders = [folder for folder in self.applied.folders if (self.store.root / folder).is_dir()]
        self.store.run(inverse(self.applied._replace(steps=left, folders=folders)), {})
        self.applied = None

    def difference(self, step: Step) -> PatchError:
        place = self.store.root / step.path
        state, data = disk.state_of(place), disk.read(place)
        remedy = "revert --force keeps your file beside the original that it restores"
        if state is None or data is None or step.after is None:
            return PatchError(f"{step.path} is missing", "the patched file", "revert --force restores the original")
        lines, wanted = data.split(b"\n"), self.store.content(step.after).split(b"\n")
        pairs = enumerate(zip(lines, wanted, strict=False), 1)
        line = next((i for i, (a, b) in pairs if a != b), min(len(lines), len(wanted)) + 1)
        if state.sha256 == step.after.sha256:
            if state.link is not None:
                return PatchError(f"{step.path} is a link", "the patched file", remedy)
            return PatchError(f"{step.path} has mode {state.mode:o}", f"{step.after.mode:o}", "restore it with chmod")
        return PatchError(f"{step.path} was changed in line {line}", "the patched bytes", remedy)

    # --- refusing

    def refuse_edits(self) -> None:
        if self.applied:
            self.store.refuse_paths(self.applied)
        raise_all([self.difference(step) for step in self.edited()])

    def refuse_interrupted(self) -> None:
        if (transaction := self.store.interrupted()) is not None:
            found = f"{self.target} has an interrupted {transaction.action}"
            raise PatchError(found, "a finished one", "run apply or revert, which roll it back first")

    def recover(self) -> None:
        """Roll back what was interrupted, before a command that writes."""
        interrupted = self.store.interrupted()
        if interrupted is not None:
            self.refuse_unwritable(interrupted.steps)
        outcome = self.store.recover()
        if interrupted is not None:
            self.say(f"an interrupted {interrupted.action} was {outcome}")
        self.applied = self.store.applied()

    def refuse_unready(self, transaction: Transaction) -> None:
        if self.target.is_checkout and not self.applied:
            changed = changed_in_git(self.store.root, [step.path for step in transaction.steps])
            if changed:
                raise PatchError(f"uncommitted changes in {comma_list(changed)}", "clean files", "commit or stash them")
        self.store.refuse_paths(transaction)
        self.refuse_unwritable(transaction.steps)

    def refuse_unwritable(self, steps: list[Step]) -> None:
        folders = {self.store.root} | {_existing((self.store.root / step.path).parent) for step in steps}
        folders |= {place for place in (self.store.folder, self.store.objects) if place.exists()}
        effective = os.access in os.supports_effective_ids
        closed = [str(f) for f in sorted(folders) if not os.access(f, os.W_OK | os.X_OK, effective_ids=effective)]
        if closed:
            remedy = "run this as the owner, or patch a PyTorch of your own"
            raise PatchError(f"no permission to write in {comma_list(closed)}", "write permission", remedy)


def _free_name(path: Path) -> Path:
    numbers = ("", *(f"-{n}" for n in range(1, 1000)))
    return next(p for n in numbers if not os.path.lexists(p := path.with_name(f"{path.name}.edited{n}")))


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def patcher(project: Path, given: str | None, say: Callable[[str], object] = print) -> Iterator[Patcher]:
    """Find the PyTorch, lock it, roll back what was interrupted."""
    target = find_target(given)
    with locked(target.root):
        yield Patcher(project, target, say)
