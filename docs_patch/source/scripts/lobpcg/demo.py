"""torch.lobpcg on four jobs that need its gradient, each compared with an answer found another way.

usage: python demo.py

1. pytorch/pytorch issue 38948: a loss of the three largest eigenpairs of A A^T, against dense torch.linalg.eigh.
2. The normalized cut of Zachary's karate club: L x = lambda D x, where the Laplacian L and the degree matrix D both
   depend on the weight of every edge. Which edges hold the club together? Against finite differences of
   scipy.linalg.eigh.
3. gradcheck(..., symmetric=True) with a gradient in A, in A with B fixed, in B, and in both.
4. The same four gradients for matrices of 200 rows and up to 50 pairs, against dense torch.linalg.eigh.

Prints every figure beside the bound that it must keep; the exit status is 1 if one is not kept.

W. W. Zachary, "An information flow model for conflict and fission in small groups", J. Anthropol. Res. 33 (1977).
J. Shi and J. Malik, "Normalized cuts and image segmentation", IEEE Trans. PAMI 22 (2000), equation (6).
"""

import functools
import inspect
import sys
import time
from typing import NamedTuple

import networkx
import numpy
import scipy.linalg

import torch


class Figure(NamedTuple):
    """One line of the table: what was measured, and the bound it must not exceed."""

    name: str
    value: float
    bound: float

    @property
    def kept(self):
        return self.value <= self.bound  # False for NaN


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())


# --- 1. the script of issue 38948 ---------------------------------------------------------------------------------


def truncation_loss(E, V):
    """Sum of |V diag(E) V^T|: depends on the span of each V, not on its sign."""
    return ((V * E) @ V.mT).abs().sum()


def issue_38948(seed=0, size=10, k=3, **options):
    """The gradient in A of the loss of the k largest eigenpairs of A A^T, against the dense oracle.

    At this size the default solves densely; `method` makes torch.lobpcg iterate, as it does for large matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(
        size, size, generator=generator, dtype=torch.float64, requires_grad=True
    )

    truncation_loss(*torch.lobpcg(A @ A.mT, k=k, **options)).backward()

    A_dense = A.detach().clone().requires_grad_()
    E, V = torch.linalg.eigh(A_dense @ A_dense.mT)
    truncation_loss(E[-k:], V[:, -k:]).backward()

    # First order: an eigenvector is off by residual / gap, and the gradient with it. 20 covers the loss's own slope.
    E = E.detach()
    gap = float(E.diff()[-k:].min() / (E[-1] - E[0]))
    tol = options.get("tol", torch.finfo(E.dtype).eps ** 0.5)
    call = (
        ", ".join(f"{name}={value!r}" for name, value in options.items())
        or "default arguments"
    )
    name = f"issue 38948, {call}, gradient in A: relative error"
    return [
        Figure(name, relative_error(A.grad, A_dense.grad), max(1e-8, 20 * tol / gap))
    ]


# --- 2. the karate club -------------------------------------------------------------------------------------------


class Club:
    """The graph: 34 members, 78 edges weighted by the number of settings in which the two members met."""

    def __init__(self):
        graph = networkx.karate_club_graph()
        self.members = graph.number_of_nodes()
        self.edges = torch.tensor(list(graph.edges))  # (78, 2)
        self.weights = torch.tensor(
            [float(w) for *_, w in graph.edges.data("weight", 1.0)], dtype=torch.float64
        )
        self.with_instructor = torch.tensor(
            [graph.nodes[i]["club"] == "Mr. Hi" for i in graph]
        )

    def pencil(self, weights):
        """The Laplacian L = D - W and the degree matrix D, differentiable in the weights of the edges."""
        i, j = self.edges.T
        W = weights.new_zeros(self.members, self.members).index_put((i, j), weights)
        D = torch.diag((W + W.mT).sum(0))
        return D - W - W.mT, D


def second_eigenvalue(E, X):
    return E[1]


def concentration(E, X):
    """Fourth moment of the second eigenvector, which has X^T D X = I: large where few members decide the cut."""
    return X[:, 1].pow(4).sum()


def dense_pairs(L, D):
    E, X = scipy.linalg.eigh(L.numpy(), D.numpy(), subset_by_index=[0, 1])
    return torch.from_numpy(E), torch.from_numpy(X)


def finite_differences(club, quantity, step=1e-4):
    """Central differences in each weight, by a dense solver without autograd; error of the order of step^2."""
    slopes = []
    for edge in range(len(club.weights)):
        shift = torch.zeros_like(club.weights)
        shift[edge] = step
        above = quantity(*dense_pairs(*club.pencil(club.weights + shift)))
        below = quantity(*dense_pairs(*club.pencil(club.weights - shift)))
        slopes.append((above - below) / (2 * step))
    return torch.stack(slopes)


def karate_club(report=print, shown=5):
    """Gradients of the normalized cut in the weights of the edges, against finite differences."""
    club = Club()
    weights = club.weights.clone().requires_grad_()
    L, D = club.pencil(weights)
    E, X = torch.lobpcg(L, k=2, B=D, largest=False, tol=1e-11, method="ortho")
    exact, _ = dense_pairs(*club.pencil(club.weights))
    figures = [
        Figure(
            "karate club, eigenvalues: largest error",
            float((E.detach() - exact).abs().max()),
            1e-10,
        )
    ]
    slopes = {}
    for quantity, name in (
        (second_eigenvalue, "second eigenvalue"),
        (concentration, "second eigenvector"),
    ):
        (slopes[quantity],) = torch.autograd.grad(
            quantity(E, X), weights, retain_graph=True
        )
        error = relative_error(slopes[quantity], finite_differences(club, quantity))
        figures.append(
            Figure(
                f"karate club, {name}, gradient in the weights: relative error",
                error,
                1e-6,
            )
        )

    E, X, slope = E.detach(), X.detach(), slopes[second_eigenvalue]
    side = X[:, 1] > 0
    agree = max(
        int((side == club.with_instructor).sum()),
        int((side != club.with_instructor).sum()),
    )
    report(
        f"lambda = {float(E[0]):.1e}, {float(E[1]):.8f}; the sign of the second vector puts {agree} of"
    )
    report(
        f"{club.members} members on the side they took when the club split. Edges on which lambda_2 depends most:"
    )
    report("   members   weight   d lambda_2 / d weight   joins")
    for edge in slope.abs().argsort(descending=True)[:shown].tolist():
        i, j = club.edges[edge].tolist()
        joins = "the two sides" if side[i] != side[j] else "one side"
        report(
            f"  {i:4d} {j:4d}   {float(club.weights[edge]):6.0f}   {float(slope[edge]):+21.6f}   {joins}"
        )
    return figures


# --- 3. gradcheck along symmetric matrices ------------------------------------------------------------------------


def random_pencil(size, columns, seed=0):
    """Symmetric A and B, A of eigenvalues 1, ..., size, B positive definite of condition 3; and a first block."""
    generator = torch.Generator().manual_seed(seed)

    def orthogonal():
        return torch.linalg.qr(
            torch.randn(size, size, generator=generator, dtype=torch.float64)
        ).Q

    Q, P = orthogonal(), orthogonal()
    A = (Q * torch.arange(1.0, size + 1, dtype=torch.float64)) @ Q.mT
    B = (P * torch.linspace(1, 3, size, dtype=torch.float64)) @ P.mT
    X = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    return (A + A.mT) / 2, (B + B.mT) / 2, X


def symmetric_gradcheck(size=10, k=2, fast_mode=False, method=None):
    """gradcheck in the four cases; a figure is 0 where it passes and 1 where it does not.

    Slow mode solves once or twice for every entry of the matrices, fast mode a few times along random directions.
    """
    A, B, X = random_pencil(size, k + 1)

    def pairs(A, B=None):
        # The start block is fixed, since gradcheck wants the same bits twice; X X^T, since a sign is no function of A.
        E, V = torch.lobpcg(A, k=k, B=B, X=X, largest=False, tol=1e-12, method=method)
        return E, V @ V.mT

    def leaf(matrix):
        return matrix.clone().requires_grad_()

    cases = {
        "A": (pairs, (leaf(A),)),
        "A, B fixed": (pairs, (leaf(A), B)),
        "B": (lambda B: pairs(A, B), (leaf(B),)),
        "A and B": (pairs, (leaf(A), leaf(B))),
    }
    options = {"symmetric": True, "fast_mode": fast_mode, "raise_exception": False}
    how = f"gradcheck, symmetric=True, fast_mode={fast_mode}, method={method!r}"
    return [
        Figure(
            f"{how}, in {name}: failures",
            float(not torch.autograd.gradcheck(function, inputs, **options)),
            0.0,
        )
        for name, (function, inputs) in cases.items()
    ]


# --- 4. larger matrices -------------------------------------------------------------------------------------------


def dense_oracle(A, B, k):
    """The k smallest pairs by Cholesky and eigh, differentiable."""
    if B is None:
        E, V = torch.linalg.eigh(A)
        return E[:k], V[:, :k]
    L = torch.linalg.cholesky(B)
    C = torch.linalg.solve_triangular(
        L, torch.linalg.solve_triangular(L, A, upper=False).mT, upper=False
    )
    E, V = torch.linalg.eigh(C)
    return E[:k], torch.linalg.solve_triangular(L.mT, V[:, :k], upper=True)


def weighted_pairs(E, X):
    """Sees every value and every vector, and no sign: sum_j (E_j^2 + sum_i i x_ij^2 / m) / j."""
    profile = torch.linspace(0, 1, X.size(0), dtype=X.dtype).unsqueeze(-1)
    rank = torch.arange(1, E.numel() + 1, dtype=E.dtype)
    return ((E**2 + (profile * X**2).sum(0)) / rank).sum()


def gradients(pairs, A, B, in_A, in_B):
    A = A.clone().requires_grad_(in_A)
    B = None if B is None else B.clone().requires_grad_(in_B)
    weighted_pairs(*pairs(A, B)).backward()
    return [M.grad for M in (A, B) if M is not None and M.requires_grad]


def four_cases(size=200, orders=(1, 10, 50), method="ortho"):
    """Gradients in A without B, in A with B fixed, in B, and in both; the worst relative error over the orders k."""
    A, B, _ = random_pencil(size, 1)
    cases = {
        "A": (None, True, False),
        "A, B fixed": (B, True, False),
        "B": (B, False, True),
        "A and B": (B, True, True),
    }
    figures = []
    for case, (mass, in_A, in_B) in cases.items():
        errors = []
        for k in orders:
            options = {"k": k, "largest": False, "tol": 1e-11, "method": method}
            ours = functools.partial(torch.lobpcg, **options)
            found = gradients(lambda A, B, f=ours: f(A, B=B), A, mass, in_A, in_B)
            oracle = functools.partial(dense_oracle, k=k)
            exact = gradients(oracle, A, mass, in_A, in_B)
            errors += map(relative_error, found, exact)
        name = f"m = {size}, k in {', '.join(map(str, orders))}, gradient in {case}: relative error"
        figures.append(Figure(name, max(errors), 1e-8))
    return figures


# --- the table ----------------------------------------------------------------------------------------------------


def main():
    if "symmetric" not in inspect.signature(torch.autograd.gradcheck).parameters:
        print(
            f"demo: the torch in {torch.__path__[0]} is not patched; run tools/patch.py apply",
            file=sys.stderr,
        )
        return 1
    print(
        f"torch {torch.__version__}, numpy {numpy.__version__}, {torch.get_num_threads()} thread(s)\n"
    )
    begin = time.perf_counter()
    parts = {
        "issue 38948": (issue_38948,),
        "issue 38948, iterated": (issue_38948, {"method": "ortho", "tol": 1e-11}),
        "karate club": (karate_club,),
        "gradcheck": (symmetric_gradcheck,),
        "gradcheck, fast": (
            symmetric_gradcheck,
            {"fast_mode": True, "method": "ortho"},
        ),
        "A, A with B fixed, B, A and B": (four_cases,),
    }
    figures = []
    for name, (part, *options) in parts.items():
        print(f"{name} ...", flush=True)
        figures += part(**dict(*options))
    seconds = time.perf_counter() - begin

    width = max(len(figure.name) for figure in figures)
    print(f"\n{'':{width}}  measured    bound")
    for figure in figures:
        print(
            f"{figure.name:{width}}  {figure.value:8.1e}  {figure.bound:7.1e}{'' if figure.kept else '   NOT KEPT'}"
        )
    broken = sum(not figure.kept for figure in figures)
    print(f"\n{len(figures) - broken} of {len(figures)} bounds kept, {seconds:.1f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
