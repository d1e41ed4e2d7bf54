"""Matrices of the benchmark without a spectrum in closed form: graphs, finite elements, GOE; and their lowest pairs.

The reference for them is a shift-inverted Lanczos run to full accuracy, and Sylvester's law of inertia says that it
has missed no pair.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import scipy.spatial


def goe(m: int) -> np.ndarray:
    """A matrix of the Gaussian orthogonal ensemble, spectrum near [-sqrt(2 m), sqrt(2 m)]."""
    G = np.random.default_rng(0).standard_normal((m, m))
    return (G + G.T) / 2


def geometric(m: int, seed: int = 0, degree: float = 12.0) -> scipy.sparse.csr_array:
    """Adjacency of m random points of the unit square, joined up to the distance that gives the mean degree; of what
    hangs together, the largest part."""
    points = np.random.default_rng(seed).random((m, 2))
    pairs = scipy.spatial.cKDTree(points).query_pairs((degree / (np.pi * m)) ** 0.5, output_type="ndarray")
    A = scipy.sparse.coo_array((np.ones(len(pairs)), pairs.T), shape=(m, m)).tocsr()
    A = A + A.T
    _, part = scipy.sparse.csgraph.connected_components(A)
    (kept,) = np.nonzero(part == np.bincount(part).argmax())
    return A[kept][:, kept]


def blobs(m: int, count: int = 10) -> scipy.sparse.csr_array:
    """Adjacency of a ring of random geometric graphs, one edge between neighbours: an eigenvalue near zero each."""
    parts = [geometric(m // count, seed) for seed in range(count)]
    A = scipy.sparse.block_diag(parts, format="lil")
    first = np.cumsum([0] + [part.shape[0] for part in parts])[:-1]
    for i, j in zip(first, np.roll(first, -1)):
        A[i, j] = A[j, i] = 1.0
    return scipy.sparse.csr_array(A)


def random_adjacency(m: int, degree: int = 20) -> scipy.sparse.csr_array:
    """Adjacency of a random graph of the mean degree: a spectrum in a half circle, and one outlier."""
    i, j = np.random.default_rng(0).integers(0, m, (2, m * degree // 2))
    apart = i != j
    A = scipy.sparse.coo_array((np.ones(apart.sum()), (i[apart], j[apart])), shape=(m, m)).tocsr()
    A = A + A.T
    A.data[:] = 1.0
    return A


def laplacian(A: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    degrees = np.asarray(A.sum(axis=1)).ravel()
    return (scipy.sparse.diags_array(degrees) - A).tocsr()


def elements(dimension: int, m: int) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Stiffness K and consistent mass M of linear elements, zero on the boundary.

    The mesh is one of the unit interval, graded by 1 to 10, or of the unit square, the Delaunay triangulation of a grid
    whose inner points are moved at random.
    """
    if dimension == 1:
        points = np.cumsum(np.concatenate([[0.0], np.geomspace(1, 10, m + 1)]))[:, None]
        cells = np.stack([np.arange(m + 1), np.arange(1, m + 2)], axis=1)
        boundary = np.array([0, m + 1])
    else:
        side = round(m**0.5)
        grid = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, side + 2)], indexing="ij"), axis=-1).reshape(-1, 2)
        (boundary,) = np.nonzero(((grid == 0) | (grid == 1)).any(axis=1))
        moved = grid + np.random.default_rng(0).uniform(-0.3, 0.3, grid.shape) / (side + 1)
        moved[boundary] = grid[boundary]
        points, cells = moved, scipy.spatial.Delaunay(moved).simplices
    K, M = _assemble(points / points.max(), cells)
    inner = np.setdiff1d(np.arange(len(points)), boundary)
    return K[inner][:, inner], M[inner][:, inner]


def _assemble(points, cells):
    """Sums over simplices T with d + 1 corners: K_T = |T| grad phi_i . grad phi_j, M_T = |T| (1 + delta_ij) / ((d + 1)
    (d + 2))."""
    d, count = points.shape[1], len(points)
    edges = points[cells[:, 1:]] - points[cells[:, :1]]  # (cells, d, d)
    volume = np.abs(np.linalg.det(edges)) / (1, 1, 2)[d]
    kept = volume > 1e-12 * volume.max()  # a flat triangle on the boundary carries nothing
    cells, edges, volume = cells[kept], edges[kept], volume[kept]
    gradients = np.linalg.inv(edges).transpose(0, 2, 1)
    gradients = np.concatenate([-gradients.sum(axis=1, keepdims=True), gradients], axis=1)  # (cells, d + 1, d)
    local = {
        "K": gradients @ gradients.transpose(0, 2, 1) * volume[:, None, None],
        "M": (np.eye(d + 1) + 1) / ((d + 1) * (d + 2)) * volume[:, None, None],
    }
    rows, columns = (np.broadcast_to(c, local["K"].shape).ravel() for c in (cells[:, :, None], cells[:, None, :]))
    return [
        scipy.sparse.coo_array((block.ravel(), (rows, columns)), shape=(count, count)).tocsr()
        for block in local.values()
    ]


def factored(A: scipy.sparse.csc_array) -> scipy.sparse.linalg.SuperLU:
    """The factorisation of a symmetric matrix by SuperLU, in an ordering of A + A^T and with pivots on the diagonal."""
    symmetric = {"SymmetricMode": True}
    return scipy.sparse.linalg.splu(A, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=symmetric)


def lowest(A, B, k: int, shift: float) -> np.ndarray:
    """The k lowest eigenvalues of sparse matrices, ascending; AssertionError unless the inertia confirms them.

    Behind the k-th, where it is apart from the next by more than rounding, A - s B has as many negative pivots as there
    are eigenvalues below s.
    """
    more = k + 6
    E = scipy.sparse.linalg.eigsh(A.tocsc(), more, B, sigma=shift, which="LM", return_eigenvectors=False, tol=1e-12)
    E = np.sort(E)
    last = k + int(np.argmax(np.diff(E[k - 1 :])))
    s = (E[last - 1] + E[last]) / 2
    pencil = A - s * (scipy.sparse.eye_array(A.shape[0]) if B is None else B)
    pivots = factored(pencil.tocsc()).U.diagonal()
    assert int((pivots < 0).sum()) == last, "the reference has missed a pair"
    return E[:k]
