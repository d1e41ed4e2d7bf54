"""The patch tool killed, starved of disk and started twice: every file stays whole, every state one of two."""

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import in_child, posix, run, unchanged_refusal, word
from patchset.store import FOLDER


# --- killed at every write

WRITES = ("write", "replace", "unlink", "mkdir", "rmdir", "symlink", "fsync", "fchmod")


def killed_run(command, project, target, survive):
    """Run `command` in a process that dies at write number `survive` + 1, a write of bytes being half done then."""

    def attempt():
        left = [survive]

        def wrapped(name, real):
            def call(*arguments, **options):
                if left[0] == 0:
                    if name == "write":
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os._exit(137)
                left[0] -= 1
                return real(*arguments, **options)

            return call

        for name in WRITES:
            setattr(os, name, wrapped(name, getattr(os, name)))
        run(command, project, target)
        (target.parent / "writes").write_text(str(survive - left[0]))
        return 0

    return in_child(attempt)


@pytest.fixture
def bench(project):
    """A wheel with a link, before and after; a function that makes fresh copies of either state."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        wheel = fake.make_wheel(folder / "before")
        (wheel / "cached.py").write_bytes(fake.LOBPCG)
        (wheel / "torch/_lobpcg.py").unlink()
        (wheel / "torch/_lobpcg.py").symlink_to("../cached.py")
        shutil.copytree(wheel, folder / "after", symlinks=True)
        run("apply", project, folder / "after")

        def fresh(state):
            shutil.rmtree(folder / "site-packages", ignore_errors=True)
            return Path(shutil.copytree(folder / state, folder / "site-packages", symlinks=True))

        yield fresh, fake.snapshot(folder / "before"), fake.snapshot(folder / "after")


def without_store(files):
    return {name: entry for name, entry in files.items() if name.split("/")[0] != FOLDER}


def settled(project, wheel, before, after):
    """status sees what happened; what was begun is rolled back or was done; from there to the other state and back."""
    journal = (wheel / FOLDER / "journal.json").exists()
    assert (word(project, wheel) == "interrupted") == journal
    run("recover", project, wheel)
    found = word(project, wheel)
    now = fake.snapshot(wheel)
    assert (found, without_store(now)) in (("unpatched", before), ("patched", without_store(after)))
    assert found == "patched" or now == before
    run("apply", project, wheel)
    run("verify", project, wheel)
    assert without_store(fake.snapshot(wheel)) == without_store(after)
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before
    return found


@posix
@pytest.mark.parametrize(
    ("command", "start", "end"), [("apply", "before", "patched"), ("revert", "after", "unpatched")]
)
def test_killed_at_every_write(project, bench, command, start, end):
    fresh, before, after = bench
    outcomes = []
    for survive in range(1000):
        wheel = fresh(start)
        if killed_run(command, project, wheel, survive) == 0:
            break
        outcomes.append(settled(project, wheel, before, after))
    assert len(outcomes) > 40
    assert survive < 999
    assert set(outcomes) == {"patched", "unpatched"}
    # Once done it stays done: the outcome changes once.
    assert outcomes.index(end) == len(outcomes) - outcomes.count(end)


@posix
@pytest.mark.parametrize(("command", "start"), [("apply", "before"), ("revert", "after")])
@pytest.mark.parametrize("part", [0.1, 0.6, 0.95])
def test_killed_while_rolling_back(project, bench, command, start, part):
    fresh, before, after = bench
    assert killed_run(command, project, fresh(start), 10**6) == 0
    survive = int(part * int((fresh(start).parent / "writes").read_text()))
    for again in range(1000):
        wheel = fresh(start)
        assert killed_run(command, project, wheel, survive) == 137
        if killed_run("recover", project, wheel, again) == 0:
            break
        settled(project, wheel, before, after)
    assert again < 999


class FailingAfter:
    """A function of os that works `survive` times, fails once, and works again."""

    def __init__(self, real, survive):
        self.real, self.left = real, survive

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == -1:
            raise OSError(28, "No space left on device")
        return self.real(*arguments, **options)


@pytest.mark.parametrize("name", ["write", "replace", "fsync"])
def test_a_failing_disk_is_rolled_back_at_once(monkeypatch, project, wheel, name):
    before = fake.snapshot(wheel)
    for survive in range(0, 60, 3):
        failing = FailingAfter(getattr(os, name), survive)
        with monkeypatch.context() as patched, contextlib.suppress(OSError):
            patched.setattr(os, name, failing)
            run("apply", project, wheel)
        if failing.left < 0:
            assert fake.snapshot(wheel) == before
        run("revert", project, wheel)


@posix
def test_contents_reach_the_disk_before_their_names(monkeypatch, project, wheel):
    synced, events = set(), []
    replace = os.replace

    def fsync(handle):
        status = os.fstat(handle)
        synced.add(status.st_ino)
        events.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", status.st_ino))

    def checked(source, destination):
        assert os.stat(source).st_ino in synced
        replace(source, destination)
        events.append(("rename", os.stat(Path(destination).parent).st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", checked)
    run("apply", project, wheel)
    renames = [i for i, event in enumerate(events) if event[0] == "rename"]
    assert len(renames) > 10
    assert all(events[i + 1] == ("folder", events[i][1]) for i in renames)


@posix
def test_rolling_back_leaves_no_bytecode_of_the_patch(project, wheel):
    """A program that ran between the two may have compiled what is rolled back, or have it compiled again."""
    assert killed_run("apply", project, wheel, 80) == 137
    assert word(project, wheel) == "interrupted"
    cached = ["torch/__pycache__/_lobpcg.cpython-311.pyc", "torch/autograd/__pycache__/gradcheck.cpython-311.pyc"]
    fake.write_files(wheel, dict.fromkeys(cached, b""))
    run("recover", project, wheel)
    assert word(project, wheel) == "unpatched"
    assert not any((wheel / path).exists() for path in cached)


@posix
def test_files_changed_after_an_interruption_are_kept(project, wheel):
    assert killed_run("apply", project, wheel, 75) == 137
    assert (wheel / FOLDER / "journal.json").exists()
    (wheel / "torch/_lobpcg.py").write_bytes(b"mine\n")
    assert word(project, wheel) == "interrupted"
    for command in ("apply", "revert"):
        assert "files changed since: torch/_lobpcg.py" in unchanged_refusal(command, project, wheel)
    assert "interrupted apply" in unchanged_refusal("verify", project, wheel)
