#!/usr/bin/env python3
"""Set up an environment with a patched PyTorch and run the demo, the tests or the linters in it.

usage: python3 tools/dev.py demo [ARGUMENT ...]     the main job on real input; arguments go to the demo
       python3 tools/dev.py test [ARGUMENT ...]     the tests; arguments go to pytest
       python3 tools/dev.py lint                    style and types; installs ruff and mypy
       python3 tools/dev.py versions [...]          the tests on each PyTorch that is supported; --help says more

The first call makes .venv in the repository, installs PyTorch and the test dependencies there and patches that
PyTorch; a later call finds this done and starts at once. A set-up that was interrupted is begun anew, and a change of
torch_patch/ is patched in again. What runs has OMP_NUM_THREADS=1 unless it is set: the matrices are small, and
threads that wait for each other on a busy machine take several times as long. The exit status is that of the command
that ran; 2 if the set-up failed.

environment: LOBPCG_TORCH=REQUIREMENT   what pip installs as PyTorch, unless the pinned one: torch==2.15.0, or a wheel
             LOBPCG_VENV=FOLDER         where the environment is made, instead of .venv
             LOBPCG_PYTHON=INTERPRETER  an interpreter to use as it is: nothing is installed or patched, only checked
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("LOBPCG_VENV") or ROOT / ".venv").absolute()
STAMP = VENV / "lobpcg-setup.json"
PROMPT = "lobpcg"
PATCH = ROOT / "tools" / "patch.py"
DEMO = ROOT / "docs_patch" / "source" / "scripts" / "lobpcg" / "demo.py"
LINT = ROOT / "tools" / "lint.py"
VERSIONS = ROOT / "tools" / "versions.py"

TORCH = "torch==2.13.0"
# import name -> requirement; networkx comes with torch and is named because the demo imports it
PACKAGES = {
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "expecttest": "expecttest>=0.2",
    "hypothesis": "hypothesis>=6",
    "pytest": "pytest>=8",
    "xdist": "pytest-xdist>=3.2",
}
# installed where `lint` is asked for; pinned, for what they find changes from release to release
LINTERS = {"ruff": "ruff==0.17.6", "mypy": "mypy==2.4.1"}
SILENCE = 8  # seconds until a step of the set-up says that it goes on
# variables through which the caller's shell would put other packages in front of those of .venv
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "VIRTUAL_ENV")


class SetupError(Exception):
    """The set-up cannot go on; the message says what was found and what to do."""


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


def command_line(*words: object) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def run(*words: object, env: dict[str, str] | None = None) -> None:
    """Run a step of the set-up, its output shown and a word every few seconds; SetupError where it fails."""
    begin = time.monotonic()
    process = subprocess.Popen([str(word) for word in words], cwd=ROOT, env=env)
    try:
        while (status := waited(process)) is None:
            say(f"at work since {time.monotonic() - begin:.0f} s; {VENV.name} holds {size_of(VENV) / 1e6:.0f} MB")
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status != 0:
        raise SetupError(f"exit status {status} from: {command_line(*words)}")


def waited(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status; None if the process goes on."""
    try:
        return process.wait(SILENCE)
    except subprocess.TimeoutExpired:
        return None


def size_of(folder: Path) -> int:
    """Bytes in the files of a folder, as far as they can be read while pip moves them."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


# --- the environment in .venv -------------------------------------------------------------------------------------


def venv_python() -> Path:
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def venv_environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    env["PYTHONNOUSERSITE"] = "1"
    return env


def torch_requirement() -> str:
    chosen = os.environ.get("LOBPCG_TORCH") or TORCH
    return os.path.abspath(chosen) if os.path.exists(chosen) else chosen


def requirements() -> list[str]:
    return [torch_requirement(), *PACKAGES.values()]


def wanted() -> str:
    """What the stamp of a finished set-up says; it is the last thing that is written."""
    return " ".join([f"{sys.version_info[0]}.{sys.version_info[1]}", *requirements()])


def stamp() -> list[str]:
    return STAMP.read_text(encoding="utf-8").split("\n") if STAMP.exists() else []


def made_here() -> bool:
    """Whether .venv is this command's: not there, empty, or with the prompt that it gives, finished or not."""
    if not VENV.exists() or not any(VENV.iterdir()):
        return True
    settings = VENV / "pyvenv.cfg"
    return STAMP.exists() or (settings.exists() and f"prompt = '{PROMPT}'" in settings.read_text(encoding="utf-8"))


def pip_command() -> list[str]:
    """The command that runs pip for .venv."""
    if importlib.util.find_spec("ensurepip") is not None:
        return [str(venv_python()), "-m", "pip"]
    return [sys.executable, "-m", "pip", "--python", str(venv_python())]


def make_venv() -> None:
    if importlib.util.find_spec("ensurepip") is not None:
        run(sys.executable, "-m", "venv", "--clear", "--prompt", PROMPT, VENV)
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"{sys.executable} has neither ensurepip nor pip, so no environment can be filled; install the "
            "distribution's package for virtual environments (python3-venv on Debian and Ubuntu), or set LOBPCG_PYTHON "
            "to an interpreter that has a patched PyTorch"
        )
    say("this Python has no ensurepip: filling .venv with the pip it has")
    run(sys.executable, "-m", "venv", "--clear", "--prompt", PROMPT, "--without-pip", VENV)


def install() -> None:
    """Leave .venv with everything installed and a stamp that says so; nothing to do where that is the case."""
    if stamp()[:1] == [wanted()]:
        return
    if not made_here():
        raise SetupError(
            f"{VENV} was not made by this command; move it away, or use it as it is with "
            f"LOBPCG_PYTHON={shlex.quote(str(venv_python()))}"
        )
    say(f"making {VENV}")
    begin = time.monotonic()
    make_venv()
    say("installing " + " ".join(requirements()))
    run(*pip_command(), "install", "--no-input", *requirements(), env=venv_environment())
    STAMP.write_text(wanted(), encoding="utf-8")
    say(f"installed in {time.monotonic() - begin:.0f} s")


def install_linters() -> None:
    """Add the linters to .venv, unless its stamp says that they are there in these versions."""
    linters = " ".join(LINTERS.values())
    if stamp()[1:] != [linters]:
        say("installing " + linters)
        run(*pip_command(), "install", "--no-input", *LINTERS.values(), env=venv_environment())
        STAMP.write_text(f"{wanted()}\n{linters}", encoding="utf-8")


def patch_venv() -> None:
    """Leave the PyTorch of .venv patched with torch_patch/ as it is now; quick where it is already."""
    try:
        run(venv_python(), PATCH, "apply", env=venv_environment())
    except SetupError as error:
        raise SetupError(
            f"{error}\npatch.py says above what stands in the way; if .venv itself is damaged, delete it and try again"
        ) from None


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold back a second set-up of the same repository; the lock goes with the process, so none is left behind."""
    if sys.platform == "win32":  # has no advisory lock on a folder
        yield
        return
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this repository")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- an interpreter that exists -----------------------------------------------------------------------------------


def check_interpreter(python: str, linters: bool = False) -> None:
    """SetupError unless this interpreter has the packages and a PyTorch patched with torch_patch/ as it is now."""
    packages = {**PACKAGES, **(LINTERS if linters else {})}
    names = ["torch", *packages]
    probe = (
        "import importlib.util, json, sys; "
        f"print(json.dumps([n for n in {names!r} if importlib.util.find_spec(n) is None]))"
    )
    try:
        answer = subprocess.run([python, "-c", probe], cwd=ROOT, check=False, capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"LOBPCG_PYTHON={python} cannot be run: {error.strerror}") from error
    if answer.returncode != 0:
        raise SetupError(f"LOBPCG_PYTHON={python} does not run as a Python 3: {answer.stderr.strip()[-500:]}")
    missing = json.loads(answer.stdout)
    if missing:
        what = [packages.get(name, torch_requirement()) for name in missing]
        raise SetupError(
            f"{python} lacks {', '.join(missing)}; install with: {command_line(python, '-m', 'pip', 'install', *what)}"
        )
    verify = subprocess.run([python, str(PATCH), "verify"], cwd=ROOT, check=False, capture_output=True, text=True)
    if verify.returncode != 0:
        sys.stderr.write(verify.stdout + verify.stderr)
        raise SetupError(
            f"the PyTorch of {python} is not patched with this version; it is left as it is; to patch it: "
            + command_line(python, PATCH, "apply")
        )


# --- commands -----------------------------------------------------------------------------------------------------


def prepare(linters: bool = False) -> tuple[str, dict[str, str]]:
    """The interpreter to use, and the environment variables to run it with."""
    chosen = os.environ.get("LOBPCG_PYTHON")
    if chosen:
        # a path is taken from the caller's folder, a bare name from PATH
        python = os.path.abspath(chosen) if os.sep in chosen else shutil.which(chosen) or chosen
        say(f"using {python} as it is")
        check_interpreter(python, linters)
        return python, dict(os.environ)
    with one_at_a_time():
        install()
        if linters:
            install_linters()
        patch_venv()
    return str(venv_python()), venv_environment()


def become(command: list[str], env: dict[str, str]) -> NoReturn:
    """Go over to the command, so that signals reach it and its status is ours; Windows can only wait for it."""
    if sys.platform == "win32":
        sys.exit(subprocess.call(command, cwd=ROOT, env=env))
    os.chdir(ROOT)
    os.execve(command[0], command, env)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    jobs = {"demo": [str(DEMO)], "test": ["-m", "pytest"], "lint": [str(LINT)]}
    if name == "versions":
        become([sys.executable, str(VERSIONS), *rest], dict(os.environ))
    if name not in jobs:
        known = ", ".join([*jobs, "versions"])
        print(f"dev.py: expected one of {known}, got {name!r}; --help says what each does", file=sys.stderr)
        return 2
    begin = time.monotonic()
    try:
        python, env = prepare(linters=name == "lint")
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    env.setdefault("OMP_NUM_THREADS", "1")
    command = [python, *jobs[name], *rest]
    say(f"ready after {time.monotonic() - begin:.1f} s; running {command_line(*command)}")
    become(command, env)


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.exit("dev.py: expected Python 3.10 or newer, got " + sys.version.split()[0] + "; run it with a newer one")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
