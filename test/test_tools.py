"""The patch tool: on small stand-ins for PyTorch in every state they can be found in, and on the installed torch."""

import contextlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT_FOLDER / "tools"), str(Path(__file__).resolve().parent)]

import fake_pytorch as fake
from patchset import lock, toml
from patchset.classes import insert_classes
from patchset.commands import patcher
from patchset.errors import PatchError
from patchset.record import Record
from patchset.series import load_series
from patchset.store import FOLDER
from patchset.target import find_target
from patchset.weave import weave

EDITS = toml.loads(fake.EDITS)["edit"]
posix = pytest.mark.skipif(os.name == "nt", reason="needs fork, permissions and links")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test here cuts the power, and bringing each file to the disk takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def project(tmp_path):
    return fake.write_files(tmp_path / "project", fake.PROJECT)


@pytest.fixture
def wheel(tmp_path):
    return fake.make_wheel(tmp_path / "site-packages")


def run(command, project, target):
    """Carry out one command; returns what it says."""
    said = []
    with patcher(project, str(target), said.append) as running:
        assert getattr(running, command)() == 0
    return "\n".join(said)


def refusal(command, project, target):
    """The message with which a command refuses."""
    with pytest.raises(PatchError) as caught:
        run(command, project, target)
    return str(caught.value)


def word(project, target):
    """The state that status finds, having rolled back what was interrupted."""
    return run("status", project, target).replace("an interrupted run was rolled back\n", "").split(":")[0]


# --- the manifest's reader


TOML_ACCEPTED = [
    "",
    "a = 1\nb-c = -20 # comment\n_d = true\ne=false",
    'a = "x # y\\\\ \\n \\t \\""\nb = \'c:\\d\'',
    "a = '''\nfirst\n  'second'\n'''\nb = \"\"\"\none \\\\ \"two\"\n\"\"\"",
    "a = []\nb = [1, [2, 3], # why\n\n 'x',\n]\n",
    "[t]\na = 1\n[[r]]\na = 1\n[[r]]\na = 2\n[[r.s]]\nb = 1\n[t.u]\nc = ['[[r]]']\n",
    "a = 'x'\r\nb = '''\r\ny\r\n'''\r\n",
    fake.SERIES,
    fake.EDITS,
]
TOML_REFUSED = [
    "a = 1.5",
    "a = 1979-05-27",
    "a = {b = 1}",
    "a.b = 1",
    '"a" = 1',
    "a = 0x1F",
    "a = 1_000",
    "a = 012",
    "a = truer",
    "a = 1 b = 2",
    "a = 1\na = 2",
    "[t]\n[t]",
    "a = [1]\n[[a]]",
    "a = 1\n[a.b]",
    "[[t]\na = 1",
    "a = [1 2]",
    "a = [1, 2",
    "a = 'x\ny'",
    "a = '''x",
    'a = "\\u0041"',
    'a = """x\\\n  y"""',
    'a = """x""""',
    "a = '\x01'",
    "a",
]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib, the oracle, is new in 3.11")
@pytest.mark.parametrize("text", TOML_ACCEPTED)
def test_toml_reads_what_tomllib_reads(text):
    import tomllib

    assert toml.loads(text) == tomllib.loads(text)


@pytest.mark.parametrize("text", TOML_REFUSED)
def test_toml_refuses_the_rest_with_its_line(text):
    with pytest.raises(toml.TOMLError, match=r"line \d+: found "):
        toml.loads("# first\n" + text)


# --- weaving


def test_weave_only_inserts():
    woven = weave(fake.GRADCHECK, EDITS)
    kept = iter(woven.splitlines())
    assert all(line in kept for line in fake.GRADCHECK.splitlines())  # a subsequence
    assert len(woven.splitlines()) == len(fake.GRADCHECK.splitlines()) + 1 + 2 + 6 + 1
    assert b"            (two lines)\n        symmetric (bool): perturb symmetric\n            inputs only\n" in woven


def test_woven_function_is_upstreams_without_the_keyword():
    names = {}
    exec(weave(fake.GRADCHECK, EDITS), names)
    assert names["gradcheck"](None, None) == ["eps", "func", "inputs", "masked"]
    assert names["gradcheck"].__kwdefaults__["symmetric"] is False


def test_weave_keeps_carriage_returns_and_non_ascii_columns():
    text = fake.GRADCHECK.replace(b"masked: bool = False,", "masked: 'µ\f' = 'éè',".encode())
    assert weave(text.replace(b"\n", b"\r\n"), EDITS) == weave(text, EDITS).replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"def gradcheck", b"def other", "0 functions gradcheck"),
        (b"def gradgradcheck", b"def gradcheck", "2 functions gradcheck"),
        (b"    eps: float", b"    symmetric=1,\n    eps: float", "already has symmetric"),
        (b"bool = False,  #", b"bool = False  #", "a comma and the end of the line"),
        (b"        masked (bool): sparse only\n            (two", b"        x\n            (two", "no docstring entry"),
        (b"        eps (float): step", b"        masked (bool): twice", "2 entries for masked"),
        (b'    r"""Compare derivatives.\n', b'    x = r"""Compare derivatives.\n', "has no docstring"),
        (b"    *,\n    eps: float = 1e-6,\n", b"    eps: float = 1e-6,\n", "no keyword-only parameter"),
        (b"import math\n", b"import math\rx = 1\n", "carriage return"),
        (b"import math\n", b"import math(\n", "expected Python"),
        (b"import math\n", b"# \xff\n", "expected UTF-8"),
    ],
)
def test_weave_refuses_a_missing_or_ambiguous_anchor(old, new, message):
    assert old in fake.GRADCHECK
    with pytest.raises(PatchError, match=message.replace("(", r"\(")):
        weave(fake.GRADCHECK.replace(old, new, 1), EDITS)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"parameters": ["a=1"]}, "the keys"),
        ({"function": "gradcheck"}, "the keys"),
        ({"function": "gradcheck", "blocks": "pass"}, "the keys"),
        ({"function": "gradcheck", "parameters": ["a"]}, "parameter 'a'"),
        ({"function": "gradcheck", "parameters": ["a=1, b=2"]}, "parameter 'a=1, b=2'"),
        ({"function": "gradcheck", "docstring": "a"}, "docstring_after"),
        ({"function": "gradcheck", "docstring": 'a """', "docstring_after": ["eps"]}, "plain text"),
        ({"function": "gradcheck", "block": "if True:"}, "complete statements|expected Python"),
        ({"function": "gradcheck", "block": "x = '''a\nb'''"}, "changed its meaning"),
    ],
)
def test_weave_refuses_a_faulty_edit(edit, message):
    with pytest.raises(PatchError, match=message):
        weave(fake.GRADCHECK, [edit])


# --- test classes


def test_classes_go_before_main_with_their_imports():
    result = insert_classes(fake.THEIR_TESTS, fake.OUR_TESTS, ["TestSymmetric"]).decode()
    inserted = result[result.index("import math") : result.index("if __name__")]
    assert inserted.startswith("import math\nfrom torch.autograd import gradcheck\n\n\n# What a comment")
    assert result.replace(inserted, "").encode() == fake.THEIR_TESTS
    assert "import torch\n" not in inserted  # upstream's file has it


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        (fake.THEIR_TESTS.replace(b"'__main__'", b"'main'"), fake.OUR_TESTS, "0 times if __name__"),
        (fake.THEIR_TESTS.replace(b"TestTheirs", b"TestSymmetric"), fake.OUR_TESTS, "already defines TestSymmetric"),
        (fake.THEIR_TESTS, b"import torch\n", "no TestSymmetric"),
        (fake.THEIR_TESTS, b"helper = 1\n" + fake.OUR_TESTS.replace(b"()):", b"helper)):"), "need helper"),
        (b"import x as math\n" + fake.THEIR_TESTS, fake.OUR_TESTS, "binds math otherwise"),
    ],
)
def test_classes_refuse_clashes_and_unmet_needs(theirs, ours, message):
    if b"helper" in ours:
        ours = ours.replace(b"gradcheck(torch.sin, ())", b"helper")
    with pytest.raises(PatchError, match=message):
        insert_classes(theirs, ours, ["TestSymmetric"])


# --- a wheel, from unpatched to patched and back


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_round_trip_on_a_wheel(tmp_path, project, newline):
    wheel = fake.make_wheel(tmp_path / "site-packages", newline=newline)
    before = fake.snapshot(wheel)
    assert word(project, wheel) == "unpatched"
    assert run("apply", project, wheel).startswith("patched 6 files")
    patched = fake.snapshot(wheel)
    assert word(project, wheel) == "patched"
    assert run("verify", project, wheel).startswith("verified 6 files")
    assert run("apply", project, wheel).startswith("already patched")
    assert fake.snapshot(wheel) == patched
    assert patched["torch/_lobpcg.py"][1] == fake.PROJECT["torch_patch/_lobpcg.py"]
    assert patched["torch/autograd/gradcheck.py"][0] == 0o640
    assert newline == b"\n" or b"\r\n    symmetric: 'bool' = False,\r\n" in patched["torch/autograd/gradcheck.py"][1]
    assert not [name for name in patched if name.startswith("torch/") and "test" in name]
    assert run("revert", project, wheel).startswith("restored 6 files")
    assert fake.snapshot(wheel) == before
    assert run("revert", project, wheel).startswith("not patched")


def test_record_describes_the_patched_files(project, wheel):
    name = "torch-2.13.0+cpu.dist-info/RECORD"
    before = (wheel / name).read_bytes().splitlines()
    run("apply", project, wheel)
    after = (wheel / name).read_bytes().splitlines()
    record = Record((wheel / name).read_bytes())
    for path in fake.PATCHED + fake.NEW:
        assert record.matches(path, (wheel / path).read_bytes())
    assert len(after) == len(before) + len(fake.NEW)
    assert sum(a != b for a, b in zip(before, after)) == len(fake.PATCHED)
    assert b'"other/a,b.py"' in b"\n".join(after)


def test_bytecode_of_replaced_files_goes(project, wheel):
    kept = wheel / "torch/__pycache__/_lobpcg_extra.cpython-311.pyc"
    stale = [
        wheel / "torch/__pycache__/_lobpcg.cpython-311.pyc",
        wheel / "torch/__pycache__/_lobpcg.cpython-39.opt-1.pyc",
    ]
    for command in ("apply", "revert"):
        for path in [kept, *stale]:
            fake.write_files(path.parent, {path.name: b""})
        run(command, project, wheel)
        assert kept.exists() and not any(path.exists() for path in stale)


def test_apply_after_a_change_of_the_patch_set(project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    (project / "torch_patch/_lobpcg_worker.py").write_bytes(b"answer = 'newer'\n")
    assert word(project, wheel) == "outdated"
    assert "torch/_lobpcg_worker.py" in refusal("verify", project, wheel)
    run("apply", project, wheel)
    run("verify", project, wheel)
    assert (wheel / "torch/_lobpcg_worker.py").read_bytes() == b"answer = 'newer'\n"
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before


def test_revert_needs_no_series(project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    shutil.rmtree(project / "torch_patch")
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before


# --- a wheel in other states


def unchanged_refusal(command, project, target):
    before = fake.snapshot(target)
    message = refusal(command, project, target)
    assert fake.snapshot(target) == before
    return message


@pytest.mark.parametrize("path", fake.PATCHED)
def test_apply_refuses_a_file_that_is_not_as_installed(project, wheel, path):
    with open(wheel / path, "ab") as file:
        file.write(b"# mine\n")
    assert f"{path} is not the file that was installed" in unchanged_refusal("apply", project, wheel)
    assert word(project, wheel) == "unpatchable"


def test_apply_refuses_a_new_file_that_exists(project, wheel):
    (wheel / "torch/_lobpcg_worker.py").write_bytes(b"")
    assert "torch/_lobpcg_worker.py is already there" in unchanged_refusal("apply", project, wheel)


def test_apply_reports_every_obstacle(project, wheel):
    (wheel / "torch/_lobpcg_worker.py").write_bytes(b"")
    (wheel / "torch/_lobpcg.py").unlink()
    assert len(unchanged_refusal("apply", project, wheel).split("\n")) == 2


def test_a_foreign_edit_of_a_patched_file_is_kept(project, wheel):
    run("apply", project, wheel)
    with open(wheel / "torch/_lobpcg.py", "ab") as file:
        file.write(b"# mine\n")
    for command in ("apply", "verify", "revert"):
        assert "torch/_lobpcg.py was changed in line 6" in unchanged_refusal(command, project, wheel)
    assert word(project, wheel) == "edited"


def test_verify_sees_modes_and_missing_files(project, wheel):
    run("apply", project, wheel)
    (wheel / "torch/_lobpcg.py").chmod(0o600)
    (wheel / "torch/_lobpcg_worker.py").unlink()
    message = refusal("verify", project, wheel)
    assert "mode 600; expected 644" in message and "_lobpcg_worker.py is missing" in message


def test_verify_sees_damaged_backups(project, wheel):
    run("apply", project, wheel)
    for backup in (wheel / FOLDER / "objects").iterdir():
        backup.write_bytes(b"")
    assert "is missing or damaged" in refusal("verify", project, wheel)
    assert "is missing or damaged" in unchanged_refusal("revert", project, wheel)


@pytest.mark.parametrize(
    "version, message", [("2.5.1", "expected version 2.6.0 or newer"), ("1.13.1", "2.6.0 or newer")]
)
def test_old_versions_are_refused(tmp_path, project, version, message):
    wheel = fake.make_wheel(tmp_path / "site-packages", version=version)
    assert message in unchanged_refusal("apply", project, wheel)


def test_an_unknown_version_is_patched_and_called_untested(tmp_path, project):
    wheel = fake.make_wheel(tmp_path / "site-packages", version="2.99.0.dev20260101")
    assert "untested: 2.99.0" in run("status", project, wheel)
    assert "untested: 2.99.0" in run("apply", project, wheel)


def test_versions_must_agree(project, wheel):
    (wheel / "torch/version.py").write_bytes(b"__version__ = '2.12.0'\n")
    assert "2.12.0" in refusal("status", project, wheel)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.0"])
def test_superseded_by_a_reinstallation(tmp_path, project, wheel, version):
    run("apply", project, wheel)
    for path in fake.NEW:  # pip removes what RECORD lists
        (wheel / path).unlink()
    shutil.rmtree(wheel / "torch-2.13.0+cpu.dist-info")
    fake.make_wheel(wheel, version=version)
    assert word(project, wheel) == "superseded"
    assert "reinstalled" in refusal("verify", project, wheel)
    assert "applying anew" in run("apply", project, wheel)
    run("verify", project, wheel)


def test_superseded_with_new_files_left_behind(tmp_path, project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    fake.make_wheel(wheel)
    assert word(project, wheel) == "superseded"
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before


@posix
def test_links_into_a_cache_are_not_written_through(tmp_path, project, wheel):
    cache = fake.write_files(tmp_path / "cache", {"gradcheck.py": fake.GRADCHECK, "_lobpcg.py": fake.LOBPCG})
    for path, link in (("torch/_lobpcg.py", os.link), ("torch/autograd/gradcheck.py", os.symlink)):
        (wheel / path).unlink()
        link(cache / Path(path).name, wheel / path)
    before, cached = fake.snapshot(wheel), fake.snapshot(cache)
    run("apply", project, wheel)
    assert fake.snapshot(cache) == cached
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before and fake.snapshot(cache) == cached


@posix
def test_a_link_whose_cache_is_gone_comes_back_as_a_file(tmp_path, project, wheel):
    cache = fake.write_files(tmp_path / "cache", {"_lobpcg.py": fake.LOBPCG})
    (wheel / "torch/_lobpcg.py").unlink()
    (wheel / "torch/_lobpcg.py").symlink_to(cache / "_lobpcg.py")
    run("apply", project, wheel)
    shutil.rmtree(cache)
    run("revert", project, wheel)
    assert (wheel / "torch/_lobpcg.py").read_bytes() == fake.LOBPCG


@posix
def test_a_linked_folder_is_refused(tmp_path, project, wheel):
    (wheel / "torch/autograd").rename(tmp_path / "autograd")
    (wheel / "torch/autograd").symlink_to(tmp_path / "autograd")
    assert "reached through a symbolic link" in unchanged_refusal("apply", project, wheel)
    (wheel / "torch").rename(tmp_path / "torch")
    (wheel / "torch").symlink_to(tmp_path / "torch")
    assert f"give {tmp_path} as TARGET" in refusal("apply", project, wheel)


def in_child(action):
    """The exit status of a forked process that runs `action`."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = action() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@posix
def test_no_permission(project):
    with tempfile.TemporaryDirectory() as folder:
        wheel = fake.make_wheel(Path(folder) / "site-packages")
        files = fake.write_files(Path(folder) / "project", fake.PROJECT)
        os.chmod(folder, 0o755)
        (wheel / "torch/autograd/gradcheck.py").chmod(0o644)
        (wheel / "torch").chmod(0o555)

        def attempt():
            if os.geteuid() == 0:  # whom no permission stops
                os.setgid(65534)
                os.setuid(65534)
            assert word(files, wheel) == "unpatched"
            return 42 if "no permission to write in" in unchanged_refusal("apply", files, wheel) else 1

        assert in_child(attempt) == 42
        (wheel / "torch").chmod(0o755)


@posix
def test_lock(project, wheel):
    def attempt():
        return 42 if "another patch command" in unchanged_refusal("apply", project, wheel) else 1

    with lock.locked(wheel):
        assert in_child(attempt) == 42
    assert word(project, wheel) == "unpatched"


@posix
def test_commands_at_the_same_time(project, wheel):
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(PatchError):
                run("apply", project, wheel)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    run("apply", project, wheel)
    run("verify", project, wheel)


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
        return 0

    return in_child(attempt)


@pytest.fixture
def bench(project):
    """A wheel with a link, before and after; a function that makes fresh copies of either state."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        wheel = fake.make_wheel(folder / "before")
        (folder / "cached.py").write_bytes(fake.LOBPCG)
        (wheel / "torch/_lobpcg.py").unlink()
        (wheel / "torch/_lobpcg.py").symlink_to(folder / "cached.py")
        shutil.copytree(wheel, folder / "after", symlinks=True)
        run("apply", project, folder / "after")

        def fresh(state):
            shutil.rmtree(folder / "site-packages", ignore_errors=True)
            return Path(shutil.copytree(folder / state, folder / "site-packages", symlinks=True))

        yield fresh, fake.snapshot(folder / "before"), fake.snapshot(folder / "after")


def without_store(files):
    return {name: entry for name, entry in files.items() if name.split("/")[0] != FOLDER}


def settled(project, wheel, before, after):
    """The next command finds one of the two states, whole, and can go on to the other and back."""
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
@pytest.mark.parametrize("command, start, end", [("apply", "before", "patched"), ("revert", "after", "unpatched")])
def test_killed_at_every_write(project, bench, command, start, end):
    fresh, before, after = bench
    outcomes = []
    for survive in range(1000):
        wheel = fresh(start)
        if killed_run(command, project, wheel, survive) == 0:
            break
        outcomes.append(settled(project, wheel, before, after))
    assert len(outcomes) > 40 and survive < 999
    assert set(outcomes) == {"patched", "unpatched"}
    # Once done it stays done: the outcome changes once.
    assert outcomes.index(end) == len(outcomes) - outcomes.count(end)


@posix
@pytest.mark.parametrize(
    "command, start, survive",
    [("apply", "before", n) for n in (5, 60, 90)] + [("revert", "after", n) for n in (5, 25, 45)],
)
def test_killed_while_rolling_back(project, bench, command, start, survive):
    fresh, before, after = bench
    for again in range(1000):
        wheel = fresh(start)
        assert killed_run(command, project, wheel, survive) == 137
        if killed_run("status", project, wheel, again) == 0:
            break
        settled(project, wheel, before, after)
    assert again < 999


@posix
@pytest.mark.parametrize("name", ["write", "replace", "fsync"])
def test_a_failing_disk_is_rolled_back_at_once(monkeypatch, project, wheel, name):
    before, real = fake.snapshot(wheel), getattr(os, name)
    for survive in range(0, 60, 3):
        left = [survive]

        def failing(*arguments, **options):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing)
            with contextlib.suppress(OSError):
                run("apply", project, wheel)
        if left[0] < 0:
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
def test_files_changed_after_an_interruption_are_kept(project, wheel):
    assert killed_run("apply", project, wheel, 75) == 137
    assert (wheel / FOLDER / "journal.json").exists()
    (wheel / "torch/_lobpcg.py").write_bytes(b"mine\n")
    assert "files changed since: torch/_lobpcg.py" in unchanged_refusal("status", project, wheel)


# --- checkouts


@pytest.mark.parametrize("suffix", ["md", "rst"])
def test_round_trip_on_a_checkout(tmp_path, project, suffix):
    tree = fake.make_checkout(tmp_path / "pytorch", suffix=suffix)
    before = fake.snapshot(tree)
    run("apply", project, tree)
    run("verify", project, tree)
    assert run("apply", project, tree).startswith("already patched")
    changed = [line[3:] for line in fake.run_git(tree, "status", "--porcelain", "-uall").splitlines()]
    assert sorted(changed) == sorted(
        [*fake.PATCHED, *fake.NEW, "test/test_autograd.py", f"docs/source/notes/lobpcg.{suffix}"]
    )
    compile((tree / "test/test_autograd.py").read_bytes(), "test_autograd.py", "exec")
    run("revert", project, tree)
    assert fake.snapshot(tree) == before
    assert fake.run_git(tree, "status", "--porcelain") == ""


def test_two_patches_add_to_one_test_file(tmp_path, project):
    second = b"class TestMore:\n    pass\n\n\n"
    fake.write_files(project, {"test/test_autograd.py": second + fake.OUR_TESTS})
    manifest = project / "torch_patch/series.toml"
    manifest.write_bytes(manifest.read_bytes() + b'classes = ["test/test_autograd.py::TestMore"]\n')
    tree = fake.make_checkout(tmp_path / "pytorch")
    run("apply", project, tree)
    lines = (tree / "test/test_autograd.py").read_text().split("\n")
    assert [line for line in lines if line.startswith(("class", "if"))] == [
        "class TestTheirs:",
        "class TestSymmetric(object):",
        "class TestMore:",
        "if __name__ == '__main__':",
    ]


@pytest.mark.parametrize("path", [*fake.PATCHED, "test/test_autograd.py"])
def test_uncommitted_changes_are_refused(tmp_path, project, path):
    tree = fake.make_checkout(tmp_path / "pytorch")
    with open(tree / path, "ab") as file:
        file.write(b"\n# mine\n")
    assert f"uncommitted changes in {path}" in unchanged_refusal("apply", project, tree)


def test_other_changes_do_not_matter(tmp_path, project):
    tree = fake.make_checkout(tmp_path / "pytorch")
    (tree / "setup.py").write_bytes(b"# mine\n")
    run("apply", project, tree)


def test_a_checkout_restored_by_git_is_superseded(tmp_path, project):
    tree = fake.make_checkout(tmp_path / "pytorch")
    run("apply", project, tree)
    fake.run_git(tree, "checkout", "-q", ".")
    assert word(project, tree) == "superseded"
    run("apply", project, tree)
    run("verify", project, tree)


def test_a_source_tree_without_git(tmp_path, project):
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    before = fake.snapshot(tree)
    run("apply", project, tree)
    run("verify", project, tree)
    run("revert", project, tree)
    assert fake.snapshot(tree) == before


# --- what TARGET means


def test_targets(tmp_path, monkeypatch, wheel):
    environment = tmp_path / "venv"
    place = environment / "lib/python3.11/site-packages"
    place.parent.mkdir(parents=True)
    shutil.copytree(wheel, place)
    (environment / "lib64").symlink_to("lib")
    assert find_target(str(environment)).root == place
    assert find_target(str(wheel)) == (wheel, "2.13.0+cpu", "torch-2.13.0+cpu.dist-info/RECORD")
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    assert find_target(str(tree)) == (tree, "2.13.0a0", None)
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert find_target(None).root == wheel
    assert "torch" not in sys.modules


@posix
def test_a_linked_package_is_found_where_it_is_installed(tmp_path, monkeypatch, wheel):
    shutil.copytree(wheel, tmp_path / "cache")
    (wheel / "torch/__init__.py").unlink()
    (wheel / "torch/__init__.py").symlink_to(tmp_path / "cache/torch/__init__.py")
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert find_target(None).root == wheel


@pytest.mark.parametrize("style", ["direct_url.json", "egg-link"])
def test_an_editable_build_is_its_checkout(tmp_path, style):
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    place = tmp_path / "venv/lib/python3.11/site-packages"
    if style == "egg-link":
        fake.write_files(place, {"torch.egg-link": f"{tree}\n.".encode()})
    else:
        source = f'{{"url": "{tree.as_uri()}", "dir_info": {{"editable": true}}}}'.encode()
        metadata = b"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0a0\n\n"
        info = place / "torch-2.13.0a0.dist-info"
        fake.write_files(info, {"METADATA": metadata, "direct_url.json": source, "RECORD": b""})
    assert find_target(str(tmp_path / "venv")).root == tree


def without_info(wheel):
    shutil.rmtree(wheel / "torch-2.13.0+cpu.dist-info")


def without_record(wheel):
    (wheel / "torch-2.13.0+cpu.dist-info/RECORD").unlink()


def twice_installed(wheel):
    fake.write_files(wheel / "torch-2.12.0.dist-info", {"METADATA": b"Name: torch\nVersion: 2.12.0\n\n"})


def half_uninstalled(wheel):
    (wheel / "torch/__init__.py").unlink()


def uninstalled(wheel):
    shutil.rmtree(wheel / "torch")


@pytest.mark.parametrize(
    "change, message",
    [
        (without_info, "no torch-.*dist-info"),
        (without_record, "has no RECORD"),
        (twice_installed, "torch-2.12.0.dist-info, torch-2.13.0"),
        (half_uninstalled, "has no __init__.py"),
        (uninstalled, "holds no torch"),
    ],
)
def test_no_target(wheel, change, message):
    change(wheel)
    with pytest.raises(PatchError, match=message):
        find_target(str(wheel))


def test_no_target_at_all(tmp_path, wheel):
    for folder, message in (("nowhere", "is not a folder"), (".", "holds no torch"), ("site-packages/torch", "give ")):
        with pytest.raises(PatchError, match=message):
            find_target(str(tmp_path / folder))
    (tmp_path / "venv/lib/python3.11/site-packages").mkdir(parents=True)
    with pytest.raises(PatchError, match="0 of the site-packages folders"):
        find_target(str(tmp_path / "venv"))


# --- the series


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b'"torch/_lobpcg_worker.py", ', b"", "_lobpcg_worker.py is in no patch"),
        (b'"torch/_lobpcg_worker.py", ', b'"torch/_lobpcg_worker.py", "torch/more.py", ', "more.py, which is missing"),
        (
            b'replace = ["torch/_lobpcg.py"]',
            b'replace = ["torch/_lobpcg_worker.py"]',
            "names torch/_lobpcg_worker.py 2 times",
        ),
        (b'why = "it matters"\n', b"", "a reason"),
        (b"replace =", b"replaces =", "unknown keys: replaces"),
        (b"oldest", b"eldest", r"\[supported\]"),
        (b"oldest =", b"oldest", "line 3: "),
        (b"torch/_lobpcg.py", b"lobpcg.py", "a path in torch/, test/ or docs/"),
    ],
)
def test_a_faulty_series_is_refused(project, old, new, message):
    manifest = project / "torch_patch/series.toml"
    assert old in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(old, new, 1))
    with pytest.raises(PatchError, match=message):
        load_series(project)


def test_the_series_of_this_project_names_its_files():
    """Both directions: a file no patch names, and a name without a file."""
    series = load_series(PROJECT_FOLDER)
    for patch in series.patches:
        for path in patch.weave:
            assert series.edits(path)


# --- the torch that runs these tests


@pytest.fixture
def installed(tmp_path):
    """The installed torch, unpatched: its metadata and the files that the series touches, copied."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        pytest.skip("torch is not installed")
    target = find_target(str(Path(spec.origin).parent.parent))
    if target.is_checkout:
        pytest.skip("torch is a development build")
    root = tmp_path / "installed"
    touched = ["torch/__init__.py", "torch/version.py", *fake.PATCHED]
    touched += [path for path in all_paths() if (target.root / path).exists()]
    for path in dict.fromkeys(touched):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(target.root / path, root / path)
    for folder in (Path(target.record).parent, Path(FOLDER)):
        if (target.root / folder).exists():
            shutil.copytree(target.root / folder, root / folder)
    run("revert", PROJECT_FOLDER, root)
    return root


def all_paths():
    rows = toml.loads((PROJECT_FOLDER / "torch_patch/series.toml").read_text())["patch"]
    return [path for row in rows for kind in ("new", "replace", "weave") for path in row.get(kind, [])]


def test_a_stand_in_patches_the_installed_torch(project, installed):
    before = fake.snapshot(installed)
    run("apply", project, installed)
    run("verify", project, installed)
    woven = (installed / "torch/autograd/gradcheck.py").read_text()
    assert woven.count("symmetric: 'bool' = False,") == 1
    run("revert", project, installed)
    assert fake.snapshot(installed) == before


def test_the_series_patches_the_installed_torch(installed):
    before = fake.snapshot(installed)
    assert run("apply", PROJECT_FOLDER, installed).startswith("patched")
    run("verify", PROJECT_FOLDER, installed)
    for path in all_paths():
        compile((installed / path).read_bytes(), path, "exec")
    run("revert", PROJECT_FOLDER, installed)
    assert fake.snapshot(installed) == before


def test_command_line(wheel):
    script = [sys.executable, str(PROJECT_FOLDER / "tools/patch.py")]
    done = subprocess.run([*script, "revert", str(wheel)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"not patched, nothing to do: torch 2.13.0+cpu in {wheel}\n")
    done = subprocess.run([*script, "revert", str(wheel / "nothing")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("patch: ")
    assert subprocess.run([*script, "undo"], capture_output=True).returncode == 2


@pytest.mark.skipif("TORCH_PATCH_SLOW" not in os.environ, reason="installs torch; set TORCH_PATCH_SLOW=1")
def test_pip_sees_an_ordinary_torch(tmp_path):
    """In an environment of its own: pip check, import, scripting and uninstall behave as without the patch."""
    version = find_target(None).version
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")

    def call(*arguments):
        return subprocess.run([python, *arguments], check=True, capture_output=True, text=True).stdout

    call("-m", "pip", "install", "-q", f"torch=={version.split('+')[0]}", "numpy")
    place = Path(call("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    before = set(os.listdir(place)) - {"__pycache__"}
    patch = str(PROJECT_FOLDER / "tools/patch.py")
    call(patch, "apply")
    call(patch, "verify", str(tmp_path / "venv"))
    call("-m", "pip", "check")
    imports = [path[: -len(".py")].replace("/", ".") for path in all_paths() if "problems" not in path]
    call("-c", "import torch; torch.jit.script(torch.lobpcg); import " + ", ".join(imports))
    call("-m", "pip", "uninstall", "-y", "torch")
    left = set(os.listdir(place)) - {"__pycache__"}
    assert left - before == {FOLDER}
    assert not {"torch", "torchgen", "functorch"} & left
