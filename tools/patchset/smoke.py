"""Whether a PyTorch that was just patched works: one solve with its gradient and one gradcheck, by its interpreter."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import PatchError
from .target import Target


_CALL = Path(__file__).with_name("smoke_call.py")
_LIMIT = 600  # seconds: an import from a slow disk may take minutes, a hang must end


def interpreter_of(given: str | None) -> str | None:
    """The interpreter that imports the PyTorch which TARGET means; None where TARGET does not say."""
    if given is None:
        return sys.executable
    for name in ("bin/python", "Scripts/python.exe"):
        if (python := Path(given) / name).exists():
            return str(python.absolute())  # not resolved: an environment is known by the place of its link
    return None


def try_out(target: Target, interpreter: str) -> None:
    """Raise SmokeError, which says what failed, unless the smoke call passes. Nothing is written, not even bytecode, so
    that what is rolled back leaves nothing behind."""
    step, error = _call(interpreter, [str(_CALL), str(target.root)])
    if error is None:
        return
    found = f"{target}: patched, {interpreter} fails in `{step}`: {error}"
    remedy = "every byte is as it was before the patch; --no-smoke patches without this call"
    raise SmokeError(found, "the right answer", remedy)


class SmokeError(PatchError):
    """The smoke call failed; the transaction around it is rolled back."""


def imports(interpreter: str) -> str | None:
    """What is said where the interpreter cannot import torch; None where it can."""
    return _call(interpreter, ["-c", "import torch"])[1]


def _call(interpreter: str, words: list[str]) -> tuple[str, str | None]:
    """The last line printed, and the last line of the error, if there is one."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    env.setdefault("OMP_NUM_THREADS", "1")
    if interpreter != sys.executable:  # what is in front of this interpreter's packages is not in front of its own
        env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as empty:  # a folder of the caller's could hold a torch, or a module it imports
        try:
            done = subprocess.run(
                [interpreter, *words], check=False, env=env, cwd=empty, capture_output=True, timeout=_LIMIT
            )
        except subprocess.TimeoutExpired as late:
            return _last(late.stdout) or "start", f"no end in {_LIMIT} s"
        except OSError as error:
            return "start", str(error)
    if done.returncode == 0:
        return "", None
    return _last(done.stdout) or "start", _last(done.stderr) or f"exit status {done.returncode}"


def _last(output: bytes | None) -> str:
    lines = [line for line in (output or b"").decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
