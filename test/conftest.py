"""What the tests of the tools share: tools/ on the path, a project and a PyTorch to patch."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fake_pytorch
import pytest


@pytest.fixture
def _no_waiting_for_the_disk(monkeypatch):
    """No test cuts the power, and bringing each file to the disk takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def project(tmp_path, _no_waiting_for_the_disk):
    return fake_pytorch.write_files(tmp_path / "project", fake_pytorch.PROJECT)


@pytest.fixture
def wheel(tmp_path):
    return fake_pytorch.make_wheel(tmp_path / "site-packages")
