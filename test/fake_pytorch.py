"""Small stand-ins for a PyTorch wheel, a checkout and this project, and the commands of the patch tool on them."""

import base64
import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from patchset.commands import patcher
from patchset.errors import PatchError


LOBPCG = b"def lobpcg(A):\n    return 'upstream'\n"
GRADCHECK = b'''import math


def gradcheck(
    func,
    inputs,
    *,
    eps: float = 1e-6,
    masked: bool = False,  # no comma in sight
) -> bool:
    r"""Compare derivatives.

    Args:
        eps (float): step
        masked (bool): sparse only
            (two lines)
    Returns:
        the verdict
    """
    args = locals().copy()
    return sorted(args)


def gradgradcheck(func, inputs, grad_outputs=None, *, eps=1e-6,
                  masked=False,
                  ):
    """Compare second derivatives.

    Args:
        masked (bool): sparse only

    """
    return gradcheck(func, inputs, eps=eps, masked=masked)
'''
EDITS = '''
[[edit]]
function = "gradcheck"
parameters = ["symmetric: 'bool' = False"]
docstring_after = ["masked"]
docstring = """
symmetric (bool): perturb symmetric
    inputs only
"""
block = """
if symmetric:
    # nothing upstream may see the new name
    from torch.autograd._symmetric import check

    return check(func, inputs)
del symmetric
"""

[[edit]]
function = "gradgradcheck"
parameters = ["symmetric=False"]
'''
SERIES = """
[supported]
oldest = "2.6.0"
tested = ["2.13.0"]
patched = ["2.14.1"]

[cover]
subject = "everything"
text = '''
First
paragraph.

    a command,
    and another

Second.
'''

[[patch]]
subject = "gradcheck"
why = "it matters"
new = ["torch/autograd/_symmetric.py"]
weave = ["torch/autograd/gradcheck.py"]
classes = ["test/test_autograd.py::TestSymmetric"]

[[patch]]
subject = "solver"
why = "it matters"
resolves = [38948]
new = ["torch/_lobpcg_worker.py", "torch/deeper/folder/problems.py"]
replace = ["torch/_lobpcg.py"]
docs = ["docs/source/notes/lobpcg"]
plan = ["python -c 'import torch._lobpcg_worker'"]
"""
OUR_TESTS = b"""import math

import torch
from torch.autograd import gradcheck


# What a comment above says, stays above.
class TestSymmetric(object):
    def test_it(self):
        assert math.pi > 3 and gradcheck(torch.sin, ())


enlist(TestSymmetric)
enlist(TestElsewhere)

if __name__ == "__main__":
    run_tests()
"""
THEIR_TESTS = b"""import torch


class TestTheirs:
    pass

if __name__ == '__main__':
    run_tests()
"""
PATCHED_LOBPCG = b"""from torch._lobpcg_worker import answer


def lobpcg(A, k, B, X, n, iK, niter, tol, largest, method, tracker, ortho_iparams, ortho_fparams, ortho_bparams):
    return answer
"""
PROJECT = {
    "torch_patch/series.toml": SERIES.encode(),
    "torch_patch/_lobpcg.py": PATCHED_LOBPCG,
    "torch_patch/_lobpcg_worker.py": b"answer = 'patched'\n",
    "torch_patch/deeper/folder/problems.py": b"problems = []\n",
    "torch_patch/autograd/_symmetric.py": b"def check(func, inputs):\n    return True\n",
    "torch_patch/autograd/gradcheck.toml": EDITS.encode(),
    "test/test_autograd.py": OUR_TESTS,
    "docs_patch/source/notes/lobpcg.rst": b"LOBPCG\n======\n",
    "docs_patch/source/notes/lobpcg.md": b"# LOBPCG\n",
}
# What a wheel says of its compiled modules; one name is in the library alone.
COMPILED = {
    "torch/_C/__init__.pyi": b"class _Guard:\n    FIRST: int = ...\n\ndef _depth() -> int: ...\n_flag: bool\n",
    "torch/_C/_functorch.pyi": b"from torch import Tensor\n\ndef get_level(x: Tensor) -> int: ...\n",
    "torch/_C/_VariableFunctions.pyi": b"def _add_dim(x) -> None: ...\n",
    "torch/lib/libtorch_python.so": b"\x7fELF\0_unlisted\0",
}
PATCHED = ["torch/_lobpcg.py", "torch/autograd/gradcheck.py"]
NEW = ["torch/_lobpcg_worker.py", "torch/deeper/folder/problems.py", "torch/autograd/_symmetric.py"]


def write_files(folder: Path, files: dict) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(data)}"


def make_wheel(folder: Path, version: str = "2.13.0+cpu", newline: bytes = b"\n") -> Path:
    """A site-packages folder with a torch of a few files, installed as pip does."""
    files = {
        "torch/__init__.py": b"from torch import _lobpcg, autograd\n",
        "torch/version.py": f"__version__ = '{version}'\n".encode(),
        "torch/_lobpcg.py": LOBPCG.replace(b"\n", newline),
        "torch/autograd/__init__.py": b"from .gradcheck import gradcheck\n",
        "torch/autograd/gradcheck.py": GRADCHECK.replace(b"\n", newline),
        "other/a,b.py": b"",
        **COMPILED,
    }
    info = f"torch-{version}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n\nBody\n".encode()
    lines = [record_line(f'"{name}"' if "," in name else name, data) for name, data in files.items()]
    lines += ["torch/__pycache__/_lobpcg.cpython-311.pyc,,", f"{info}/RECORD,,"]
    files[f"{info}/RECORD"] = "".join(line + "\n" for line in lines).encode()
    write_files(folder, files)
    (folder / "torch/autograd/gradcheck.py").chmod(0o640)
    return folder


def make_checkout(folder: Path, git: bool = True, suffix: str = "md") -> Path:
    """A checkout of 2.13, committed."""
    files = {
        "setup.py": b"",
        "version.txt": b"2.13.0a0\n",
        "torch/__init__.py": b"",
        "torch/_lobpcg.py": LOBPCG,
        "torch/autograd/__init__.py": b"",
        "torch/autograd/gradcheck.py": GRADCHECK,
        "test/test_autograd.py": THEIR_TESTS,
        f"docs/source/index.{suffix}": b"PyTorch\n",
    }
    write_files(folder, files)
    if git:
        run_git(folder, "init", "-q")
        run_git(folder, "add", "-A")
        run_git(folder, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "base")
    return folder


def run_git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def snapshot(folder: Path) -> dict:
    """Every path below `folder` with its permissions and content; git's own files aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] == ".git":
            continue
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", os.readlink(path))
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ("folder",)
        else:
            found[name] = (stat.S_IMODE(status.st_mode), path.read_bytes())
    return found


# --- commands

posix = pytest.mark.skipif(os.name == "nt", reason="needs fork, permissions and links")


def run(command, project, target, *arguments, expected=0):
    """Carry out one command, which is to return the status `expected`; what it says."""
    said = []
    with patcher(project, str(target), said.append) as running:
        assert (getattr(running, command)(*arguments) or 0) == expected, said
    return "\n".join(said)


def refusal(command, project, target):
    """The message with which a command refuses."""
    with pytest.raises(PatchError) as caught:
        run(command, project, target)
    return str(caught.value)


REFUSED = ("edited", "interrupted", "unpatchable")  # states in which apply or revert would stop


def word(project, target):
    """The state that status finds, which writes nothing and whose exit status says whether it is a good one."""
    before, said = snapshot(target), []
    with patcher(project, str(target), said.append) as running:
        status = running.status()
    assert snapshot(target) == before
    found = said[0].split(":")[0]
    assert status == (found in REFUSED)
    return found


def unchanged_refusal(command, project, target):
    """The message with which a command refuses, and leaves every byte."""
    before = snapshot(target)
    message = refusal(command, project, target)
    assert snapshot(target) == before
    return message


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
