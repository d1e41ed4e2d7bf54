"""The example of the Laplacian in slabs: one command, and what each process says it held."""

import os
import re
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parent.parent / "docs_patch" / "source" / "scripts" / "lobpcg" / "slabs.py"


def test_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(SCRIPT), "--side", "11"],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"rank (\d): (\d+) of 1331 rows, (\d+) entries of A", run.stdout)
    # 7 m - 6 side^2 stored entries in all.
    assert [(rank, count) for rank, count, _ in rows] == [("0", "666"), ("1", "665")]
    assert sum(int(entries) for *_, entries in rows) == 7 * 11**3 - 6 * 11**2
    (eigenvalues,) = re.findall(r"eigenvalues to (\S+) of the closed form", run.stdout)
    (gradient,) = re.findall(r"gradient of the first in v to (\S+) of x\^2", run.stdout)
    assert float(eigenvalues) < 1e-10
    assert float(gradient) < 1e-6
