"""Tune a clamped plate: move its first eigenfrequencies to prescribed values by its thickness, element by element.

usage: python plate.py [--triangles 4000] [--steps 40] [--output plate.png]

An oval plate of aluminium is meshed by triangles and bends by Kirchhoff's theory (Morley's element). Stiffness K and
mass M are sparse, K = sum_e t_e^3 K_e and M = sum_e t_e M_e, and both depend on the thickness t_e of every element.
The eigenvalues (2 pi f)^2 of K x = lambda M x, and the eigenvectors, come from torch.lobpcg, and so does the gradient
in all t_e:

- the first four frequencies are to stand to each other as 2 : 3 : 4 : 5, from the lowest of the uniform plate on;
- the third mode is to be at rest at a given point, where the plate could be held: a loss on an eigenvector;
- the weight is to stay, and t_e stays within a factor of two of the uniform thickness.

Prints its progress, writes a picture of design and modes before and after (if matplotlib is there), and ends with
status 1 if a frequency is more than 0.1 per cent off.

L. S. D. Morley, "The triangular equilibrium element in the solution of plate bending problems", Aero. Quart. 19 (1968).
"""

import argparse
import math
import sys
import time

import numpy
import scipy.sparse
import scipy.sparse.linalg
import scipy.spatial

import torch


YOUNG, POISSON, DENSITY = 70e9, 0.33, 2700.0  # aluminium, SI units
THICKNESS = 0.004
AXES = (0.30, 0.22)  # half axes of the oval
RATIOS = (1, 3 / 2, 2, 5 / 2)
ENOUGH = 1e-9  # the loss at which the optimisation ends: frequencies to 3e-5
RESTING, POINT = 2, (0.10, 0.06)  # this mode is to have a node here


class Mesh:
    """A triangulation of an oval: points (p, 2), triangles (e, 3), edges (s, 2); what lies on the rim."""

    def __init__(self, triangles, axes=AXES):
        # A triangular lattice has 2 triangles of area sqrt(3) h^2 / 4 per point.
        a, b = axes
        h = math.sqrt(4 * math.pi * a * b / (math.sqrt(3) * triangles))
        inside = self._lattice(h, a, b)
        # points of the rim at equal distances along it
        angle = numpy.linspace(0, 2 * math.pi, 4001)
        rim = numpy.stack([a * numpy.cos(angle), b * numpy.sin(angle)], 1)
        length = numpy.concatenate(
            [[0], numpy.cumsum(numpy.hypot(*numpy.diff(rim, axis=0).T))]
        )
        at = numpy.interp(
            numpy.arange(round(length[-1] / h)) * length[-1] / round(length[-1] / h),
            length,
            angle,
        )
        rim = numpy.stack([a * numpy.cos(at), b * numpy.sin(at)], 1)
        self.points = numpy.concatenate([rim, inside])
        self.triangles = scipy.spatial.Delaunay(self.points).simplices
        # edge i of a triangle is opposite to its corner i
        corners = numpy.sort(self.triangles[:, [[1, 2], [2, 0], [0, 1]]], -1)
        self.edges, which = numpy.unique(
            corners.reshape(-1, 2), axis=0, return_inverse=True
        )
        self.edges_of = which.reshape(-1, 3)
        self.rim_edges = (
            numpy.bincount(which.reshape(-1), minlength=len(self.edges)) == 1
        )
        self.rim_points = numpy.zeros(len(self.points), dtype=bool)
        self.rim_points[self.edges[self.rim_edges]] = True

    @staticmethod
    def _lattice(h, a, b):
        """Points of a triangular lattice that keep 0.6 h from the rim."""
        rows = numpy.arange(-math.ceil(b / h) * 2, math.ceil(b / h) * 2 + 1)
        columns = numpy.arange(-math.ceil(a / h) - 1, math.ceil(a / h) + 2)
        x = h * (columns[None, :] + (rows[:, None] % 2) / 2)
        y = h * math.sqrt(3) / 2 * rows[:, None] + 0 * x
        grid = numpy.stack([x.ravel(), y.ravel()], 1)
        keep = (grid[:, 0] / (a - 0.6 * h)) ** 2 + (grid[:, 1] / (b - 0.6 * h)) ** 2 < 1
        return grid[keep]


class Plate:
    """K and M of a clamped plate as functions of the thickness (e,) of its elements.

    Unknowns: deflections of the inner points, then derivatives normal to the inner edges at their midpoints times a
    length, so that all have one unit.
    """

    def __init__(self, mesh):
        self.mesh = mesh
        inner = numpy.concatenate([~mesh.rim_points, ~mesh.rim_edges])
        self.m = int(inner.sum())
        number = numpy.where(inner, numpy.cumsum(inner) - 1, -1)
        unknowns = numpy.concatenate(
            [mesh.triangles, mesh.edges_of + len(mesh.points)], 1
        )
        self.points = number[: len(mesh.points)]  # unknown of each point, -1 on the rim
        stiffness, mass, self.area = self._elements()
        # The pattern of K and M, found once: element entry i goes into stored value slot[i].
        index = number[unknowns]
        row, column = numpy.broadcast_arrays(index[:, :, None], index[:, None, :])
        kept = (row >= 0) & (column >= 0)
        position, slot = numpy.unique(
            row[kept] * self.m + column[kept], return_inverse=True
        )
        self.crow = torch.from_numpy(
            numpy.searchsorted(position // self.m, numpy.arange(self.m + 1))
        )
        self.column = torch.from_numpy(position % self.m)
        self.slot = torch.from_numpy(slot.reshape(-1))
        self.element = torch.from_numpy(numpy.nonzero(kept)[0])
        self.stiffness, self.mass = (
            torch.from_numpy(values[kept]) for values in (stiffness, mass)
        )

    def _elements(self):
        """Stiffness and mass (e, 6, 6) of every element at thickness 1, and its area."""
        mesh = self.mesh
        corner = mesh.points[mesh.triangles]  # (e, 3, 2)
        center = corner.mean(1, keepdims=True)
        (ax, ay), (bx, by) = (
            (corner[:, 1] - corner[:, 0]).T,
            (corner[:, 2] - corner[:, 0]).T,
        )
        area = abs(ax * by - ay * bx) / 2
        size = math.sqrt(area.mean())
        x = (corner - center) / size  # local coordinates of order 1
        middle = (x[:, [1, 2, 0]] + x[:, [2, 0, 1]]) / 2
        along = numpy.diff(mesh.points[mesh.edges], axis=1)[:, 0]
        normal = numpy.stack([-along[:, 1], along[:, 0]], 1) / numpy.linalg.norm(
            along, axis=1, keepdims=True
        )
        # rows: the six unknowns of the monomials 1, x, y, x^2, x y, y^2
        unknowns = numpy.concatenate(
            [_monomials(x), _normal_derivatives(middle, normal[mesh.edges_of])], 1
        )
        shapes = numpy.linalg.inv(
            unknowns
        )  # column i: the monomials of the quadratic with unknown i = 1, others 0
        curvature = numpy.zeros((3, 6))
        curvature[0, 3], curvature[1, 5], curvature[2, 4] = (
            2,
            2,
            2,
        )  # w_xx, w_yy, 2 w_xy
        bend = curvature @ shapes / size**2
        D = (
            numpy.array([[1, POISSON, 0], [POISSON, 1, 0], [0, 0, (1 - POISSON) / 2]])
            * YOUNG
            / (12 * (1 - POISSON**2))
        )
        stiffness = area[:, None, None] * (bend.transpose(0, 2, 1) @ D @ bend)
        # the integral of products of quadratics, by their values at corners and midpoints
        values = numpy.concatenate([_monomials(x), _monomials(middle)], 1) @ shapes
        one, eye = numpy.ones((3, 3)), numpy.eye(3)
        weights = (
            numpy.block([[7 * eye - one, -4 * eye], [-4 * eye, 16 * (eye + one)]]) / 180
        )
        mass = (
            DENSITY
            * area[:, None, None]
            * (values.transpose(0, 2, 1) @ weights @ values)
        )
        return stiffness, mass, torch.from_numpy(area)

    def pencil(self, thickness):
        """Sparse K and M, differentiable in the thickness (e,)."""
        pencil = []
        for factor, entries in ((thickness**3, self.stiffness), (thickness, self.mass)):
            entries = factor[self.element] * entries
            values = torch.zeros(len(self.column), dtype=torch.float64).index_add(
                0, self.slot, entries
            )
            pencil.append(
                torch.sparse_csr_tensor(
                    self.crow, self.column, values, (self.m, self.m)
                )
            )
        return tuple(pencil)

    def weight(self, thickness):
        return DENSITY * (self.area * thickness).sum()

    def deflections(self, X):
        """Modes at all points of the mesh, zero on the rim: (p, k)."""
        return torch.cat([X, torch.zeros_like(X[:1])])[torch.from_numpy(self.points)]


def _monomials(x):
    u, v = x[..., 0], x[..., 1]
    return numpy.stack([numpy.ones_like(u), u, v, u * u, u * v, v * v], -1)


def _normal_derivatives(x, normal):
    (u, v), (p, q) = (numpy.moveaxis(t, -1, 0) for t in (x, normal))
    return numpy.stack([0 * u, p, q, 2 * u * p, v * p + u * q, 2 * v * q], -1)


class Problem:
    """The loss as a function of one free parameter an element, and what it is made of."""

    def __init__(self, triangles, ratios=RATIOS):
        self.mesh = Mesh(triangles)
        self.plate = Plate(self.mesh)
        self.elements = len(self.mesh.triangles)
        self.smooth = self._smoothing(0.02)
        self.k = len(ratios)
        self.point = int(
            numpy.linalg.norm(self.mesh.points - numpy.array(POINT), axis=1).argmin()
        )
        uniform = torch.zeros(self.elements, dtype=torch.float64)
        frequencies = self.evaluate(uniform)[1]
        self.target = frequencies[0] * torch.tensor(ratios, dtype=torch.float64)
        self.weight = self.plate.weight(self.thickness(uniform))

    def _smoothing(self, radius):
        """Averages of the elements within `radius`, weighted by distance: thickness varies no faster than that."""
        centers = self.mesh.points[self.mesh.triangles].mean(1)
        tree = scipy.spatial.KDTree(centers)
        near = tree.sparse_distance_matrix(tree, radius, output_type="coo_matrix")
        weights = scipy.sparse.coo_array(
            (radius - near.data, (near.row, near.col)), shape=near.shape
        ).tocsr()
        weights = scipy.sparse.diags_array(1 / weights.sum(1)) @ weights
        parts = (weights.indptr, weights.indices, weights.data)
        return torch.sparse_csr_tensor(
            *(torch.from_numpy(part) for part in parts), weights.shape
        )

    def thickness(self, parameters):
        """Between a half and twice the uniform thickness."""
        return THICKNESS * 2 ** torch.tanh(self.smooth @ parameters)

    def evaluate(self, parameters):
        """Thickness (e,), frequencies (k,) in Hz, modes (m, k)."""
        thickness = self.thickness(parameters)
        K, M = self.plate.pencil(thickness)
        E, X = torch.lobpcg(
            K, self.k, B=M, iK=inverse(K.detach()), largest=False, tol=1e-9
        )
        return thickness, E.sqrt() / (2 * math.pi), X

    def loss(self, parameters):
        thickness, frequencies, X = self.evaluate(parameters)
        relative = self.plate.weight(thickness) / self.weight - 1
        # X^T M X = 1: the square of a deflection times the mass is a number without unit.
        rest = self.weight * X[self.plate.points[self.point], RESTING] ** 2
        return (
            (frequencies / self.target - 1).square().sum() + 0.01 * rest + relative**2
        )


def inverse(K):
    """K^-1 by sparse factors, as a function on blocks: they cost less than the iterations that they save."""
    parts = (K.values().numpy(), K.col_indices().numpy(), K.crow_indices().numpy())
    factors = scipy.sparse.linalg.splu(
        scipy.sparse.csc_array(parts, shape=K.shape)
    )  # symmetric: rows are columns
    return lambda R: torch.from_numpy(factors.solve(R.numpy()))


def optimise(problem, steps, report=print):
    """Parameters of the tuned plate, by L-BFGS; one line of progress every few steps."""
    parameters = torch.zeros(problem.elements, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=1, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = problem.loss(parameters)
        value.backward()
        return value

    report("step     loss    frequencies / wanted                thickness mm")
    for step in range(steps + 1):
        with torch.no_grad():
            thickness, frequencies, _ = problem.evaluate(parameters)
            loss = float(problem.loss(parameters))
        if step % 2 == 0 or loss < ENOUGH:
            ratios = "  ".join(
                f"{ratio:.4f}" for ratio in (frequencies / problem.target).tolist()
            )
            low, high = (1000 * float(t) for t in (thickness.min(), thickness.max()))
            report(f"{step:4d}  {loss:7.1e}    {ratios}    {low:.2f} to {high:.2f}")
        if loss < ENOUGH:
            break
        optimiser.step(closure)
    return parameters.detach()


def picture(problem, designs, path):
    """Thickness and modes of the designs, one row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, tri

    mesh = problem.mesh
    grid = tri.Triangulation(*mesh.points.T, mesh.triangles)
    figure, axes = pyplot.subplots(
        2, 1 + problem.k, figsize=(3.1 * (1 + problem.k), 5), layout="constrained"
    )
    for row, (name, parameters) in zip(axes, designs.items()):
        thickness, frequencies, X = problem.evaluate(parameters)
        drawn = row[0].tripcolor(
            grid, facecolors=1000 * thickness.numpy(), cmap="viridis", vmin=2, vmax=8
        )
        row[0].set_title(f"{name}: thickness, mm")
        figure.colorbar(drawn, ax=row[0], shrink=0.7)
        for j, axis in enumerate(row[1:]):
            w = problem.plate.deflections(X)[:, j].numpy()
            w = w / w[abs(w).argmax()]
            axis.tricontourf(grid, w, levels=numpy.linspace(-1, 1, 21), cmap="RdBu_r")
            if (w < -0.05).any():
                axis.tricontour(grid, w, levels=[0], colors="black", linewidths=0.8)
            if j == RESTING:
                axis.plot(
                    *mesh.points[problem.point], "o", mfc="none", mec="black", ms=9
                )
            axis.set_title(
                f"{float(frequencies[j]):.1f} Hz, wanted {float(problem.target[j]):.1f}"
            )
    for axis in axes.flat:
        axis.set_aspect("equal")
        axis.axis("off")
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--triangles", type=int, default=4000, help="elements, about (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="most steps of L-BFGS (%(default)s)"
    )
    parser.add_argument(
        "--output", default="plate.png", help="the picture (%(default)s)"
    )
    options = parser.parse_args(argv)
    began = time.perf_counter()
    problem = Problem(options.triangles)
    stored = len(problem.plate.column)
    print(
        f"{problem.elements} elements, {problem.plate.m} unknowns, {stored} stored values in K and in M"
    )
    tuned = optimise(problem, options.steps)
    _, frequencies, X = problem.evaluate(tuned)
    for j, (found, wanted) in enumerate(
        zip(frequencies.tolist(), problem.target.tolist())
    ):
        print(f"mode {j + 1}: {found:8.2f} Hz, wanted {wanted:8.2f} Hz")
    w = problem.plate.deflections(X)[:, RESTING].abs()
    print(
        f"mode {RESTING + 1} at the resting point: {float(w[problem.point] / w.max()):.1e} of its largest deflection"
    )
    print(f"{time.perf_counter() - began:.0f} s")
    designs = {"before": torch.zeros_like(tuned), "after": tuned}
    try:
        picture(problem, designs, options.output)
        print(f"picture: {options.output}")
    except ImportError as error:
        print(f"no picture: {error}; install matplotlib to have one")
    return int(bool((frequencies / problem.target - 1).abs().max() > 1e-3))


if __name__ == "__main__":
    sys.exit(main())
