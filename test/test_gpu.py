"""tools/gpu.py on the CPU: the copy that is patched, the checks and what they notice, the table of times."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu  # noqa: E402
from benchmark import device  # noqa: E402


CHECKS = device.checks("cpu")


def test_what_is_patched_is_a_copy(tmp_path):
    site, copy = tmp_path / "site", tmp_path / "copy"
    for name in ("torch/nn/x.py", "torch/lib/libtorch.so.2", "torch-2.11.0.dist-info/RECORD", "numpy/__init__.py"):
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    copy.mkdir()
    gpu.mirror(site, copy)
    for name in ("torch/nn/x.py", "torch-2.11.0.dist-info/RECORD"):
        (copy / name).write_text("patched")
        assert (site / name).read_text() == "before"
    assert (copy / "torch/lib/libtorch.so.2").is_symlink()
    assert (copy / "numpy/__init__.py").read_text() == "before"
    assert not (copy / "torch").is_symlink()


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=[title for title, _ in CHECKS])
def test_checks_hold(check):
    assert check()


@pytest.mark.parametrize("check", [check for _, check in CHECKS[:6]], ids=[title for title, _ in CHECKS[:6]])
def test_checks_notice_a_wrong_gradient(check, monkeypatch):
    """With the gradient in A a tenth too large."""
    right = torch.lobpcg

    def wrong(A, *arguments, **options):
        A.register_hook(lambda g: 1.1 * g)
        return right(A, *arguments, **options)

    monkeypatch.setattr(torch, "lobpcg", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        check()


def test_checks_notice_a_batch_and_a_second_call_that_differ(monkeypatch):
    right, calls = torch.lobpcg, []

    def wrong(A, *arguments, **options):
        calls.append(A)
        E, X = right(A, *arguments, **options)
        return E * (1 + 1e-6 * len(calls)), X

    monkeypatch.setattr(torch, "lobpcg", wrong)
    with pytest.raises(AssertionError, match="differ"):
        device.batches("cpu")
    with pytest.raises(AssertionError, match="differ"):
        device.determinism("cpu")


def test_waits_of_the_host_are_counted():
    T = torch.ones(3)
    with device.Transfers() as mode:
        float(T.sum()), bool(T[0] > 0), T[1].item(), T + 1, T.clone()
    assert mode.count == 3


def test_laplacian_of_a_grid():
    A = device.laplacian(30, "cpu")
    rows, columns = 5, 6
    path = lambda m: (
        2 * torch.eye(m).double() - torch.ones(m - 1).double().diag(1) - torch.ones(m - 1).double().diag(-1)
    )
    exact = torch.kron(path(rows), torch.eye(columns).double()) + torch.kron(torch.eye(rows).double(), path(columns))
    assert torch.equal(A.to_dense(), exact)


def test_table_is_complete_and_keeps_to_its_time(capsys):
    rows, failed = device.measure("cpu", True, time.monotonic() + 600)
    assert failed == 0
    assert {len(row) for row in rows} == {3 + len(device.COLUMNS)}
    for name, _, ours, eigh, _, _, without, accuracy in rows:
        assert float(ours) > 0
        assert float(without if name.startswith("Laplacian") else eigh) > 0
        assert float(accuracy) < 1e-7
    late, _ = device.measure("cpu", True, time.monotonic() - 1)
    assert {row[2] for row in late} == {"left out"}


@pytest.mark.skipif(not hasattr(device.signal, "setitimer"), reason="the system has no such signal")
def test_a_call_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError), device.interrupted_after(time.monotonic() + 0.05):
        time.sleep(60)


def test_an_interpreter_without_torch(capsys):
    assert gpu.main(["--python", "no-such-interpreter"]) == 2
    assert "--python" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert device.run("cuda", 1.0, True) == 2
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_of_it(tmp_path):
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--device", "cpu", "--tiny", "--output", tmp_path / "table"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 checks failed, 0 timings raised" in (tmp_path / "table").read_text()
