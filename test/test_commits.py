"""The series as commits and as mails: one tree either way, and a kill between any two calls of git loses nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import in_child, posix, run, unchanged_refusal, word
from patchset import commits, git
from patchset.classes import part_of
from patchset.commands import patcher
from patchset.errors import PatchError
from upstream.source import fetched, FetchError


GROWING = b"""# Owner(s): ["module: none"]
\"\"\"Tests of two patches.\"\"\"

import math
from torch import (
    first,
    second,
)


BOUND = 1


def helper():
    return BOUND


class First:
    uses = (math, first)


# Why the second is there.
@second
class Second(First):
    uses = helper()


enlist(First)
enlist(Second)

if __name__ == "__main__":
    run_tests()
"""


@pytest.fixture
def project(project):
    """A project whose two patches share a test file that upstream lacks."""
    fake.write_files(project, {"test/test_growing.py": GROWING})
    manifest = project / "torch_patch/series.toml"
    text = manifest.read_text().replace('::TestSymmetric"]', '::TestSymmetric", "test/test_growing.py::First"]')
    manifest.write_text(text + 'classes = ["test/test_growing.py::Second"]\n')
    return project


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Uthor")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "author@example.org")
    return fake.make_checkout(tmp_path / "pytorch")


def carry_out(command, project, target, *arguments):
    said = []
    with patcher(project, str(target), said.append) as running:
        assert getattr(running, command)(*arguments) == 0
    return "\n".join(said)


def head(tree, of="HEAD"):
    return fake.run_git(tree, "rev-parse", of).strip()


def clean(tree):
    return fake.run_git(tree, "status", "--porcelain", "-uall") == ""


# --- what a step's test file holds


def test_part_of_a_test_file():
    text = part_of(GROWING, ["First"]).decode()
    assert text == (
        '# Owner(s): ["module: none"]\n"""Tests of two patches."""\n\nimport math\nfrom torch import first\n\n\n'
        "class First:\n    uses = (math, first)\n\n\nenlist(First)\n\n"
        'if __name__ == "__main__":\n    run_tests()\n'
    )
    assert part_of(GROWING, ["First", "Second"]) == GROWING
    assert "BOUND = 1\n\n\ndef helper" in part_of(GROWING, ["Second"]).decode()
    assert "import math\nfrom torch import (\n    first,\n    second,\n)" in part_of(GROWING, ["Second"]).decode()


# --- commits


def test_commits_there_and_back(project, tree):
    before, base = fake.snapshot(tree), head(tree)
    said = carry_out("apply", project, tree, True)
    assert f"2 commits on top of {base}" in said
    assert clean(tree)
    assert head(tree, "HEAD~2") == base
    subjects = fake.run_git(tree, "log", "--format=%an|%s", "-2").splitlines()
    assert subjects == ["A. Uthor|solver", "A. Uthor|gradcheck"]
    assert fake.run_git(tree, "log", "-1", "--format=%B").strip() == (
        "solver\n\nit matters\n\nFixes #38948\n\nTest Plan:\npython test/test_growing.py -k Second\n"
        "python -c 'import torch._lobpcg_worker'"
    )
    first = fake.run_git(tree, "show", "--name-only", "--format=", "HEAD~").split()
    assert sorted(first) == sorted(
        ["torch/autograd/_symmetric.py", "torch/autograd/gradcheck.py", "test/test_autograd.py", "test/test_growing.py"]
    )
    assert fake.run_git(tree, "show", "HEAD:test/test_growing.py").encode() == GROWING
    assert word(project, tree) == "patched"
    run("verify", project, tree)
    tip = head(tree)
    assert carry_out("apply", project, tree, True).startswith("already patched")
    assert head(tree) == tip
    run("revert", project, tree)
    assert (head(tree), clean(tree), fake.snapshot(tree)) == (base, True, before)
    carry_out("apply", project, tree, True)
    assert head(tree) == tip  # same bytes, same commits


def test_commits_have_the_tree_that_apply_makes(project, tree):
    run("apply", project, tree)
    plain = fake.snapshot(tree)
    run("revert", project, tree)
    carry_out("apply", project, tree, True)
    assert fake.snapshot(tree).keys() == plain.keys()
    own = [name for name in plain if not name.startswith(".torch_lobpcg_patch")]
    assert all(fake.snapshot(tree)[name] == plain[name] for name in own)


def test_commits_are_refused(project, tree, wheel):
    with pytest.raises(PatchError, match="a git checkout for --commits"):
        carry_out("apply", project, wheel, True)
    run("apply", project, tree)
    with pytest.raises(PatchError, match="is patched without commits"):
        carry_out("apply", project, tree, True)
    run("revert", project, tree)
    with open(tree / "torch/_lobpcg.py", "ab") as file:
        file.write(b"# mine\n")
    with pytest.raises(PatchError, match=r"uncommitted changes in torch/_lobpcg\.py"):
        carry_out("apply", project, tree, True)


def test_commits_on_top_are_kept(project, tree):
    carry_out("apply", project, tree, True)
    (tree / "mine").write_bytes(b"")
    fake.run_git(tree, "add", "mine")
    fake.run_git(tree, "commit", "-qm", "mine")
    assert "git revert " in unchanged_refusal("revert", project, tree)


def test_a_changed_series_is_not_laid_over_commits(project, tree):
    carry_out("apply", project, tree, True)
    (project / "torch_patch/_lobpcg_worker.py").write_bytes(b"answer = 'newer'\n")
    assert word(project, tree) == "outdated"
    assert "revert first" in unchanged_refusal("apply", project, tree)


@posix
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_killed_between_calls_of_git(project, tree, command):
    before, base = fake.snapshot(tree), head(tree)
    carry_out("apply", project, tree, True)
    after, tip = fake.snapshot(tree), head(tree)
    if command == "apply":
        run("revert", project, tree)
    arguments = [True] if command == "apply" else []

    def attempt(survive):
        left, real = [survive], git.git

        def counted(*words, **options):
            if left[0] == 0:
                os._exit(137)
            left[0] -= 1
            return real(*words, **options)

        for module in (git, commits):
            module.git = counted
        carry_out(command, project, tree, *arguments)
        return 0

    for survive in range(200):
        status = in_child(lambda survive=survive: attempt(survive))
        if status == 0:
            break
        assert status == 137
        # The same command completes what was begun; the other one takes it back.
        for again, wanted in (("apply", (tip, after)), ("revert", (base, before))):
            carry_out(again, project, tree, *([True] if again == "apply" else []))
            assert (head(tree), clean(tree)) == (wanted[0], True)
            assert fake.snapshot(tree) == wanted[1]
        if command == "revert":
            carry_out("apply", project, tree, True)
    assert 3 < survive < 199


# --- mails


def test_exported_mails_make_the_same_tree(tmp_path, project, tree):
    before, base = fake.snapshot(tree), head(tree)
    objects = set((tree / ".git/objects").rglob("*"))
    output = tmp_path / "mails"
    said = carry_out("export", project, tree, output)
    assert f"2 patches on top of {base}" in said
    assert (fake.snapshot(tree), head(tree)) == (before, base)
    assert set((tree / ".git/objects").rglob("*")) == objects
    names = sorted(path.name for path in output.iterdir())
    assert names == ["0000-cover-letter.patch", "0001-gradcheck.patch", "0002-solver.patch"]
    letter = (output / names[0]).read_text()
    assert (
        "Subject: [PATCH 0/2] everything\n\nFirst paragraph.\n\n    a command,\n    and another\n\nSecond.\n" in letter
    )
    assert f"base-commit: {base}" in letter
    assert "***" not in letter
    carry_out("export", project, tree, tmp_path / "again")
    assert fake.snapshot(tmp_path / "again") == fake.snapshot(output)

    clone = tmp_path / "clone"
    fake.run_git(tmp_path, "clone", "-q", str(tree), str(clone))
    fake.run_git(clone, "am", "-q", "--keep-non-patch", *(str(output / name) for name in names[1:]))
    carry_out("apply", project, tree, True)
    assert head(clone, "HEAD^{tree}") == head(tree, "HEAD^{tree}")
    carry_out("export", project, tree, tmp_path / "patched")  # of the base below the commits
    assert fake.snapshot(tmp_path / "patched") == fake.snapshot(output)

    assert word(project, clone) == "committed"
    assert "of the last 2 commits" in run("verify", project, clone)
    assert "nothing to do" in run("apply", project, clone)
    assert "git reset --keep HEAD~2" in unchanged_refusal("revert", project, clone)
    (clone / "torch/_lobpcg_worker.py").write_bytes(b"")
    assert word(project, clone) == "unpatchable"


def test_the_users_settings_do_not_matter(tmp_path, monkeypatch, project, tree):
    carry_out("export", project, tree, tmp_path / "plain")
    settings = tmp_path / "settings"
    settings.write_text(
        "[diff]\n noprefix = true\n[format]\n attach = x\n numbered = false\n[core]\n autocrlf = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    carry_out("export", project, tree, tmp_path / "other")
    assert fake.snapshot(tmp_path / "other") == fake.snapshot(tmp_path / "plain")


def test_export_is_refused(tmp_path, project, tree, wheel):
    for folder in (project / "mails", tree / "mails"):
        with pytest.raises(PatchError, match="a folder outside"):
            carry_out("export", project, tree, folder)
    fake.write_files(tmp_path / "full", {"mine": b""})
    with pytest.raises(PatchError, match="not an empty folder"):
        carry_out("export", project, tree, tmp_path / "full")
    with pytest.raises(PatchError, match="is no git working tree"):
        carry_out("export", project, wheel, tmp_path / "mails")
    (tmp_path / "tree").mkdir()
    bare = fake.make_checkout(tmp_path / "tree/pytorch", git=False)
    with pytest.raises(PatchError, match="is no git working tree"):
        carry_out("export", project, bare, tmp_path / "mails")
    assert not (tmp_path / "mails").exists()


def test_an_export_needs_no_clean_tree(tmp_path, project, tree):
    carry_out("export", project, tree, tmp_path / "clean")
    for path in (*fake.PATCHED, fake.NEW[0]):
        (tree / path).write_bytes(b"# mine\n")
    carry_out("export", project, tree, tmp_path / "other")
    assert fake.snapshot(tmp_path / "other") == fake.snapshot(tmp_path / "clean")


def test_an_export_needs_a_folder(tree):
    script = [sys.executable, str(Path(__file__).resolve().parent.parent / "tools/patch.py")]
    done = subprocess.run([*script, "export", str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--output" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("_no_waiting_for_the_disk")
def test_round_trips_on_a_release(tmp_path, monkeypatch):
    """This project on the tree of a release: mails, commits and plain edits make one tree, and all are taken back."""
    here = Path(__file__).resolve().parent.parent
    try:
        release = fetched(here / "build" / "pytorch-source")
    except FetchError as error:
        pytest.skip(str(error))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Uthor")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "author@example.org")
    tree, clone = tmp_path / "pytorch", tmp_path / "clone"
    shutil.copytree(release, tree, symlinks=True)
    for command in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "base"]):
        fake.run_git(tree, *command)
    before, base = fake.snapshot(tree), head(tree)
    fake.run_git(tmp_path, "clone", "-q", str(tree), str(clone))
    carry_out("export", here, tree, tmp_path / "mails")
    mails = sorted(map(str, (tmp_path / "mails").iterdir()))[1:]
    fake.run_git(clone, "am", "-q", "--keep-non-patch", *mails)
    run("verify", here, clone)
    carry_out("apply", here, tree, True)
    run("verify", here, tree)
    assert head(tree, "HEAD^{tree}") == head(clone, "HEAD^{tree}")
    committed = fake.snapshot(tree)
    run("revert", here, tree)
    assert (head(tree), fake.snapshot(tree)) == (base, before)
    run("apply", here, tree)
    run("verify", here, tree)
    plain = fake.snapshot(tree)
    assert all(plain.get(name) == entry for name, entry in committed.items() if not name.startswith(".torch_lobpcg"))
    run("revert", here, tree)
    assert fake.snapshot(tree) == before
