"""A store that somebody else wrote, a target laid out to mislead, a disk that is full: nothing outside is touched."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import posix, refusal, run, unchanged_refusal, word
from patchset.errors import explained, PatchError
from patchset.git import changed_in_git
from patchset.store import FOLDER


PAYLOAD = b"print('from elsewhere')\n"
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
STATE = [DIGEST, 0o644, None]
PATCH = Path(__file__).resolve().parent.parent / "tools/patch.py"
COMMANDS = ("status", "verify", "apply", "revert")


def transaction(**fields):
    plain = {"format": 1, "action": "apply", "version": "2.13.0", "steps": [], "folders": [], "commits": []}
    return json.dumps({**plain, **fields}).encode()


def plant(target, name="journal.json", **fields):
    """A store that holds PAYLOAD and, under `name`, a transaction of these fields."""
    fake.write_files(target / FOLDER, {f"objects/{DIGEST}": PAYLOAD, name: transaction(**fields)})


@pytest.fixture
def checkout(tmp_path):
    return fake.make_checkout(tmp_path / "pytorch")


@pytest.fixture
def outside(tmp_path):
    """A folder that no command may change."""
    folder = fake.write_files(tmp_path / "victim", {"profile": b"mine\n", "__pycache__/_lobpcg.cpython-311.pyc": b""})
    before = fake.snapshot(folder)
    yield folder
    assert fake.snapshot(folder) == before


# --- what a store may say

PATHS = {
    "parent": "../victim/.profile",
    "inner parent": "torch/../../victim/.profile",
    "absolute": "/tmp/torch-patch-victim",
    "dot": "torch/./_lobpcg.py",
    "empty part": "torch//_lobpcg.py",
    "drive": "torch/c:/x.py",
    "backslash": "torch\\..\\..\\x.py",
    "newline": "torch/x\n.py",
    "NUL": "torch/x\0.py",
    "escape": "torch/\x1b[2J.py",
    "git": ".git/hooks/post-checkout",
    "other package": "pip/__init__.py",
    "nothing": "",
    "number": 7,
}


@pytest.mark.parametrize("name", ["journal.json", "state.json"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_that_leave_the_target(project, checkout, outside, name, path):
    plant(checkout, name, steps=[[path, STATE, None]])
    for command in COMMANDS:
        message = unchanged_refusal(command, project, checkout)
        assert f"{name} holds" in message
        assert "git checkout" in message
        assert "pip" not in message.replace(repr(path), "")


@pytest.mark.parametrize("path", ["torch/evil.py", "test/evil.py", "docs/source/conf.py", "torch-9.dist-info/RECORD"])
def test_paths_that_nothing_names(project, checkout, path):
    plant(checkout, steps=[[path, STATE, None]])
    assert word(project, checkout) == "interrupted"
    for command in ("apply", "revert"):
        assert f"names {path}, and neither the series nor RECORD" in unchanged_refusal(command, project, checkout)
    (checkout / FOLDER / "journal.json").rename(checkout / FOLDER / "state.json")
    for command in COMMANDS:
        assert f"names {path}, and neither" in unchanged_refusal(command, project, checkout)


def test_folders_that_nothing_names(project, checkout):
    (checkout / "torch/empty").mkdir()
    plant(checkout, steps=[["torch/_lobpcg_worker.py", STATE, None]], folders=["torch/empty"])
    assert "names torch/empty, and neither" in unchanged_refusal("revert", project, checkout)
    plant(checkout, folders=["torch/../../victim"])
    assert "not one inside this PyTorch" in unchanged_refusal("revert", project, checkout)


TORN = {
    "cut short": transaction()[:40],
    "empty": b"",
    "binary": b"\xff\x00",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another format": transaction(format=2),
    "another key": transaction(run="rm"),
    "another action": transaction(action="exec"),
    "steps of one": transaction(steps=[["torch/_lobpcg.py"]]),
    "steps in words": transaction(steps="abc"),
    "a path twice": transaction(steps=[["torch/_lobpcg.py", None, STATE]] * 2),
    "folders in words": transaction(folders="torch"),
    "one commit": transaction(commits=["a" * 40]),
    "options as commits": transaction(commits=["--upload-pack=x", "--exec=y"]),
    "numbers as commits": transaction(commits=[1, 2]),
    "set-user-ID": transaction(steps=[["torch/_lobpcg.py", [DIGEST, 0o4755, None], None]]),
    "sticky": transaction(steps=[["torch/_lobpcg.py", [DIGEST, 0o1644, None], None]]),
    "a negative mode": transaction(steps=[["torch/_lobpcg.py", [DIGEST, -1, None], None]]),
    "a mode in words": transaction(steps=[["torch/_lobpcg.py", [DIGEST, "644", None], None]]),
    "a digest that is a path": transaction(
        steps=[["torch/_lobpcg.py", ["../../../victim/profile", 0o644, None], None]]
    ),
    "a link in numbers": transaction(steps=[["torch/_lobpcg.py", [DIGEST, 0, 5], None]]),
}


@pytest.mark.parametrize("name", ["journal.json", "state.json"])
@pytest.mark.parametrize("data", TORN.values(), ids=TORN)
def test_torn_and_forged_transactions(project, checkout, name, data):
    fake.write_files(checkout / FOLDER, {name: data})
    for command in COMMANDS:
        message = unchanged_refusal(command, project, checkout)
        assert f"{name} holds" in message
        assert f"delete {checkout / FOLDER}" in message


def test_a_journal_without_its_contents(project, wheel):
    run("apply", project, wheel)
    shutil.rmtree(wheel / FOLDER / "objects")
    (wheel / FOLDER / "state.json").rename(wheel / FOLDER / "journal.json")
    (wheel / "torch/_lobpcg.py").write_bytes(fake.LOBPCG)  # half rolled back already
    assert word(project, wheel) == "interrupted"
    message = unchanged_refusal("revert", project, wheel)
    assert "is missing or damaged" in message
    assert "--force-reinstall" in message


def test_contents_that_are_not_what_they_are_called(project, wheel):
    run("apply", project, wheel)
    for backup in (wheel / FOLDER / "objects").iterdir():
        backup.write_bytes(PAYLOAD)
    assert "is missing or damaged" in unchanged_refusal("revert", project, wheel)


def test_a_checkout_advises_git_and_a_source_tree_neither(tmp_path, project, wheel, checkout):
    bare = fake.make_checkout(tmp_path / "bare", git=False)
    for target, advice in ((checkout, "git checkout"), (bare, "unpack the sources"), (wheel, "pip install --force")):
        (target / "torch/_lobpcg.py").unlink()
        message = unchanged_refusal("apply", project, target)
        assert advice in message
        assert ("pip" in message) == (target == wheel)


# --- links, kinds and owners


@posix
@pytest.mark.parametrize("part", ["", "objects", "journal.json", "state.json"])
def test_a_store_that_is_a_link(project, checkout, outside, part):
    plant(outside.parent, steps=[])
    (outside.parent / FOLDER).rename(outside.parent / "store")
    if part:
        (checkout / FOLDER).mkdir()
    (checkout / FOLDER / part).symlink_to(outside.parent / "store" / part)
    for command in COMMANDS:
        assert "is a link or of another kind" in unchanged_refusal(command, project, checkout)
    assert (outside.parent / "store/objects" / DIGEST).read_bytes() == PAYLOAD


@posix
@pytest.mark.parametrize("name", ["saving", "staged", ".gitignore"])
def test_links_within_the_store_are_not_written_through(project, checkout, outside, name):
    (checkout / FOLDER).mkdir()
    (checkout / FOLDER / name).symlink_to(outside / "profile")
    run("apply", project, checkout)
    run("revert", project, checkout)


@posix
def test_linked_objects_are_not_written_through(project, checkout, outside):
    digest = hashlib.sha256(fake.PATCHED_LOBPCG).hexdigest()
    (checkout / FOLDER / "objects").mkdir(parents=True)
    for name, link in ((digest, os.link), (hashlib.sha256(fake.LOBPCG).hexdigest(), os.symlink)):
        link(outside / "profile", checkout / FOLDER / "objects" / name)
    run("apply", project, checkout)
    run("verify", project, checkout)


@posix
def test_a_link_out_of_the_target_is_not_made(tmp_path, project, wheel, outside):
    run("apply", project, wheel)
    state = wheel / FOLDER / "state.json"
    fields = json.loads(state.read_text())
    for step in fields["steps"]:
        if step[0] == "torch/_lobpcg.py":  # as if it had been a link to a file of the same content
            step[1] = [step[1][0], 0, str(tmp_path / "cached.py")]
    (tmp_path / "cached.py").write_bytes(fake.LOBPCG)
    state.write_text(json.dumps(fields))
    run("revert", project, wheel)
    assert not (wheel / "torch/_lobpcg.py").is_symlink()
    assert (wheel / "torch/_lobpcg.py").read_bytes() == fake.LOBPCG


@posix
@pytest.mark.parametrize("state", ["unpatched", "patched", "interrupted"])
def test_a_folder_that_became_a_link(project, wheel, outside, state):
    if state != "unpatched":
        run("apply", project, wheel)
    if state == "interrupted":
        (wheel / FOLDER / "state.json").rename(wheel / FOLDER / "journal.json")
        (wheel / "torch/_lobpcg_worker.py").unlink()
    shutil.copytree(wheel / "torch/autograd", outside.parent / "autograd")
    shutil.rmtree(wheel / "torch/autograd")
    (wheel / "torch/autograd").symlink_to(outside.parent / "autograd")
    before = fake.snapshot(outside.parent / "autograd")
    for command in ("apply", "revert") if state != "unpatched" else ("apply",):
        assert "reached through a symbolic link" in unchanged_refusal(command, project, wheel)
    assert fake.snapshot(outside.parent / "autograd") == before


@posix
def test_linked_bytecode_is_left_alone(project, wheel, outside):
    (wheel / "torch/__pycache__").symlink_to(outside / "__pycache__")
    run("apply", project, wheel)
    run("revert", project, wheel)


@posix
@pytest.mark.parametrize("path", ["torch/_lobpcg.py", f"{FOLDER}/journal.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(project, wheel, path, kind):
    place = wheel / path
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    with pytest.raises(PatchError, match=r"no regular file|another kind"):
        run("apply", project, wheel)


@posix
def test_set_user_id_is_not_carried_along(project, wheel):
    (wheel / "torch/_lobpcg.py").chmod(0o4755)
    assert "torch/_lobpcg.py has mode 4755" in unchanged_refusal("apply", project, wheel)


@posix
def test_hard_links_keep_what_others_see(project, wheel, outside):
    for path in fake.PATCHED:
        os.link(wheel / path, outside.parent / Path(path).name)
    run("apply", project, wheel)
    assert (outside.parent / "_lobpcg.py").read_bytes() == fake.LOBPCG
    assert (outside.parent / "gradcheck.py").read_bytes() == fake.GRADCHECK


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_store_of_another_user(project, checkout):
    plant(checkout, steps=[])
    os.chown(checkout / FOLDER, 4321, 4321)
    for command in COMMANDS:
        assert "belongs to user 4321" in unchanged_refusal(command, project, checkout)


def test_files_of_the_user_in_the_store_stay(project, wheel):
    run("apply", project, wheel)
    fake.write_files(wheel / FOLDER, {"mine": b"1", "objects/mine": b"2"})
    run("revert", project, wheel)
    assert (wheel / FOLDER / "mine").read_bytes() == b"1"
    assert (wheel / FOLDER / "objects/mine").read_bytes() == b"2"
    assert word(project, wheel) == "unpatched"


# --- looking writes nothing


@pytest.mark.parametrize(
    "state", ["unpatched", "patched", "edited", "superseded", "interrupted", "left over", "committed"]
)
def test_status_and_verify_write_nothing(monkeypatch, project, checkout, state):
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Uthor")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "author@example.org")
    if state not in ("unpatched", "left over"):
        run("apply", project, checkout, state == "committed")
    if state == "committed":
        shutil.rmtree(checkout / FOLDER)
    elif state == "superseded":
        fake.run_git(checkout, "checkout", "-q", ".")
        for path in fake.PATCHED:
            os.utime(checkout / path, (1, 1))  # git would note in its index that they are as they were
    elif state == "edited":
        (checkout / "torch/_lobpcg.py").write_bytes(b"mine\n")
    elif state == "interrupted":
        (checkout / FOLDER / "state.json").rename(checkout / FOLDER / "journal.json")
    elif state == "left over":
        fake.write_files(checkout / FOLDER, {f"objects/{DIGEST}": PAYLOAD})
    before = everything(checkout)
    for command in ("status", "verify"):
        subprocess.run([sys.executable, str(PATCH), command, str(checkout)], check=False, capture_output=True)
    with fake.patcher(project, str(checkout), str) as running:
        running.status()
    assert everything(checkout) == before


def everything(folder):
    """Content and times of every file, git's own too."""
    return {path: (os.lstat(path).st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@posix
@pytest.mark.parametrize("setting", ["hook", "core.fsmonitor", "filter.x.clean", "filter.x.process", "gpg.program"])
def test_git_runs_no_program_of_the_checkout(tmp_path, monkeypatch, project, checkout, setting):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\ncat\n")
    program.chmod(0o755)
    if setting == "hook":
        for name in ("post-index-change", "reference-transaction", "post-checkout", "post-commit", "pre-commit"):
            shutil.copy(program, checkout / ".git/hooks" / name)
    else:
        fake.run_git(checkout, "config", setting, str(program))
        fake.run_git(checkout, "config", "log.showSignature", "true")
        fake.write_files(checkout / ".git/info", {"attributes": b"*.py filter=x\n"})
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Uthor")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "author@example.org")
    (checkout / "torch/_lobpcg.py").touch()
    run("status", project, checkout)
    run("apply", project, checkout, True)
    run("verify", project, checkout)
    run("export", project, checkout, tmp_path / "mails")
    run("revert", project, checkout)
    assert not (tmp_path / "ran").exists()


def test_another_repository_in_the_environment_is_not_asked(tmp_path, monkeypatch, checkout):
    monkeypatch.setattr(fake, "LOBPCG", b"# of another version\n")
    other = fake.make_checkout(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert changed_in_git(checkout, ["torch/_lobpcg.py"]) == []


# --- edits


def test_revert_by_force_keeps_edits_beside_the_originals(project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    (wheel / "torch/_lobpcg.py").write_bytes(b"mine\n")
    (wheel / "torch/autograd/gradcheck.py").unlink()
    (wheel / "torch/deeper/folder/problems.py").write_bytes(b"mine too\n")
    fake.write_files(wheel, {"torch/_lobpcg.py.edited": b"of last week\n"})
    assert word(project, wheel) == "edited"
    assert "--force" in refusal("revert", project, wheel)
    said = run("revert", project, wheel, True)
    assert "kept your torch/_lobpcg.py as _lobpcg.py.edited-1" in said
    after = fake.snapshot(wheel)
    kept = {
        "torch/_lobpcg.py.edited": b"of last week\n",
        "torch/_lobpcg.py.edited-1": b"mine\n",
        "torch/deeper/folder/problems.py.edited": b"mine too\n",
    }
    assert {name: after.pop(name)[1] for name in kept} == kept
    del after["torch/deeper"], after["torch/deeper/folder"]
    assert after == before
    assert word(project, wheel) == "unpatched"


def test_revert_by_force_without_edits_is_revert(project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    (wheel / "torch/_lobpcg.py").chmod(0o600)
    run("revert", project, wheel, True)
    assert fake.snapshot(wheel) == before


@posix
def test_an_edit_that_is_a_link_is_kept_by_its_content(project, wheel, outside):
    run("apply", project, wheel)
    (wheel / "torch/_lobpcg.py").unlink()
    (wheel / "torch/_lobpcg.py").symlink_to(outside / "profile")
    assert word(project, wheel) == "edited"
    run("revert", project, wheel, True)
    assert (wheel / "torch/_lobpcg.py").read_bytes() == fake.LOBPCG
    assert (wheel / "torch/_lobpcg.py.edited").read_bytes() == b"mine\n"


# --- a disk that is full, a RECORD that is not there


@pytest.mark.parametrize(("number", "words"), [(28, "the disk is full"), (13, "Permission denied"), (30, "Read-only")])
def test_what_the_system_refuses_is_explained(number, words):
    message = str(explained(OSError(number, os.strerror(number), "torch/_lobpcg.py")))
    assert message.startswith(words)
    assert "; expected " in message
    assert "rolled back" in message


@pytest.mark.parametrize("data", [None, b"\xff\xfe", b"torch/\0_lobpcg.py,,\n", b""])
def test_a_record_that_is_missing_or_torn(project, wheel, data):
    record = wheel / "torch-2.13.0+cpu.dist-info/RECORD"
    record.unlink()
    if data is not None:
        record.write_bytes(data)
    message = unchanged_refusal("apply", project, wheel)
    assert "; expected " in message
    assert "install" in message


def test_metadata_that_is_torn(project, wheel):
    for name, data in (("METADATA", b"\xff\xfe"), ("direct_url.json", b"{"), ("direct_url.json", b"[]")):
        fake.write_files(wheel / "torch-2.13.0+cpu.dist-info", {name: data})
        if name == "direct_url.json":
            (wheel / "torch/__init__.py").unlink(missing_ok=True)  # as an editable installation has it
        with pytest.raises(PatchError, match="expected"):
            run("apply", project, wheel)


def test_modes_of_new_folders(project, wheel):
    run("apply", project, wheel)
    assert stat.S_IMODE(os.stat(wheel / "torch/deeper/folder").st_mode) & 0o700 == 0o700
