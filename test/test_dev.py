"""tools/dev.py: what is set up, when it is set up again, and what is refused. No network: installing is replaced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "dev.py"


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """The module with .venv in an empty folder, and `dev.ran`: the commands in the place of venv, pip and patch.py."""
    spec = importlib.util.spec_from_file_location("lobpcg_dev", SCRIPT)
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    dev.VENV = tmp_path / ".venv"
    dev.STAMP = dev.VENV / "lobpcg-setup.json"
    dev.ran = []

    def run(*words, env=None):
        dev.ran.append([str(word) for word in words])
        if "venv" in words:
            dev.venv_python().parent.mkdir(parents=True, exist_ok=True)
            dev.venv_python().touch()
            (dev.VENV / "pyvenv.cfg").write_text(f"prompt = '{words[words.index('--prompt') + 1]}'\n")

    monkeypatch.setattr(dev, "run", run)
    for name in ("LOBPCG_TORCH", "LOBPCG_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    return dev


def test_first_call_installs_and_second_does_not(dev):
    dev.install()
    assert [command[1:3] for command in dev.ran] == [["-m", "venv"], ["-m", "pip"]]
    assert "torch==2.13.0" in dev.ran[1]
    dev.ran.clear()
    dev.install()
    assert dev.ran == []


def test_linters_are_added_once(dev, monkeypatch):
    dev.install()
    dev.ran.clear()
    for _ in range(2):
        dev.install()
        dev.install_linters()
    assert [command[1:4] for command in dev.ran] == [["-m", "pip", "install"]]
    assert all(any(name in word for word in dev.ran[0]) for name in ("ruff==", "mypy=="))
    monkeypatch.setitem(dev.LINTERS, "ruff", "ruff==99")
    dev.install_linters()
    assert "ruff==99" in dev.ran[-1]


def test_another_torch_is_installed_into_an_empty_environment(dev, monkeypatch):
    dev.install()
    dev.ran.clear()
    monkeypatch.setenv("LOBPCG_TORCH", "torch==2.6.0")
    dev.install()
    assert "torch==2.6.0" in dev.ran[-1]
    assert "torch==2.13.0" not in dev.ran[-1]
    assert "--clear" in dev.ran[0]


@pytest.mark.parametrize("stop", ["venv", "pip"])
def test_interrupted_setup_is_begun_anew(dev, monkeypatch, stop):
    right = dev.run

    def interrupted(*words, env=None):
        if stop in words:
            raise KeyboardInterrupt
        right(*words, env=env)

    with monkeypatch.context() as patched:
        patched.setattr(dev, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dev.install()
    dev.ran.clear()
    dev.install()
    assert [command[1:3] for command in dev.ran] == [["-m", "venv"], ["-m", "pip"]]


def test_stamp_cut_short_counts_as_interrupted(dev):
    dev.install()
    dev.STAMP.write_text(dev.STAMP.read_text()[:10])
    dev.ran.clear()
    dev.install()
    assert len(dev.ran) == 2


def test_an_environment_without_its_stamp_is_known_by_its_prompt(dev):
    """As a kill during the first installation leaves it; what venv itself writes is looked at."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--prompt", dev.PROMPT, str(dev.VENV)], check=True)
    assert dev.made_here()
    dev.install()
    assert len(dev.ran) == 2
    assert "--clear" in dev.ran[0]


@pytest.mark.parametrize("chosen", [None, "7"])
def test_one_thread_unless_another_number_is_asked_for(dev, monkeypatch, chosen):
    monkeypatch.setattr(
        dev, "prepare", lambda linters: ("python", {} if chosen is None else {"OMP_NUM_THREADS": chosen})
    )
    became = []
    monkeypatch.setattr(dev, "become", lambda command, env: became.append(env["OMP_NUM_THREADS"]))
    dev.main(["demo"])
    assert became == [chosen or "1"]


def test_foreign_environment_is_left_alone(dev):
    mine = dev.VENV / "pyvenv.cfg"
    mine.parent.mkdir()
    mine.write_text("home = /usr/bin\n")
    with pytest.raises(dev.SetupError, match=r"was not made by this command; move it away"):
        dev.install()
    assert mine.exists()
    assert dev.ran == []


def test_without_ensurepip_the_outer_pip_fills_the_environment(dev, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name))
    dev.install()
    assert "--without-pip" in dev.ran[0]
    assert dev.ran[1][:5] == [sys.executable, "-m", "pip", "--python", str(dev.venv_python())]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dev.STAMP.write_text("started")
    with pytest.raises(dev.SetupError, match="neither ensurepip nor pip"):
        dev.install()


def test_environment_does_not_leak_into_the_one_made_here(dev, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert "PYTHONPATH" not in dev.venv_environment()


def interpreter(folder, missing, verified):
    """A script that answers as an interpreter which lacks the packages `missing`."""
    script = folder / "python"
    answers = f"-c) echo '{json.dumps(missing)}';; *) exit {0 if verified else 1};;"
    script.write_text(f"#!/bin/sh\ncase $1 in {answers} esac\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for an interpreter is a shell script")
class TestInterpreterThatExists:
    def test_used_as_it_is(self, dev, tmp_path):
        dev.check_interpreter(interpreter(tmp_path, [], True))
        assert dev.ran == []

    def test_missing_packages_are_named(self, dev, tmp_path):
        python = interpreter(tmp_path, ["scipy", "pytest"], True)
        with pytest.raises(dev.SetupError, match=r"lacks scipy, pytest; install with: .* install scipy 'pytest>=8'"):
            dev.check_interpreter(python)

    def test_unpatched_torch_is_not_patched(self, dev, tmp_path):
        python = interpreter(tmp_path, [], False)
        with pytest.raises(dev.SetupError, match=r"it is left as it is; to patch it: .*patch\.py apply"):
            dev.check_interpreter(python)
        assert dev.ran == []

    def test_not_an_interpreter(self, dev, tmp_path):
        with pytest.raises(dev.SetupError, match="cannot be run"):
            dev.check_interpreter(str(tmp_path / "absent"))


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["tset"], 2)])
def test_usage(arguments, status):
    answer = subprocess.run([sys.executable, str(SCRIPT), *arguments], check=False, capture_output=True, text=True)
    assert answer.returncode == status
    assert "demo" in answer.stdout + answer.stderr
