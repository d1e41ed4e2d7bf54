"""The example of the tuned plate: its elements, its gradient, its progress and what it says without matplotlib."""

import contextlib
import importlib.util
import io
import math
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest

import torch


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def plate():
    path = ROOT / "docs_patch" / "source" / "scripts" / "lobpcg" / "plate.py"
    spec = importlib.util.spec_from_file_location("lobpcg_plate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_clamped_circle(plate):
    """The lowest frequency of a clamped circular plate: omega R^2 sqrt(rho t / D) = 10.2158 (Leissa 1969)."""
    radius, t = 0.3, 0.004
    model = plate.Plate(plate.Mesh(600, (radius, radius)))
    K, M = (S.to_dense() for S in model.pencil(torch.full((len(model.area),), t, dtype=torch.float64)))
    L = torch.linalg.cholesky(M)
    half = torch.linalg.solve_triangular(L, K, upper=False)
    lowest = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))[0]
    rigidity = plate.YOUNG * t**3 / (12 * (1 - plate.POISSON**2))
    exact = 10.2158 / radius**2 * math.sqrt(rigidity / (plate.DENSITY * t))
    # The error falls with the square of the element size: 2.1 per cent here, 1.0 with twice as many elements.
    assert abs(float(lowest.sqrt()) / exact - 1) < 0.03


def test_mesh(plate):
    mesh = plate.Mesh(400)
    assert len(mesh.points) - len(mesh.edges) + len(mesh.triangles) == 1  # Euler: a disk without holes
    a, b = plate.AXES
    assert numpy.allclose(((mesh.points[mesh.rim_points] / [a, b]) ** 2).sum(1), 1)
    x, y, z = numpy.moveaxis(mesh.points[mesh.triangles], 1, 0)
    area = abs(numpy.linalg.det(numpy.stack([y - x, z - x], -1))).sum() / 2
    assert abs(area / (math.pi * a * b) - 1) < 0.02


def test_gradient(plate):
    """Frequencies, mode and weight together, by central differences along a random direction."""
    problem = plate.Problem(150)
    generator = torch.Generator().manual_seed(0)
    at, along = (torch.randn(problem.elements, dtype=torch.float64, generator=generator) for _ in range(2))
    at.requires_grad_()
    problem.loss(at).backward()
    h = 1e-5
    with torch.no_grad():
        difference = float(problem.loss(at + h * along) - problem.loss(at - h * along)) / (2 * h)
    assert abs(float(at.grad @ along) / difference - 1) < 1e-5


def test_tuning_and_message_without_matplotlib(plate, tmp_path):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), mock.patch.dict(sys.modules, {"matplotlib": None}):
        status = plate.main(["--triangles", "300", "--output", str(tmp_path / "plate.png")])
    assert status == 0, output.getvalue()
    assert "install matplotlib" in output.getvalue()
    assert not list(tmp_path.iterdir())


def test_status_of_a_plate_that_is_not_tuned(plate, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(sys.modules, {"matplotlib": None}):
        assert plate.main(["--triangles", "300", "--steps", "1", "--output", str(tmp_path / "plate.png")]) == 1
