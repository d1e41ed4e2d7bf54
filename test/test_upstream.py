"""tools/upstream_tests.py: the copy of the tests, what is recorded of a run, and what counts as fixed and broken."""

import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import fake_pytorch as fake
import pytest
from upstream import source


SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "upstream_tests.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("upstream_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DONE = {"": "finished"}


@pytest.mark.parametrize(
    ("before", "after", "fixed", "broken", "unfinished"),
    [
        ({"a": "failed", **DONE}, {"a": "passed", **DONE}, ["a"], [], False),
        ({"a": "passed", **DONE}, {"a": "failed", **DONE}, [], ["a"], False),
        ({"a": "passed", **DONE}, {"a": "crashed"}, [], ["a"], True),
        ({"a": "failed", **DONE}, {"a": "failed", **DONE}, [], [], False),
        ({"a": "failed", **DONE}, {"a": "skipped", **DONE}, [], [], False),  # hidden, not fixed
        ({"a": "failed", **DONE}, DONE, [], [], False),
        (DONE, {"ours": "failed", **DONE}, [], ["ours"], False),
        ({"a": "passed"}, {"a": "passed"}, [], [], False),  # neither came to its end
        # a test over operators that no operator passes, and one that the plain one does
        ({"x_sin_cpu": "failed", **DONE}, {"x_lobpcg_cpu": "failed", **DONE}, [], [], False),
        ({"x_sin_cpu": "passed", **DONE}, {"x_lobpcg_cpu": "failed", **DONE}, [], ["x_lobpcg_cpu"], False),
        ({"a": "passed", **DONE}, {"a": "passed"}, [], [], True),
    ],
)
def test_what_counts(tool, before, after, fixed, broken, unfinished):
    assert tool.compare(before, after) == (fixed, broken, unfinished)


TESTS = """
import os
import unittest

class T(unittest.TestCase):
    def test_right(self):
        pass

    def test_wrong(self):
        self.fail()

    def test_left_out(self):
        self.skipTest("why not")

    def tearDown(self):
        assert "test_late" not in self.id()

    def test_late(self):
        pass

    def test_slow_gradcheck(self):
        assert os.environ["PYTORCH_TEST_WITH_SLOW_GRADCHECK"] == "1"
"""


def outcomes(tool, monkeypatch, folder, text, timeout=60.0):
    job = tool.Job("sub/test_x.py", slow_gradcheck=True)
    monkeypatch.setattr(tool, "JOBS", [job])
    fake.write_files(folder, {"tests/sub/test_x.py": text.encode()})
    runner = tool.Runner("baseline", sys.executable, None, folder / "tests", timeout)
    return {name.split("::")[-1]: outcome for name, outcome in runner.run(job).items()}


def test_record_of_a_run(tool, monkeypatch, tmp_path):
    assert outcomes(tool, monkeypatch, tmp_path, TESTS) == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_left_out": "skipped",
        "test_late": "failed",
        "test_slow_gradcheck": "passed",
        "": "finished",
    }


def test_record_of_a_crash_and_of_a_file_that_is_cut_short(tool, monkeypatch, tmp_path):
    crash = TESTS.replace("self.fail()", "os._exit(3)")
    found = outcomes(tool, monkeypatch, tmp_path / "crash", crash)
    assert found["test_wrong"] == "crashed"
    assert found["test_right"] == "passed"
    assert "" not in found
    hang = TESTS.replace("self.fail()", "__import__('time').sleep(600)")
    log = tmp_path / "hang/baseline-0.log"
    late = lambda: 60.0 * (log.exists() and "::test_wrong" in log.read_text())  # the limit is over when it hangs
    monkeypatch.setattr(tool.time, "monotonic", late)
    monkeypatch.setattr(tool, "SILENCE", 0.5)
    found = outcomes(tool, monkeypatch, tmp_path / "hang", hang)
    assert found["test_wrong"] == "crashed"
    assert "test_sub" not in found


def test_record_of_a_file_that_cannot_be_imported(tool, monkeypatch, tmp_path):
    found = outcomes(tool, monkeypatch, tmp_path, "import nowhere_at_all\n")
    assert found[" "] == "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert tool.counts(found) == "not imported: ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert tool.compare(found, found) == ([], [], False)


@pytest.mark.parametrize("woven", [False, True])
def test_copy_of_the_tests(tool, monkeypatch, tmp_path, project, woven):
    monkeypatch.setattr(tool, "ROOT", project)
    monkeypatch.setattr(tool, "JOBS", [tool.Job("test_autograd.py")])
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    text = b"super(self.__class__, self).setUp()\n" + fake.THEIR_TESTS
    fake.write_files(tree, {"test/test_autograd.py": text, "test/data/expected": b"super(self.__class__, self)"})
    before = fake.snapshot(tree)
    tool.copy_tests(tree, tmp_path / "tests", woven)
    assert fake.snapshot(tree) == before
    copied = (tmp_path / "tests/test_autograd.py").read_text()
    assert copied.startswith("super().setUp()\n")
    assert ("class TestSymmetric" in copied) == woven
    assert (tmp_path / "tests/data/expected").read_bytes() == b"super(self.__class__, self)"


def test_helpers_are_brought_back_where_they_are_missing(monkeypatch):
    from upstream import older_tests

    place = types.ModuleType("older_place")
    place.here = "old"
    newer = types.ModuleType("newer_place")
    newer.moved = "moved"
    monkeypatch.setitem(sys.modules, "older_place", place)
    monkeypatch.setitem(sys.modules, "newer_place", newer)
    moved = {
        ("older_place", "here"): ("newer_place", "moved"),
        ("older_place", "gone"): ("newer_place", "moved"),
        ("older_place", "flag"): True,
        ("older_place", "nowhere"): ("newer_place", "nowhere"),
        ("no_place", "x"): True,
    }
    monkeypatch.setattr(older_tests, "MOVED", moved)
    older_tests.bridge()
    assert (place.here, place.gone, place.flag) == ("old", "moved", True)
    assert not hasattr(place, "nowhere")


def test_operators_that_are_gone_are_left_out():
    from upstream import older_tests

    operator, entry = types.SimpleNamespace, []
    common = types.SimpleNamespace(
        op_db=[operator(name="svd", variant_test_name=""), operator(name="det", variant_test_name="singular")],
        skipOps=lambda case, test, entries: entry.extend([case, test, *entries]),
        opsToleranceOverride=lambda case, test, entries: entry.extend(entries),
    )
    older_tests.keep_known(common)
    here, gone = operator(op_name="det", variant_name="singular"), operator(op_name="det", variant_name="")
    common.skipOps("T", "t", [here, gone])
    assert entry == ["T", "t", here]
    common.opsToleranceOverride("T", "t", (("svd", "", 1, None), ("eig", "", 1, None)))
    assert entry[3:] == [("svd", "", 1, None)]


def test_table(tool, monkeypatch):
    job = tool.Job("test_x.py", "lobpcg")
    before, after = {"T::a": "failed", "T::b": "passed", "": "finished"}, {"T::a": "passed", "T::b": "failed"}
    row = tool.Row(job, before, after, tool.compare(before, after))
    assert tool.table([row]).splitlines()[2] == (
        "| `test_x.py -k 'lobpcg'` | 1 failed, 1 passed | 1 failed, 1 passed, cut short | T::a | T::b |"
    )


def test_the_two_pytorches(tool, monkeypatch, tmp_path, project, wheel):
    monkeypatch.setattr(tool, "ROOT", project)
    for state in ("unpatched", "patched"):
        if state == "patched":
            fake.run("apply", project, wheel)
        patched, baseline = tool.make_pytorches(wheel, tmp_path / state)
        assert (baseline / "torch/_lobpcg.py").read_bytes() == fake.LOBPCG
        assert (patched / "torch/_lobpcg.py").read_bytes() == fake.PATCHED_LOBPCG
        assert not (baseline / "torch/_lobpcg_worker.py").exists()


def test_unpacking_takes_what_is_wanted(tmp_path):
    fake.write_files(tmp_path / "pytorch-v9", dict.fromkeys(("setup.py", "test/a.py", "aten/b.cpp", "setup.cfg"), b""))
    with tarfile.open(tmp_path / "source.tar.xz", "w:xz") as packed:
        packed.add(tmp_path / "pytorch-v9", "pytorch-v9")
    assert source._unpack(tmp_path / "source.tar.xz", tmp_path / "tree") == "tree/pytorch-v9"
    files = [path for path in fake.snapshot(tmp_path / "tree/pytorch-v9") if "." in path]
    assert sorted(files) == ["setup.py", "test/a.py"]


def test_no_apt(monkeypatch, tmp_path):
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(source.FetchError, match="--tree"):
        source.fetched(tmp_path / "source")
    assert not (tmp_path / "source").exists()
    command = [sys.executable, str(SCRIPT), "--baseline", sys.executable, "--tree", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"upstream_tests: {tmp_path} has no test/")
