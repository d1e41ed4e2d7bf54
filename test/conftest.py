"""What the tests of the tools share: tools/ on the path, a project and a PyTorch to patch."""

import os
import sys
import threading
import time
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


# --- a word while a test is slow


class Pulse:
    """Names the tests that run since a few seconds on the terminal, so that a long one does not look like a hang.

    pytest captures what is written to descriptor 1 while a test runs; a copy of it, made before, stays the terminal's.
    """

    silence = 8.0  # seconds

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self.running: dict[str, float] = {"collecting": time.monotonic()}
        self.spoke = time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.stopped.wait(1):
            now = time.monotonic()
            if now - self.spoke >= self.silence and self.running:
                self.spoke = now
                slow = ", ".join(f"{test} ({now - begin:.0f} s)" for test, begin in list(self.running.items()))
                os.write(self.terminal, f"\nat work: {slow}\n".encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.pop("collecting", None)
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.spoke = time.monotonic()

    def pytest_unconfigure(self) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        os.close(self.terminal)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that reports, where pytest-xdist runs several
        pulse = Pulse(os.dup(1))
        config.pluginmanager.register(pulse)
        pulse.thread.start()
