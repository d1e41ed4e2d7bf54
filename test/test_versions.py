"""tools/versions.py: what it counts, what it does again, and that a fault in any version is its exit status."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fake_pytorch as fake
import pytest
from patchset.series import load_series


SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "versions.py"


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """The module with its folder elsewhere; what would be set up and run is replaced."""
    spec = importlib.util.spec_from_file_location("lobpcg_versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = tmp_path / "results"
    monkeypatch.setattr(module, "RAN", ("2.15.0",))
    monkeypatch.setattr(module, "PATCHED", ("2.6.0",))
    return module


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("test/test_x.py::TestA::test_b PASSED     [ 12%]\n", ("PASSED", "12", "test/test_x.py::TestA::test_b")),
        ("[gw1] [  7%] FAILED test/test_x.py::test_c \n", ("FAILED", "7", "test/test_x.py::test_c")),
        ("test/test_x.py::test_d SKIPPED (no CUDA) [100%]\n", ("SKIPPED", "100", "test/test_x.py::test_d")),
    ],
)
def test_progress_reads_what_pytest_prints(versions, line, found):
    progress = versions.Progress("2.15.0")
    progress.see(line)
    assert (*progress.counts, progress.percent, progress.what) == found


def test_progress_speaks_in_silence_and_not_at_each_line(versions, capsys):
    progress = versions.Progress("2.15.0")
    progress.see("test/test_x.py::test_b PASSED [ 12%]\n")
    progress.see("dev.py: at work since 8 s; .venv holds 100 MB\n")
    assert capsys.readouterr().out == ""
    progress.see(None)
    assert capsys.readouterr().out.startswith("versions: 2.15.0: 12 %, 1 passed, 0 failed, 0 s; at work since 8 s")


def test_lines_of_a_silent_process(versions, monkeypatch):
    monkeypatch.setattr(versions, "SILENCE", 0.2)
    code = "import time; print('one', flush=True); time.sleep(1); print('two')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines = list(versions.lines_of(process))
    assert [line for line in lines if line] == ["one\n", "two\n"]
    assert None in lines
    process.wait()


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("=== 9 passed, 2 skipped in 3.2s ===\n", 0, "the whole suite ran: 9 passed, 2 skipped"),
        (
            "=== 1 failed, 9 passed, 1 xfailed in 65.02s (0:01:05) ===\n",
            1,
            "the whole suite ran: 1 failed, 9 passed, 1 xfailed",
        ),
        ("dev.py: exit status 1 from pip\n", 2, "the set-up or the suite ended with status 2"),
        ("=== no tests ran in 0.1s ===\n", 5, "the set-up or the suite ended with status 5"),
    ],
)
def test_summary(versions, text, status, words):
    assert versions.summary(text, status) == words


def test_what_is_done_is_not_done_again_until_a_file_changes(versions, monkeypatch, capsys):
    did, states = [], ["one"]
    monkeypatch.setattr(versions, "state", lambda: states[0])
    row = lambda version, options: did.append(version) or versions.Row(version, "b", "done", version != "2.6.0", 1.0)
    monkeypatch.setattr(versions, "run_suite", row)
    monkeypatch.setattr(versions, "patch_files", row)
    assert versions.main([]) == 1  # 2.6.0 is wrong
    assert versions.main([]) == 1  # and done again
    assert did == ["2.15.0", "2.6.0", "2.6.0"]
    assert versions.main(["2.15.0"]) == 0
    assert len(did) == 3
    assert versions.main(["2.15.0", "--again"]) == 0
    states[0] = "two"
    assert versions.main(["2.15.0"]) == 0
    assert len(did) == 5
    assert "not done with these files: 1 versions" in capsys.readouterr().out


def test_a_version_that_cannot_be_had_is_a_fault_and_the_next_one_is_done(versions, monkeypatch, capsys):
    def absent(version, options):
        raise RuntimeError("pip brings no wheel")

    row = lambda version, options: versions.Row(version, "b", "done", True, 1.0)
    monkeypatch.setattr(versions, "run_suite", absent)
    monkeypatch.setattr(versions, "patch_files", row)
    assert versions.main([]) == 1
    said = capsys.readouterr().out
    assert "| 2.15.0 |  | pip brings no wheel |" in said
    assert "| 2.6.0 | b | done |" in said


@pytest.mark.usefixtures("_no_waiting_for_the_disk")
@pytest.mark.parametrize("fits", [True, False])
def test_files_are_patched_verified_and_reverted(versions, tmp_path, wheel, project, monkeypatch, fits):
    shutil.copytree(SCRIPT.parent, project / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    if not fits:
        (wheel / "torch/autograd/gradcheck.py").write_bytes(b"")
    monkeypatch.setattr(versions, "ROOT", project)
    packed = tmp_path / "torch.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(wheel.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(wheel))
    row = versions.patch_files("2.6.0", versions.parsed([f"--wheel=2.6.0={packed}"]))
    assert row.right == fits
    assert row.done == "patched, verified, reverted" if fits else row.done.startswith("apply failed: patch: ")


def test_the_table_is_put_between_its_marks(versions, tmp_path, monkeypatch):
    page = fake.write_files(tmp_path, {"page.md": b"a\n<!-- versions -->\nold\n<!-- /versions -->\nb\n"}) / "page.md"
    text = b'oldest = "2.6.0"\ntested = ["2.13.0"]  # ran\npatched = []\n[cover]\n'
    series = fake.write_files(tmp_path, {"series.toml": text}) / "series.toml"
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.setattr(versions, "SERIES", series)
    rows = [versions.Row("2.15.0", "2.15.0+cpu", "ran", True, 12.4), versions.Row("2.6.0", "w", "patched", True, 0.1)]
    versions.publish(rows)
    assert series.read_text() == 'oldest = "2.6.0"\ntested = ["2.15.0"]\npatched = ["2.6.0"]\n[cover]\n'
    assert "old" not in page.read_text()
    assert "\n| 2.15.0 | 2.15.0+cpu | ran |\n| 2.6.0 | w | patched |\n<!-- /versions -->\nb\n" in page.read_text()


def test_the_words_for_what_was_done_do_not_ask_to_do_it_again(versions, tmp_path, monkeypatch):
    series = (
        fake.write_files(tmp_path, {"torch_patch/series.toml": b"tested = []\n[cover]\n"}) / "torch_patch/series.toml"
    )
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "SERIES", series)
    before = versions.state()
    series.write_text('tested = ["2.15.0"]\n[cover]\n')
    assert versions.state() == before
    series.write_text('tested = ["2.15.0"]\n[covers]\n')
    assert versions.state() != before


def test_unknown_versions_are_refused(versions, capsys):
    with pytest.raises(SystemExit):
        versions.parsed(["1.0"])
    assert "those that are supported: 2.15.0, 2.6.0" in capsys.readouterr().err


def test_the_versions_that_are_named_are_those_of_the_table():
    """series.toml, from which patch.py tells what was done with a version, and the README say what the table says."""
    spec = importlib.util.spec_from_file_location("lobpcg_versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8").split(module.MARKS[0])[1].split(module.MARKS[1])[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines()[2:]]
    ran = [row[0] for row in rows if row[2].startswith("the whole suite ran: ")]
    patched = [row[0] for row in rows if row[2] == "patched, verified, reverted"]
    assert len(ran) + len(patched) == len(rows)
    assert not [row for row in rows if "failed" in row[2] or "error" in row[2]]
    series = load_series(SCRIPT.parent.parent)
    assert (series.tested, series.patched) == (ran, patched) == (list(module.RAN), list(module.PATCHED))
    readme = (SCRIPT.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"PyTorch {', '.join(ran[:-1])} and {ran[-1]}" in " ".join(readme.split())
