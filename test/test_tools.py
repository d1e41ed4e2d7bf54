"""The patch tool: on small stand-ins for PyTorch in every state they can be found in, and on the installed torch."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import in_child, posix, refusal, run, unchanged_refusal, word
from patchset import lock
from patchset.errors import PatchError
from patchset.record import Record
from patchset.series import check_classes, load_series, tomllib
from patchset.store import FOLDER
from patchset.target import find_target


PROJECT_FOLDER = Path(__file__).resolve().parent.parent


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
        assert kept.exists()
        assert not any(path.exists() for path in stale)


@pytest.mark.parametrize("mine", [None, "torch/deeper/folder/mine.py", "torch/deeper/folder/__pycache__/mine.pyc"])
def test_a_new_folder_goes_with_its_bytecode_unless_it_holds_more(project, wheel, mine):
    run("apply", project, wheel)
    compiled = "torch/deeper/folder/__pycache__/problems.cpython-311.pyc"
    fake.write_files(wheel, {compiled: b"", **({mine: b"mine\n"} if mine else {})})
    run("revert", project, wheel)
    assert (wheel / "torch/deeper").exists() == (mine is not None)
    assert not (wheel / compiled).exists()
    assert mine is None or (wheel / mine).read_bytes() == b"mine\n"


def test_a_patch_set_that_drops_a_package_takes_its_folder_away(project, wheel):
    before = fake.snapshot(wheel)
    run("apply", project, wheel)
    manifest = project / "torch_patch/series.toml"
    manifest.write_bytes(manifest.read_bytes().replace(b', "torch/deeper/folder/problems.py"', b""))
    shutil.rmtree(project / "torch_patch/deeper")
    assert word(project, wheel) == "outdated"
    run("apply", project, wheel)
    run("verify", project, wheel)
    assert not (wheel / "torch/deeper").exists()
    run("revert", project, wheel)
    assert fake.snapshot(wheel) == before


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
        message = unchanged_refusal(command, project, wheel)
        assert "torch/_lobpcg.py was changed in line 6" in message
        assert "revert --force" in message
    assert word(project, wheel) == "edited"


def test_verify_sees_modes_and_missing_files(project, wheel):
    run("apply", project, wheel)
    (wheel / "torch/_lobpcg.py").chmod(0o600)
    (wheel / "torch/_lobpcg_worker.py").unlink()
    message = refusal("verify", project, wheel)
    assert "mode 600; expected 644" in message
    assert "_lobpcg_worker.py is missing" in message


def test_verify_sees_damaged_backups(project, wheel):
    run("apply", project, wheel)
    for backup in (wheel / FOLDER / "objects").iterdir():
        backup.write_bytes(b"")
    assert "is missing or damaged" in refusal("verify", project, wheel)
    assert "is missing or damaged" in unchanged_refusal("revert", project, wheel)


@pytest.mark.parametrize(
    ("version", "message"), [("2.5.1", "expected version 2.6.0 or newer"), ("1.13.1", "2.6.0 or newer")]
)
def test_old_versions_are_refused(tmp_path, project, version, message):
    wheel = fake.make_wheel(tmp_path / "site-packages", version=version)
    assert message in unchanged_refusal("apply", project, wheel)


def test_an_unknown_version_is_patched_and_called_untested(tmp_path, project):
    wheel = fake.make_wheel(tmp_path / "site-packages", version="2.99.0.dev20260101")
    assert "untested: 2.99.0" in run("status", project, wheel)
    assert "untested: 2.99.0" in run("apply", project, wheel)


def test_a_version_that_is_known_to_fit(tmp_path, project):
    wheel = fake.make_wheel(tmp_path / "site-packages", version="2.14.1")
    assert "not run: 2.14.1 was patched, verified and reverted, but the tests ran on 2.13.0" in run(
        "apply", project, wheel
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"from torch.autograd import nothing", "imports nothing from torch.autograd, which does not define it"),
        (b"import torch.nowhere", "imports torch.nowhere, which is missing"),
        (b"def f():\n    from torch.nowhere import x", "imports torch.nowhere, which is missing"),
        (b"from torch.autograd import gradcheck", None),
        (b"from torch import autograd", None),
        (b"import torch._C._functorch", None),
        (b"from torch._lobpcg_worker import answer", "which a later patch brings"),
        (b"from torch._C import _depth", None),
        (b"from torch._C import _width", "imports _width from torch._C, which does not define it"),
        (b"import torch._C._nowhere", "imports torch._C._nowhere, which is missing"),
        (b"import torch\ntorch._C._depth()", None),
        (b"import torch\ntorch._C._width()", "uses torch._C._width, which is missing"),
        (b"import torch\nx = torch._C._Guard.FIRST", None),
        (b"import torch\ndef f(x): return torch._C._functorch.get_level(x)", None),
        (b"import torch\ndef f(x): return torch._C._functorch.level(x)", "uses torch._C._functorch.level, which"),
        (b"import torch as t\nC = t._C\nC._width()", "uses torch._C._width, which is missing"),
        (b"from torch import _C as C\nfrom torch._C import _functorch as f\nC._flag, f.get_level", None),
        (b"from torch._C import _functorch as f\nf.level", "uses torch._C._functorch.level, which is missing"),
        (b"import torch\ntorch._C._unlisted", None),
        (b"import torch\ntorch._C._unlist", "uses torch._C._unlist, which is missing"),
        (b"import torch\nif hasattr(torch._C, '_width'):\n    torch._C._width()", None),
        (b"import torch\ntorch._add_dim(1)", None),
        (b"import torch\ntorch._take_dim(1)", "uses torch._take_dim, which is missing"),
        (b"import torch\ntorch.autograd._nothing()", "uses torch.autograd._nothing, which is missing"),
        (b"import torch\ntorch.ops._lobpcg.solve(1); torch.linalg.nothing", None),
    ],
)
def test_what_the_new_files_import_must_be_there(project, wheel, line, message):
    with open(project / "torch_patch/autograd/_symmetric.py", "ab") as file:
        file.write(line + b"\n")
    if message is None:
        run("apply", project, wheel)
    else:
        assert message in run("status", project, wheel, expected=1)
        assert message in unchanged_refusal("apply", project, wheel)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (b"__all__ = ['lobpcg']\ndef lobpcg(A, k, B): pass\n", None),
        (b"__all__ = ['lobpcg']\ndef lobpcg(A, k, X): pass\n", "lobpcg has the parameters A, k, X"),
        (b"__all__ = ['lobpcg', 'more']\ndef more(): pass\ndef lobpcg(A): pass\n", "torch/_lobpcg.py defines more"),
    ],
)
def test_a_replaced_module_keeps_what_it_offers(monkeypatch, tmp_path, project, theirs, message):
    monkeypatch.setattr(fake, "LOBPCG", theirs)
    wheel = fake.make_wheel(tmp_path / "site-packages", version="2.99.0")
    if message is None:
        run("apply", project, wheel)
    else:
        assert message in unchanged_refusal("apply", project, wheel)


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
    # A link that leads out of the PyTorch is not made on the word of a store: its content comes back as a file.
    before["torch/autograd/gradcheck.py"] = (0o644, fake.GRADCHECK)
    assert fake.snapshot(wheel) == before
    assert fake.snapshot(cache) == cached


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


@pytest.mark.parametrize(("suffixes", "index"), [([".rst"], "md"), ([".md", ".rst"], "rst"), ([".md"], "rst")])
def test_a_page_in_one_markup_or_both(tmp_path, project, suffixes, index):
    for suffix in {".md", ".rst"} - set(suffixes):
        (project / f"docs_patch/source/notes/lobpcg{suffix}").unlink()
    tree = fake.make_checkout(tmp_path / "pytorch", suffix=index)
    run("apply", project, tree)
    wanted = f".{index}" if f".{index}" in suffixes else suffixes[0]
    assert [path.suffix for path in (tree / "docs/source/notes").iterdir()] == [wanted]


def test_a_page_that_exists_is_refused(tmp_path, project):
    tree = fake.make_checkout(tmp_path / "pytorch", suffix="md")
    fake.write_files(tree, {"docs/source/notes/lobpcg.rst": b"mine\n"})
    assert "docs/source/notes/lobpcg.rst is already there" in unchanged_refusal("apply", project, tree)


def test_pictures_and_scripts_of_a_page(tmp_path, project):
    fake.write_files(project, {"docs_patch/source/notes/plot.svg": b"<svg/>"})
    with pytest.raises(PatchError, match=r"docs/source/notes/plot is in no patch"):
        check_classes(load_series(project))
    manifest = project / "torch_patch/series.toml"
    manifest.write_bytes(
        manifest.read_bytes().replace(b'notes/lobpcg"]', b'notes/lobpcg", "docs/source/notes/plot.svg"]')
    )
    tree = fake.make_checkout(tmp_path / "pytorch")
    run("apply", project, tree)
    assert (tree / "docs/source/notes/plot.svg").read_bytes() == b"<svg/>"


# --- the series


@pytest.mark.parametrize(
    ("old", "new", "message"),
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
        (b"plan =", b"# plan =", "patch 'solver' with neither classes nor plan"),
        (b"oldest", b"eldest", r"\[supported\]"),
        (b"oldest =", b"oldest", "line 3"),
        (b"torch/_lobpcg.py", b"lobpcg.py", "a path in torch/, test/ or docs/"),
        (
            b"::TestSymmetric",
            b"::TestOther",
            "(?s)names test/test_autograd.py::TestOther.*TestSymmetric is in no patch",
        ),
    ],
)
def test_a_faulty_series_is_refused(project, old, new, message):
    manifest = project / "torch_patch/series.toml"
    assert old in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(old, new, 1))
    with pytest.raises(PatchError, match=message):
        check_classes(load_series(project))


def test_the_series_of_this_project_names_its_files():
    """Both directions, files and test classes: what no patch names, and a name of nothing."""
    series = load_series(PROJECT_FOLDER)
    check_classes(series)
    assert all(len(patch.subject) <= 72 and patch.subject.startswith("[") for patch in series.patches)
    for patch in series.patches:
        for path in patch.weave:
            assert series.edits(path)


def test_a_mail_can_be_read():
    """What a patch adds beside its tests; what it takes out depends on the PyTorch."""
    series = load_series(PROJECT_FOLDER)
    for patch in series.patches:
        files = [series.source(path) for path in patch.new + patch.replace]
        files += [file for page in patch.docs for file in series.source(page).parent.glob(f"{Path(page).stem}.*")]
        assert sum(len(file.read_text().splitlines()) for file in files) <= 1500, patch.subject
        assert all(path.startswith("torch/") for path in patch.new + patch.replace)
    (number,) = [number for number, patch in enumerate(series.patches, 1) if patch.replace]
    assert f"Patch {number} lets torch.lobpcg use them" in series.cover.text
    assert len(series.cover.text.split()) <= 500  # a page


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
    touched += [path.relative_to(target.root).as_posix() for path in (target.root / "torch/_C").rglob("*.pyi")]
    for path in dict.fromkeys(touched):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(target.root / path, root / path)
    for folder in (Path(target.record).parent, Path(FOLDER)):
        if (target.root / folder).exists():
            shutil.copytree(target.root / folder, root / folder)
    run("revert", PROJECT_FOLDER, root)
    return root


def all_paths():
    rows = tomllib.loads((PROJECT_FOLDER / "torch_patch/series.toml").read_text())["patch"]
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
    done = subprocess.run([*script, "revert", str(wheel)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"not patched, nothing to do: torch 2.13.0+cpu in {wheel}\n")
    done = subprocess.run([*script, "revert", str(wheel / "nothing")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("patch: ")
    assert subprocess.run([*script, "undo"], capture_output=True, check=False).returncode == 2


@pytest.mark.slow
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
