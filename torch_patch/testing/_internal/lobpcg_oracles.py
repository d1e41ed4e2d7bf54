# mypy: ignore-errors

"""What tests of torch.lobpcg have in common: one way to call it, one way to judge pairs, and oracles of its gradients.

The oracles share no code with lobpcg: all pairs by Cholesky and eigh, differentiated by autograd where the spectrum is
simple, and a sum over all pairs, which holds for repeated eigenvalues too.
"""

import os
import warnings

import torch
from torch.testing._internal.common_utils import TestCase


class LobpcgTestCase(TestCase):
    """What the classes below share: one way to call the solver, one way to judge what it returned."""

    def setUp(self):
        super().setUp()
        if not torch._C.has_lapack:
            self.skipTest("torch was built without LAPACK")

    @property
    def problems(self):
        from torch.testing._internal import lobpcg_problems

        return lobpcg_problems

    @property
    def full(self):
        """Long sweeps are asked for by LOBPCG_TEST_FULL=1."""
        return os.environ.get("LOBPCG_TEST_FULL", "0") == "1"

    def solve(self, *args, solver=None, **kwargs):
        """E, X and the warnings that lobpcg gave."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            E, X = (solver or torch.lobpcg)(*args, **kwargs)
        return E, X, [str(w.message) for w in caught if "lobpcg" in str(w.message)]

    def default_tol(self, dtype):
        """A relative residual that every problem of the catalogue can reach: 100 eps, rounded up."""
        return {torch.float64: 1e-9, torch.float32: 2e-5}[
            torch.zeros((), dtype=dtype).abs().dtype
        ]

    def assert_pairs(self, A, B, E, X, exact, tol, condition=1.0, rounding=0.0):
        """E, X are the wanted pairs: B-orthonormal, small residuals, E within the residual of the exact values.

        A Hermitian pencil has an eigenvalue within ||r|| / sqrt(smallest eigenvalue of B) of a Ritz value, for X
        B-normalised. Everything is judged in double precision and, against overflow, after division by the norm of A.
        """
        eps, m = torch.finfo(E.dtype).eps, X.size(-2)
        wide = torch.complex128 if X.is_complex() else torch.float64
        A, X = (M.detach().to_dense().to(wide) for M in (A, X))
        I = torch.eye(X.size(-1), dtype=wide, device=X.device)
        B = (
            torch.eye(m, dtype=wide, device=X.device)
            if B is None
            else B.detach().to_dense().to(wide)
        )
        self.assertFalse(E.is_complex())
        self.assertEqual(E.shape, exact.shape)
        self.assertEqual(X.shape, exact.shape[:-1] + (m, exact.shape[-1]))
        if E.numel() == 0:
            return
        scale = A.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(wide).tiny)
        A, E = A / scale, E.detach().double() / scale[..., 0].real
        exact = exact.to(E.device) / scale[..., 0].real
        orthogonal = (X.mH @ B @ X - I).abs().amax()
        self.assertLessEqual(
            orthogonal, 10 * m * eps * condition, "X is not B-orthonormal"
        )
        norm_A, norm_B = (torch.linalg.matrix_norm(M)[..., None] for M in (A, B))
        bound = (
            (tol * 1.1 + 10 * m * eps)
            * (norm_A + E.abs() * norm_B)
            * torch.linalg.vector_norm(X, dim=-2)
        )
        residual = torch.linalg.vector_norm(A @ X - B @ X * E.unsqueeze(-2), dim=-2)
        self.assertLessEqual(
            (residual / bound.clamp_min(1e-300)).max(),
            1.0,
            "residual above the tolerance",
        )
        smallest = torch.linalg.eigvalsh(B)[..., :1]
        off = (
            (E - exact).abs()
            - residual / smallest.sqrt()
            - rounding / scale[..., 0].real
        )
        slack = (
            10
            * m
            * eps
            * condition
            * norm_A
            / torch.linalg.matrix_norm(B, 2)[..., None]
        )
        self.assertLessEqual(
            (off - slack).max(), 0.0, f"not the wanted eigenvalues: {E} against {exact}"
        )

    def run_problem(
        self, p, dtype, k=3, largest=False, layout=torch.strided, device="cpu", **kwargs
    ):
        """Solve p and judge; a warning excuses the residual, never wrong orthogonality or shapes."""
        A, B = p.build(dtype, layout, device)
        tol = kwargs.setdefault("tol", self.default_tol(dtype))
        E, X, messages = self.solve(A, k=k, B=B, largest=largest, **kwargs)
        self.assertLessEqual(len(messages), 1)
        self.assertEqual(messages, [])
        self.assert_pairs(
            A, B, E, X, p.extreme(k, largest), tol, p.condition, p.error(dtype)
        )
        return E, X

    def start(self, m, n, dtype=torch.float64, seed=0, batch=()):
        return torch.randn(
            *batch, m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed)
        )

    def counting(self, M):
        """M as a callable on blocks, and the list of the numbers of columns it was applied to."""
        columns = []

        def apply(V):
            columns.append(V.size(-1))
            return M @ V

        return apply, columns


class LobpcgGradientCase(LobpcgTestCase):
    """The oracles, the losses and the one way to ask for a gradient that the classes below share."""

    # Oracles ------------------------------------------------------------------------------------------------------

    def dense_pairs(self, A, B):
        """All eigenvalues, ascending, and B-orthonormal eigenvectors by Cholesky and eigh; differentiable."""
        A = (A + A.mH) / 2
        if B is None:
            return torch.linalg.eigh(A)
        L = torch.linalg.cholesky((B + B.mH) / 2)
        C = torch.linalg.solve_triangular(
            L, torch.linalg.solve_triangular(L, A, upper=False).mH, upper=False
        )
        E, U = torch.linalg.eigh((C + C.mH) / 2)
        return E, torch.linalg.solve_triangular(L.mH, U, upper=True)

    def reference(self, A, B=None, k=1, largest=True):
        """lobpcg's result by dense autograd: the oracle for simple spectra."""
        E, X = self.dense_pairs(A, B)
        if largest:
            E, X = E.flip(-1), X.flip(-1)
        return E[..., :k], X[..., :k]

    def spectral_gradient(self, A, B, k, largest, loss, cluster=1e-9):
        """gA, gB of loss(E, X) as a sum over all m pairs: exact also for repeated eigenvalues (gauge-invariant loss).

        dX_j = sum_i V_i s_ij with s_ij = V_i^H (dA - E_j dB) X_j / (E_j - lambda_i). Inside a cluster (relative
        distance below `cluster`) only s + s^H = -V^H dB V is determined, and a gauge-invariant loss sees no more:
        C = V^H gX is Hermitian there and contributes -C/2 to the coefficient of dB.
        """
        with torch.no_grad():
            E_all, V = self.dense_pairs(
                A.detach().to_dense(), None if B is None else B.detach().to_dense()
            )
        if largest:
            E_all, V = E_all.flip(-1), V.flip(-1)
        E, X = (
            E_all[:k].clone().requires_grad_(True),
            V[:, :k].clone().requires_grad_(True),
        )
        gE, gX = torch.autograd.grad(
            loss(E, X), (E, X), allow_unused=True, materialize_grads=True
        )
        E, X = E.detach(), X.detach()
        C = V.mH @ gX
        distance = E - E_all.unsqueeze(-1)
        close = distance.abs() <= cluster * (E_all[0] - E_all[-1]).abs()
        T = torch.where(
            close, torch.zeros_like(C), C / torch.where(close, 1.0, distance)
        )
        W = V @ T + X * gE
        inside = torch.where(close[:k], (C[:k] + C[:k].mH) / 2, torch.zeros_like(C[:k]))

        def hermitian(M):
            return (M + M.mH) / 2

        gA = hermitian(W @ X.mH)
        gB = (
            None
            if B is None
            else -hermitian((W * E) @ X.mH) - hermitian(X @ inside @ X.mH) / 2
        )
        return gA, gB

    def smallest_gap(self, A, B, k, largest):
        """Smallest distance of a wanted eigenvalue to any other, relative to the spread of the spectrum."""
        E = self.dense_pairs(A.detach(), None if B is None else B.detach())[0]
        E = E.flip(-1) if largest else E
        return ((E[: k + 1].diff().abs().min()) / (E[0] - E[-1]).abs()).item()

    # Losses ---------------------------------------------------------------------------------------------------------

    def weights(self, m, dtype=torch.float64, seed=0):
        """Hermitian, entries of variance about 1, the same in every precision; no generator, as vmap wants it."""
        t = torch.arange(1, m * m + 1, dtype=torch.float64).reshape(m, m) ** 2
        M = 2**0.5 * torch.sin(0.6180339887 * t + seed)
        if dtype.is_complex:
            imaginary = 2**0.5 * torch.sin(0.4142135624 * t + seed)
            M = torch.complex(M, imaginary) / 2**0.5
        return ((M + M.mH) / 2).to(dtype)

    def loss_of_values(self, E, X):
        return (E * torch.arange(1, E.size(-1) + 1, dtype=E.dtype)).sum()

    def loss_of_vectors(self, E, X):
        """sum_j w_j x_j^H M x_j, all w_j different: sees every vector, no sign and no phase."""
        M = self.weights(X.size(-2), X.dtype)
        w = 1 / torch.arange(1, X.size(-1) + 1, dtype=E.dtype)
        return ((X.conj() * (M @ X)).real.sum(-2) * w).sum()

    def loss_of_both(self, E, X):
        M = self.weights(X.size(-2), X.dtype, 1)
        return (
            (X.conj() * (M @ X)).real.sum(-2) * (1 + E**2)
        ).sum() + self.loss_of_vectors(E, X)

    def loss_of_subspace(self, E, X):
        """trace of M X X^H and of the eigenvalues: invariant under every rotation of the k vectors."""
        return (X.conj() * (self.weights(X.size(-2), X.dtype) @ X)).real.sum() + E.sum()

    def loss_of_signed_vectors(self, E, X):
        """A linear functional of X after its largest entries were made positive."""
        largest = X.gather(-2, X.abs().argmax(-2, keepdim=True))
        X = X * (largest.conj() / largest.abs())
        return (X * self.weights(X.size(-2), X.dtype)[:, : X.size(-1)]).real.sum()

    # Asking -----------------------------------------------------------------------------------------------------------

    def leaf(self, M, needed=True):
        return None if M is None else M.detach().clone().requires_grad_(needed)

    def gradient(self, loss, A, B=None, need=(True, True), solver=None, **kwargs):
        """(gA, gB, messages of lobpcg): gradients of loss(lobpcg(A, B)), None where not needed."""
        A, B = self.leaf(A, need[0]), self.leaf(B, need[1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            E, X = (solver or torch.lobpcg)(A, B=B, **kwargs)
            # Not backward(): PyTorch cannot accumulate into .grad of a CSC, BSR or BSC leaf.
            leaves = [M for M in (A, B) if M is not None and M.requires_grad]
            found = iter(torch.autograd.grad(loss(E, X), leaves, allow_unused=True))
        messages = [str(w.message) for w in caught if "lobpcg" in str(w.message)]
        gA, gB = (
            next(found) if M is not None and M.requires_grad else None for M in (A, B)
        )
        return gA, gB, messages

    def relative(self, found, expected):
        found, expected = found.to_dense().to(expected.dtype), expected.to_dense()
        return (
            torch.linalg.vector_norm(found - expected)
            / torch.linalg.vector_norm(expected)
        ).item()

    def assert_close(self, found, expected, bound, what=""):
        self.assertIsNotNone(found, f"{what}: no gradient")
        error = self.relative(found, expected)
        self.assertLessEqual(error, bound, f"{what}: relative error {error:.1e}")

    def assert_hermitian(self, g):
        """Up to the rounding of a sum of at most 2 k = 100 products, taken in either order."""
        g = g.to_dense()
        self.assertLessEqual(
            (g - g.mH).abs().max(), 100 * torch.finfo(g.dtype).eps * g.abs().max()
        )
