"""Whether each patch of the series works is found out on a torch of links, for steps that do and steps that do not."""

import subprocess
import sys
from pathlib import Path

import fake_pytorch as fake
import pytest
from fake_pytorch import posix, run
from patchset import steps
from patchset.target import find_target


TESTS = b"""import unittest

import torch._lobpcg


class First(unittest.TestCase):
    def test_before(self):
        from torch.autograd._symmetric import check

        self.assertTrue(check(None, ()))
        self.assertEqual(torch._lobpcg.lobpcg(None), "upstream")


class Second(unittest.TestCase):
    def test_after(self):
        self.assertEqual(torch._lobpcg.lobpcg(*[None] * 14), "patched")


if __name__ == "__main__":
    unittest.main()
"""


@pytest.fixture
def project(project):
    fake.write_files(project, {"test/test_growing.py": TESTS})
    manifest = project / "torch_patch/series.toml"
    text = manifest.read_text().replace("test_autograd.py::TestSymmetric", "test_growing.py::First")
    manifest.write_text(text + 'classes = ["test/test_growing.py::Second"]\n')
    return project


@pytest.fixture
def outcome(monkeypatch, project, wheel):
    """A function that checks the series on the wheel; its status and what it says of each patch."""
    monkeypatch.setattr(steps, "find_target", lambda given: find_target(str(wheel)))

    def check():
        said = []
        status = steps.check_steps(project, ["-q"], said.append)
        return status, [line.split(":")[0] for line in said]

    return check


@posix
@pytest.mark.parametrize("patched", [False, True])
def test_every_step(project, wheel, outcome, patched):
    if patched:
        run("apply", project, wheel)
    before = fake.snapshot(wheel)
    assert outcome() == (0, ["1/2 passes", "2/2 passes"])
    assert fake.snapshot(wheel) == before


@posix
def test_a_step_that_fails(project, outcome):
    broken = TESTS.replace(b'"upstream"', b'"patched"')  # as if the first patch did what the second one does
    fake.write_files(project, {"test/test_growing.py": broken})
    assert outcome() == (1, ["1/2 failed (1)", "2/2 passes"])


@posix
def test_a_step_that_cannot_be_imported(project, outcome):
    fake.write_files(project, {"torch_patch/_lobpcg.py": fake.PATCHED_LOBPCG + b"\n\nraise ValueError\n"})
    assert outcome() == (1, ["1/2 passes", "2/2 failed (1)"])


@posix
def test_a_plan_that_fails(project, outcome):
    manifest = project / "torch_patch/series.toml"
    manifest.write_text(manifest.read_text().replace("import torch._lobpcg_worker", "import torch._lobpcg_walker"))
    assert outcome() == (1, ["1/2 passes", "2/2 failed (1)"])


@pytest.mark.slow
def test_every_step_of_this_project():
    """Imports and tests after each patch, on the installed torch: a quarter of an hour."""
    patch = Path(__file__).resolve().parent.parent / "tools/patch.py"
    command = [sys.executable, "-W", "ignore", str(patch), "steps", "--", "-x"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
