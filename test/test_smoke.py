"""The call that `apply` makes on what it has patched: what it says, and that a failure leaves every byte as it was."""

import contextlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import in_child, posix, word
from patchset.commands import patcher
from patchset.errors import PatchError
from patchset.smoke import interpreter_of
from patchset.store import FOLDER


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from gpu import mirror  # noqa: E402


def interpreter(folder, call, plain="exit 0"):
    """A stand-in for an interpreter: what it does in the smoke call, and what where torch is only imported."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\ncase $1 in\n-c) {plain};;\n*) {call};;\nesac\n")
    script.chmod(0o755)
    return str(script)


def apply(project, target, python):
    said = []
    with patcher(project, str(target), said.append) as running:
        assert running.apply(interpreter=python) == 0
    return "\n".join(said)


@posix
def test_what_passes_is_said_and_asked_once(tmp_path, project, wheel):
    python = interpreter(tmp_path, f'echo "$2" >> {tmp_path}/calls')
    said = apply(project, wheel, python)
    assert "patched 6 files" in said
    assert "one solve with its gradient and one gradcheck are right" in said
    assert word(project, wheel) == "patched"
    assert apply(project, wheel, python).startswith("already patched")
    assert (tmp_path / "calls").read_text() == f"{wheel}\n"


def test_without_an_interpreter_it_is_said_that_nothing_was_tried(project, wheel):
    assert "not tried: " in fake.run("apply", project, wheel)


@posix
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_is_rolled_back(tmp_path, project, wheel, earlier):
    before = fake.snapshot(wheel)
    if earlier:  # another state of the patch set, which goes in any case
        fake.run("apply", project, wheel)
        (project / "torch_patch/_lobpcg_worker.py").write_bytes(b"answer = 'newer'\n")
    python = interpreter(tmp_path, "echo one gradcheck; echo Traceback >&2; echo 'ArithmeticError: off' >&2; exit 1")
    with pytest.raises(PatchError) as caught:
        apply(project, wheel, python)
    assert "fails in `one gradcheck`: ArithmeticError: off" in str(caught.value)
    assert "every byte is as it was before the patch" in str(caught.value)
    assert fake.snapshot(wheel) == before


@posix
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("kill -11 $$", "fails in `start`: exit status -11"),
        ("echo import torch; exit 3", "fails in `import torch`: exit status 3"),
    ],
)
def test_a_crash_is_a_failure(tmp_path, project, wheel, call, said):
    before = fake.snapshot(wheel)
    with pytest.raises(PatchError) as caught:
        apply(project, wheel, interpreter(tmp_path, call))
    assert said in str(caught.value)
    assert fake.snapshot(wheel) == before


@posix
def test_a_torch_that_cannot_be_imported_anyway_is_not_blamed_on_the_patch(tmp_path, project, wheel):
    before = fake.snapshot(wheel)
    python = interpreter(tmp_path, "exit 1", plain="echo 'ImportError: no library' >&2; exit 1")
    with pytest.raises(PatchError) as caught:
        apply(project, wheel, python)
    assert "cannot import torch without the patch either: ImportError: no library" in str(caught.value)
    assert "--no-smoke" in str(caught.value)
    assert fake.snapshot(wheel) == before


def test_an_interpreter_that_does_not_start(tmp_path, project, wheel):
    before = fake.snapshot(wheel)
    with pytest.raises(PatchError, match="without the patch either"):
        apply(project, wheel, str(tmp_path / "absent"))
    assert fake.snapshot(wheel) == before


@posix
@pytest.mark.parametrize("next_command", ["apply", "revert"])
def test_killed_in_the_call(tmp_path, project, wheel, next_command):
    """The files are in their places then, and nobody has found them right: whoever comes next takes them back."""
    before = fake.snapshot(wheel)
    python = interpreter(tmp_path, "kill -9 $PPID")
    assert in_child(lambda: apply(project, wheel, python) and 0) != 0
    assert word(project, wheel) == "interrupted"
    assert (wheel / "torch/_lobpcg.py").read_bytes() == fake.PATCHED_LOBPCG
    said = fake.run(next_command, project, wheel)
    assert "an interrupted apply was rolled back" in said
    assert word(project, wheel) == ("patched" if next_command == "apply" else "unpatched")
    fake.run("revert", project, wheel)
    assert fake.snapshot(wheel) == before
    assert not (wheel / FOLDER).exists()


def test_which_interpreter_is_asked(tmp_path, wheel):
    assert interpreter_of(None) == sys.executable
    assert interpreter_of(str(wheel)) is None
    for name in ("bin/python", "Scripts/python.exe"):
        environment = tmp_path / name.split("/")[0]
        fake.write_files(environment, {name: b""})
        assert interpreter_of(str(environment)) == str(environment / name)


# --- on a copy of the torch that is installed


@pytest.fixture
def copy(tmp_path, _no_waiting_for_the_disk):
    """A function that runs patch.py of a copy of this project on a copy of the installed torch, and both."""
    torch, here = tmp_path / "site-packages", tmp_path / "project"
    torch.mkdir()
    mirror(Path(importlib.util.find_spec("torch").origin).parent.parent, torch)
    for name in ("tools", "torch_patch"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*words):
        command = [sys.executable, str(here / "tools/patch.py"), *words]
        env = {**os.environ, "PYTHONPATH": str(torch)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    run("revert")  # the installed one may be patched
    return run, torch, here


def contents(folder):
    """The bytes of the files that are no links, bytecode included."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode) and not path.parent.is_symlink():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


WRONG = """

exact_reverse_mode = reverse_mode


def reverse_mode(pairs, gE, gX, *which):
    return exact_reverse_mode(pairs, 1.01 * gE, gX, *which)
"""


@posix
def test_the_installed_torch_passes_and_a_wrong_gradient_does_not(copy):
    run, torch, here = copy
    before = contents(torch)
    derivative = here / "torch_patch/_lobpcg_impl/derivative.py"
    right = derivative.read_text()
    derivative.write_text(right + WRONG)
    status, said = run("apply")
    assert status == 1
    assert "fails in `one solve with its gradient`: ArithmeticError: gradient" in said
    assert contents(torch) == before
    derivative.write_text(right)
    status, said = run("apply")
    assert (status, "tried: one solve" in said) == (0, True)
    assert run("verify")[0] == 0
    assert run("revert")[0] == 0
    assert contents(torch) == before
