# Owner(s): ["module: linear algebra"]
"""The displayed formulas of the derivative modules, each against a dense oracle that shares no code with it."""

import itertools
import math
import unittest
import warnings
from unittest import mock

import torch
import torch._lobpcg_impl.accuracy as accuracy
import torch._lobpcg_impl.complement as complement
import torch._lobpcg_impl.derivative as derivative
from torch._lobpcg_impl.arguments import settle
from torch._lobpcg_impl.iteration import EigenPairs
from torch._lobpcg_impl.operand import hermitian_part, operand, Pencil
from torch._lobpcg_impl.pairs import Pairs
from torch._lobpcg_impl.resolvent import reduced_resolvent
from torch._lobpcg_impl.sparse import is_symmetric_pattern, Pattern, PatternValues
from torch.testing._internal.common_utils import run_tests


DTYPES = (torch.float64, torch.complex128)
SPARSE = {
    "coo": lambda M: M.to_sparse_coo(),
    "coo with duplicates": lambda M: split_duplicates(M.to_sparse_coo().coalesce()),
    "csr": lambda M: M.to_sparse_csr(),
    "csc": lambda M: M.to_sparse_csc(),
    "bsr": lambda M: M.to_sparse_bsr((2, 2)),
    "bsc": lambda M: M.to_sparse_bsc((2, 2)),
}


def split_duplicates(S):
    i, v = S.indices(), S.values()
    return torch.sparse_coo_tensor(
        torch.cat([i, i], 1), torch.cat([v / 4, v * 3 / 4]), S.shape
    )


def random(*shape, dtype, seed=0):
    return torch.randn(
        *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )


def hermitian(M):
    return (M + M.mH) / 2


def differentiable_eigenpairs(A, B, forward, k, largest, tol):
    """torch.lobpcg with `forward` in the place of its solver."""
    with mock.patch.object(derivative, "solve", forward):
        return torch.lobpcg(A, k, B, largest=largest, tol=tol)


def pairs_of(A, B, E, X, tol, largest=False, further=None):
    """Exact pairs as a derivative gets them; A, B: matrices, callables or None."""
    empty = X[..., :0]
    T, Y = (E[..., :0], empty) if further is None else further
    options = settle(
        X.shape[-2], X.dtype, E.shape[-1], None, None, None, tol, largest, None
    )
    zero = torch.zeros_like(E)
    return Pairs(Pencil.of(A, B, None, X), options, E, X, T, Y, zero, zero + 1)


def pencil(m, dtype, batch=()):
    A = hermitian(random(*batch, m, m, dtype=dtype, seed=1))
    R = random(*batch, m, m, dtype=dtype, seed=2)
    return A, hermitian(R @ R.mH / m + torch.eye(m, dtype=dtype))


def spectral(A, B):
    """All eigenpairs, ascending, through the Cholesky factor of B; differentiable."""
    L = torch.linalg.cholesky(B)
    C = torch.linalg.solve_triangular(
        L, torch.linalg.solve_triangular(L, A, upper=False).mH, upper=False
    )
    E, U = torch.linalg.eigh(C)
    return E, torch.linalg.solve_triangular(L.mH, U, upper=True)


def exact(n, largest):
    """A forward that returns exact pairs."""

    def solve(pencil, X, options):
        A = hermitian(pencil.A.dense())
        B = (
            hermitian(pencil.B.dense())
            if pencil.generalized
            else torch.eye(A.shape[-1], dtype=A.dtype)
        )
        E, U = spectral(A, B)
        if largest:
            E, U = E.flip(-1), U.flip(-1)
        E, U = E[..., :n], U[..., :n]
        residual = torch.linalg.vector_norm(A @ U - B @ U * E.unsqueeze(-2), dim=-2)
        size = torch.linalg.matrix_norm(A, 2).unsqueeze(
            -1
        ) + E.abs() * torch.linalg.matrix_norm(B, 2).unsqueeze(-1)
        return EigenPairs(E, U, residual, size * torch.linalg.vector_norm(U, dim=-2))

    return solve


def invariant_loss(E, X):
    """Real and blind to phases; sees eigenvalues and eigenvectors."""
    W = hermitian(random(X.shape[-2], X.shape[-2], dtype=X.dtype, seed=9))
    weights = torch.arange(1, E.shape[-1] + 1, dtype=E.dtype)
    return E.sin().sum() + ((X * weights) @ X.mH * W.mT).sum().real


def system(A, B, E, X, b):
    """R_j b_j from the full system, one dense solve per pair."""
    m, k = X.shape
    columns = []
    for j in range(k):
        top = torch.cat([A - E[j] * B, B @ X], 1)
        bottom = torch.cat([X.mH @ B, torch.zeros(k, k, dtype=X.dtype)], 1)
        rhs = torch.cat([b[:, j], torch.zeros(k, dtype=X.dtype)])
        columns.append(torch.linalg.solve(torch.cat([top, bottom]), rhs)[:m])
    return torch.stack(columns, 1)


class FormulaTest(unittest.TestCase):
    def assertRelative(self, value, reference, bound):
        error = float(
            torch.linalg.vector_norm(value - reference)
            / torch.linalg.vector_norm(reference)
        )
        self.assertLessEqual(error, bound)

    def setUp(self):
        context = warnings.catch_warnings()
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        warnings.simplefilter("error", RuntimeWarning)


class ResolventTest(FormulaTest):
    def setup_pairs(self, dtype, m=24, k=3, largest=False, extra=0):
        A, B = pencil(m, dtype)
        E, X = spectral(A, B)
        if largest:
            E, X = E.flip(-1), X.flip(-1)
        return (
            A,
            B,
            E[:k],
            X[:, :k],
            X[:, k : k + extra],
            random(m, k, dtype=dtype, seed=3),
        )

    def test_every_route_solves_the_full_system(self):
        for dtype in DTYPES:
            for largest in (False, True):
                A, B, E, X, Y, b = self.setup_pairs(dtype, largest=largest, extra=2)
                sign = -1.0 if largest else 1.0
                op = complement.Complement(Pencil.of(A, B, None, None), E, X, sign)
                rhs = op.project_dual(b)
                op.set_scale(rhs)
                reference = system(A, B, E, X, b) * op.scale * op.sign
                preconditioned = op.restrict(slice(None))
                preconditioned.pencil = Pencil.of(A, B, B, None)
                routes = {
                    "factorised": lambda: complement._factorised(op, rhs, 3),
                    "spectral": lambda: complement._spectral(op, rhs, A, B),
                    "iterations": lambda: complement._iterate(op, rhs, None, 1e-14),
                    "deflated": lambda: complement._iterate(
                        op, rhs, (E[:2], Y + 1e-2 * b[:, :2]), 1e-14
                    ),
                    "preconditioned": lambda: complement._iterate(
                        preconditioned, rhs, (E[:2], Y), 1e-14
                    ),
                }
                for name, route in routes.items():
                    with self.subTest(name, dtype=dtype, largest=largest):
                        self.assertRelative(op.project(route()), reference, 1e-11)

    def test_iterations_alone_converge_and_stay(self):
        # Callables have no dense route: tolerance 0 asks for the attainable accuracy, column by column.
        A, B, E, X, _, b = self.setup_pairs(torch.float64, m=400, k=4)
        b = b * torch.tensor([1.0, 1e-9, 1e9, 0.0], dtype=b.dtype)
        z = reduced_resolvent(pairs_of(lambda V: A @ V, lambda V: B @ V, E, X, 0.0), b)
        reference = system(A, B, E, X, b)
        self.assertRelative(
            z[:, :3] / b[:, :3].norm(dim=0),
            reference[:, :3] / b[:, :3].norm(dim=0),
            1e-10,
        )
        self.assertEqual(float(z[:, 3].abs().max()), 0.0)

    def test_further_dimensions_are_further_columns(self):
        A, B, E, X, _, _ = self.setup_pairs(torch.float64)
        b = random(2, 5, 24, 3, dtype=torch.float64)
        z = reduced_resolvent(pairs_of(A, B, E, X, 1e-12), b)
        for i in range(2):
            for j in range(5):
                self.assertRelative(z[i, j], system(A, B, E, X, b[i, j]), 1e-11)

    def test_reverse_and_forward_mode(self):
        for dtype in DTYPES:
            A, B, E, X, _, b = self.setup_pairs(dtype, m=9)

            def ours(A, B, E, X, b):
                return reduced_resolvent(pairs_of(A, B, E, X, 1e-15), b)

            def herm(A, B, E, X, b):
                return system(hermitian(A), hermitian(B), E, X, b)

            inputs = tuple(t.clone().requires_grad_() for t in (A, B, E, X, b))
            cotangent = random(9, 3, dtype=dtype, seed=7)
            expected = torch.autograd.grad(herm(*inputs), inputs, cotangent)
            actual = torch.autograd.grad(ours(*inputs), inputs, cotangent)
            for name, value, reference in zip(
                ("gA", "gB", "gE", "gX", "gb"), actual, expected
            ):
                with self.subTest(name, dtype=dtype):
                    self.assertRelative(value, reference, 1e-11)
            plain = (A, B, E, X, b)
            tangents = tuple(
                random(*t.shape, dtype=t.dtype, seed=20 + i)
                for i, t in enumerate(plain)
            )
            _, dz = torch.func.jvp(ours, plain, tangents)
            _, reference = torch.func.jvp(herm, plain, tangents)
            self.assertRelative(dz, reference, 1e-11)


class EigenpairsTest(FormulaTest):
    def test_reverse_mode(self):
        for dtype in DTYPES:
            for largest in (False, True):
                for generalized in (False, True):
                    for batch in ((), (2,)):
                        A, B = pencil(12, dtype, batch)
                        B = (
                            B
                            if generalized
                            else torch.eye(12, dtype=dtype).expand_as(A)
                        )
                        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
                        inputs = (A, B) if generalized else (A,)
                        E, X = spectral(hermitian(A), hermitian(B))
                        E, X = (E.flip(-1), X.flip(-1)) if largest else (E, X)
                        expected = torch.autograd.grad(
                            invariant_loss(E[..., :3], X[..., :3]), inputs
                        )
                        E, X = differentiable_eigenpairs(
                            A,
                            B if generalized else None,
                            exact(5, largest),
                            3,
                            largest,
                            1e-12,
                        )
                        actual = torch.autograd.grad(invariant_loss(E, X), inputs)
                        for name, value, reference in zip("AB", actual, expected):
                            with self.subTest(
                                name, dtype=dtype, largest=largest, batch=batch
                            ):
                                self.assertRelative(value, reference, 1e-11)
                                self.assertRelative(value, value.mH, 1e-14)

    def test_forward_mode_against_differences(self):
        for dtype in DTYPES:
            A, B = pencil(10, dtype)
            dA, dB = (
                random(10, 10, dtype=dtype, seed=5),
                random(10, 10, dtype=dtype, seed=6),
            )

            def f(A, B):
                return differentiable_eigenpairs(A, B, exact(4, True), 2, True, 1e-12)

            def projector(A, B, f=f):
                E, X = f(A, B)
                return E, X @ X.mH

            _, (dE, dP) = torch.func.jvp(projector, (A, B), (dA, dB))
            h = 1e-5
            plus, minus = (
                projector(A + h * dA, B + h * dB),
                projector(A - h * dA, B - h * dB),
            )
            self.assertRelative(dE, (plus[0] - minus[0]) / (2 * h), 1e-8)
            self.assertRelative(dP, (plus[1] - minus[1]) / (2 * h), 1e-8)

    def test_eigenvalues_alone_need_no_solve(self):
        A, B = (M.requires_grad_() for M in pencil(12, torch.float64))
        E, _ = differentiable_eigenpairs(A, B, exact(5, True), 3, True, 1e-12)
        solve, derivative.reduced_resolvent = derivative.reduced_resolvent, None
        try:
            gA, gB = torch.autograd.grad(E.square().sum(), (A, B))
        finally:
            derivative.reduced_resolvent = solve
        exact_E, _ = spectral(A, B)
        for value, reference in zip(
            (gA, gB), torch.autograd.grad(exact_E[-3:].square().sum(), (A, B))
        ):
            self.assertRelative(value, hermitian(reference), 1e-12)

    def test_short_way_of_a_small_matrix(self):
        """Right by all pairs, and what the long way gives to the bit, as graphs must have it."""
        losses = {
            "values": lambda E, X, M: E.sin().sum(),
            "vectors": lambda E, X, M: (X @ X.mH * M).sum(),
            "both": lambda E, X, M: ((X * E.sin().unsqueeze(-2)) @ X.mH * M).sum(),
            "a column inside": lambda E, X, M: X[..., -1].norm(dim=-1).sum()
            + (X[..., 0].square() @ M[0]).sum(),
        }
        cases = itertools.product(
            ((torch.float64, 1e-11), (torch.float32, 3e-5)),
            ((6, 1), (20, 3), (100, 4)),
            ((), (3, 2)),
            (False, True),
            losses,
        )
        for (dtype, bound), (m, k), batch, largest, name in cases:
            W = hermitian(random(m, m, dtype=torch.float64, seed=3))
            A = hermitian(random(*batch, m, m, dtype=torch.float64, seed=m)).to(dtype)
            A = A.requires_grad_()

            def gradient(pairs, A=A, W=W, loss=losses[name]):
                return torch.autograd.grad(loss(*pairs, W.to(pairs[1].dtype)), A)[0]

            with self.subTest(
                name, dtype=dtype, m=m, k=k, batch=batch, largest=largest
            ):
                short = gradient(torch.lobpcg(A, k, largest=largest))
                never = mock.patch.object(
                    derivative, "weights_at_once", return_value=None
                )
                with never:
                    long = gradient(torch.lobpcg(A, k, largest=largest))
                self.assertTrue(torch.equal(short, long))
                E, X = torch.linalg.eigh(A.double())
                E, X = (T.flip(-1)[..., :k] if largest else T[..., :k] for T in (E, X))
                exact = gradient((E, X))
                self.assertRelative(short, (exact + exact.mH) / 2, bound)

    def test_short_way_is_taken(self):
        """Without one linear system, but where something is to be said or a second derivative may follow."""
        A = hermitian(random(30, 30, dtype=torch.float64))
        double = A.clone()
        double[:, :2] = double[:2] = 0.0
        double[0, 0] = double[1, 1] = 40.0
        for M, create_graph, systems in (
            (A, False, 0),
            (A.float(), False, 0),
            (A, True, 1),
            (double, False, 1),
            (torch.stack([A, -A]), False, 0),
            (torch.stack([A, -A]).float(), False, 0),
            (torch.stack([A, double]), False, 1),
        ):
            M = M.clone().requires_grad_()
            _, X = torch.lobpcg(M, 2)
            count = mock.patch.object(
                derivative, "reduced_resolvent", wraps=reduced_resolvent
            )
            with count as solved:
                loss = (X @ X.mH)[..., 0, 1].sum()
                torch.autograd.grad(loss, M, create_graph=create_graph)
            self.assertEqual(solved.call_count, systems)

    def test_short_way_across_a_narrow_gap(self):
        """Of a batch: no factor where the loss tells no vectors apart, as in the long way, and right by all pairs."""
        for gap in (3e-2, 1e-2, 3e-3):
            e = torch.linspace(1, 4, 20, dtype=torch.float64)
            e[1] = e[0] + gap
            Q = torch.linalg.qr(random(3, 20, 20, dtype=torch.float64)).Q
            A = hermitian((Q * e) @ Q.mH)
            W = hermitian(random(20, 20, dtype=torch.float64, seed=3))
            for largest, M in ((False, A), (True, -A)):
                M = M.float().requires_grad_()

                def gradient(X, M=M):
                    return torch.autograd.grad((X @ X.mH * W.to(X.dtype)).sum(), M)[0]

                with self.subTest(gap=gap, largest=largest):
                    count = mock.patch.object(
                        derivative, "reduced_resolvent", wraps=reduced_resolvent
                    )
                    with count as solved:
                        short = gradient(torch.lobpcg(M, 2, largest=largest)[1])
                    self.assertEqual(solved.call_count, 0)
                    never = mock.patch.object(
                        derivative, "weights_at_once", return_value=None
                    )
                    with never:
                        long = gradient(torch.lobpcg(M, 2, largest=largest)[1])
                    self.assertTrue(torch.equal(short, long))
                    exact = self.all_pairs_gradient(M.double(), W, largest)
                    self.assertRelative(short, exact, 3e-6)

    def all_pairs_gradient(self, M, W, largest):
        """Of sum(W o X X^T), X the first two vectors: divided differences."""
        E, X = torch.linalg.eigh(-M if largest else M)
        S = X.mH @ W @ X
        D = torch.zeros_like(S)
        D[..., :2, 2:] = S[..., :2, 2:] / (E[..., :2, None] - E[..., None, 2:])
        D = D + D.mH
        return (X @ D @ X.mH).detach() * (-1 if largest else 1)

    def test_rules_of_a_batch_are_those_of_one(self):
        g = torch.Generator().manual_seed(5)
        seen = set()
        for _ in range(300):
            k = int(torch.randint(1, 5, (), generator=g))
            E, size, x = torch.rand(3, k, generator=g, dtype=torch.float64) + 1
            gE, g_, z, left, rest = torch.rand(5, k, generator=g, dtype=torch.float64)
            noise = 10.0 ** float(-14 * torch.rand((), generator=g))
            E = 1 + E * 10.0 ** float(-6 * torch.rand((), generator=g))
            r, zero = noise * torch.rand(k, generator=g, dtype=torch.float64), 0 * x
            rows = [E, r, zero, size, x, gE, g_, z, left, rest]
            eps = 2.0**-52
            one = accuracy.rows_are_clear([row.tolist() for row in rows], 50, eps, eps)
            self.assertEqual(accuracy.batch_is_clear(rows, 50, eps, eps), one)
            seen.add(one)
        self.assertEqual(seen, {True, False})

    def test_pattern_that_is_not_symmetric(self):
        index = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]])
        values = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
        S = torch.sparse_coo_tensor(index, values, (3, 3)).requires_grad_()
        with self.assertRaisesRegex(
            ValueError, r"sparse A .* \(r, c\) without \(c, r\)"
        ):
            differentiable_eigenpairs(S, None, exact(1, False), 1, False, 1e-10)

    def test_hermitian_part_copies_only_what_is_not_hermitian(self):
        A, _ = pencil(6, torch.complex128)
        self.assertIs(hermitian_part(A), A)
        M = random(6, 6, dtype=torch.complex128)
        self.assertTrue(torch.equal(hermitian_part(M), hermitian(M)))


class ClusterTest(FormulaTest):
    def problem(self, m, values, dtype=torch.float64):
        e = torch.arange(1.0, m + 1, dtype=torch.float64)
        e[: len(values)] = torch.tensor(values, dtype=torch.float64)
        Q = torch.linalg.qr(random(m, m, dtype=dtype)).Q
        return e, Q, hermitian((Q * e) @ Q.mH).requires_grad_()

    def projector_gradient(self, e, Q, k, W):
        """Gradient of Re tr(W P) in A, P the projector onto the first k vectors: divided differences, outside in."""
        S = Q.mH @ W @ Q
        D = torch.zeros_like(S)
        D[:k, k:] = S[:k, k:] / (e[:k, None] - e[None, k:])
        D[k:, :k] = S[k:, :k] / (e[None, :k] - e[k:, None])
        return Q @ D @ Q.mH

    def test_projector_at_any_gap_inside_the_block(self):
        for dtype in DTYPES:
            for gap in (0.0, 1e-15, 1e-13, 1e-10, 1e-6):
                e, Q, A = self.problem(20, [1.0, 1.0 + gap, 1.0 + 2 * gap, 3.0], dtype)
                W = hermitian(random(20, 20, dtype=dtype, seed=3))
                _, X = differentiable_eigenpairs(
                    A, None, exact(6, False), 4, False, 1e-12
                )
                (gA,) = torch.autograd.grad((X @ X.mH * W.mT).sum().real, A)
                with self.subTest(gap=gap, dtype=dtype):
                    self.assertRelative(gA, self.projector_gradient(e, Q, 4, W), 1e-10)

    def test_projector_of_a_pencil_in_both_modes(self):
        """X X^H of a triple eigenvalue with B given, against differences of the projector by Cholesky and eigh."""
        for dtype in DTYPES:
            e, Q, _ = self.problem(16, [1.0, 1.0, 1.0], dtype)
            _, B = pencil(16, dtype)
            L = torch.linalg.cholesky(B)
            A = hermitian(L @ ((Q * e) @ Q.mH) @ L.mH)
            W, dA, dB = (
                hermitian(random(16, 16, dtype=dtype, seed=s)) for s in (3, 4, 5)
            )
            dA, dB = dA * 1e-1, dB * 1e-1

            def value(h):
                X = spectral(A + h * dA, B + h * dB)[1][:, :3]
                return (X @ X.mH * W.mT).sum().real

            h = 1e-5
            difference = (value(h) - value(-h)) / (2 * h)

            def f(A, B):
                forward = exact(5, False)
                return differentiable_eigenpairs(A, B, forward, 3, False, 1e-12)[1]

            def loss(A, B, f=f, W=W):
                X = f(A, B)
                return (X @ X.mH * W.mT).sum().real

            gA, gB = torch.autograd.grad(
                loss(*(inputs := [M.clone().requires_grad_() for M in (A, B)])), inputs
            )
            with self.subTest(dtype=dtype):
                self.assertRelative(
                    (gA.conj() * dA).sum().real + (gB.conj() * dB).sum().real,
                    difference,
                    1e-7,
                )
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", RuntimeWarning
                    )  # the tangent splits the cluster
                    _, tangent = torch.func.jvp(loss, (A, B), (dA, dB))
                self.assertRelative(tangent, difference, 1e-7)

    def test_second_derivative(self):
        """A triple eigenvalue and a simple one, at any gap, along one direction: differences of the loss itself."""
        for dtype, gap, generalized in itertools.product(
            DTYPES, (0.0, 1e-13, 1e-7), (False, True)
        ):
            e, Q, _ = self.problem(16, [1.0, 1.0 + gap, 1.0 + 2 * gap, 2.5], dtype)
            B = pencil(16, dtype)[1] if generalized else torch.eye(16, dtype=dtype)
            L = torch.linalg.cholesky(B)
            A = hermitian(L @ ((Q * e) @ Q.mH) @ L.mH)
            W, dA, dB = (
                hermitian(random(16, 16, dtype=dtype, seed=s)) for s in (3, 4, 5)
            )
            dB = dB * (0.1 if generalized else 0.0)

            def loss(E, X):
                first, last = X[:, :3], X[:, 3]
                mixed = E[:3].sum() * (last.conj() @ (W @ last)).real
                return (first @ first.mH * W.mT).sum().real * (1 + E[3] ** 2) + mixed

            def value(t):
                E, X = spectral(A + t * dA, B + t * dB)
                return loss(E[:4], X[:, :4])

            h = 3e-3
            f = [value(i * h) for i in range(-4, 5)]
            weights = [
                -1 / 560,
                8 / 315,
                -1 / 5,
                8 / 5,
                -205 / 72,
                8 / 5,
                -1 / 5,
                8 / 315,
                -1 / 560,
            ]
            expected = sum(w * v for w, v in zip(weights, f)) / h**2
            t = torch.zeros((), dtype=torch.float64, requires_grad=True)
            pair = differentiable_eigenpairs(
                A + t * dA,
                B + t * dB if generalized else None,
                exact(6, False),
                4,
                False,
                1e-12,
            )
            (g,) = torch.autograd.grad(loss(*pair), t, create_graph=True)
            (second,) = torch.autograd.grad(g, t, create_graph=True)
            with self.subTest(gap=gap, dtype=dtype, generalized=generalized):
                self.assertRelative(second.detach(), expected, 1e-5)
                if gap < 1e-10:
                    with self.assertWarnsRegex(
                        RuntimeWarning, "beyond the second are incomplete"
                    ):
                        torch.autograd.grad(second, t)

    def test_second_derivative_that_cannot_be_known(self):
        """The curvature of a function of single eigenvalues is not determined by their derivatives."""
        _, _, A = self.problem(16, [1.0, 1.0])
        E, _ = differentiable_eigenpairs(A, None, exact(4, False), 2, False, 1e-12)
        (g,) = torch.autograd.grad((E**2).sum(), A, create_graph=True)
        with self.assertWarnsRegex(RuntimeWarning, "weighs them differently"):
            torch.autograd.grad((g * hermitian(random(16, 16, dtype=A.dtype))).sum(), A)

    def test_loss_that_sees_the_gauge(self):
        _, _, A = self.problem(20, [1.0, 1.0])
        E, X = differentiable_eigenpairs(A, None, exact(5, False), 3, False, 1e-12)
        with self.assertRaisesRegex(
            RuntimeError, "eigenvalues 0 and 1 are equal to rounding"
        ):
            torch.autograd.grad((X[:, 0] ** 4).sum(), A, retain_graph=True)
        with self.assertWarnsRegex(RuntimeWarning, "weighs them differently"):
            torch.autograd.grad(E[0], A)
        _, _, A = self.problem(20, [1.0], torch.complex128)
        _, X = differentiable_eigenpairs(A, None, exact(5, False), 3, False, 1e-12)
        with self.assertRaisesRegex(RuntimeError, "phase of eigenvector"):
            torch.autograd.grad(X.real.sum(), A)

    def test_cluster_cut_at_k(self):
        for m in (20, 400):  # by factorisation and by iterations
            e, Q, A = self.problem(m, [1.0, 2.0, 3.0, 3.0])
            W = hermitian(random(m, m, dtype=torch.float64, seed=3))
            _, X = differentiable_eigenpairs(A, None, exact(6, False), 3, False, 1e-12)
            with self.assertWarnsRegex(
                RuntimeWarning, r"eigenvalue 2 of the k=3 .* rounding"
            ):
                (gA,) = torch.autograd.grad((X @ X.mH * W).sum(), A, retain_graph=True)
            self.assertLess(float(gA.abs().max()), 1e3)
            # The part that exists: vectors outside of the cluster do not notice it.
            (gA,) = torch.autograd.grad((X[:, :2] @ X[:, :2].mH * W).sum(), A)
            self.assertRelative(gA, self.projector_gradient(e, Q, 2, W), 1e-10)

    def test_pairs_that_have_not_converged(self):
        """A word where their error matters to the gradient, which is measured for small matrices."""
        for m, angle, warns in ((20, 0.1, True), (20, 1e-5, False), (300, 1e-5, True)):
            e, Q, A = self.problem(m, [1.0])

            def rough(*args):
                pairs = exact(5, False)(*args)
                c, s = math.cos(angle), math.sin(angle)
                X = torch.cat(
                    [
                        pairs.X[:, :2],
                        c * pairs.X[:, 2:3] + s * Q[:, 3:4],
                        pairs.X[:, 3:],
                    ],
                    -1,
                )
                residual = pairs.residual.clone()
                residual[2] = s * float(e[3] - e[2])
                return EigenPairs(pairs.E, X, residual, pairs.scale)

            E, _ = differentiable_eigenpairs(A, None, rough, 3, False, 1e-8)
            with self.subTest(m=m, angle=angle), warnings.catch_warnings(
                record=True
            ) as caught:
                warnings.simplefilter("always")
                (gA,) = torch.autograd.grad(E.sum(), A)
                said = [str(w.message) for w in caught]
                self.assertEqual(len(said), int(warns))
                if warns:
                    self.assertRegex(
                        said[0],
                        r"relative residual .* where tol=1.0e-08 .* Raise niter",
                    )
                else:
                    self.assertRelative(gA, Q[:, :3] @ Q[:, :3].mH, 1e-4)


class PatternTest(FormulaTest):
    def matrix(self, dtype, m=8):
        M = hermitian(random(m, m, dtype=dtype, seed=4))
        return M * (hermitian(random(m, m, dtype=torch.float64, seed=5)).abs() < 0.6)

    def test_gradient_lives_on_the_pattern(self):
        for dtype in DTYPES:
            M = self.matrix(dtype)
            U, V = random(8, 3, dtype=dtype, seed=6), random(8, 3, dtype=dtype, seed=7)
            for name, convert in SPARSE.items():
                S = convert(M)
                stored = convert(torch.ones_like(M) * (M != 0)).to_dense() != 0
                if name in ("bsr", "bsc"):  # whole blocks are stored
                    blocks = (M != 0).reshape(4, 2, 4, 2).any(3).any(1)
                    stored = blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)
                with self.subTest(name, dtype=dtype):
                    matrix = operand(S, "A")
                    (g,) = matrix.pullback((U, V))
                    self.assertEqual(
                        (g.layout, g.dtype, g.shape), (S.layout, S.dtype, S.shape)
                    )
                    self.assertRelative(
                        g.to_dense(), hermitian(U @ V.mH) * stored, 1e-15
                    )
                    for product in (
                        matrix.apply(V),
                        matrix.product(V),
                        matrix.tangent((S,), V),
                    ):
                        self.assertRelative(product, M @ V, 1e-14)
                    self.assertTrue(is_symmetric_pattern(S))

    def test_gradient_on_the_pattern_is_differentiable(self):
        for name in ("coo", "csr", "bsr"):
            for dtype in DTYPES:
                pattern = Pattern(SPARSE[name](self.matrix(dtype)))
                U, V = (
                    random(8, 2, dtype=dtype, seed=s).requires_grad_() for s in (6, 7)
                )
                for part in (False, True):

                    def values(U, V):
                        return PatternValues.apply(U, V, pattern, part)

                    with self.subTest(name, dtype=dtype, hermitian=part):
                        self.assertTrue(
                            torch.autograd.gradcheck(values, (U, V), fast_mode=True)
                        )
                        self.assertTrue(
                            torch.autograd.gradgradcheck(values, (U, V), fast_mode=True)
                        )

    def test_batches_that_the_matrix_lacks_are_summed(self):
        U, V = (
            random(4, 8, 3, dtype=torch.float64, seed=6),
            random(4, 8, 3, dtype=torch.float64, seed=7),
        )
        M = self.matrix(torch.float64)
        for S in (M, M.to_sparse_csr()):
            stored = (
                M != 0
                if S.layout != torch.strided
                else torch.ones_like(M, dtype=torch.bool)
            )
            (g,) = operand(S, "A").pullback((U, V))
            self.assertRelative(
                g.to_dense(), hermitian(U @ V.mH).sum(0) * stored, 1e-14
            )

    def test_pattern_that_is_not_symmetric(self):
        for index in ([[0, 1, 0], [0, 1, 1]], [[0, 1, 0, 2], [0, 1, 2, 1]]):
            values = torch.ones(len(index[0]), dtype=torch.float64)
            self.assertFalse(
                is_symmetric_pattern(torch.sparse_coo_tensor(index, values, (3, 3)))
            )


if __name__ == "__main__":
    run_tests()
