# Owner(s): ["module: autograd"]
"""Derivatives of torch.lobpcg in A and B, against independent dense oracles; gradcheck along symmetric matrices."""

import functools
import itertools
import re
import textwrap
import warnings

import torch
from torch.autograd import Function
from torch.testing._internal.common_utils import (
    gradcheck,
    gradgradcheck,
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)
from torch.testing._internal.lobpcg_oracles import LobpcgGradientCase


class TestLobpcgGradient(LobpcgGradientCase):
    """Right gradients for simple spectra: every case of A and B, every loss, dense."""

    def pencil(self, kind, m, generalized):
        if kind == "indefinite":
            return self.problems.indefinite(m, 1e3 if generalized else 1.0).build()
        A, _ = self.problems.wishart(m, 2 * m).build()
        B = self.problems.prescribed(
            f"mass{m}", torch.logspace(-3, 0, m, dtype=torch.float64)
        )
        return A, B.build()[0] if generalized else None

    def test_error_against_dense_oracle(self):
        """float64, forward tolerance 1e-11: at most 1e-8, or 20 tol / gap where that is larger."""
        orders = (1, 5, 10, 20, 50) if self.full else (1, 20, 50)
        for kind, generalized, largest, k in itertools.product(
            ("indefinite", "wishart"), (False, True), (False, True), orders
        ):
            A, B = self.pencil(kind, 200, generalized)
            gap = self.smallest_gap(A, B, k, largest)
            bound = max(1e-8, 20 * 1e-11 / gap)
            exact = self.gradient(
                self.loss_of_both, A, B, k=k, largest=largest, solver=self.reference
            )
            methods = (
                ("ortho", "basic", None)
                if self.full
                else ("ortho",)
                if k > 5
                else ("ortho", None)
            )
            for method in methods:
                with self.subTest(
                    kind=kind,
                    generalized=generalized,
                    largest=largest,
                    k=k,
                    method=method,
                ):
                    gA, gB, messages = self.gradient(
                        self.loss_of_both,
                        A,
                        B,
                        k=k,
                        largest=largest,
                        tol=1e-11,
                        niter=3000,
                        method=method,
                    )
                    self.assertEqual(messages, [])
                    self.assert_close(gA, exact[0], bound, "gA")
                    self.assert_hermitian(gA)
                    if generalized:
                        self.assert_close(gB, exact[1], bound, "gB")
                        self.assert_hermitian(gB)

    def test_only_what_is_needed(self):
        """A with B fixed, B with A fixed, both: the same numbers, and nothing for the fixed one."""
        A, B = self.problems.indefinite(60, 10.0).build()
        for largest, method, k in itertools.product(
            (False, True), ("ortho", "basic", None), (1, 4, 20)
        ):
            options = dict(k=k, largest=largest, method=method, tol=1e-11, niter=3000)
            exact = self.gradient(
                self.loss_of_both, A, B, k=k, largest=largest, solver=self.reference
            )
            for need in ((True, False), (False, True), (True, True)):
                with self.subTest(largest=largest, method=method, k=k, need=need):
                    found = self.gradient(self.loss_of_both, A, B, need, **options)
                    self.assertEqual(found[2], [])
                    for g, e, needed in zip(found, exact, need):
                        if needed:
                            self.assert_close(g, e, 1e-8)
                        else:
                            self.assertIsNone(g)

    def test_losses(self):
        for name, generalized, dtype in itertools.product(
            ("values", "vectors", "both", "subspace", "signed_vectors"),
            (False, True),
            (torch.float64, torch.complex128),
        ):
            loss = getattr(self, f"loss_of_{name}")
            p = self.problems.indefinite(
                45, 1e2 if generalized else 1.0, is_complex=dtype.is_complex
            )
            A, B = p.build(dtype)
            exact = self.spectral_gradient(A, B, 4, False, loss)
            for method in ("ortho", "basic", None):
                with self.subTest(
                    loss=name, generalized=generalized, dtype=dtype, method=method
                ):
                    gA, gB, messages = self.gradient(
                        loss,
                        A,
                        B,
                        k=4,
                        largest=False,
                        method=method,
                        tol=1e-11,
                        niter=2000,
                    )
                    self.assertEqual(messages, [])
                    self.assert_close(gA, exact[0], 1e-8, "gA")
                    self.assert_hermitian(gA)
                    if generalized:
                        self.assert_close(gB, exact[1], 1e-8, "gB")
                        self.assert_hermitian(gB)

    def test_the_two_oracles_agree(self):
        """The sum over the spectrum against autograd through Cholesky and eigh."""
        A, B = self.problems.indefinite(30, 1e2).build()
        for largest, loss in itertools.product(
            (False, True), (self.loss_of_both, self.loss_of_signed_vectors)
        ):
            by_autograd = self.gradient(
                loss, A, B, k=4, largest=largest, solver=self.reference
            )
            by_sum = self.spectral_gradient(A, B, 4, largest, loss)
            self.assert_close(by_sum[0], by_autograd[0], 1e-10)
            self.assert_close(by_sum[1], by_autograd[1], 1e-10)

    def test_float32(self):
        for k, generalized, largest in itertools.product(
            (1, 5, 10), (False, True), (False, True)
        ):
            A, B = self.problems.indefinite(100, 10.0 if generalized else 1.0).build(
                torch.float32
            )
            wide = None if B is None else B.double()
            exact = self.gradient(
                self.loss_of_vectors,
                A.double(),
                wide,
                k=k,
                largest=largest,
                solver=self.reference,
            )
            for method in ("ortho", None):
                with self.subTest(
                    k=k, generalized=generalized, largest=largest, method=method
                ):
                    found = self.gradient(
                        self.loss_of_vectors,
                        A,
                        B,
                        k=k,
                        largest=largest,
                        tol=1e-6,
                        niter=2000,
                        method=method,
                    )
                    self.assertEqual(found[0].dtype, torch.float32)
                    self.assert_close(found[0], exact[0], 1e-4, "gA")
                    if generalized:
                        self.assert_close(found[1], exact[1], 1e-4, "gB")

    def test_issue_38948(self):
        """A = S S^T with S the leaf: the gradient goes on through what made A."""
        S = torch.randn(
            10,
            10,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
            requires_grad=True,
        )

        def loss(E, X):
            return (X @ torch.diag_embed(E) @ X.mT).abs().sum()

        found = torch.autograd.grad(loss(*torch.lobpcg(S @ S.mT, k=3, tol=1e-12)), S)[0]
        expected = torch.autograd.grad(loss(*self.reference(S @ S.mT, k=3)), S)[0]
        self.assert_close(found, expected, 1e-8)

    def test_closed_form_laplacian(self):
        """Every eigenvector of the 1-D Laplacian is a sine, so gA is a sum of products of sines."""
        p = self.problems.laplacian(60)
        A, _ = p.build()
        for largest, method in itertools.product((False, True), ("ortho", None)):
            V, E_all = p.eigenvectors(60, largest), p.extreme(60, largest)
            M = self.weights(60)
            w = 1 / torch.arange(1, 4, dtype=torch.float64)
            C = V.mT @ (2 * M @ V[:, :3] * w)
            distance = E_all[:3] - E_all.unsqueeze(-1)
            T = torch.where(distance == 0, 0.0, C / distance)
            expected = V @ T @ V[:, :3].mT
            gA, _, _ = self.gradient(
                self.loss_of_vectors,
                A,
                k=3,
                largest=largest,
                tol=1e-12,
                niter=2000,
                method=method,
            )
            self.assert_close(gA, (expected + expected.mT) / 2, 1e-7)
            gA, _, _ = self.gradient(
                self.loss_of_values,
                A,
                k=3,
                largest=largest,
                tol=1e-12,
                niter=2000,
                method=method,
            )
            self.assert_close(gA, (V[:, :3] * torch.arange(1, 4)) @ V[:, :3].mT, 1e-9)

    def test_finite_differences(self):
        """Central differences of lobpcg itself along symmetric directions, in A and in B."""
        A, B = self.problems.indefinite(40, 1e2).build()
        options = dict(k=3, largest=False, tol=1e-13, niter=1000)
        for method in ("ortho", None):
            gA, gB, _ = self.gradient(self.loss_of_both, A, B, method=method, **options)

            def value(t, dA, dB):
                return self.loss_of_both(
                    *torch.lobpcg(A + t * dA, B=B + t * dB, method=method, **options)
                ).item()

            for seed in range(3):
                dA, dB = (
                    self.weights(40, seed=seed),
                    0.01 * self.weights(40, seed=10 + seed),
                )
                h = 1e-4 / torch.linalg.matrix_norm(dA, 2).item()
                difference = (
                    8 * (value(h, dA, dB) - value(-h, dA, dB))
                    - value(2 * h, dA, dB)
                    + value(-2 * h, dA, dB)
                ) / (12 * h)
                self.assertEqual(
                    (gA * dA).sum().item() + (gB * dB).sum().item(),
                    difference,
                    rtol=1e-6,
                    atol=1e-6,
                )

    def test_batches_and_broadcast_B(self):
        """A batched, B one for all or one each: gB of a shared B is the sum over the batch."""
        p = self.problems.indefinite(30, 1e2)
        for dtype, shape, method in itertools.product(
            (torch.float64, torch.complex128), ((3,), (2, 2)), ("ortho", None)
        ):
            A, B, _ = self.problems.batch(p, shape, dtype)
            options = dict(k=3, largest=False, method=method, tol=1e-11, niter=2000)

            def loss(E, X):
                return sum(
                    self.loss_of_both(*pair)
                    for pair in zip(E.flatten(0, -2), X.flatten(0, -3))
                )

            members = [
                self.spectral_gradient(M, B, 3, False, self.loss_of_both)
                for M in A.flatten(0, -3)
            ]
            each_A = torch.stack([g for g, _ in members]).reshape(A.shape)
            each_B = torch.stack([g for _, g in members]).reshape(A.shape)
            with self.subTest(dtype=dtype, shape=shape, method=method):
                gA, gB, messages = self.gradient(loss, A, B, **options)
                self.assertEqual(messages, [])
                self.assert_close(gA, each_A, 1e-8)
                self.assert_close(gB, each_B.flatten(0, -3).sum(0), 1e-8)
                gA, gB, _ = self.gradient(loss, A, B.expand(A.shape), **options)
                self.assert_close(gA, each_A, 1e-8)
                self.assert_close(gB, each_B, 1e-8)
                gB = self.gradient(loss, A, B, (False, True), **options)[1]
                self.assert_close(gB, each_B.flatten(0, -3).sum(0), 1e-8)

    def test_empty_batch(self):
        A = torch.zeros(0, 20, 20, dtype=torch.float64, requires_grad=True)
        E, X = torch.lobpcg(A, k=2)
        (E.sum() + X.sum()).backward()
        self.assertEqual(A.grad.shape, A.shape)

    def test_every_k(self):
        A, B = self.problems.indefinite(24, 10.0).build()
        for k in (1, 2, 3, 7, 8, 12, 23, 24):
            exact = self.gradient(
                self.loss_of_both, A, B, k=k, largest=True, solver=self.reference
            )
            for method in ("ortho", "basic", None) if k <= 8 else (None,):
                with self.subTest(k=k, method=method):
                    limit = {"niter": 2000} if method else {}
                    gA, gB, messages = self.gradient(
                        self.loss_of_both, A, B, k=k, method=method, tol=1e-11, **limit
                    )
                    self.assertEqual(messages, [])
                    self.assert_close(gA, exact[0], 1e-8)
                    self.assert_close(gB, exact[1], 1e-8)

    def test_guard_columns_and_start_block(self):
        """n > k, a start block and a preconditioner change the way, not the gradient."""
        A, B = self.problems.indefinite(60, 1e2).build()
        A = A + 1.1 * B  # positive definite, so that its inverse is a preconditioner
        exact = self.gradient(
            self.loss_of_both, A, B, k=3, largest=False, solver=self.reference
        )
        X = torch.randn(
            60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        ways = {
            "n": dict(n=10),
            "X": dict(X=X),
            "iK": dict(iK=torch.linalg.inv(A)),
            "sparse iK": dict(iK=torch.linalg.inv(A).to_sparse_csr()),
            "callable iK": dict(iK=lambda R: torch.linalg.solve(A, R)),
        }
        for (name, way), method in itertools.product(
            ways.items(), ("ortho", "basic", None)
        ):
            with self.subTest(way=name, method=method):
                gA, gB, messages = self.gradient(
                    self.loss_of_both,
                    A,
                    B,
                    k=3,
                    largest=False,
                    tol=1e-11,
                    niter=2000,
                    method=method,
                    **way,
                )
                self.assertEqual(messages, [])
                self.assert_close(gA, exact[0], 1e-8)
                self.assert_close(gB, exact[1], 1e-8)

    def test_iterative_backward(self):
        """Large enough that dense solves do not pay: the closed form of the Laplacian judges, iK or not."""
        p = self.problems.laplacian(31, 40)
        A, _ = p.build()
        for iK in (None, torch.linalg.inv(A)):
            expected, _ = self.spectral_gradient(A, None, 4, False, self.loss_of_both)
            gA, _, messages = self.gradient(
                self.loss_of_both,
                A,
                k=4,
                n=8,
                largest=False,
                tol=1e-10,
                niter=3000,
                method="ortho",
                iK=iK,
            )
            self.assertEqual(messages, [])
            self.assert_close(gA, expected, 1e-6)

    def test_scale(self):
        """gA of a loss of X scales as 1/|A|, and is right at extreme scales."""
        A, B = self.problems.indefinite(40, 1e2).build()
        exact = self.spectral_gradient(A, B, 3, True, self.loss_of_vectors)
        for exponent, method in itertools.product(
            (-500, -60, 60, 500), ("ortho", None)
        ):
            with self.subTest(exponent=exponent, method=method):
                s = 2.0**exponent
                gA, gB, messages = self.gradient(
                    self.loss_of_vectors,
                    A * s,
                    B,
                    k=3,
                    tol=1e-11,
                    niter=2000,
                    method=method,
                )
                self.assertEqual(messages, [])
                self.assert_close(gA * s, exact[0], 1e-8)
                self.assert_close(gB, exact[1], 1e-8)

    def test_requires_grad_on_X_and_iK(self):
        A, _ = self.problems.indefinite(30).build()
        X = torch.randn(30, 3, dtype=torch.float64, requires_grad=True)
        iK = torch.eye(30, dtype=torch.float64, requires_grad=True)
        for needed, method in itertools.product(
            (False, True), ("ortho", "basic", None)
        ):
            M = self.leaf(A, needed)
            E, V = torch.lobpcg(M, X=X, iK=iK, method=method)
            if needed:
                self.loss_of_both(E, V).backward()
                self.assertIsNotNone(M.grad)
            self.assertIsNone(X.grad)
            self.assertIsNone(iK.grad)

    def test_nothing_requires_grad(self):
        A, B = self.problems.indefinite(30, 10.0).build()
        self.assertFalse(torch.lobpcg(A, k=2, B=B)[0].requires_grad)
        with torch.no_grad():
            self.assertFalse(torch.lobpcg(self.leaf(A), k=2)[0].requires_grad)
        with torch.inference_mode():
            self.assertEqual(
                torch.lobpcg(A, k=2)[0],
                self.problems.indefinite(30, 10.0).spectrum.new_tensor(
                    torch.linalg.eigvalsh(A).flip(0)[:2].tolist()
                ),
                atol=1e-6,
                rtol=0,
            )

    def test_undefined_cotangents(self):
        """An output that the loss does not use has no cotangent; both unused is a zero gradient."""
        A, B = self.problems.indefinite(30, 10.0).build()
        options = dict(k=3, largest=False, tol=1e-11)
        for loss in (self.loss_of_values, self.loss_of_vectors):
            exact = self.spectral_gradient(A, B, 3, False, loss)
            found = self.gradient(loss, A, B, **options)
            self.assert_close(found[0], exact[0], 1e-8)
            self.assert_close(found[1], exact[1], 1e-8)
        leaf = self.leaf(A)
        E, X = torch.lobpcg(leaf, **options)
        gA = torch.autograd.grad(
            [E, X], leaf, [torch.zeros_like(E), torch.zeros_like(X)]
        )[0]
        self.assertEqual(gA.abs().max().item(), 0.0)

    def test_values_alone_need_no_solve(self):
        """gA = X diag(gE) X^H whatever the residual, and no operation with an m x m matrix as a factor."""
        from torch.utils._python_dispatch import TorchDispatchMode

        m, seen = 300, []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                square = [
                    a
                    for a in args
                    if isinstance(a, torch.Tensor) and tuple(a.shape[-2:]) == (m, m)
                ]
                name = str(function)
                if square and any(
                    word in name
                    for word in (
                        "mm",
                        "mul.",
                        "linalg",
                        "solve",
                        "chol",
                        "lu",
                        "sparse",
                    )
                ):
                    seen.append(name)
                return function(*args, **(kwargs or {}))

        A, B = (self.leaf(M) for M in self.problems.indefinite(m, 10.0).build())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            E, X = torch.lobpcg(A, k=3, B=B, niter=5, method="ortho")
            with Record():
                gA, gB = torch.autograd.grad(self.loss_of_values(E, X), (A, B))
        self.assertEqual([name for name in seen if "mul.Scalar" not in name], [])
        gE = torch.arange(1, 4, dtype=torch.float64)
        self.assert_close(gA, (X * gE) @ X.mT, 1e-13)
        self.assert_close(gB, -(X * gE * E) @ X.mT, 1e-13)

    def test_hermitian_part(self):
        """The gradient at a matrix that is not symmetric is that of its symmetric part, and is symmetric itself."""
        A, B = self.problems.indefinite(30, 10.0).build()
        skew = torch.triu(self.weights(30), 1)
        skew = skew - skew.mT
        exact = self.spectral_gradient(A, B, 3, True, self.loss_of_both)
        for method in ("ortho", None):
            gA, gB, _ = self.gradient(
                self.loss_of_both, A + skew, B + skew, k=3, tol=1e-11, method=method
            )
            self.assert_close(gA, exact[0], 1e-8)
            self.assert_close(gB, exact[1], 1e-8)
            self.assert_hermitian(gA)
            self.assert_hermitian(gB)

    def test_gradient_descent_moves_eigenvalues(self):
        """End to end: springs of a chain are tuned until its lowest frequencies are the prescribed ones."""
        m = 30
        T = torch.eye(m + 1, m, dtype=torch.float64) - torch.eye(
            m + 1, m, dtype=torch.float64
        ).roll(1, 0)
        logs = torch.zeros(m + 1, dtype=torch.float64, requires_grad=True)
        mass = torch.diag(1 + torch.arange(m).double() / m)
        target = self.reference(1.3 * T.mT @ T, mass, 3, False)[0].detach()
        optimizer = torch.optim.LBFGS(
            [logs], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-12
        )

        def closure():
            optimizer.zero_grad()
            E, _ = torch.lobpcg(
                T.mT @ torch.diag(logs.exp()) @ T,
                k=3,
                B=mass,
                largest=False,
                tol=1e-11,
                niter=2000,
            )
            value = ((E / target - 1) ** 2).sum()
            value.backward()
            return value

        optimizer.step(closure)
        self.assertLess(closure().item(), 1e-10)


class TestLobpcgGradientSparse(LobpcgGradientCase):
    """Gradients to the stored values: the layout and pattern of the input, no m x m array on the way."""

    layouts = (
        torch.sparse_coo,
        torch.sparse_csr,
        torch.sparse_csc,
        torch.sparse_bsr,
        torch.sparse_bsc,
    )
    options = dict(k=3, largest=False, tol=1e-11, niter=3000)

    def pencils(self):
        P = self.problems
        yield P.laplacian(12, 9)
        yield P.laplacian_mass(12, 9)
        yield P.rod(60)
        yield P.diagonal_mass(P.laplacian(12, 9), 10.0)

    def masked(self, g, like):
        """g at the stored positions of `like`, zero elsewhere: what a gradient of that pattern can hold."""
        ones = like.detach().to_sparse_coo().coalesce()
        r, c = ones.indices()
        out = torch.zeros_like(g)
        out[r, c] = g[r, c]
        return out

    def test_leaves(self):
        for p, layout, dtype in itertools.product(
            self.pencils(), self.layouts, (torch.float64, torch.complex128)
        ):
            A, B = p.build(dtype, layout)
            exact = self.spectral_gradient(A, B, 3, False, self.loss_of_both)
            for method in ("ortho", None) if dtype == torch.float64 else ("ortho",):
                with self.subTest(
                    problem=p.name, layout=layout, dtype=dtype, method=method
                ):
                    gA, gB, messages = self.gradient(
                        self.loss_of_both, A, B, method=method, **self.options
                    )
                    self.assertEqual(messages, [])
                    for g, M, e in ((gA, A, exact[0]), (gB, B, exact[1]))[
                        : 1 + (B is not None)
                    ]:
                        self.assertEqual(g.layout, layout)
                        self.assertEqual(g.dtype, dtype)
                        self.assert_close(g, self.masked(e, M), 1e-8)
                        self.assert_hermitian(g)
                        if layout == torch.sparse_coo:
                            self.assertLessEqual(g._nnz(), M._nnz())

    def test_mixed_with_dense(self):
        p = self.problems.laplacian_mass(10, 7)
        for of_A, of_B in (
            (torch.strided, torch.sparse_csr),
            (torch.sparse_coo, torch.strided),
            (torch.sparse_csr, torch.sparse_coo),
        ):
            A, B = p.build(torch.float64, of_A)[0], p.build(torch.float64, of_B)[1]
            exact = self.spectral_gradient(A, B, 3, False, self.loss_of_both)
            gA, gB, _ = self.gradient(self.loss_of_both, A, B, **self.options)
            self.assertEqual((gA.layout, gB.layout), (of_A, of_B))
            self.assert_close(
                gA,
                exact[0] if of_A == torch.strided else self.masked(exact[0], A),
                1e-8,
            )
            self.assert_close(
                gB,
                exact[1] if of_B == torch.strided else self.masked(exact[1], B),
                1e-8,
            )

    def values_gradient(self, make, values):
        values = values.detach().clone().requires_grad_(True)
        E, X = torch.lobpcg(make(values), **self.options)
        self.loss_of_both(E, X).backward()
        return values.grad

    def test_behind_constructors(self):
        A, _ = self.problems.laplacian(12, 9).build(torch.float64, torch.sparse_coo)
        exact, _ = self.spectral_gradient(A, None, 3, False, self.loss_of_both)
        r, c = A.indices()
        found = self.values_gradient(
            lambda v: torch.sparse_coo_tensor(A.indices(), v, A.shape), A.values()
        )
        self.assert_close(found, exact[r, c], 1e-8)
        C = A.to_sparse_csr()
        for index in (torch.int64, torch.int32):
            crow, col = C.crow_indices().to(index), C.col_indices().to(index)
            found = self.values_gradient(
                lambda v: torch.sparse_csr_tensor(crow, col, v, C.shape), C.values()
            )
            self.assert_close(found, exact[r, c], 1e-8)
        D = C.to_sparse_csc()
        found = self.values_gradient(
            lambda v: torch.sparse_csc_tensor(
                D.ccol_indices(), D.row_indices(), v, D.shape
            ),
            D.values(),
        )
        self.assert_close(
            found,
            exact[
                D.row_indices(),
                torch.arange(108).repeat_interleave(D.ccol_indices().diff()),
            ],
            1e-8,
        )

    def test_uncoalesced_duplicates(self):
        """Every duplicate of a position gets that position's gradient; the order of the entries is the caller's."""
        A, _ = self.problems.laplacian(12, 9).build(torch.float64, torch.sparse_coo)
        exact, _ = self.spectral_gradient(A, None, 3, False, self.loss_of_both)
        order = torch.randperm(2 * A._nnz(), generator=torch.Generator().manual_seed(0))
        indices = torch.cat([A.indices(), A.indices()], 1)[:, order]
        values = torch.cat([0.25 * A.values(), 0.75 * A.values()])[order]
        found = self.values_gradient(
            lambda v: torch.sparse_coo_tensor(indices, v, A.shape), values
        )
        self.assert_close(found, exact[indices[0], indices[1]], 1e-8)
        leaf = torch.sparse_coo_tensor(indices, values, A.shape).requires_grad_(True)
        self.loss_of_both(*torch.lobpcg(leaf, **self.options)).backward()
        self.assert_close(leaf.grad, self.masked(exact, A), 1e-8)

    def test_explicit_zeros_and_empty_rows(self):
        """A stored zero gets its gradient; an empty row is a zero eigenvalue, not an accident."""
        d = torch.cat(
            [torch.arange(1, 40, dtype=torch.float64), torch.zeros(1).double()]
        )
        i = torch.arange(39)
        indices = torch.cat([torch.stack([i, i]), torch.tensor([[0, 5], [5, 0]])], 1)
        values = torch.cat([d[:39], torch.zeros(2).double()])
        A = torch.sparse_coo_tensor(indices, values, (40, 40)).to_dense()
        exact, _ = self.spectral_gradient(A, None, 3, True, self.loss_of_both)
        for make in (
            lambda v: torch.sparse_coo_tensor(indices, v, (40, 40)),
            lambda v: torch.sparse_coo_tensor(indices, v, (40, 40)).to_sparse_csr(),
        ):
            v = values.clone().requires_grad_(True)
            self.loss_of_both(*torch.lobpcg(make(v), k=3, tol=1e-11)).backward()
            self.assert_close(v.grad, exact[indices[0], indices[1]], 1e-8)

    def test_pattern_that_is_not_symmetric(self):
        """A stored zero without its mirror: the gradient could not be symmetric, so it is refused by name."""
        A, _ = self.problems.laplacian(20).build(torch.float64, torch.sparse_coo)
        indices = torch.cat([A.indices(), torch.tensor([[0], [7]])], 1)
        values = torch.cat([A.values(), torch.zeros(1).double()])
        for layout in ("coo", "csr", "csc"):
            S = getattr(
                torch.sparse_coo_tensor(indices, values, A.shape), f"to_sparse_{layout}"
            )().requires_grad_(True)
            with self.assertRaisesRegex(
                ValueError, r"(?s)lobpcg: .*\bA\b.*(pattern|position)"
            ):
                E, X = torch.lobpcg(S, k=2)
                (E.sum() + X.abs().sum()).backward()

    def test_finite_differences_in_values(self):
        """A change of the coefficients c of sum_e c_e b_e b_e^T (a graph's weights), sparse against dense autograd."""
        i, j = torch.arange(29), torch.arange(1, 30)
        i, j = torch.cat([i, i[:28]]), torch.cat([j, i[:28] + 2])
        c = 1 + torch.rand(
            len(i), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )

        def laplacian(c):
            n = torch.arange(30)
            degree = (
                torch.zeros(30, dtype=c.dtype).index_add(0, i, c).index_add(0, j, c)
            )
            indices = torch.stack([torch.cat([i, j, n]), torch.cat([j, i, n])])
            return torch.sparse_coo_tensor(
                indices, torch.cat([-c, -c, degree]), (30, 30)
            ), degree

        def cut(c, dense):
            L, degree = laplacian(c)
            D = torch.sparse_coo_tensor(
                torch.arange(30).expand(2, 30), degree, (30, 30)
            )
            if dense:
                return self.loss_of_both(
                    *self.reference(L.to_dense(), D.to_dense(), 3, False)
                )
            return self.loss_of_both(*torch.lobpcg(L, B=D, **self.options))

        g = [
            torch.autograd.functional.jacobian(functools.partial(cut, dense=dense), c)
            for dense in (False, True)
        ]
        self.assert_close(g[0], g[1], 1e-8)

    def test_no_square_array(self):
        """Neither forward nor backward makes a dense array of m^2 / 8 elements, m = 1600."""
        from torch.utils._python_dispatch import TorchDispatchMode

        p = self.problems.laplacian_mass(40, 40)
        sizes = []

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                sizes.extend(
                    (o.numel(), str(function))
                    for o in torch.utils._pytree.tree_leaves(out)
                    if isinstance(o, torch.Tensor) and o.layout == torch.strided
                )
                return out

        def solve(A, B):
            sizes.clear()
            with Largest():
                E, X = torch.lobpcg(
                    A, k=4, B=B, n=8, largest=False, tol=1e-7, niter=2000
                )
                (E.sum() + (X**2)[::3].sum()).backward()
            self.assertLess(max(sizes)[0], p.m**2 // 8, max(sizes))

        for layout in (torch.sparse_csr, torch.sparse_coo):
            A, B = (self.leaf(M) for M in p.build(torch.float64, layout))
            solve(A, B)
            self.assertEqual(A.grad.layout, layout)
        # behind PyTorch's constructor, whose own derivative makes a dense array
        crow, col = A.to_sparse_csr().crow_indices(), A.to_sparse_csr().col_indices()
        for make in (torch.sparse_csr_tensor, torch.sparse_csc_tensor):
            values = [self.leaf(M.to_sparse_csr().values()) for M in (A, B)]
            solve(*(make(crow, col, v, A.shape) for v in values))
            for v, M in zip(values, (A, B)):
                self.assert_close(v.grad, M.grad.to_sparse_csr().values(), 1e-6)

    def test_gradient_of_a_constructed_matrix(self):
        """autograd.grad of a CSR matrix itself and of the values behind it, leaf or not."""
        A, _ = self.problems.laplacian(12, 9).build(torch.float64, torch.sparse_csr)
        for through in (lambda v: v, lambda v: 1.0 * v):
            values = through(self.leaf(A.values()))
            M = torch.sparse_csr_tensor(
                A.crow_indices(), A.col_indices(), values, A.shape
            )
            loss = self.loss_of_both(*torch.lobpcg(M, **self.options))
            of_matrix = torch.autograd.grad(loss, M, retain_graph=True)[0]
            of_values = torch.autograd.grad(loss, values)[0]
            self.assertEqual(of_matrix.layout, torch.sparse_csr)
            self.assertEqual(of_matrix.values(), of_values, atol=0, rtol=0)

    def test_zero_cotangent(self):
        """Zeros on the pattern of A, without a product in the solve."""
        from unittest import mock

        for layout in self.layouts:
            A = self.leaf(
                self.problems.laplacian(12, 9).build(torch.float64, layout)[0]
            )
            E, X = torch.lobpcg(A, **self.options)
            with mock.patch(
                "torch._lobpcg_impl.complement.Complement.raw",
                side_effect=AssertionError("a product"),
            ):
                g = torch.autograd.grad(
                    (E, X), A, (torch.zeros_like(E), torch.zeros_like(X))
                )[0]
            self.assertEqual((g.layout, g._nnz()), (layout, A._nnz()))
            self.assertEqual(g.to_dense(), torch.zeros(108, 108).double())

    def test_symmetric_pattern_is_recognised(self):
        """Against the dense pattern: symmetric, with one position taken out or moved, empty, in a batch."""
        from torch._lobpcg_impl.sparse import is_symmetric_pattern

        ones = (self.weights(30) > 1.2).double()
        cut, moved = ones.clone(), ones.clone()
        r, c = (ones.triu(1)).nonzero()[3].tolist()
        cut[r, c] = moved[r, c] = 0
        moved[r, (ones[r] + ones[:, r] == 0).nonzero()[0]] = 1
        for M, expected in (
            (ones, True),
            (cut, False),
            (moved, False),
            (0 * ones, True),
        ):
            for S in (
                M.to_sparse(),
                M.to_sparse_csr(),
                M.to_sparse_csc(),
                torch.stack([ones, M]).to_sparse(),
            ):
                self.assertEqual(is_symmetric_pattern(S), expected)
        batch = torch.stack(
            [cut, cut.mT.contiguous()]
        )  # symmetric as a sum, not one by one
        self.assertFalse(is_symmetric_pattern(batch.to_sparse()))

    @staticmethod
    def path_without_mass(m):
        """The Laplacian of a path: no mass along the vector of ones."""
        i, n = torch.arange(m - 1), torch.arange(m)
        ends = torch.tensor([1.0] + (m - 2) * [2.0] + [1.0]).double()
        return torch.sparse_coo_tensor(
            torch.stack([torch.cat([n, i, i + 1]), torch.cat([n, i + 1, i])]),
            torch.cat([ends, -torch.ones(2 * m - 2).double()]),
            (m, m),
        ).coalesce()

    def test_singular_B(self):
        """Finite eigenvalues of a B that is singular on part of the space: right, or an error that names B.

        Whether a Cholesky factorisation of such a B fails is decided by rounding, hence the sizes."""
        for sides in ((12, 9), (7, 6), (10, 11), (15, 16)):
            with self.subTest(sides=sides):
                A, _ = self.problems.laplacian(*sides).build(
                    torch.float64, torch.sparse_coo
                )
                B = self.path_without_mass(A.shape[0])
                # the oracle swaps the two: B x = A x / E
                C, D = self.leaf(A.to_dense()), self.leaf(B.to_dense())
                mu, Y = self.reference(D, C, 3, True)
                loss = self.loss_of_both(1 / mu, Y / mu.sqrt())
                exact = torch.autograd.grad(loss, (C, D))
                gA, gB, messages = self.gradient(
                    self.loss_of_both, A, B, **self.options
                )
                self.assertEqual(messages, [])
                for g, e, M in ((gA, exact[0], A), (gB, exact[1], B)):
                    self.assert_close(g, self.masked((e + e.mT) / 2, M), 1e-7)
        n = torch.arange(108)
        A, _ = self.problems.laplacian(12, 9).build(torch.float64, torch.sparse_coo)
        empty = torch.sparse_coo_tensor(
            torch.stack([n[:-1], n[:-1]]), torch.ones(107).double(), A.shape
        )
        with self.assertRaisesRegex(ValueError, r"lobpcg: B is not positive definite"):
            torch.lobpcg(A, B=empty.requires_grad_(True), **self.options)

    def large(self, *sides):
        """A Laplacian with a loss on three pairs and the gradient of it from all eigenvectors in closed form."""
        p = self.problems.laplacian(*sides)
        V, E = p.eigenvectors(p.m), p.spectrum
        d = torch.cos(torch.arange(p.m, dtype=torch.float64))

        def loss(E, X):
            return (
                (1 + torch.arange(E.size(0))) * (E + (d.unsqueeze(-1) * X * X).sum(0))
            ).sum()

        def exact(first, count, r, c):
            wanted = range(first, first + count)
            out = torch.zeros(r.numel(), dtype=torch.float64)
            for w, j in enumerate(wanted, 1):
                difference = E[j] - E
                difference[j] = 1
                weight = V.mT @ (2 * w * d * V[:, j]) / difference
                weight[j] = w
                z = V @ weight
                out += (z[r] * V[c, j] + V[r, j] * z[c]) / 2
            return out

        return p, loss, exact

    def test_poor_preconditioner(self):
        """One that slows the iteration down changes neither the pairs nor the gradient."""
        p, loss, exact = self.large(30, 28)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        scale = torch.logspace(-1, 1, p.m, dtype=torch.float64)[
            torch.arange(p.m) * 7 % p.m
        ].unsqueeze(-1)
        options = dict(k=3, n=8, largest=False, tol=1e-9, niter=5000)
        gA, _, messages = self.gradient(loss, A, iK=lambda R: scale * R, **options)
        self.assertEqual(messages, [])
        r, c = A.to_sparse_coo().indices()
        self.assertEqual(
            gA.values(),
            exact(0, 3, r, c),
            atol=1e-6 * gA.values().abs().max().item(),
            rtol=0,
        )

    def test_systems_are_solved_as_well_as_the_pairs_deserve(self):
        """Fewer preconditioned columns in backward than in forward, and an error that only the pairs' residual sets."""
        p, loss, exact = self.large(30, 28)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        inverse = torch.linalg.inv(A.to_dense() + 0.05 * torch.eye(p.m).double())
        columns = [0]

        def iK(R):
            columns[0] += R.size(-1)
            return inverse @ R

        r, c = A.to_sparse_coo().indices()
        for tol, bound in ((1e-6, 1e-3), (1e-10, 1e-7)):
            A, columns[0] = self.leaf(A), 0
            E, X = torch.lobpcg(A, k=3, largest=False, tol=tol, iK=iK)
            forward, columns[0] = columns[0], 0
            found = torch.autograd.grad(loss(E, X), A)[0].values()
            self.assertLess(columns[0], 0.8 * forward)
            e = exact(0, 3, r, c)
            self.assertLess((found - e).norm() / e.norm(), bound)

    def test_pairs_that_are_not_extreme(self):
        """The operator of the solve is not definite then: a right gradient, or a warning that says so."""
        p, loss, exact = self.large(47, 45)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        r, c = A.to_sparse_coo().indices()
        X = p.eigenvectors(6)[:, 3:]
        gA, _, messages = self.gradient(loss, A, k=3, X=X, niter=0, largest=False)
        e = exact(3, 3, r, c)
        if (gA.values() - e).norm() > 1e-6 * e.norm():
            self.assertRegex("\n".join(messages), "lobpcg: .*not definite")

    def test_sparse_equals_dense_on_a_large_problem(self):
        """m = 1190, beyond dense solves: with and without a preconditioner."""
        p = self.problems.laplacian(34, 35)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        dense = A.to_dense()
        exact, _ = self.spectral_gradient(dense, None, 4, False, self.loss_of_both)
        iK = torch.linalg.inv(dense)
        for preconditioner in (iK, None) if self.full else (iK,):
            gA, _, messages = self.gradient(
                self.loss_of_both,
                A,
                k=4,
                n=8,
                largest=False,
                tol=1e-10,
                niter=3000,
                iK=preconditioner,
            )
            self.assertEqual(messages, [])
            self.assert_close(gA, self.masked(exact, A), 1e-6)

    def test_double_backward(self):
        A, _ = self.problems.laplacian(7, 5).build(torch.float64, torch.sparse_coo)
        r, c = A.indices()
        direction = self.weights(35)[r, c]

        def second(solve):
            v = A.values().clone().requires_grad_(True)
            g = torch.autograd.grad(self.loss_of_both(*solve(v)), v, create_graph=True)[
                0
            ]
            return torch.autograd.grad((g * direction).sum(), v)[0]

        def dense(v):
            return self.reference(
                torch.zeros(35, 35).double().index_put((r, c), v), None, 3, False
            )

        crow = A.to_sparse_csr().crow_indices()
        for make in (
            lambda v: torch.sparse_coo_tensor(A.indices(), v, A.shape),
            lambda v: torch.sparse_coo_tensor(A.indices().flip(1), v.flip(0), A.shape),
            lambda v: torch.sparse_coo_tensor(
                torch.cat([A.indices()] * 2, 1), torch.cat([v, -3 * v]) / -2, A.shape
            ),
            lambda v: torch.sparse_coo_tensor(A.indices(), v, A.shape).to_sparse_csr(),
            lambda v: torch.sparse_csr_tensor(crow, c, v, A.shape),
            lambda v: torch.sparse_csc_tensor(crow, c, v, A.shape),
            lambda v: torch.sparse_bsr_tensor(crow, c, v.reshape(-1, 1, 1), A.shape),
        ):
            found = second(lambda v: torch.lobpcg(make(v), **self.options))
            self.assert_close(found, second(dense), 1e-8)

    def test_hermitian_sparse(self):
        p = self.problems.ring(45, 1.0)
        for layout in self.layouts:
            A, _ = p.build(torch.complex128, layout)
            exact, _ = self.spectral_gradient(A, None, 3, False, self.loss_of_both)
            gA, _, _ = self.gradient(self.loss_of_both, A, **self.options)
            self.assert_close(gA, self.masked(exact, A), 1e-8)


class TestLobpcgGradientDegenerate(LobpcgGradientCase):
    """Repeated and close eigenvalues, cut clusters, unconverged pairs: exact, or said so, never wrong in silence."""

    def cluster_problems(self):
        P = self.problems
        for gap in (0.0, 1e-13, 1e-10, 1e-6, 1e-2):
            yield P.clustered(40, 3, gap), gap
            yield P.clustered(40, 3, gap, 1e2), gap
            yield P.clustered(40, 3, gap, is_complex=True), gap
            yield P.clustered(40, 3, gap, 1e2, True), gap

    def test_gauge_invariant_loss_is_exact(self):
        """Three values in a cluster and a simple fourth: loss sees the cluster only as a whole."""

        def loss(E, X):
            M = self.weights(X.size(-2), X.dtype)
            terms = (X.conj() * (M @ X)).real.sum(-2)
            return terms[:3].sum() + E[:3].sum() ** 2 + terms[3] * E[3]

        for (p, gap), largest in itertools.product(
            self.cluster_problems(), (False, True)
        ):
            dtype = torch.complex128 if p.is_complex else torch.float64
            A, B = p.build(dtype)
            # in exact arithmetic the pairs inside the cluster contribute nothing to gA at any gap
            exact = self.spectral_gradient(A, B, 4, largest, loss, cluster=1e-3)
            for method in ("ortho", None):
                with self.subTest(problem=p.name, largest=largest, method=method):
                    gA, gB, messages = self.gradient(
                        loss,
                        A,
                        B,
                        k=4,
                        largest=largest,
                        tol=1e-13,
                        niter=2000,
                        method=method,
                    )
                    self.assertEqual(
                        [m for m in messages if "not converge" not in m], []
                    )
                    bound = 1e-10 * p.condition
                    self.assert_close(gA, exact[0], bound, "gA")
                    if B is not None:
                        self.assert_close(
                            gB, exact[1], bound if gap < 1e-2 else 1.0, "gB"
                        )

    def test_equal_to_the_bit(self):
        for p, k in (
            (self.problems.doubled(25), 4),
            (self.problems.get("identity"), 0),
            (self.problems.ring(24), 5),
        ):
            A, _ = p.build()
            k = k or p.m
            exact, _ = self.spectral_gradient(A, None, k, True, self.loss_of_subspace)
            with self.subTest(problem=p.name):
                if p.name.startswith("ring"):
                    k = 5  # 4, then two double values: complete
                gA, _, messages = self.gradient(
                    self.loss_of_subspace, A, k=k, tol=1e-12
                )
                self.assertEqual(messages, [])
                self.assertEqual(gA, exact, atol=1e-10, rtol=1e-10)

    def test_cluster_with_B_against_finite_differences(self):
        """The part of gB that belongs to a repeated eigenvalue, by differences of the dense projector."""
        p = self.problems.clustered(30, 3, 0.0, 1e2)
        A, B = p.build()

        def value(M, N):
            E, X = self.dense_pairs(M, N)
            return self.loss_of_subspace(E[:3], X[:, :3]).item()

        h, dA, dB = 1e-5, self.weights(30, seed=3), 0.01 * self.weights(30, seed=4)
        in_A = (value(A + h * dA, B) - value(A - h * dA, B)) / (2 * h)
        in_B = (value(A, B + h * dB) - value(A, B - h * dB)) / (2 * h)
        by_sum = self.spectral_gradient(A, B, 3, False, self.loss_of_subspace)
        self.assertEqual((by_sum[0] * dA).sum().item(), in_A, rtol=1e-5, atol=1e-5)
        self.assertEqual((by_sum[1] * dB).sum().item(), in_B, rtol=1e-5, atol=1e-5)
        gA, gB, _ = self.gradient(
            self.loss_of_subspace, A, B, k=3, largest=False, tol=1e-13, niter=500
        )
        self.assertEqual((gA * dA).sum().item(), in_A, rtol=1e-5, atol=1e-5)
        self.assertEqual((gB * dB).sum().item(), in_B, rtol=1e-5, atol=1e-5)

    def test_batch_with_one_degenerate_member(self):
        simple, double = (
            self.problems.laplacian(50).build()[0],
            self.problems.doubled(25).build()[0],
        )
        A = torch.stack([simple, double])

        def loss(E, X):
            return sum(self.loss_of_subspace(*pair) for pair in zip(E, X))

        for method in ("ortho", None):
            gA, _, messages = self.gradient(
                loss, A, k=4, tol=1e-12, niter=2000, method=method
            )
            self.assertEqual(messages, [])
            for g, M in zip(gA, A):
                self.assert_close(
                    g,
                    self.spectral_gradient(M, None, 4, True, self.loss_of_subspace)[0],
                    1e-9,
                )

    def outcome(self, loss, A, B=None, **kwargs):
        """("error" | "warning" | "silent", text, gA)."""
        try:
            gA, _, messages = self.gradient(loss, A, B, **kwargs)
        except (RuntimeError, ValueError) as error:
            return "error", str(error), None
        return ("warning", messages[0], gA) if messages else ("silent", "", gA)

    def test_gauge_dependent_loss_is_refused(self):
        for p in (
            self.problems.doubled(25),
            self.problems.clustered(40, 3, 0.0),
            self.problems.clustered(40, 3, 1e-13, 1e2),
        ):
            A, B = p.build()
            for loss, method in itertools.product(
                (self.loss_of_vectors, self.loss_of_signed_vectors), ("ortho", None)
            ):
                with self.subTest(problem=p.name, loss=loss.__name__, method=method):
                    kind, text, _ = self.outcome(
                        loss,
                        A,
                        B,
                        k=4,
                        tol=1e-13,
                        niter=2000,
                        largest=False,
                        method=method,
                    )
                    self.assertIn(kind, ("error", "warning"))
                    self.assertRegex(
                        text, r"(?s)lobpcg: .*(gap|repeated|equal|degenerate|cluster)"
                    )

    def test_values_weighted_differently_inside_a_cluster(self):
        """sum_j j E_j is not differentiable at a repeated eigenvalue: refused, or X diag(gE) X^H as eigh returns."""
        A, _ = self.problems.doubled(25).build()
        kind, text, gA = self.outcome(self.loss_of_values, A, k=4, tol=1e-13)
        if kind == "silent":  # eigh's convention: X diag(gE) X^H for the X returned
            self.assertEqual(
                torch.linalg.eigvalsh(gA)[-4:],
                torch.tensor([1.0, 2, 3, 4]).double(),
                atol=1e-9,
                rtol=0,
            )
        else:
            self.assertRegex(
                text, r"(?s)lobpcg: .*(gap|repeated|equal|degenerate|cluster)"
            )

    def test_phase_dependent_loss_is_refused(self):
        for generalized, method in itertools.product((False, True), ("ortho", None)):
            A, B = self.problems.indefinite(
                40, 10.0 if generalized else 1.0, True
            ).build(torch.complex128)
            with self.assertRaisesRegex(
                (RuntimeError, ValueError), r"(?s)lobpcg: .*phase"
            ):
                self.gradient(lambda E, X: X.real.sum(), A, B, k=3, method=method)
            with self.assertRaisesRegex(
                (RuntimeError, ValueError), r"(?s)lobpcg: .*phase"
            ):
                self.gradient(
                    lambda E, X: X[0].imag.sum() + E.sum(), A, B, k=3, method=method
                )

    def test_phase_check_tolerates_rounding(self):
        """float32 rounding in an invariant loss is no dependence on the phase."""
        A, _ = self.problems.indefinite(60, is_complex=True).build(torch.complex64)
        for seed in range(10):
            M = self.weights(60, torch.complex64, seed)
            self.gradient(
                lambda E, X: (X.mH @ M @ X).abs().square().sum() * 1e3,
                A,
                k=3,
                tol=1e-6,
                method="ortho",
            )

    def test_cluster_cut_at_k(self):
        """k = 2 of a triple value: a warning that names k; eigenvalue sums over complete parts stay right."""
        for gap, generalized in itertools.product((0.0, 1e-13), (False, True)):
            A, B = self.problems.clustered(
                40, 3, gap, 10.0 if generalized else 1.0
            ).build()
            for method in ("ortho", None):
                with self.subTest(gap=gap, generalized=generalized, method=method):
                    kind, text, gA = self.outcome(
                        self.loss_of_subspace,
                        A,
                        B,
                        k=2,
                        largest=False,
                        tol=1e-13,
                        niter=2000,
                        method=method,
                    )
                    self.assertIn(kind, ("error", "warning"))
                    self.assertRegex(text, r"(?s)lobpcg: .*k\b")
                    if gA is not None:
                        self.assertTrue(torch.isfinite(gA).all())
                        self.assertLess(gA.abs().max(), 1e6)

    def test_part_that_exists_beside_a_cut_cluster(self):
        """Simple value first, cut cluster after: a loss of the first pair alone has its exact gradient."""
        spectrum = torch.cat(
            [torch.tensor([-5.0]), torch.zeros(3), torch.arange(1.0, 27)]
        ).double()
        A, _ = self.problems.prescribed("simple then triple", spectrum).build()

        def loss(E, X):
            return self.loss_of_both(E[:1], X[:, :1])

        exact, _ = self.spectral_gradient(A, None, 1, False, self.loss_of_both)
        for method in ("ortho", None):
            kind, _, gA = self.outcome(
                loss, A, k=3, largest=False, tol=1e-13, niter=2000, method=method
            )
            self.assertIn(kind, ("silent", "warning"))
            self.assert_close(gA, exact, 1e-8)

    def test_unconverged_pairs_warn(self):
        """The warning bounds the error: residual over gap, within a factor of 100."""
        A, _ = self.problems.laplacian(150).build()
        exact, _ = self.spectral_gradient(A, None, 3, False, self.loss_of_vectors)
        for method in ("ortho", "basic"):
            leaf = self.leaf(A)
            with warnings.catch_warnings(record=True) as forward:
                warnings.simplefilter("always")
                E, X = torch.lobpcg(
                    leaf, k=3, largest=False, niter=25, tol=1e-12, method=method
                )
            with warnings.catch_warnings(record=True) as backward:
                warnings.simplefilter("always")
                self.loss_of_vectors(E, X).backward()
            texts = [
                [str(w.message) for w in found if "lobpcg" in str(w.message)]
                for found in (forward, backward)
            ]
            self.assertEqual([len(t) for t in texts], [1, 1], texts)
            self.assertRegex(texts[1][0], r"(?s)lobpcg: .*gradient.*")
            numbers = [
                float(x) for x in re.findall(r"\d(?:\.\d+)?e[+-]?\d+", texts[1][0])
            ]
            error = self.relative(leaf.grad, exact)
            self.assertTrue(
                any(error <= 100 * x for x in numbers), (error, texts[1][0])
            )

    def test_unconverged_values_need_no_warning_beyond_forward(self):
        """The gradient of E alone is X X^T: quadratically good, but the pairs are not, which the forward said."""
        A, _ = self.problems.laplacian(150).build()
        _, _, messages = self.gradient(
            self.loss_of_values,
            A,
            k=3,
            largest=False,
            niter=25,
            tol=1e-12,
            method="ortho",
        )
        self.assertGreaterEqual(len(messages), 1)

    def test_zero_and_identity(self):
        """Every vector is an eigenvector: k < m cuts the only cluster, k = m does not."""
        for name in ("zero", "identity"):
            A, _ = self.problems.get(name).build()
            kind, _, gA = self.outcome(self.loss_of_subspace, A, k=3)
            self.assertIn(kind, ("error", "warning"))
            kind, _, gA = self.outcome(lambda E, X: E.sum(), A, k=A.size(-1))
            self.assertEqual(
                gA, torch.eye(A.size(-1), dtype=A.dtype), atol=1e-10, rtol=0
            )

    def test_estimate_bounds_the_error_over_the_catalogue(self):
        """A forward that was stopped early: the error of the gradient is at most 100 times the estimate, and where the
        estimate is below a tenth at least a hundredth of it; without a word on the gradient it is at most 1e-2."""
        judged = 0
        for p, largest, niter in itertools.product(
            self.problems.catalogue(), (False, True), (2, 8, 20)
        ):
            E = p.extreme(4, largest)
            if not 1e-100 < p.radius < 1e100 or E.diff().abs().min() <= 1e-6 * p.spread:
                continue
            A, B = p.build(torch.complex128 if p.is_complex else torch.float64)
            loss = self.loss_of_both if p.radius < 1e20 else self.loss_of_vectors
            found = self.gradient(
                loss, A, B, k=3, largest=largest, niter=niter, tol=1e-10
            )
            texts = [text for text in found[2] if "gradient" in text]
            with self.subTest(problem=p.name, largest=largest, niter=niter):
                exact = self.spectral_gradient(A, B, 3, largest, loss)
                error = max(
                    self.relative(g, e) for g, e in zip(found, exact) if g is not None
                )
                if not found[2]:
                    self.assertLessEqual(error, 1e-8)
                    continue
                if not texts:
                    self.assertLessEqual(error, 1e-2)
                    continue
                self.assertEqual(len(texts), 1)
                stated = r"relative error of (?:the gradient .residual over gap. |about )?(\S+?)\.? "
                estimate = float(re.search(stated, texts[0])[1])
                self.assertLessEqual(error, 100 * estimate)
                if estimate < 0.1:
                    self.assertGreaterEqual(error, estimate / 100)
                judged += 1
        self.assertGreater(judged, 60)

    def two_close(self, gap, special=False):
        """diag(1, 1 + gap, 3, 4, ...) of order 12, or with its eigenvectors turned."""
        spectrum = torch.cat(
            [
                torch.tensor([1.0, 1.0 + gap], dtype=torch.float64),
                torch.arange(3.0, 13.0).double(),
            ]
        )
        return (
            self.problems.diagonal(spectrum)
            if special
            else self.problems.prescribed("two close", spectrum)
        )

    def test_loss_of_the_truncated_matrix(self):
        """tr(M X diag(E) X^H): exact where gE and G determine it, to 1e-10 at a gap of 1e-6, and warned of below."""
        M = self.weights(12)

        def loss(E, X):
            return ((X * E) @ X.mT * M).sum()

        for gap, special in itertools.product((0.0, 1e-13, 1e-10, 1e-6), (False, True)):
            p = self.two_close(gap, special)
            A, _ = p.build()
            V = p.eigenvectors(12)
            phi = torch.cat([p.spectrum[:2], torch.zeros(10, dtype=torch.float64)])
            distance = p.spectrum.unsqueeze(-1) - p.spectrum
            ratio = (phi.unsqueeze(-1) - phi) / torch.where(
                distance == 0, 1.0, distance
            )
            ratio[:2, :2] = 1.0
            exact = V @ (V.mT @ M @ V * ratio) @ V.mT
            for method in ("ortho", None):
                with self.subTest(gap=gap, special=special, method=method):
                    kind, text, gA = self.outcome(
                        loss, A, k=2, largest=False, tol=1e-13, niter=500, method=method
                    )
                    if gap == 1e-6:
                        self.assertEqual(kind, "silent", text)
                        self.assert_close(gA, exact, 1e-9)
                    else:
                        self.assertEqual(kind, "warning")
                        self.assertRegex(text, r"lobpcg: .*0 and 1.*gap")

    def test_off_diagonal_loss_in_a_special_basis(self):
        """diag(M) = 0 and unit vectors: gE is zero, G Hermitian, and the gradient is not."""
        M = torch.zeros(12, 12, dtype=torch.float64)
        M[0, 1] = M[1, 0] = 1.0
        for gap in (0.0, 1e-14, 1e-13, 1e-10):
            A, _ = self.two_close(gap, True).build()
            kind, text, _ = self.outcome(
                lambda E, X: ((X * E) @ X.mT * M).sum(), A, k=2, largest=False
            )
            self.assertEqual(kind, "warning", gap)
            self.assertRegex(text, r"lobpcg: .*0 and 1.*gap")

    def test_cut_cluster_without_guard_columns(self):
        """n = k carries no vector beside the wanted ones to show the cluster; also for a loss of values alone."""
        A, _ = self.problems.clustered(40, 3, 1e-10).build()
        for M in (A, A.to_sparse_csr()):
            for loss in (self.loss_of_subspace, lambda E, X: E.sum()):
                kind, text, _ = self.outcome(
                    loss, M, k=2, n=2, largest=False, tol=1e-8, method="ortho"
                )
                self.assertEqual(kind, "warning")
                self.assertRegex(
                    text, r"lobpcg: .*k=2 .*(gap|distance)|lobpcg: .*distance .*k=2"
                )

    def test_single_precision_with_ill_conditioned_B(self):
        """cond(B) = 1e3: the pairs are found in double, so neither a warning nor an error more than 1e-3."""
        p = self.problems.diagonal_mass(self.problems.wishart(60, 120), 1e3)
        A, B = (M.to(torch.float32).double() for M in p.build())
        exact = self.spectral_gradient(A, B, 3, True, self.loss_of_vectors)
        for method in ("ortho", None):
            *found, messages = self.gradient(
                self.loss_of_vectors, A.float(), B.float(), k=3, method=method
            )
            self.assertEqual(messages, [])
            for g, e in zip(found, exact):
                self.assert_close(g, e, 1e-3)


class TestLobpcgGradientHigherOrder(LobpcgGradientCase):
    """Double backward, forward mode, third derivatives."""

    def invariant(self, E, X):
        """Outputs without gauge freedom: E and the moduli of X's entries, squared."""
        return E, X.abs().square()

    def pencil_of(self, S, R=None):
        """Hermitian A and positive definite B from unconstrained parameters."""
        A = (
            S + S.mH.resolve_conj()
        )  # a lazy conjugate has no batched forward derivative
        return A, None if R is None else R @ R.mH.resolve_conj() + torch.eye(
            R.size(-1), dtype=R.dtype
        )

    def parameters(self, m, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        S, R = (torch.randn(m, m, dtype=dtype, generator=generator) for _ in range(2))
        return S.requires_grad_(True), (R / m**0.5).detach().requires_grad_(True)

    def function(self, k=2, **kwargs):
        options = dict(k=k, tol=1e-14, largest=False, niter=300)
        options.update(kwargs)

        def of(S, R=None):
            A, B = self.pencil_of(S, R)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # tol is below what can be reached on purpose
                return self.invariant(*torch.lobpcg(A, B=B, **options))

        return of

    def test_gradcheck_plain(self):
        """Ordinary gradcheck perturbs single entries: dense input enters through its Hermitian part, so it passes."""
        for dtype, method in itertools.product(
            (torch.float64, torch.complex128), ("ortho", "basic", None)
        ):
            A, B = self.problems.indefinite(9, 10.0, dtype.is_complex).build(dtype)
            A, B = self.leaf(A), self.leaf(B)

            def f(A, B=None):
                return self.invariant(
                    *torch.lobpcg(A, k=2, B=B, tol=1e-13, niter=300, method=method)
                )

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.assertTrue(gradcheck(f, (A,), check_batched_grad=False))
                self.assertTrue(gradcheck(f, (A, B), check_batched_grad=False))

    def test_gradcheck_and_gradgradcheck(self):
        for dtype, method, generalized in itertools.product(
            (torch.float64, torch.complex128), ("ortho", None), (False, True)
        ):
            with self.subTest(dtype=dtype, method=method, generalized=generalized):
                inputs = self.parameters(9, dtype)[: 1 + generalized]
                f = self.function(method=method)
                self.assertTrue(gradcheck(f, inputs, check_batched_grad=False))
                self.assertTrue(gradgradcheck(f, inputs, check_batched_grad=False))

    def test_batched_grad_and_forward_ad(self):
        for dtype in (torch.float64, torch.complex128):
            inputs = self.parameters(9, dtype)
            self.assertTrue(
                gradcheck(
                    self.function(),
                    inputs,
                    check_batched_grad=True,
                    check_forward_ad=True,
                    check_batched_forward_grad=not dtype.is_complex,  # fails for torch.linalg.eigh too, PyTorch 2.13
                )
            )
            self.assertTrue(
                gradgradcheck(
                    self.function(),
                    inputs,
                    check_batched_grad=True,
                    check_fwd_over_rev=True,
                    check_rev_over_rev=True,
                )
            )

    def hessian_vector(self, solve, loss, S, R, dS, dR):
        S, R = (
            S.detach().clone().requires_grad_(True),
            R.detach().clone().requires_grad_(True),
        )
        A, B = self.pencil_of(S, R)
        gS, gR = torch.autograd.grad(loss(*solve(A, B)), (S, R), create_graph=True)
        return torch.autograd.grad(
            (gS * dS.conj()).real.sum() + (gR * dR.conj()).real.sum(), (S, R)
        )

    def test_hessian_vector_products(self):
        """Second derivatives in A and B together against eigh, m = 60, several k, both ends."""
        for dtype, k, largest in itertools.product(
            (torch.float64, torch.complex128), (1, 4, 12), (False, True)
        ):
            S, R = self.parameters(60, dtype)
            dS, dR = self.parameters(60, dtype, seed=1)
            options = dict(k=k, largest=largest)
            expected = self.hessian_vector(
                lambda A, B: self.reference(A, B, **options),
                self.loss_of_both,
                S,
                R,
                dS,
                dR,
            )
            for method in ("ortho", None):
                with self.subTest(dtype=dtype, k=k, largest=largest, method=method):
                    found = self.hessian_vector(
                        lambda A, B: torch.lobpcg(
                            A, B=B, tol=1e-12, niter=2000, method=method, **options
                        ),
                        self.loss_of_both,
                        S,
                        R,
                        dS,
                        dR,
                    )
                    for f, e in zip(found, expected):
                        self.assert_close(f, e, 1e-6)

    def test_hessian_is_symmetric(self):
        A, _ = self.problems.indefinite(8).build()
        H = torch.autograd.functional.hessian(
            lambda A: self.loss_of_both(*torch.lobpcg((A + A.mT) / 2, k=2, tol=1e-13)),
            A,
        ).reshape(64, 64)
        self.assertEqual(H, H.T, atol=1e-8, rtol=1e-8)

    def test_third_derivative(self):
        A, _ = self.problems.indefinite(8).build()
        D = self.weights(8)

        def third(solve):
            t = torch.zeros((), dtype=torch.float64, requires_grad=True)
            value = self.loss_of_both(*solve(A + t * D))
            for _ in range(3):
                (value,) = torch.autograd.grad(value, t, create_graph=True)
            return value.detach()

        expected = third(lambda M: self.reference(M, None, 2, True))
        self.assertEqual(
            third(lambda M: torch.lobpcg(M, k=2, tol=1e-13)),
            expected,
            rtol=1e-6,
            atol=1e-6,
        )

    def test_repeated_values_second_order(self):
        """Second derivative of a gauge-invariant loss at a double eigenvalue, by differences of the first."""
        p = self.problems.clustered(24, 2, 0.0)
        A, _ = p.build()
        D = self.weights(24)

        def first(t):
            return (
                (
                    self.spectral_gradient(
                        A + t * D, None, 2, False, self.loss_of_subspace, 1e-3
                    )[0]
                    * D
                )
                .sum()
                .item()
            )

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = self.loss_of_subspace(
            *torch.lobpcg(A + t * D, k=2, largest=False, tol=1e-13, niter=500)
        )
        (g,) = torch.autograd.grad(value, t, create_graph=True)
        (h,) = torch.autograd.grad(g, t)
        self.assertEqual(
            h.item(), (first(1e-5) - first(-1e-5)) / 2e-5, rtol=1e-4, atol=1e-4
        )

    def test_forward_mode_against_finite_differences(self):
        import torch.autograd.forward_ad as fwAD

        for dtype in (torch.float64, torch.complex128):
            A, B = self.problems.indefinite(30, 10.0, dtype.is_complex).build(dtype)
            dA, dB = self.weights(30, dtype, 1), 0.01 * self.weights(30, dtype, 2)
            options = dict(k=3, largest=False, tol=1e-13, niter=1000)

            def value(t):
                E, X = self.reference(A + t * dA, B + t * dB, 3, False)
                return E, (X * X.conj()).real

            with fwAD.dual_level(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                E, X = torch.lobpcg(
                    fwAD.make_dual(A, dA), B=fwAD.make_dual(B, dB), **options
                )
                squares = (X * X.conj()).real
                found = fwAD.unpack_dual(E).tangent, fwAD.unpack_dual(squares).tangent
            h = 1e-6
            for f, plus, minus in zip(found, value(h), value(-h)):
                self.assertEqual(f, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6)

    def test_forward_mode_in_one_of_two(self):
        import torch.autograd.forward_ad as fwAD

        A, B = self.problems.indefinite(30, 10.0).build()
        direction = self.weights(30, seed=3)
        gA, gB, _ = self.gradient(self.loss_of_both, A, B, k=3, tol=1e-12)
        for of_A in (True, False):
            with fwAD.dual_level():
                dual = fwAD.make_dual(A if of_A else B, direction)
                pair = torch.lobpcg(
                    dual if of_A else A, B=B if of_A else dual, k=3, tol=1e-12
                )
                tangent = fwAD.unpack_dual(self.loss_of_both(*pair)).tangent
            self.assertEqual(
                tangent, ((gA if of_A else gB) * direction).sum(), rtol=1e-7, atol=1e-7
            )


class TestSymmetricGradcheck(TestCase):
    """gradcheck and gradgradcheck with `symmetric` and `check_symmetric_grad`.

    The planted functions have the closed form f(X) = |X|_F^2 / 2, with gradient X, so a wrong gradient is a known one.
    """

    dtypes = parametrize("dtype", [torch.float64, torch.complex128])
    batches = parametrize("batch", [(), (2,)])
    modes = parametrize("fast_mode", [False, True])

    class Planted(Function):
        """f(X) = |X|_F^2 / 2 per matrix. `first` spoils the gradient and the tangent, `second` the second gradient."""

        @staticmethod
        def forward(ctx, X, first, second):
            ctx.set_materialize_grads(
                False
            )  # as gradcheck cannot compare the sparse zeros that would follow
            ctx.save_for_backward(X)
            ctx.save_for_forward(X)
            ctx.first, ctx.second = first, second
            return (X * X.conj()).real.sum((-2, -1)) / 2

        @staticmethod
        def backward(ctx, gf):
            if gf is None:
                return None, None, None
            (X,) = ctx.saved_tensors
            G = TestSymmetricGradcheck.Identity.apply(X, ctx.second)
            return ctx.first(gf[..., None, None] * G), None, None

        @staticmethod
        def jvp(ctx, dX, *_):
            (X,) = ctx.saved_tensors
            return (ctx.first(X).conj() * dX).real.sum((-2, -1))

    class Identity(Function):
        """X, with `spoil` put on its gradient."""

        @staticmethod
        def forward(ctx, X, spoil):
            ctx.spoil = spoil
            return X.clone()

        @staticmethod
        def backward(ctx, G):
            return ctx.spoil(G), None

    # Each rule spoils a gradient G (*, m, m).

    @staticmethod
    def exact(G):
        return G

    @staticmethod
    def off_diagonal_doubled(G):
        return 2 * G - torch.diag_embed(torch.diagonal(G, dim1=-2, dim2=-1))

    @staticmethod
    def lower_triangle(G):
        return torch.tril(TestSymmetricGradcheck.off_diagonal_doubled(G))

    @staticmethod
    def with_skew_part(G):
        K = torch.triu(G, 1)
        return G + K - K.transpose(-2, -1).conj_physical()

    def planted(self, first="exact", second="exact"):
        return lambda X: self.Planted.apply(
            X, getattr(self, first), getattr(self, second)
        )

    def matrix(self, *batch, m=3, dtype=torch.float64):
        """A positive definite (*batch, m, m) with simple eigenvalues, symmetric to the bit."""
        M = torch.randn(
            *batch, m, m, dtype=dtype, generator=torch.Generator().manual_seed(m)
        )
        A = M @ M.mH + torch.diag(torch.arange(1.0, m + 1)).to(dtype)
        return ((A + A.mH) / 2).requires_grad_()

    def sparse_matrix(self, layout, dtype=torch.float64):
        """A 4 x 4 matrix whose stored entries, by 2 x 2 blocks or one by one, are a symmetric proper subset."""
        A = self.matrix(m=4, dtype=dtype).detach()
        block = (
            {"blocksize": (2, 2)}
            if layout in (torch.sparse_bsr, torch.sparse_bsc)
            else {}
        )
        A[:2, 2:] = A[2:, :2] = 0
        if not block:
            A[0, 3], A[3, 0] = 1 + A[0, 1], (1 + A[0, 1]).conj()
        return A.to_sparse(layout=layout, **block).requires_grad_()

    # What is accepted

    functions = {
        "eigh": lambda A: TestSymmetricGradcheck.projector(
            torch.linalg.eigh(A)[1][..., :2]
        ),
        "eigvalsh": torch.linalg.eigvalsh,
        "cholesky": torch.linalg.cholesky,
        "logdet": torch.logdet,
        "inverse": torch.linalg.inv,
    }

    def function(self, name):
        return self.planted() if name == "planted" else self.functions[name]

    @staticmethod
    def projector(V):
        return V @ V.transpose(-2, -1).conj_physical()

    @modes
    @batches
    @dtypes
    @parametrize("name", [*functions, "planted"])
    def test_passes(self, name, dtype, batch, fast_mode):
        func, A = self.function(name), self.matrix(*batch, dtype=dtype)
        batched_forward = (
            name != "planted"
        )  # a Function's jvp has no rule for the vmap used there
        self.assertTrue(
            torch.autograd.gradcheck(
                func,
                A,
                symmetric=True,
                fast_mode=fast_mode,
                check_forward_ad=True,
                check_batched_grad=True,
                check_batched_forward_grad=batched_forward,
            )
        )

    @modes
    @dtypes
    @parametrize("name", ["eigh", "eigvalsh", "cholesky", "logdet", "inverse"])
    def test_second_order_passes(self, name, dtype, fast_mode):
        func, A = self.function(name), self.matrix(dtype=dtype)
        self.assertTrue(
            torch.autograd.gradgradcheck(
                func,
                A,
                symmetric=True,
                fast_mode=fast_mode,
                check_fwd_over_rev=True,
                check_batched_grad=True,
            )
        )

    @modes
    @batches
    def test_symmetric_gradient_passes(self, batch, fast_mode):
        for name in ("eigh", "eigvalsh", "cholesky", "logdet", "planted"):
            A = self.matrix(*batch)
            options = {
                "symmetric": True,
                "check_symmetric_grad": True,
                "fast_mode": fast_mode,
            }
            self.assertTrue(torch.autograd.gradcheck(self.function(name), A, **options))
            self.assertTrue(
                torch.autograd.gradgradcheck(self.function(name), A, **options)
            )

    # What is rejected

    @modes
    @batches
    @dtypes
    @parametrize("mode", ["backward", "forward"])
    def test_off_diagonal_doubled_fails(self, mode, dtype, batch, fast_mode):
        options = {
            "check_forward_ad": mode == "forward",
            "check_backward_ad": mode == "backward",
        }
        options.update(check_undefined_grad=False, fast_mode=fast_mode, symmetric=True)
        func = self.planted("off_diagonal_doubled")
        with self.assertRaisesRegex(RuntimeError, "Jacobian .*mismatch"):
            torch.autograd.gradcheck(func, self.matrix(*batch, dtype=dtype), **options)

    @modes
    @batches
    @dtypes
    @parametrize("rule", ["lower_triangle", "with_skew_part"])
    def test_gradient_with_skew_part_fails_on_demand(
        self, rule, dtype, batch, fast_mode
    ):
        A, func = self.matrix(*batch, dtype=dtype), self.planted(rule)
        check = torch.autograd.gradcheck
        self.assertTrue(
            check(func, A, symmetric=True, fast_mode=fast_mode, check_forward_ad=True)
        )
        self.assertFalse(
            check(
                func,
                A,
                symmetric=True,
                check_symmetric_grad=True,
                fast_mode=fast_mode,
                raise_exception=False,
            )
        )
        with self.assertRaisesRegex(
            RuntimeError, "gradient of output 0 with respect to input 0 .* skew part"
        ):
            check(
                func, A, symmetric=True, check_symmetric_grad=True, fast_mode=fast_mode
            )

    @modes
    @dtypes
    def test_wrong_second_gradient_fails(self, dtype, fast_mode):
        A, check = self.matrix(dtype=dtype), torch.autograd.gradgradcheck
        options = {"symmetric": True, "fast_mode": fast_mode}
        with self.assertRaisesRegex(RuntimeError, "Jacobian"):
            check(self.planted(second="off_diagonal_doubled"), A, **options)
        for rule in ("lower_triangle", "with_skew_part"):
            func = self.planted(second=rule)
            self.assertTrue(check(func, A, **options))
            with self.assertRaisesRegex(
                RuntimeError,
                "of the first gradient with respect to input 0 .* skew part",
            ):
                check(func, A, check_symmetric_grad=True, **options)
            # With cotangents of the user's own, those are what counts.
            for weight in (0.0, 1.0):
                gf = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
                passed = check(
                    func,
                    A,
                    gf,
                    check_symmetric_grad=True,
                    raise_exception=False,
                    **options,
                )
                self.assertEqual(passed, weight == 0)

    def test_one_bad_matrix_or_output_is_found(self):
        A = self.matrix(2, 3)

        def func(X):
            f = self.planted()(X)
            return f, torch.stack([f.sum(), self.planted("with_skew_part")(X[1, 2])])

        message = "gradient of output 1 with respect to input 0 .* in matrix \\(1, 2\\) of the batch"
        for fast_mode in (False, True):
            with self.assertRaisesRegex(RuntimeError, message):
                torch.autograd.gradcheck(
                    func,
                    A,
                    symmetric=True,
                    check_symmetric_grad=True,
                    rtol=1e-6,
                    fast_mode=fast_mode,
                )

    # Which perturbations func sees

    @modes
    @dtypes
    def test_func_sees_symmetric_matrices_only(self, dtype, fast_mode):
        seen = []

        def func(A, C):
            given = (
                A,
                torch.autograd.forward_ad.unpack_dual(A)[1],
            )  # A and its tangent, if it has one
            hidden = (
                torch._C._functorch.is_legacy_batchedtensor
            )  # the values are out of reach under vmap
            seen.extend(X.detach() for X in given if X is not None and not hidden(X))
            return (A @ C @ A).sum(-1)

        C = torch.ones(3, 3, dtype=dtype, requires_grad=True)
        torch.autograd.gradcheck(
            func,
            (self.matrix(dtype=dtype), C),
            symmetric=(True, False),
            fast_mode=fast_mode,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        self.assertGreater(len({tuple(X.flatten().tolist()) for X in seen}), 3)
        for X in seen:
            self.assertEqual(X, X.mH, rtol=0, atol=0)

    def test_unmarked_input_is_perturbed_entry_by_entry(self):
        A, B = self.matrix(), self.matrix()
        func = self.planted("lower_triangle")
        for symmetric, passes in (
            ((True, True), True),
            ((True, False), False),
            ((False, True), False),
        ):
            self.assertEqual(
                torch.autograd.gradcheck(
                    lambda A, B: func(A) * func(B),
                    (A, B),
                    symmetric=symmetric,
                    raise_exception=False,
                ),
                passes,
            )

    def test_flags(self):
        A, b = self.matrix(), torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        self.assertTrue(
            torch.autograd.gradcheck(
                torch.linalg.solve, [A, b], symmetric=[True, False]
            )
        )
        # A flag on a constant has no effect, whatever its shape; True leaves alone what is not a differentiable tensor.
        self.assertTrue(
            torch.autograd.gradcheck(
                torch.linalg.solve, (A, b.detach()), symmetric=(True, True)
            )
        )
        self.assertTrue(
            torch.autograd.gradcheck(torch.linalg.matrix_power, (A, 3), symmetric=True)
        )
        self.assertTrue(
            torch.autograd.gradgradcheck(
                torch.linalg.solve, (A, b), symmetric=(True, False)
            )
        )

    def test_unused_input_and_undefined_gradients(self):
        A, B = self.matrix(), self.matrix(2)

        class Undefined(Function):
            @staticmethod
            def forward(ctx, X):
                ctx.set_materialize_grads(False)
                return X.diagonal().clone(), X.sum()

            @staticmethod
            def backward(ctx, gd, gs):
                G = torch.zeros_like(A)
                if gd is not None:
                    G = G + torch.diag(gd)
                if gs is not None:
                    G = G + gs
                return G

        self.assertTrue(
            torch.autograd.gradcheck(
                lambda A, B: Undefined.apply(A),
                (A, B),
                symmetric=True,
                check_symmetric_grad=True,
            )
        )

    # Sparse matrices

    @modes
    @dtypes
    @parametrize("masked", [False, True])
    @parametrize(
        "layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"]
    )
    def test_sparse(self, layout, masked, dtype, fast_mode):
        A = self.sparse_matrix(getattr(torch, layout), dtype)
        seen = []

        def func(rule):
            def planted(X):
                seen.append(X.detach())
                return self.planted(rule)(X.to_dense(masked_grad=masked))

            return planted

        def check(rule, **options):
            return torch.autograd.gradcheck(
                func(rule),
                A,
                symmetric=True,
                masked=masked,
                fast_mode=fast_mode,
                raise_exception=False,
                **options,
            )

        self.assertTrue(check("exact", check_symmetric_grad=True))
        self.assertFalse(check("off_diagonal_doubled"))
        for rule in ("lower_triangle", "with_skew_part"):
            self.assertTrue(check(rule))
            self.assertFalse(check(rule, check_symmetric_grad=True))
        self.assertEqual(seen[0], A.detach())
        for X in seen:
            self.assertEqual(X.layout, A.layout)
            self.assertEqual(X.to_dense(), X.to_dense().mH, rtol=0, atol=0)

    def test_sparse_batch(self):
        A = self.matrix(2).detach().to_sparse().requires_grad_()
        for rule, passes in (("exact", True), ("off_diagonal_doubled", False)):
            func = self.planted(rule)
            options = {"symmetric": True, "masked": True, "raise_exception": False}
            self.assertEqual(
                torch.autograd.gradcheck(
                    lambda X, f=func: f(X.to_dense()), A, **options
                ),
                passes,
            )

    # Bad arguments

    def message(self, error, func, inputs, check=torch.autograd.gradcheck, **options):
        with self.assertRaises(error) as caught:
            check(func, inputs, raise_exception=False, **options)
        return self.filled(caught.exception)

    @staticmethod
    def filled(error):
        return textwrap.fill(str(error), 100, break_on_hyphens=False)

    def test_bad_flags(self):
        A = self.matrix()
        self.assertExpectedInline(
            self.message(ValueError, torch.logdet, A, symmetric=(True, False)),
            """\
gradcheck: expected symmetric to hold one flag per input, got 2 for 1 inputs; flags of inputs
without requires_grad have no effect""",
        )
        self.assertExpectedInline(
            self.message(TypeError, torch.logdet, A, symmetric=1),
            """\
gradcheck: expected symmetric to be a bool, or a list or tuple of bool, got 1""",
        )
        self.assertExpectedInline(
            self.message(TypeError, torch.logdet, A, symmetric=("lower",)),
            """\
gradcheck: expected symmetric to be a bool, or a list or tuple of bool, got ('lower',)""",
        )
        self.assertExpectedInline(
            self.message(
                TypeError, torch.linalg.matrix_power, (A, 3), symmetric=(True, True)
            ),
            """\
gradcheck: expected input 1, marked symmetric, to be a Tensor, got int; set its flag to False""",
        )
        self.assertExpectedInline(
            self.message(ValueError, torch.logdet, A, check_symmetric_grad=True),
            """\
gradcheck: check_symmetric_grad=True needs an input marked symmetric that requires a gradient, got
none; pass symmetric=True or a flag per input""",
        )

    def test_bad_input(self):
        A = self.matrix()
        self.assertExpectedInline(
            self.message(ValueError, torch.linalg.solve, (A, A[:, 0]), symmetric=True),
            """\
gradcheck: expected input 1, marked symmetric, to have shape (*, m, m), got (3,); pass symmetric as
one flag per input to leave it out""",
        )
        self.assertExpectedInline(
            self.message(
                ValueError,
                torch.linalg.pinv,
                A[:, :2],
                torch.autograd.gradgradcheck,
                symmetric=True,
            ),
            """\
gradgradcheck: expected input 0, marked symmetric, to have shape (*, m, m), got (3, 2); pass
symmetric as one flag per input to leave it out""",
        )
        X = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
        X[1, 0, 1] = 1
        self.assertExpectedInline(
            self.message(ValueError, torch.logdet, X.requires_grad_(), symmetric=True),
            """\
gradcheck: expected input 0 to be symmetric, got a skew part of relative norm 4.1e-01 in matrix (1,)
of the batch; pass (X + X.mH) / 2""",
        )
        X = torch.eye(2, dtype=torch.complex128) * 1j
        self.assertExpectedInline(
            self.message(ValueError, torch.logdet, X.requires_grad_(), symmetric=True),
            """\
gradcheck: expected input 0 to be Hermitian, got a skew part of relative norm 1.0e+00; pass (X +
X.mH) / 2""",
        )
        X = torch.full((2, 2), float("nan"), dtype=torch.float64)
        self.assertExpectedInline(
            self.message(ValueError, torch.logdet, X.requires_grad_(), symmetric=True),
            """\
gradcheck: expected input 0 to be symmetric, got a skew part of relative norm nan; pass (X + X.mH) /
2""",
        )

    def test_symmetric_to_rounding_is_accepted(self):
        for m in (1, 3, 30):
            M = torch.randn(
                m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m)
            )
            A = (M @ torch.linalg.inv(M @ M.mT + torch.eye(m)) @ M.mT).requires_grad_()
            self.assertTrue(
                torch.autograd.gradcheck(torch.trace, A, symmetric=True, fast_mode=True)
            )

    def test_empty(self):
        for shape in ((0, 3, 3), (2, 0, 0)):
            A = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            self.assertTrue(
                torch.autograd.gradcheck(
                    lambda X: X.sum((-2, -1)),
                    A,
                    symmetric=True,
                    check_symmetric_grad=True,
                )
            )

    def test_bad_layout(self):
        dense = self.matrix(2).detach()
        hybrid = dense.to_sparse(2).requires_grad_()
        self.assertExpectedInline(
            self.message(ValueError, torch.Tensor.to_dense, hybrid, symmetric=True),
            """\
gradcheck: input 0, marked symmetric, has layout torch.sparse_coo and shape (2, 3, 3); a symmetric
input is strided, COO without dense dimensions, or a single CSR, CSC, BSR or BSC matrix; convert it
inside func""",
        )
        batch = dense.to_sparse_csr().requires_grad_()
        self.assertExpectedInline(
            self.message(ValueError, torch.Tensor.to_dense, batch, symmetric=True),
            """\
gradcheck: input 0, marked symmetric, has layout torch.sparse_csr and shape (2, 3, 3); a symmetric
input is strided, COO without dense dimensions, or a single CSR, CSC, BSR or BSC matrix; convert it
inside func""",
        )
        one_sided = torch.sparse_coo_tensor(
            [[0, 1, 0], [0, 1, 1]], [1.0, 1.0, 0.0], (2, 2), dtype=torch.float64
        )
        self.assertExpectedInline(
            self.message(
                ValueError,
                torch.Tensor.to_dense,
                one_sided.requires_grad_(),
                symmetric=True,
            ),
            """\
gradcheck: expected the stored entries of input 0 to be symmetric, got (i, j) stored without (j, i);
store an explicit zero there""",
        )

    def test_as_sparse_gradcheck_is_refused(self):
        check = torch.sparse.as_sparse_gradcheck(torch.autograd.gradcheck)
        A = self.sparse_matrix(torch.sparse_csr)
        self.assertExpectedInline(
            self.message(ValueError, torch.Tensor.to_dense, A, check, symmetric=True),
            """\
gradcheck: symmetric cannot be combined with torch.sparse.as_sparse_gradcheck, which hands on the
stored values of a sparse matrix in its place; give the sparse matrix to torch.autograd.gradcheck
itself""",
        )
        self.assertTrue(check(torch.logdet, self.matrix(), symmetric=True))

    def test_change_in_place(self):
        def changes(A, B):
            B.mul_(2)
            return A @ B

        A = self.matrix()
        for options in (
            {},
            {"fast_mode": True},
            {"check_forward_ad": True, "check_backward_ad": False},
        ):
            self.assertExpectedInline(
                self.message(
                    ValueError,
                    changes,
                    (A, A.detach().clone().requires_grad_()),
                    symmetric=True,
                    **options,
                ),
                """\
gradcheck: expected func to leave its inputs unchanged, but it changed input 1 in place; clone it in
func""",
            )
        self.assertIn(
            "gradgradcheck: expected func to leave",
            self.message(
                ValueError,
                changes,
                (A, A),
                torch.autograd.gradgradcheck,
                symmetric=True,
            ),
        )
        for layout in (torch.sparse_coo, torch.sparse_csr):
            S = self.sparse_matrix(layout)
            message = self.message(
                ValueError, lambda X: X.mul_(2).to_dense(), S, symmetric=True
            )
            self.assertIn("changed input 0 in place", message)

    def test_modes_that_give_no_gradient(self):
        A = self.matrix()
        self.assertExpectedInline(
            self.message(
                ValueError,
                torch.logdet,
                A,
                symmetric=True,
                check_symmetric_grad=True,
                check_forward_ad=True,
                check_backward_ad=False,
            ),
            """\
gradcheck: check_symmetric_grad looks at what backward returns, which check_backward_ad=False leaves
out; set check_backward_ad=True""",
        )
        self.assertExpectedInline(
            self.message(
                ValueError,
                torch.logdet,
                A,
                torch.autograd.gradgradcheck,
                symmetric=True,
                check_symmetric_grad=True,
                check_fwd_over_rev=True,
                check_rev_over_rev=False,
            ),
            """\
gradgradcheck: check_symmetric_grad looks at what double backward returns, which
check_rev_over_rev=False leaves out; set check_rev_over_rev=True""",
        )

    def test_message_of_a_skew_gradient(self):
        A = torch.tensor(
            [[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64, requires_grad=True
        )
        with self.assertRaises(RuntimeError) as caught:
            torch.autograd.gradcheck(
                self.planted("lower_triangle"),
                A,
                symmetric=True,
                check_symmetric_grad=True,
            )
        # G = [[1, 0], [4, 1]]: |G|^2 = 18 and its skew part has norm^2 8.
        self.assertExpectedInline(
            self.filled(caught.exception),
            """\
gradcheck: expected the gradient of output 0 with respect to input 0 to be symmetric, got a skew
part of relative norm 6.7e-01; return (G + G.mH) / 2 from backward, or drop check_symmetric_grad""",
        )

    # Callers and what must not change

    @parametrize("slow", [False, True])
    def test_testing_wrappers(self, slow):
        from unittest import mock

        A = self.matrix()
        with mock.patch(
            "torch.testing._internal.common_utils.TEST_WITH_SLOW_GRADCHECK", slow
        ):
            self.assertTrue(
                gradcheck(
                    torch.linalg.eigvalsh,
                    (A,),
                    symmetric=True,
                    check_symmetric_grad=True,
                )
            )
            self.assertTrue(
                gradgradcheck(
                    torch.linalg.eigvalsh,
                    (A,),
                    symmetric=(True,),
                    check_symmetric_grad=True,
                )
            )
            for wrapper, func in (
                (gradcheck, self.planted("off_diagonal_doubled")),
                (gradgradcheck, self.planted(second="off_diagonal_doubled")),
            ):
                with self.assertRaisesRegex(
                    RuntimeError, "Jacobian mismatch"
                ) as caught:
                    wrapper(func, A, symmetric=True)
                self.assertEqual("in fast mode" in str(caught.exception), not slow)

    def test_without_marks_nothing_changes(self):
        X = self.matrix().detach().tril().requires_grad_()  # not symmetric
        messages = []
        for options in (
            {},
            {"symmetric": False},
            {"symmetric": (False,)},
            {"check_symmetric_grad": False},
        ):
            with self.assertRaises(RuntimeError) as caught:
                torch.autograd.gradcheck(
                    self.planted("off_diagonal_doubled"), X, **options
                )
            messages.append(str(caught.exception))
            self.assertTrue(torch.autograd.gradcheck(self.planted(), X, **options))
            self.assertTrue(torch.autograd.gradgradcheck(self.planted(), X, **options))
        self.assertEqual(messages[1:], messages[:1] * 3)
        with self.assertRaisesRegex(
            ValueError, "at least one input tensor to require gradient"
        ):
            torch.autograd.gradcheck(torch.logdet, X.detach(), symmetric=True)

    def test_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        torch.autograd.gradcheck(
            torch.logdet,
            self.matrix(),
            symmetric=True,
            check_symmetric_grad=True,
            fast_mode=True,
        )
        self.assertEqual(torch.get_rng_state(), before)


instantiate_parametrized_tests(TestSymmetricGradcheck)

if __name__ == "__main__":
    run_tests()
