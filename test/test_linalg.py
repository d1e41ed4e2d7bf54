# Owner(s): ["module: linear algebra"]
"""torch.lobpcg without gradients: right pairs, honest convergence, start blocks, preconditioners, batches, errors."""

import io
import itertools
import math

import torch
from torch.testing._internal.common_device_type import (
    dtypes,
    instantiate_device_type_tests,
    onlyCPU,
    onlyNativeDeviceTypes,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)
from torch.testing._internal.lobpcg_oracles import LobpcgTestCase


class TestLobpcgSolver(LobpcgTestCase):
    """The solver as torch.lobpcg calls it, with checked arguments and without autograd."""

    def test_catalogue(self):
        from torch._lobpcg_impl.arguments import settle
        from torch._lobpcg_impl.operand import Pencil
        from torch._lobpcg_impl.solver import solve

        for p, largest, method in itertools.product(
            self.problems.catalogue(), (False, True), (None, "ortho")
        ):
            with self.subTest(problem=p.name, largest=largest, method=method):
                dtype = torch.complex128 if p.is_complex else torch.float64
                A, B = p.build(dtype)
                tol = self.default_tol(dtype)
                options = settle(p.m, dtype, 3, None, None, None, tol, largest, method)
                pairs = solve(Pencil.of(A, B, None, None), None, options)
                E, X, exact = pairs.E[:3], pairs.X[:, :3], p.extreme(3, largest)
                self.assertTrue(
                    bool((pairs.residual[:3] <= tol * pairs.scale[:3]).all())
                )
                self.assert_pairs(A, B, E, X, exact, tol, p.condition, p.error(dtype))


class TestLobpcgForward(LobpcgTestCase):
    """The wanted pairs of every problem whose spectrum is known."""

    def sweep(self, device, dtype, methods, layouts=(torch.strided,)):
        for p, method, largest, layout in itertools.product(
            self.problems.catalogue(), methods, (False, True), layouts
        ):
            if p.supports(dtype):
                with self.subTest(
                    problem=p.name, method=method, largest=largest, layout=layout
                ):
                    self.run_problem(
                        p, dtype, 3, largest, layout, device, method=method, niter=3000
                    )

    @onlyNativeDeviceTypes
    @dtypes(torch.float32, torch.float64, torch.complex128)
    def test_catalogue_ortho(self, device, dtype):
        self.sweep(device, dtype, ("ortho",))

    @onlyNativeDeviceTypes
    @dtypes(torch.float64, torch.complex64)
    def test_catalogue_basic(self, device, dtype):
        self.sweep(device, dtype, ("basic",))

    @onlyNativeDeviceTypes
    @dtypes(torch.float32, torch.float64, torch.complex64, torch.complex128)
    def test_catalogue_default_method(self, device, dtype):
        for p, largest in itertools.product(self.problems.catalogue(), (False, True)):
            if p.supports(dtype):
                with self.subTest(problem=p.name, largest=largest):
                    self.run_problem(p, dtype, 3, largest, device=device)

    @onlyNativeDeviceTypes
    @dtypes(torch.float64, torch.complex128)
    def test_layouts(self, device, dtype):
        names = ("laplacian12x9", "mikota60", "ring45_flux1", "path60_ncut", "rod100")
        layouts = (
            torch.sparse_coo,
            torch.sparse_csr,
            torch.sparse_csc,
            torch.sparse_bsr,
            torch.sparse_bsc,
        )
        for name, layout in itertools.product(names, layouts):
            p = self.problems.get(name)
            if p.supports(dtype):
                with self.subTest(problem=name, layout=layout):
                    self.run_problem(p, dtype, 3, True, layout, device, method="ortho")

    @onlyNativeDeviceTypes
    @dtypes(torch.float64)
    def test_mixed_layouts(self, device, dtype):
        p = self.problems.diagonal_mass(self.problems.laplacian(12, 9), 10.0)
        inverse = torch.linalg.inv(p.build(dtype, device=device)[0])
        layouts = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_bsr)
        for of_A, of_B, of_iK in itertools.product(
            layouts, layouts, (torch.strided, torch.sparse_coo)
        ):
            with self.subTest(A=of_A, B=of_B, iK=of_iK):
                A, B = p.build(dtype, of_A, device)[0], p.build(dtype, of_B, device)[1]
                iK = inverse if of_iK == torch.strided else inverse.to_sparse_coo()
                E, X, messages = self.solve(
                    A, k=2, B=B, iK=iK, largest=False, method="ortho", tol=1e-10
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A, B, E, X, p.extreme(2), 1e-10, p.condition, p.error(dtype)
                )

    @onlyNativeDeviceTypes
    @dtypes(torch.float64)
    def test_uncoalesced_and_int32_indices(self, device, dtype):
        p = self.problems.laplacian(40)
        A = p.build(dtype, torch.sparse_coo, device)[0]
        halves = torch.sparse_coo_tensor(
            torch.cat([A.indices(), A.indices()], 1),
            torch.cat([A.values(), A.values()]) / 2,
            A.shape,
        )
        C = A.to_sparse_csr()
        C = torch.sparse_csr_tensor(
            C.crow_indices().int(), C.col_indices().int(), C.values(), C.shape
        )
        for M in (halves, C):
            E, X, messages = self.solve(M, k=2, largest=True, method="ortho", tol=1e-10)
            self.assertEqual(messages, [])
            self.assert_pairs(
                A, None, E, X, p.extreme(2, True), 1e-10, 1.0, p.error(dtype)
            )

    @onlyNativeDeviceTypes
    @dtypes(torch.float32, torch.float64)
    def test_every_k(self, device, dtype):
        p = self.problems.indefinite(31)
        for k, method in itertools.product((1, 2, 5, 10), ("ortho", "basic")):
            with self.subTest(k=k, method=method):
                self.run_problem(p, dtype, k, device=device, method=method)
        for k in (
            11,
            16,
            30,
            31,
        ):  # LOBPCG itself needs m >= 3 n; the default method does not
            with self.subTest(k=k):
                self.run_problem(p, dtype, k, device=device)

    def test_tiny_orders(self):
        for m, dtype in itertools.product(
            (1, 2, 3, 4), (torch.float64, torch.complex64)
        ):
            p = self.problems.indefinite(m)
            for k in range(1, m + 1):
                with self.subTest(m=m, k=k):
                    self.run_problem(p, dtype, k)

    def test_defaults(self):
        """k = 1, or the columns of X; the largest eigenvalues; eigenvalues in the order asked for."""
        p = self.problems.laplacian(50)
        A, _ = p.build()
        self.assertEqual(self.solve(A)[0], p.extreme(1, True), atol=1e-6, rtol=0)
        self.assertEqual(
            self.solve(A, X=self.start(50, 4))[0], p.extreme(4, True), atol=1e-6, rtol=0
        )
        self.assertEqual(
            self.solve(A, k=2, X=self.start(50, 4))[0],
            p.extreme(2, True),
            atol=1e-6,
            rtol=0,
        )
        self.assertEqual(
            self.solve(A, 3, None, None, 5)[0], p.extreme(3, True), atol=1e-6, rtol=0
        )

    def test_default_tolerance_is_met(self):
        for dtype, method in itertools.product(
            (torch.float32, torch.float64), ("ortho", "basic")
        ):
            p = self.problems.laplacian(12, 9)
            A, _ = p.build(dtype)
            E, X, messages = self.solve(A, k=3, method=method)
            self.assertEqual(messages, [])
            self.assert_pairs(
                A,
                None,
                E,
                X,
                p.extreme(3, True),
                torch.finfo(dtype).eps ** 0.5,
                1.0,
                p.error(dtype),
            )

    @onlyCPU
    @dtypes(torch.float32)
    def test_many_starts_float32(self, device, dtype):
        """Single precision loses no start: eigenvalues of a 2-D Laplacian to 1e-5 of its norm."""
        size = 50 if self.full else 20
        p = self.problems.laplacian(size, size)
        A, _ = p.build(dtype, torch.sparse_csr, device)
        for seed in range(200 if self.full else 5):
            E, _, messages = self.solve(
                A,
                X=self.start(p.m, 6, dtype, seed),
                k=4,
                largest=False,
                tol=1e-6,
                niter=3000,
            )
            self.assertLessEqual(
                (E - p.extreme(4)).abs().max(), 1e-5 * 8, f"seed {seed}: {messages}"
            )

    def test_basic_never_returns_a_pair_twice(self):
        names = (
            "path60",
            "star40",
            "hypercube6",
            "complete30",
            "indefinite80_cond1000",
            "path60_ncut",
        )
        for name, seed in itertools.product(names, range(25 if self.full else 3)):
            p = self.problems.get(name)
            with self.subTest(problem=name, seed=seed):
                self.run_problem(
                    p,
                    torch.float64,
                    5,
                    method="basic",
                    X=self.start(p.m, 5, seed=seed),
                    niter=3000,
                )

    def test_many_starts(self):
        """A start block of any seed leads to the wanted pairs, in both methods."""
        for p, method in itertools.product(
            self.problems.catalogue(), ("ortho", "basic")
        ):
            for seed in range(100 if self.full else 1):
                dtype = torch.complex128 if p.is_complex else torch.float64
                with self.subTest(problem=p.name, method=method, seed=seed):
                    X = self.start(p.m, 4, dtype, seed)
                    self.run_problem(p, dtype, 3, method=method, X=X, niter=3000)

    def test_hermitian_part(self):
        """A dense A stands for (A + A^H)/2, with and without requires_grad; B too."""
        for dtype in (torch.float64, torch.complex128):
            p = self.problems.indefinite(40, 10.0)
            A, B = p.build(dtype)
            skew = self.start(40, 40, dtype)
            skew = skew - skew.mH
            for requires_grad, method in itertools.product(
                (False, True), ("ortho", "basic", None)
            ):
                C, D = (A + skew).requires_grad_(requires_grad), B + skew
                E, X, _ = self.solve(C, k=3, B=D, method=method, tol=1e-10, niter=2000)
                self.assert_pairs(
                    A, B, E, X, p.extreme(3, True), 1e-10, 10.0, 10 * p.error(dtype)
                )

    def test_is_reproducible_and_leaves_the_global_generator_alone(self):
        A, B = self.problems.indefinite(80, 10.0).build()
        for method, batched in itertools.product(
            ("ortho", "basic", None), (False, True)
        ):
            M = torch.stack([A, 2 * A]) if batched else A
            torch.manual_seed(1)
            state = torch.get_rng_state()
            first = torch.lobpcg(M, k=3, B=B, method=method)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            torch.manual_seed(2)
            second = torch.lobpcg(M, k=3, B=B, method=method)
            self.assertTrue(all(map(torch.equal, first, second)))

    def test_leaves_the_callers_tensors_alone(self):
        p = self.problems.diagonal_mass(self.problems.laplacian(12, 9), 10.0)
        for method, layout in itertools.product(
            ("ortho", "basic", None), (torch.strided, torch.sparse_csr)
        ):
            A, B = p.build(torch.float64, layout)
            given = {
                "A": A,
                "B": B,
                "X": self.start(p.m, 4),
                "iK": torch.eye(p.m, dtype=torch.float64),
            }
            before = {name: M.to_dense().clone() for name, M in given.items()}
            versions = {name: M._version for name, M in given.items()}
            _E, X, _ = self.solve(**given, k=3, method=method)
            for name, M in given.items():
                self.assertTrue(torch.equal(M.to_dense(), before[name]), name)
                self.assertEqual(M._version, versions[name], name)
            X.zero_()
            self.assertTrue(
                torch.equal(given["X"], before["X"]),
                "the result shares memory with the start block",
            )

    def test_noncontiguous_and_views(self):
        p = self.problems.indefinite(40)
        A, _ = p.build()
        wide = torch.zeros(80, 40, dtype=torch.float64)
        wide[::2] = A
        X = self.start(5, 40).T
        E, V, _ = self.solve(wide[::2], k=3, X=X, tol=1e-10, method="ortho")
        self.assert_pairs(
            A, None, E, V, p.extreme(3, True), 1e-10, 1.0, p.error(torch.float64)
        )
        C = self.problems.get("indefinite80_complex").build(torch.complex128)[0]
        self.assertEqual(
            self.solve(C.mT.conj(), k=3, method="ortho")[0],
            self.solve(C, k=3, method="ortho")[0],
        )

    def test_default_dtype_does_not_matter(self):
        p = self.problems.laplacian(12, 9)
        A, _ = p.build()
        expected = torch.lobpcg(A, k=3, method="ortho")
        try:
            torch.set_default_dtype(torch.float64)
            found = torch.lobpcg(A, k=3, method="ortho")
            single = torch.lobpcg(A.float(), k=3, method="ortho")
        finally:
            torch.set_default_dtype(torch.float32)
        self.assertTrue(all(map(torch.equal, found, expected)))
        self.assertEqual([M.dtype for M in single], [torch.float32] * 2)


class TestLobpcgConvergence(LobpcgTestCase):
    """Start blocks, iteration limits, scale: converged means converged, and the rest is said in one warning."""

    def test_exact_start_is_recognised(self):
        """Right, and at a fraction of a random start's cost: what is left is the look for pairs that X0 cannot see."""
        for name, method in itertools.product(
            ("laplacian12x9", "rod100", "indefinite80_complex"), ("ortho", "basic")
        ):
            p = self.problems.get(name)
            dtype = torch.complex128 if p.is_complex else torch.float64
            A, B = p.build(dtype)
            work = []
            for X in (p.eigenvectors(3, dtype=dtype), self.start(p.m, 3, dtype)):
                apply, columns = self.counting(A)
                E, V, messages = self.solve(
                    apply, B=B, X=X, largest=False, method=method, tol=1e-9, niter=3000
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A, B, E, V, p.extreme(3), 1e-9, p.condition, p.error(dtype)
                )
                work.append(sum(columns))
            self.assertLess(work[0], 0.5 * work[1])

    def test_good_start_needs_fewer_iterations(self):
        p = self.problems.laplacian(20, 17)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        near = p.eigenvectors(4) + 1e-6 * self.start(p.m, 4)
        work = []
        for X in (near, self.start(p.m, 4)):
            apply, columns = self.counting(A)
            _, _, messages = self.solve(
                apply, X=X, largest=False, method="ortho", tol=1e-10, niter=3000
            )
            self.assertEqual(messages, [])
            work.append(sum(columns))
        self.assertLess(work[0], 0.8 * work[1])

    def test_start_inside_a_wrong_invariant_subspace(self):
        """Exact eigenvectors of unwanted pairs have zero residual; the wanted ones must still be found."""
        for name, method in itertools.product(
            ("laplacian12x9", "rod100", "indefinite80"), ("ortho", "basic")
        ):
            p = self.problems.get(name)
            A, B = p.build()
            for X in (p.eigenvectors(3, largest=True), p.eigenvectors(6)[:, 1:5]):
                with self.subTest(problem=name, method=method, n=X.size(-1)):
                    E, V, messages = self.solve(
                        A,
                        k=3,
                        B=B,
                        X=X,
                        largest=False,
                        method=method,
                        tol=1e-9,
                        niter=2000,
                    )
                    self.assertEqual(messages, [])
                    self.assert_pairs(
                        A,
                        B,
                        E,
                        V,
                        p.extreme(3),
                        1e-9,
                        p.condition,
                        p.error(torch.float64),
                    )

    def test_diagonal_with_columns_of_the_identity(self):
        p = self.problems.get("diagonal100")
        A, _ = p.build()
        for largest, method, layout in itertools.product(
            (False, True), ("ortho", "basic"), (torch.strided, torch.sparse_csr)
        ):
            A, _ = p.build(torch.float64, layout)
            for columns in ([0, 1, 2], [49, 50, 51], [99, 98, 97], [97, 1, 50]):
                X = torch.eye(100, dtype=torch.float64)[:, columns]
                E, V, messages = self.solve(
                    A, X=X, largest=largest, method=method, tol=1e-9
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A,
                    None,
                    E,
                    V,
                    p.extreme(3, largest),
                    1e-9,
                    1.0,
                    p.error(torch.float64),
                )

    def test_null_vector_start(self):
        """A graph Laplacian's constant vector is exact for eigenvalue 0: relative residuals alone never accept it."""
        p = self.problems.path_graph(40)
        A, _ = p.build()
        for method in ("ortho", "basic"):
            E, X, messages = self.solve(
                A,
                X=torch.ones(40, 1, dtype=torch.float64),
                largest=False,
                method=method,
                tol=1e-10,
            )
            self.assertEqual(messages, [])
            self.assert_pairs(
                A, None, E, X, p.extreme(1), 1e-10, 1.0, p.error(torch.float64)
            )

    def test_dependent_start_columns_are_repaired(self):
        p = self.problems.indefinite(80, 10.0)
        A, B = p.build()
        X = self.start(80, 5)
        blocks = {
            "duplicate": X[:, [0, 1, 2, 0, 1]],
            "zero": X * torch.tensor([1, 0, 1, 1, 0], dtype=torch.float64),
            "combination": torch.cat([X[:, :4], X[:, :4].sum(-1, keepdim=True)], -1),
            "nearly": torch.cat([X[:, :4], X[:, :1] * (1 + 1e-15)], -1),
            "badly scaled": X
            * torch.tensor([1, 1e150, 1e-150, 1, 1e-20], dtype=torch.float64),
        }
        for (name, block), method in itertools.product(
            blocks.items(), ("ortho", "basic")
        ):
            with self.subTest(block=name, method=method):
                E, V, messages = self.solve(
                    A, k=3, B=B, X=block, method=method, tol=1e-9
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A,
                    B,
                    E,
                    V,
                    p.extreme(3, True),
                    1e-9,
                    p.condition,
                    p.error(torch.float64),
                )

    def test_rank_below_k_is_an_error(self):
        A, _ = self.problems.laplacian(50).build()
        X = self.start(50, 4)
        for block in (X[:, [0, 0, 0, 0]], torch.zeros_like(X), X[:, [0, 1, 0, 1]]):
            for method in ("ortho", "basic"):
                with self.assertRaisesRegex(ValueError, r"lobpcg: .*rank"):
                    torch.lobpcg(A, k=3, X=block, method=method)

    def test_unconverged_is_one_warning(self):
        p = self.problems.laplacian(200)
        A, _ = p.build()
        for method, batched in itertools.product(("ortho", "basic"), (False, True)):
            M = torch.stack([A, A + A]) if batched else A
            E, _X, messages = self.solve(
                M, k=3, largest=False, niter=4, method=method, tol=1e-12
            )
            self.assertEqual(len(messages), 1, messages)
            self.assertRegex(messages[0], r"lobpcg: .*residual")
            self.assertRegex(messages[0], r"1e-12")
            self.assertRegex(messages[0], r"\b4\b")
            self.assertRegex(messages[0], r"niter")
            self.assertEqual(E.shape, M.shape[:-2] + (3,))

    def test_converged_is_no_warning(self):
        A, _ = self.problems.laplacian(30).build()
        self.assertEqual(self.solve(A, k=2, method="ortho", tol=1e-6)[2], [])

    def rayleigh_ritz(self, A, X, k, largest):
        Q = torch.linalg.qr(X)[0]
        E = torch.linalg.eigvalsh(Q.mH @ A @ Q)
        return E[-k:].flip(0) if largest else E[:k]

    def test_niter_zero_is_rayleigh_ritz(self):
        A, _ = self.problems.indefinite(60).build()
        X = self.start(60, 5)
        for method, largest in itertools.product(("ortho", "basic"), (False, True)):
            E, V, messages = self.solve(
                A, k=3, X=X, niter=0, method=method, largest=largest
            )
            self.assertEqual(
                E, self.rayleigh_ritz(A, X, 3, largest), atol=1e-12, rtol=0
            )
            self.assertEqual(V.mH @ V, torch.eye(3, dtype=V.dtype), atol=1e-12, rtol=0)
            self.assertEqual((V * (A @ V)).sum(-2), E, atol=1e-12, rtol=0)
            self.assertEqual(
                V, X @ torch.linalg.lstsq(X, V).solution, atol=1e-11, rtol=0
            )
            self.assertEqual(len(messages), 1)

    def test_first_iterations_are_rayleigh_ritz_on_the_krylov_block(self):
        """Without a preconditioner, step one minimises over span [X, residuals]: the oracle is a dense projection."""
        A, _ = self.problems.indefinite(60).build()
        X = self.start(60, 3)
        for method, largest in itertools.product(("ortho", "basic"), (False, True)):
            E, _, _ = self.solve(A, k=3, X=X, niter=1, method=method, largest=largest)
            self.assertEqual(
                E,
                self.rayleigh_ritz(A, torch.cat([X, A @ X], -1), 3, largest),
                atol=1e-10,
                rtol=0,
            )

    def test_ritz_values_improve_monotonically(self):
        A, B = self.problems.get("mikota60").build()
        X = self.start(60, 3)
        for method in ("ortho", "basic"):
            values = [
                self.solve(A, B=B, X=X, niter=i, method=method, largest=False)[0].sum()
                for i in range(8)
            ]
            for before, after in zip(values, values[1:]):
                self.assertLess(after, before)

    def test_niter_minus_one_stops_at_the_attainable_accuracy(self):
        for name, method in itertools.product(
            ("laplacian100", "mikota60", "indefinite80_complex"), ("ortho", "basic")
        ):
            p = self.problems.get(name)
            dtype = torch.complex128 if p.is_complex else torch.float64
            A, B = p.build(dtype)
            with self.subTest(problem=name, method=method):
                E, X, messages = self.solve(
                    A, k=3, B=B, largest=True, niter=-1, tol=1e-30, method=method
                )
                self.assertLessEqual(len(messages), 1)
                self.assert_pairs(
                    A, B, E, X, p.extreme(3, True), 1e-13, p.condition, p.error(dtype)
                )

    def test_zero_tolerance(self):
        A, _ = self.problems.laplacian(30).build()
        E, _, messages = self.solve(A, k=2, tol=0.0, niter=50, method="ortho")
        self.assertEqual(len(messages), 1)
        self.assertEqual(
            E, self.problems.laplacian(30).extreme(2, True), atol=1e-10, rtol=0
        )

    def test_scale_invariance(self):
        """A power of two scales E exactly and changes neither iterations nor vectors."""
        p = self.problems.indefinite(80, 10.0)
        for dtype, exponents in (
            (torch.float64, (-600, -70, 70, 600)),
            (torch.float32, (-90, 90)),
        ):
            A, B = p.build(dtype)
            for method in ("ortho", "basic"):
                E, X, _ = self.solve(A, k=3, B=B, method=method)
                for e in exponents:
                    with self.subTest(dtype=dtype, method=method, exponent=e):
                        S, V, messages = self.solve(A * 2.0**e, k=3, B=B, method=method)
                        self.assertEqual(messages, [])
                        self.assertEqual(S / 2.0**e, E, rtol=1e-4, atol=0)
                        self.assertEqual(V.abs(), X.abs(), atol=1e-2, rtol=0)

    def test_scale_of_B(self):
        p = self.problems.indefinite(80, 10.0)
        A, B = p.build()
        for method, s in itertools.product(("ortho", "basic"), (1e-100, 1e100)):
            E, _X, messages = self.solve(A, k=3, B=B * s, method=method, tol=1e-9)
            self.assertEqual(messages, [])
            self.assertEqual(E * s, p.extreme(3, True), rtol=1e-7, atol=0)

    def test_single_entry_scales(self):
        """Huge diagonal entries beside ordinary ones (penalty methods) do not hide the small eigenvalues."""
        values = torch.cat(
            [
                torch.arange(1, 41, dtype=torch.float64),
                torch.full((5,), 1e12, dtype=torch.float64),
            ]
        )
        A = torch.diag(values)
        E, _, _ = self.solve(
            A,
            k=2,
            largest=False,
            tol=1e-14,
            niter=2000,
            iK=torch.diag(1 / values),
            method="ortho",
        )
        self.assertEqual(
            E, torch.tensor([1.0, 2.0], dtype=torch.float64), atol=1e-2, rtol=0
        )


class TestLobpcgProducts(LobpcgTestCase):
    """What an iteration costs, preconditioners, callables."""

    def test_one_product_per_new_direction(self):
        """A is applied to the start block once, then to at most 1.1 x the active columns an iteration."""
        p = self.problems.laplacian(40, 37)
        A, _ = p.build(torch.float64, torch.sparse_csr)
        for method, generalized in itertools.product(("ortho", "basic"), (False, True)):
            n, niter = 4, 30
            apply, columns = self.counting(A)
            B, of_B = self.counting(torch.eye(p.m, dtype=torch.float64) * 2)
            self.solve(
                apply,
                B=B if generalized else None,
                X=self.start(p.m, n),
                niter=niter,
                tol=1e-30,
                method=method,
            )
            self.assertLessEqual(sum(columns), n + 1.1 * n * niter, (method, columns))
            self.assertGreaterEqual(sum(columns), n * niter)
            if generalized:
                self.assertLessEqual(sum(of_B), 2 * n + 1.1 * n * niter, (method, of_B))

    def test_one_transfer_to_the_host_per_iteration(self):
        """As on an accelerator: a batch is iterated without looking at numbers but once. eigh's own are not counted."""
        from contextlib import ExitStack
        from unittest import mock

        transfers = []

        def counting(name):
            method = getattr(torch.Tensor, name)
            return mock.patch.object(
                torch.Tensor,
                name,
                lambda T, *args, **kwargs: transfers.append(name)
                or method(T, *args, **kwargs),
            )

        names = (
            "item",
            "tolist",
            "__bool__",
            "__float__",
            "__int__",
            "nonzero",
            "numpy",
            "cpu",
        )
        G = torch.randn(
            2, 80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        A, eye = G + G.mT, torch.eye(80, dtype=torch.float64)
        for name, options in {
            "plain": {},
            "B": {"B": eye.expand(2, 80, 80) * 2},
            "iK": {"iK": eye},
        }.items():
            counts = []
            for niter in (10, 30):
                transfers.clear()
                with ExitStack() as stack:
                    for method in names:
                        stack.enter_context(counting(method))
                    self.solve(A, k=2, niter=niter, tol=0.0, **options)
                counts.append(len(transfers))
            with self.subTest(name=name):
                self.assertGreater(counts[0], 10)
                self.assertLessEqual(
                    counts[1] - counts[0], 21
                )  # 20, and one for a refresh

    def test_converged_columns_cost_nothing(self):
        """Soft locking: a wanted pair far from the rest converges first and leaves the products."""
        spectrum = torch.cat(
            [torch.tensor([-100.0]), torch.linspace(1, 2, 199)]
        ).double()
        A, _ = self.problems.prescribed("outlier", spectrum).build()
        for method in ("ortho", "basic"):
            apply, columns = self.counting(A)
            _, _, messages = self.solve(
                apply,
                X=self.start(200, 3),
                largest=False,
                tol=1e-8,
                method=method,
                niter=500,
            )
            self.assertEqual(messages, [])
            self.assertLess(columns[-1], 3, (method, columns))

    def test_callables_agree_with_tensors(self):
        for p in (
            self.problems.indefinite(80, 10.0),
            self.problems.indefinite(80, 10.0, True),
        ):
            dtype = torch.complex128 if p.is_complex else torch.float64
            A, B = p.build(dtype)
            for method in (None, "ortho", "basic"):
                E, X, messages = self.solve(
                    lambda V: A @ V,
                    k=3,
                    B=lambda V: B @ V,
                    X=self.start(80, 4, dtype),
                    method=method,
                    tol=1e-9,
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A, B, E, X, p.extreme(3, True), 1e-9, p.condition, p.error(dtype)
                )

    def test_batched_callable(self):
        A, _, exact = self.problems.batch(self.problems.indefinite(40), (2, 3))
        E, X, messages = self.solve(
            lambda V: A @ V,
            X=self.start(40, 3, batch=(2, 3)),
            method="ortho",
            tol=1e-9,
            niter=500,
        )
        self.assertEqual(messages, [])
        self.assert_pairs(A, None, E, X, exact[..., -3:].flip(-1), 1e-9)

    def test_bad_callables_are_named(self):
        A, _ = self.problems.laplacian(30).build()
        X = self.start(30, 2)
        bad = {
            "shape": lambda V: (A @ V)[:-1],
            "dtype": lambda V: (A @ V).float(),
            "NaN|finite": lambda V: A @ V * math.nan,
            "[Tt]ensor": lambda V: None,
        }
        for (fact, wrong), name in itertools.product(bad.items(), ("A", "B", "iK")):
            with self.subTest(fact=fact, name=name):
                with self.assertRaisesRegex(
                    (ValueError, TypeError), rf"lobpcg: .*\b{name}\b.*({fact})"
                ):
                    torch.lobpcg(
                        **{"A": A, "X": X, "method": "ortho", "tol": 1e-10, name: wrong}
                    )

    def preconditioned(self, iK, A, B=None, method="ortho", largest=False, **kwargs):
        """Iterations: products with the block of residuals, counted through a callable A."""
        apply, columns = self.counting(A)
        E, X, messages = self.solve(
            apply,
            B=B,
            X=self.start(A.size(-1), 4, A.dtype, batch=A.shape[:-2]),
            k=3,
            iK=iK,
            largest=largest,
            method=method,
            tol=1e-8,
            niter=3000,
            **kwargs,
        )
        self.assertEqual(messages, [])
        return len(columns), E, X

    def test_inverse_as_preconditioner(self):
        """With iK = A^-1, condition 1e6, at most 15 iterations from the default start, in every form iK may take."""
        spectrum = torch.logspace(-6, 0, 500, dtype=torch.float64)
        p = self.problems.prescribed("condition 1e6", spectrum)
        A, _ = p.build()
        inverse = torch.linalg.inv(A)
        factor = torch.linalg.cholesky(A)
        forms = {
            "dense": inverse,
            "coo": inverse.to_sparse_coo(),
            "csr": inverse.to_sparse_csr(),
            "callable": lambda R: torch.cholesky_solve(R, factor),
        }
        for (name, iK), method in itertools.product(
            forms.items(), ("ortho", "basic", None)
        ):
            with self.subTest(iK=name, method=method):
                steps = []
                E, X, messages = self.solve(
                    A,
                    k=3,
                    iK=iK,
                    largest=False,
                    method=method,
                    tol=1e-8,
                    tracker=lambda worker: steps.append(worker.ivars["istep"]),
                )
                self.assertEqual(messages, [])
                self.assertLessEqual(steps[-1], 15)
                self.assert_pairs(
                    A, None, E, X, p.extreme(3), 1e-8, 1.0, p.error(torch.float64)
                )

    def test_diagonal_preconditioner_of_a_graded_matrix(self):
        """diag(1..1e6) plus a small coupling: Jacobi's preconditioner saves most of the iterations."""
        d = torch.logspace(0, 6, 300, dtype=torch.float64)
        coupling = torch.diag(torch.full((299,), 0.1, dtype=torch.float64), 1)
        A = torch.diag(d) + coupling + coupling.mT
        index = torch.arange(300)
        jacobi = torch.sparse_coo_tensor(torch.stack([index, index]), 1 / d, (300, 300))
        exact = torch.linalg.eigvalsh(A)[:3]
        for method in ("ortho", "basic"):
            count, E, _ = self.preconditioned(jacobi, A, method=method)
            self.assertEqual(E, exact, atol=1e-1, rtol=1e-6)
            apply, columns = self.counting(A)
            self.solve(
                apply,
                X=self.start(300, 4),
                k=3,
                largest=False,
                tol=1e-8,
                niter=4 * count,
                method=method,
            )
            self.assertGreater(len(columns), 2 * count)

    def test_preconditioner_with_B_and_complex(self):
        for name in ("rod100", "laplacian12x9_mass100"):
            p = self.problems.get(name)
            for dtype, method in itertools.product(
                (torch.float64, torch.complex128), ("ortho", "basic")
            ):
                A, B = p.build(dtype)
                count, E, X = self.preconditioned(torch.linalg.inv(A), A, B, method)
                self.assertLessEqual(count, 25)
                self.assert_pairs(
                    A, B, E, X, p.extreme(3), 1e-8, p.condition, p.error(dtype)
                )

    def test_batched_and_broadcast_preconditioner(self):
        p = self.problems.laplacian(60)
        A, _, exact = self.problems.batch(p, (3,))
        for iK, method in itertools.product(
            (torch.linalg.inv(A), torch.linalg.inv(A[0])), ("ortho", "basic")
        ):
            count, E, X = self.preconditioned(iK, A, method=method)
            self.assertLessEqual(count, 30)
            self.assert_pairs(A, None, E, X, exact[..., :3], 1e-8)

    def test_indefinite_preconditioner_is_named(self):
        A, _ = self.problems.laplacian(50).build()
        eye = torch.eye(50, dtype=torch.float64)
        wrong = torch.diag(torch.linspace(-1, 1, 50).double())
        for iK, method in itertools.product(
            (-eye, wrong, lambda R: -R), ("ortho", "basic")
        ):
            with self.assertRaisesRegex(ValueError, r"lobpcg: .*iK.*positive definite"):
                torch.lobpcg(
                    A,
                    k=2,
                    iK=iK,
                    X=self.start(50, 2),
                    largest=False,
                    method=method,
                    tol=1e-10,
                )

    def test_callables_do_not_see_the_worker_state(self):
        """A callable that overwrites its argument's copy, or returns its own buffer, changes nothing."""
        p = self.problems.laplacian(40)
        A, _ = p.build()
        buffer = torch.empty(40, 3, dtype=torch.float64)

        def apply(V):
            out = buffer[:, : V.size(-1)]
            torch.matmul(A, V, out=out)
            return out

        E, X, _ = self.solve(apply, X=self.start(40, 3), method="ortho", tol=1e-9)
        self.assert_pairs(
            A, None, E, X, p.extreme(3, True), 1e-9, 1.0, p.error(torch.float64)
        )


class TestLobpcgPolynomial(LobpcgTestCase):
    """The Chebyshev iteration that gives the directions where no iK does."""

    def steps_and_products(self, A, **kwargs):
        """E, iterations, columns that A was applied to."""
        seen = []
        E, _, messages = self.solve(
            A,
            tracker=lambda w: seen.append((w.ivars["istep"], w.pencil.A.columns)),
            **kwargs,
        )
        self.assertEqual(messages, [])
        return (E, *seen[-1])

    def directions(self, A, B, sign, E, R, most=60, exact=True):
        """q(C) D^-1 R from the polynomial aimed by eigenvalues E, and the polynomial; not `exact`: with products in
        single precision, as they are unless the interval begins at the wanted end, almost."""
        from unittest import mock

        from torch._lobpcg_impl import product_form
        from torch._lobpcg_impl.chebyshev import polynomial
        from torch._lobpcg_impl.operand import Pencil

        q = polynomial(Pencil.of(A, B, None, R), sign, most)
        X = torch.zeros(*E.shape[:-1], R.shape[-2], E.shape[-1], dtype=R.dtype)
        far = math.inf if exact else product_form._BLURRED
        with mock.patch.object(product_form, "_BLURRED", far):
            q.aim(E, X)
        if q.chosen.degree > 1 and not exact:
            self.assertEqual(q.chosen.form.M.dtype.to_real(), torch.float32)
        return q(R), q.chosen

    def exact_directions(self, A, D, sign, q, R):
        """The same from the definition of q, by all eigenpairs."""
        root = torch.ones(A.shape[-1], dtype=torch.float64) if D is None else D.sqrt()
        e, V = torch.linalg.eigh(sign * A / root / root.unsqueeze(-1))

        def T(t):
            x = i.at(t)
            if abs(x) <= 1:
                return math.cos(q.degree * math.acos(x))
            sign = 1 if x > 0 else (-1) ** q.degree
            return sign * math.cosh(q.degree * math.acosh(abs(x)))

        (i,) = q.intervals
        values = [(1 - T(t) / T(i.s)) / (t - i.s) for t in e.tolist()]
        f = torch.tensor(values, dtype=V.dtype)
        return ((V * f) @ (V.mH @ (R / root.unsqueeze(-1)))) / root.unsqueeze(-1)

    def test_polynomial_of_a_dense_matrix(self):
        """By its recurrence, up to a factor for each column; without B, in one matrix of a certain size."""
        from unittest import mock

        from torch._lobpcg_impl import chebyshev, product_form
        from torch._lobpcg_impl.operand import Pencil

        def unit(Z):
            return Z / torch.linalg.vector_norm(Z, dim=-2, keepdim=True)

        g = torch.Generator().manual_seed(7)
        cases = itertools.product(
            (torch.float64, torch.complex128), (1.0, -1.0), (1.0, 1e70), (True, False)
        )
        for dtype, sign, size, exact in cases:
            A = torch.randn(60, 60, generator=g, dtype=dtype) * size
            A = A + A.mH
            E = torch.linalg.eigvalsh(A)
            E = E[:8] if sign > 0 else E.flip(-1)[:8]
            R = torch.randn(60, 5, generator=g, dtype=dtype)
            R[:, 0] *= 1e-60
            far = math.inf if exact else product_form._BLURRED
            with (
                mock.patch.object(chebyshev, "_DENSE_FROM", 0),
                mock.patch.object(product_form, "_BLURRED", far),
                self.subTest(dtype=dtype, sign=sign, size=size, exact=exact),
            ):
                q = chebyshev.polynomial(Pencil.of(A, None, None, R), sign)
                q.aim(E, R)
                self.assertEqual(q.chosen.degree, 4)
                expected = self.exact_directions(A, None, sign, q.chosen, R)
                bound = 1e-12 if exact else 2e-6
                error = (unit(q(R)) - unit(expected)).abs().max()
                self.assertLess(float(error), bound)
                self.assertIs(q(R, R), R)
                self.assertLess(float((unit(R) - unit(expected)).abs().max()), bound)
        for M, B in ((A, torch.eye(60, dtype=dtype)), (A.expand(2, 60, 60), None)):
            self.assertIsNone(chebyshev.polynomial(Pencil.of(M, B, None, None), 1.0))

    def test_dense_solve_takes_a_third_of_the_iterations(self):
        """With q, and as right as without, at both ends and of an indefinite matrix in single precision."""
        g = torch.Generator().manual_seed(7)
        G = torch.randn(700, 700, generator=g, dtype=torch.float64) / 700**0.5
        for dtype, largest in itertools.product(
            (torch.float64, torch.float32), (True, False)
        ):
            A = (G + G.mT).to(dtype)
            steps = {}
            for degree in (1, 60):
                seen = []
                E, _, messages = self.solve(
                    A,
                    k=4,
                    largest=largest,
                    tracker=lambda w, seen=seen: seen.append(w.ivars["istep"]),
                    ortho_iparams={"degree": degree},
                )
                self.assertEqual(messages, [])
                steps[degree] = seen[-1]
                exact = torch.linalg.eigvalsh(A.double())
                exact = exact.flip(-1)[:4] if largest else exact[:4]
                bound = 1e-9 if dtype == torch.float64 else 1e-3
                self.assertLess(float((E - exact).abs().max()), bound)
            self.assertLess(steps[60], 0.5 * steps[1])

    def test_filter_is_its_definition(self):
        """T_12(x(C)) / T_12(x(0)) in the measure diag(A), a thirtieth at most where C is above share of its bound."""
        from unittest import mock

        from numpy.polynomial import chebyshev

        from torch._lobpcg_impl import product_form
        from torch._lobpcg_impl.chebyshev import low_pass
        from torch._lobpcg_impl.operand import Pencil

        share = math.tanh(math.acosh(30.0) / 24) ** 2
        for p in (self.problems.laplacian(9, 8), self.problems.ring(45, 1.0)):
            dtype = torch.complex128 if p.is_complex else torch.float64
            with self.subTest(problem=p.name):
                A, _ = p.build(dtype, torch.sparse_csr)
                dense = A.to_dense()
                dense = (
                    dense
                    + 0.1 * torch.diag(torch.linspace(0, 5, p.m))
                    + 3.0 * p.is_complex * torch.eye(p.m)
                )
                R, d = self.start(p.m, 3, dtype), torch.real(dense.diagonal())
                with mock.patch.object(product_form, "_BLURRED", math.inf):
                    p_of_C = low_pass(
                        Pencil.of(dense.to_sparse_csr(), None, None, R), 1.0
                    )
                up = float((dense.abs().sum(-1) / d).max())
                e, V = torch.linalg.eigh(dense / d.sqrt() / d.sqrt().unsqueeze(-1))
                x = ((1 + share) - 2 * e.numpy() / up) / (1 - share)
                T = chebyshev.Chebyshev.basis(12)
                f = torch.from_numpy(T(x) / T((1 + share) / (1 - share))).to(dtype)
                self.assertLess(float(f.abs()[e > share * up].max()), 1 / 30 + 1e-12)
                root = d.sqrt().unsqueeze(-1)
                exact = ((V * f) @ (V.mH @ (R * root))) / root
                self.assertEqual(p_of_C(R), exact, atol=1e-12, rtol=1e-10)

    def test_filter_leaves_what_it_cannot_serve(self):
        from torch._lobpcg_impl.chebyshev import low_pass
        from torch._lobpcg_impl.operand import Pencil

        A, _ = self.problems.laplacian(9, 8).build(torch.float64, torch.sparse_csr)
        m, R = A.shape[0], self.start(A.shape[0], 3, torch.float64)
        indefinite = (A.to_dense() - 3.0 * torch.eye(m)).to_sparse_csr()
        self.assertIs(low_pass(Pencil.of(indefinite, None, None, R), 1.0)(R), R)
        for M, sign in ((A, -1.0), (A.to_dense(), 1.0), (A * -1.0, 1.0)):
            self.assertIsNone(low_pass(Pencil.of(M, None, None, R), sign))

    def test_polynomial_is_its_definition(self):
        for p in (
            self.problems.laplacian(9, 8),
            self.problems.ring(45, 1.0),
            self.problems.indefinite(60),
        ):
            dtype = torch.complex128 if p.is_complex else torch.float64
            for sign in (1.0, -1.0):
                with self.subTest(problem=p.name, sign=sign):
                    A, _ = p.build(dtype, torch.sparse_csr)
                    R = self.start(p.m, 3, dtype)
                    Z, q = self.directions(A, None, sign, p.extreme(4, sign < 0), R)
                    self.assertGreater(q.degree, 1)
                    exact = self.exact_directions(A.to_dense(), None, sign, q, R)
                    self.assertEqual(Z, exact, atol=1e-10, rtol=1e-10)

    def test_products_in_single_precision(self):
        """They are right to its rounding, whatever the size of the matrix, of its measure and of each column."""
        p = self.problems.diagonal_mass(self.problems.indefinite(60), 50.0)
        A, B = p.build(layout=torch.sparse_csr)
        d = B.to_dense().diagonal()
        columns = torch.tensor([1e-200, 1.0, 1e200, 0.0], dtype=torch.float64)
        R = self.start(p.m, 4)
        for sign, size in itertools.product((1.0, -1.0), (1e-60, 1.0, 1e60)):
            E = p.extreme(4, sign < 0)
            B = (size * d).diag().to_sparse_csr()
            for M, D, e in ((A * size, size * d, E), (A.to(torch.complex128), d, E)):
                B = D.diag().to(M.dtype).to_sparse_csr()
                V = R.to(M.dtype)
                Z, q = self.directions(M, B, sign, e, V * columns, exact=False)
                exact = self.exact_directions(M.to_dense(), D, sign, q, V)
                error = torch.linalg.vector_norm(Z / columns - exact, dim=0)
                bound = 2e-5 * torch.linalg.vector_norm(exact, dim=0)
                self.assertTrue(bool((error < bound)[:3].all()), (sign, size, error))
                self.assertEqual(Z[:, 3], torch.zeros_like(Z[:, 3]))

    def test_single_precision(self):
        """The highest degree, at a spectrum whose wanted end is far from zero: rounding errors of a product stay what
        those of a recurrence are."""
        p = self.problems.path_graph(700)
        A = p.build()[0].to_dense() - 2.0 * torch.eye(700, dtype=torch.float64)
        E, R = p.extreme(4) - 2.0, self.start(700, 3)
        for B, d in ((None, None), (1.0 + torch.arange(700) % 7, 1)):
            D = None if d is None else B.double()
            M = None if d is None else D.diag().float().to_sparse_csr()
            S = A if d is None else A * (D[:, None] * D).sqrt()
            Z, q = self.directions(
                S.float().to_sparse_csr(), M, 1.0, E.float(), R.float()
            )
            self.assertEqual(q.degree, 60)
            exact = self.exact_directions(S, D, 1.0, q, R)
            error = torch.linalg.vector_norm(Z.double() - exact)
            self.assertLess(error, 2e-4 * torch.linalg.vector_norm(exact))

    def test_images_are_kept_or_computed(self):
        """The same pairs, whether products with the basis are carried along or not."""
        from unittest import mock

        from torch._lobpcg_impl import basis

        one, p = self.problems.laplacian(31, 28), self.problems
        for problem in (one, p.laplacian_mass(31, 28), p.diagonal_mass(one, 1e4)):
            for dtype, method in itertools.product(
                (torch.float32, torch.complex128), ("ortho", "basic")
            ):
                A, B = problem.build(dtype, torch.sparse_csr)
                found = []
                for columns in (0, 1000):
                    seen = []
                    with mock.patch.object(basis, "_IMAGES_UP_TO", columns):
                        E, _, messages = self.solve(
                            A,
                            B=B,
                            k=12,
                            largest=False,
                            method=method,
                            tracker=lambda w: seen.append(w.basis.images),
                        )
                    self.assertEqual(messages, [])
                    self.assertEqual(seen[-1], columns > 0)
                    found.append(E)
                exact = problem.extreme(12)
                size = 1e-5 if dtype == torch.float32 else 1e-9
                for E in found:
                    self.assertEqual(
                        E.double(), exact, atol=size * float(exact[-1]), rtol=0
                    )

    def test_diagonal_mass_is_the_measure(self):
        p = self.problems.diagonal_mass(self.problems.indefinite(60), 50.0)
        A, B = p.build(layout=torch.sparse_csr)
        d = B.to_dense().diagonal()
        R = self.start(p.m, 3)
        for sign in (1.0, -1.0):
            E = p.extreme(4, sign < 0)
            Z, q = self.directions(
                A, B.to_dense().diag().diag().to_sparse_csr(), sign, E, R
            )
            exact = self.exact_directions(A.to_dense(), d, sign, q, R)
            self.assertEqual(Z, exact, atol=1e-10, rtol=1e-10)

    def test_batch_is_its_members(self):
        A, _, spectrum = self.problems.batch(self.problems.laplacian(7, 5), (3,))
        E, R = spectrum[:, :4], self.start(35, 3, batch=(3,))
        Z, q = self.directions(A.to_sparse(), None, 1.0, E, R)
        for i in range(3):
            alone, own = self.directions(
                A[i].to_sparse(), None, 1.0, E[i], R[i], q.degree
            )
            self.assertEqual(own.degree, q.degree)
            self.assertEqual(Z[i], alone, atol=1e-10, rtol=1e-10)
        Z, _ = self.directions(A.to_sparse(), None, 1.0, E, R, q.degree, exact=False)
        for i in range(3):
            alone, _ = self.directions(
                A[i].to_sparse(), None, 1.0, E[i], R[i], q.degree
            )
            self.assertEqual(Z[i], alone, atol=1e-5, rtol=1e-5)

    def test_batch_of_starts(self):
        """More start blocks than matrices."""
        A, _, spectrum = self.problems.batch(self.problems.laplacian(23, 19), (3,))
        X = self.start(437, 5, batch=(2, 3))
        E, V, messages = self.solve(A.to_sparse(), X=X, k=4, largest=False)
        self.assertEqual(messages, [])
        self.assertEqual(V.shape, (2, 3, 437, 4))
        self.assertEqual(E, spectrum[:, :4].expand(2, 3, 4), atol=1e-9, rtol=0)

    def test_pairs_of_grids(self):
        p = self.problems.laplacian(23, 19)
        for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            for k, largest in itertools.product((1, 5, 24), (False, True)):
                with self.subTest(dtype=dtype, k=k, largest=largest):
                    self.run_problem(p, dtype, k, largest, torch.sparse_csr)

    def test_pairs_of_pencils(self):
        for p in (
            self.problems.laplacian_mass(31, 28),
            self.problems.diagonal_mass(self.problems.laplacian(31, 28), 1e4),
            self.problems.path_graph(300, normalized=True),
            self.problems.mikota(200),
            self.problems.rod(150),
        ):
            for k, largest in itertools.product((4, 20), (False, True)):
                with self.subTest(problem=p.name, k=k, largest=largest):
                    self.run_problem(p, torch.float64, k, largest, torch.sparse_csr)

    def test_every_copy_of_an_eigenvalue(self):
        one = self.problems.laplacian(19, 16)
        A, _ = one.build(layout=torch.sparse_coo)
        index = A.coalesce().indices()
        for copies, k in itertools.product((6, 12), (4, 7, 26)):
            many = torch.cat([index + i * one.m for i in range(copies)], 1)
            values = A.coalesce().values().repeat(copies)
            size = (copies * one.m,) * 2
            M = torch.sparse_coo_tensor(many, values, size).to_sparse_csr()
            E, _, messages = self.solve(M, k=k, largest=False)
            exact = one.spectrum.repeat_interleave(copies)[:k]
            self.assertEqual(messages, [])
            self.assertEqual(E, exact, atol=1e-9, rtol=0)

    def test_fewer_iterations(self):
        """The iteration count falls by the degree, and products do not double."""
        A, _ = self.problems.laplacian(60, 53).build(layout=torch.sparse_csr)
        for k in (4, 24):
            ask = {"k": k, "n": k + 4, "largest": False}
            E, steps, products = self.steps_and_products(A, **ask)
            plain, more, fewer = self.steps_and_products(A, iK=lambda R: R, **ask)
            self.assertEqual(E, plain, atol=1e-9, rtol=0)
            self.assertLess(5 * steps, more)
            self.assertLess(products, 2 * fewer)

    def test_graded_pencils(self):
        """diag(A) measures what B does not: condition 1e8 and more, without a preconditioner."""
        p = self.problems.diagonal_mass(self.problems.laplacian(31, 28), 1e8)
        A, B = p.build(layout=torch.sparse_csr)
        for M in (B, B.to_dense().to_sparse_csr()):
            E, steps, _ = self.steps_and_products(A, k=4, B=M, largest=False)
            self.assertEqual(E, p.extreme(4), atol=1e-8, rtol=1e-6)
            self.assertLess(steps, 60)
        # The same without B: most rows of a graded diagonal are far from the wanted end.
        d = torch.logspace(0, 4, 1000, dtype=torch.float64)
        off = torch.ones(999, dtype=torch.float64)
        A = ((d + 2).diag() - off.diag(1) - off.diag(-1)).to_sparse_csr()
        E, steps, _ = self.steps_and_products(A, k=3, largest=False)
        self.assertEqual(E, torch.linalg.eigvalsh(A.to_dense())[:3], atol=1e-7, rtol=0)
        self.assertLess(steps, 60)

    def test_bound_that_is_too_low(self):
        """An end of the spectrum that the bound misses costs iterations and nothing else."""
        from unittest import mock

        from torch._lobpcg_impl.chebyshev import Polynomial

        bounds = Polynomial._bounds
        p = self.problems.laplacian(23, 19)
        for share in (0.9, 0.5, 0.1):
            with mock.patch.object(
                Polynomial,
                "_bounds",
                lambda q, like: [(low, share * up) for low, up in bounds(q, like)],
            ):
                for dtype in (torch.float32, torch.float64):
                    self.run_problem(p, dtype, 4, False, torch.sparse_csr)

    def test_degenerate_spectra(self):
        """Nothing to tell apart, or nothing to tell it by."""
        for p in (
            self.problems.diagonal(torch.ones(60), "identity"),
            self.problems.diagonal(torch.zeros(60), "zero"),
            self.problems.star_graph(60),
            self.problems.complete_graph(60),
        ):
            for largest in (False, True):
                with self.subTest(problem=p.name, largest=largest):
                    self.run_problem(p, torch.float64, 3, largest, torch.sparse_csr)

    def test_off(self):
        """Where iK is given, degree is 0, the solve truncated or A a callable, an iteration costs one product."""
        A, _ = self.problems.laplacian(20, 17).build(layout=torch.sparse_csr)
        X = self.start(340, 5)
        for M, given in (
            (A.to_dense(), {}),
            (A, {"iK": lambda R: R}),
            (A, {"ortho_iparams": {"degree": 0}}),
            (A, {"ortho_iparams": {"degree": 1}}),
            (A, {"niter": 199}),
            (lambda V: A @ V, {}),
        ):
            seen = []
            self.solve(
                M,
                X=X,
                k=3,
                largest=False,
                tol=0.0,
                tracker=lambda w: seen.append((w.pencil.A.columns, w.n)),
                **given,
            )
            for (before, _), (after, n) in zip(seen[1:10], seen[2:11]):
                self.assertLessEqual(after - before, n)

    def test_guards(self):
        """Four guard columns for twenty pairs or more where each costs a polynomial, or iterations are few."""
        A, _ = self.problems.laplacian(20, 17).build(layout=torch.sparse_csr)
        for M, given, k, n in (
            (A, {}, 19, 38),
            (A, {}, 20, 24),
            (A, {"iK": lambda R: R}, 20, 40),
            (A.to_dense(), {}, 20, 40),
            (A.to_dense(), {"niter": 5}, 20, 24),
        ):
            seen = []
            self.solve(
                M, k=k, largest=False, tracker=lambda w: seen.append(w.n), **given
            )
            self.assertEqual(seen[0], n)


class TestLobpcgBatches(LobpcgTestCase):
    """A batch is solved as its members are, whatever is broadcast."""

    def test_batches(self):
        p = self.problems.indefinite(80, 10.0)
        for dtype, shape, method in itertools.product(
            (torch.float64, torch.complex128),
            ((1,), (5,), (2, 3)),
            ("ortho", "basic", None),
        ):
            A, B, exact = self.problems.batch(p, shape, dtype)
            for largest in (False, True):
                with self.subTest(
                    dtype=dtype, shape=shape, method=method, largest=largest
                ):
                    E, X, messages = self.solve(
                        A,
                        k=3,
                        B=B,
                        largest=largest,
                        method=method,
                        tol=1e-9,
                        niter=2000,
                    )
                    self.assertEqual(messages, [])
                    wanted = exact[..., -3:].flip(-1) if largest else exact[..., :3]
                    self.assert_pairs(
                        A, B, E, X, wanted, 1e-9, p.condition, 10 * p.error(dtype)
                    )

    def test_broadcast(self):
        p = self.problems.indefinite(80, 10.0)
        A, B, exact = self.problems.batch(p, (2, 3))
        wanted = exact[..., -3:].flip(-1)
        X, iK = self.start(80, 4), torch.eye(80, dtype=torch.float64)
        forms = {
            "nothing batched but A": (A, B, X, iK),
            "everything batched": (
                A,
                *(M.expand(2, 3, *M.shape).clone() for M in (B, X, iK)),
            ),
            "expanded views": (A, *(M.expand(2, 3, *M.shape) for M in (B, X, iK))),
            "one dimension of the two": (
                A,
                B.expand(3, 80, 80),
                X.expand(2, 1, 80, 4),
                iK.expand(1, 80, 80),
            ),
        }
        for (name, (A, B, X, iK)), method in itertools.product(
            forms.items(), ("ortho", "basic", None)
        ):
            with self.subTest(form=name, method=method):
                E, V, messages = self.solve(
                    A, k=3, B=B, X=X, iK=iK, method=method, tol=1e-9, niter=2000
                )
                self.assertEqual(messages, [])
                self.assert_pairs(
                    A, B, E, V, wanted, 1e-9, p.condition, 10 * p.error(torch.float64)
                )

    def test_batched_B_with_one_A(self):
        p = self.problems.indefinite(80, 10.0)
        A, B = p.build()
        E, X, messages = self.solve(
            A, k=3, B=torch.stack([B, 2 * B]), method="ortho", tol=1e-9
        )
        self.assertEqual(messages, [])
        wanted = torch.stack([p.extreme(3, True), p.extreme(3, True) / 2])
        self.assert_pairs(
            A.expand(2, 80, 80),
            torch.stack([B, 2 * B]),
            E,
            X,
            wanted,
            1e-9,
            p.condition,
            1e-10,
        )

    def test_members_of_very_different_difficulty(self):
        """Masks are per matrix: an exact, a zero, a hard and a huge member in one batch."""
        hard = self.problems.laplacian(60)
        A, _ = hard.build()
        one, values = torch.ones(60, dtype=torch.float64), hard.spectrum
        members = torch.stack(
            [torch.diag(one), torch.diag(0 * one), A, 1e100 * A, torch.diag(values)]
        )
        exact = torch.stack([one, 0 * one, values, 1e100 * values, values])
        for method, largest in itertools.product(("ortho", "basic"), (False, True)):
            E, X, messages = self.solve(
                members, k=3, largest=largest, method=method, tol=1e-10, niter=2000
            )
            self.assertEqual(messages, [])
            wanted = exact[:, -3:].flip(-1) if largest else exact[:, :3]
            for i in range(len(members)):
                self.assert_pairs(members[i], None, E[i], X[i], wanted[i], 1e-10)

    def test_empty_batch(self):
        for shape, method in itertools.product(
            ((0,), (2, 0)), ("ortho", "basic", None)
        ):
            A = torch.zeros(*shape, 30, 30, dtype=torch.float64)
            E, X, messages = self.solve(A, k=2, method=method)
            self.assertEqual(messages, [])
            self.assertEqual((E.shape, X.shape), ((*shape, 2), (*shape, 30, 2)))

    def test_sparse_batches(self):
        """COO with leading sparse dimensions and batched CSR: solved, or refused by name."""
        p = self.problems.laplacian(30)
        A, _, exact = self.problems.batch(p, (3,))
        for S in (A.to_sparse_coo(), A.to_sparse_csr()):
            try:
                E, X, _ = self.solve(S, k=2, method="ortho", tol=1e-9)
            except (ValueError, TypeError) as error:
                self.assertRegex(str(error), r"lobpcg: .*(batch|dimension)")
                continue
            self.assert_pairs(A, None, E, X, exact[..., -2:].flip(-1), 1e-9)

    def test_member_equals_single_solve(self):
        p = self.problems.get("indefinite80")
        A, _, _ = self.problems.batch(p, (4,))
        X = self.start(80, 3)
        E, V, _ = self.solve(A, X=X, method="ortho", tol=1e-10)
        for i in range(4):
            e, v, _ = self.solve(A[i], X=X, method="ortho", tol=1e-10)
            self.assertEqual(E[i], e, rtol=1e-9, atol=1e-9)
            self.assertEqual(
                (V[i] * v).sum(-2).abs(),
                torch.ones(3, dtype=v.dtype),
                atol=1e-8,
                rtol=0,
            )


class TestLobpcgWorker(LobpcgTestCase):
    """The tracker's contract, the public names of torch._lobpcg, TorchScript."""

    def test_tracker_sees_the_state(self):
        p = self.problems.indefinite(80, 10.0)
        A, B = p.build()
        seen = []

        def tracker(worker):
            k, n = worker.iparams["k"], worker.iparams["n"]
            self.assertEqual((worker.iparams["m"], k, n), (80, 3, 5))
            self.assertEqual(worker.iparams["niter"], 2000)
            self.assertEqual(worker.fparams["tol"], 1e-9)
            self.assertIs(worker.bparams["largest"], False)
            self.assertEqual(worker.A.to_dense(), A)
            self.assertEqual(worker.B.to_dense(), B)
            self.assertEqual(worker.X.shape[-2:], (80, n))
            self.assertEqual(worker.R.shape[-2], 80)
            self.assertGreaterEqual(worker.E.shape[-1], k)
            self.assertGreaterEqual(worker.tvars["rerr"].numel(), k)
            for name in ("iK", "S"):
                self.assertTrue(hasattr(worker, name))
            seen.append((worker.ivars["istep"], worker.ivars["converged_count"]))
            done = worker.ivars["converged_count"]
            if done:
                self.assertLessEqual(
                    worker.tvars["rerr"][:done].max(), worker.fparams["tol"]
                )
            if done >= k:
                residual = A @ worker.X[:, :k] - B @ worker.X[:, :k] * worker.E[:k]
                self.assertLessEqual(residual.abs().max(), 1e-6)

        for method in ("ortho", "basic"):
            seen.clear()
            E, X, messages = self.solve(
                A,
                k=3,
                B=B,
                n=5,
                niter=2000,
                tol=1e-9,
                largest=False,
                method=method,
                tracker=tracker,
            )
            self.assertEqual(messages, [])
            self.assert_pairs(
                A, B, E, X, p.extreme(3), 1e-9, p.condition, p.error(torch.float64)
            )
            steps = [step for step, _ in seen]
            self.assertEqual(steps, list(range(steps[0], steps[0] + len(steps))))
            self.assertLessEqual(steps[0], 1)
            self.assertGreaterEqual(seen[-1][1], 3)
            self.assertLess(seen[0][1], 3)

    def test_tracker_runs_per_matrix(self):
        A, _, exact = self.problems.batch(self.problems.indefinite(40), (2, 2))
        shapes, starts = set(), []

        def tracker(worker):
            shapes.add(tuple(worker.A.shape))
            starts.append(worker.ivars["istep"])

        E, X, _ = self.solve(A, k=2, method="ortho", tol=1e-9, tracker=tracker)
        self.assertEqual(shapes, {(40, 40)})
        self.assertEqual(starts.count(starts[0]), 4)
        self.assert_pairs(A, None, E, X, exact[..., -2:].flip(-1), 1e-9)

    def test_force_stop(self):
        A, _ = self.problems.laplacian(100).build()
        for method in ("ortho", "basic"):
            calls = []

            def tracker(worker):
                calls.append(worker.ivars["istep"])
                if worker.ivars["istep"] == 3:
                    worker.bvars["force_stop"] = True

            _E, X, _ = self.solve(
                A, k=2, largest=False, method=method, tracker=tracker, tol=1e-12
            )
            self.assertEqual(calls[-1], 3)
            self.assertEqual(
                (X.mH @ X), torch.eye(2, dtype=X.dtype), atol=1e-10, rtol=0
            )

    def test_tracker_does_not_change_the_result(self):
        A, B = self.problems.get("rod100").build()
        for method in ("ortho", "basic"):
            plain = torch.lobpcg(A, k=3, B=B, n=5, method=method)
            tracked = torch.lobpcg(
                A, k=3, B=B, n=5, method=method, tracker=lambda worker: None
            )
            self.assertEqual(plain[0], tracked[0], rtol=1e-6, atol=0)

    def test_tracker_that_raises(self):
        from torch._lobpcg import LOBPCG

        A, _ = self.problems.laplacian(50).build()
        before = dict(vars(LOBPCG))

        def tracker(worker):
            raise RuntimeError("planted")

        with self.assertRaisesRegex(RuntimeError, "planted"):
            torch.lobpcg(A, k=2, method="ortho", tracker=tracker)
        self.assertEqual(dict(vars(LOBPCG)), before)
        self.assertEqual(self.solve(A, k=2, method="ortho")[2], [])

    def test_nested_call_in_a_tracker(self):
        p = self.problems.laplacian(50)
        A, _ = p.build()
        inner = []

        def tracker(worker):
            if not inner:
                inner.append(
                    torch.lobpcg(A, k=1, largest=False, method="basic", tol=1e-9)[0]
                )

        E, X, _ = self.solve(A, k=2, method="ortho", tracker=tracker, tol=1e-9)
        self.assert_pairs(
            A, None, E, X, p.extreme(2, True), 1e-9, 1.0, p.error(torch.float64)
        )
        self.assertEqual(inner[0], p.extreme(1), atol=1e-7, rtol=0)

    def test_threads(self):
        """Eight threads, each with a tracker: every call reaches its own tracker, every result is right."""
        from concurrent.futures import ThreadPoolExecutor

        def work(i):
            p = self.problems.laplacian(40 + i)
            A, _ = p.build()
            orders = []
            E, _ = torch.lobpcg(
                A,
                k=2,
                method="ortho",
                tol=1e-9,
                tracker=lambda w: orders.append(w.A.size(-1)),
            )
            expected = []
            torch.lobpcg(
                A,
                k=2,
                method="ortho",
                tol=1e-9,
                tracker=lambda w: expected.append(w.A.size(-1)),
            )
            return (
                E - p.extreme(2, True)
            ).abs().max().item(), orders == expected and set(orders) == {40 + i}

        with ThreadPoolExecutor(8) as pool:
            for error, own in pool.map(work, range(16)):
                self.assertLess(error, 1e-7)
                self.assertTrue(own)

    def test_public_names(self):
        import inspect

        import torch._lobpcg as module

        self.assertIs(torch.lobpcg, module.lobpcg)
        self.assertEqual(torch.lobpcg.__module__, "torch._lobpcg")
        self.assertTrue(inspect.isclass(module.LOBPCG))
        self.assertTrue(
            issubclass(module.LOBPCGAutogradFunction, torch.autograd.Function)
        )
        parameters = inspect.signature(torch.lobpcg).parameters
        names = "A k B X n iK niter tol largest method tracker ortho_iparams ortho_fparams ortho_bparams"
        self.assertEqual(list(parameters), names.split())
        self.assertTrue(
            all(p.default is None for name, p in parameters.items() if name != "A")
        )

    def test_torch_function_is_asked_before_anything_is_looked_at(self):
        class Opaque:
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return function, args, kwargs

        for position in ("A", "B", "X", "iK"):
            arguments = {"A": torch.zeros(2, 3, dtype=torch.int64), position: Opaque()}
            function, _, _ = torch.lobpcg(**arguments)
            self.assertIs(function, torch.lobpcg)

    def test_subclass_input(self):
        class Plain(torch.Tensor):
            pass

        A, _ = self.problems.laplacian(30).build()
        E, _ = torch.lobpcg(A.as_subclass(Plain), k=2, method="ortho")
        self.assertEqual(
            E.as_subclass(torch.Tensor), torch.lobpcg(A, k=2, method="ortho")[0]
        )

    def test_torchscript_equals_eager(self):
        scripted = torch.jit.script(torch.lobpcg)
        for name, dtype in itertools.product(
            ("laplacian_mass11x8", "path60_ncut"), (torch.float64, torch.complex128)
        ):
            p = self.problems.get(name)
            for layout, method in itertools.product(
                (torch.strided, torch.sparse_coo), (None, "ortho", "basic")
            ):
                A, B = p.build(dtype, layout)
                for _ in range(
                    3
                ):  # the profiling executor specialises after the first runs
                    arguments = dict(
                        A=A,
                        k=3,
                        B=B,
                        X=self.start(p.m, 4, dtype),
                        tol=1e-10,
                        method=method,
                    )
                    E, X, _ = self.solve(**arguments, solver=scripted)
                    expected = self.solve(**arguments)
                    # Not to the bit: TorchScript's optimiser may fuse a product with a sum.
                    self.assertEqual(
                        E,
                        expected[0],
                        rtol=1e-12,
                        atol=0,
                        msg=str((name, layout, method)),
                    )
                    phase = torch.sgn((X.conj() * expected[1]).sum(-2))
                    self.assertEqual(
                        X * phase,
                        expected[1],
                        rtol=0,
                        atol=1e-6,
                        msg=str((name, layout, method)),
                    )

    @staticmethod
    def spectral_gap(A: torch.Tensor):
        E, _X = torch.lobpcg(A, k=2, largest=False, method="ortho")
        return E[1] - E[0]

    def test_torchscript_inside_a_scripted_function(self):
        """Scripted, and stored and loaded: value and gradient x_1 x_1^T - x_0 x_0^T."""
        p = self.problems.laplacian(40)
        A, _ = p.build()
        exact = p.extreme(2)
        _, X = torch.linalg.eigh(A)
        x, y = X[:, 0], X[:, 1]
        scripted, stored = torch.jit.script(self.spectral_gap), io.BytesIO()
        torch.jit.save(scripted, stored)
        stored.seek(0)
        for function in (scripted, torch.jit.load(stored)):
            leaf = A.clone().requires_grad_()
            gap = function(leaf)
            self.assertEqual(gap, exact[1] - exact[0], atol=1e-7, rtol=0)
            (gA,) = torch.autograd.grad(gap, leaf)
            self.assertEqual(
                gA, torch.outer(y, y) - torch.outer(x, x), atol=1e-5, rtol=0
            )

    @parametrize("name", ["A", "B", "iK", "tracker"])
    def test_torchscript_takes_no_callables(self, name):
        """TorchScript itself compares types, before anything of lobpcg runs: the error says what it got for what."""
        A, _ = self.problems.laplacian(40).build()
        X = self.start(40, 2, A.dtype)
        arguments = {"A": A, "X": X, name: lambda V: V}
        with self.assertRaisesRegex(
            RuntimeError, f"for argument '{name}' but instead found type 'function'"
        ):
            torch.jit.script(torch.lobpcg)(**arguments)

    def test_torchscript_has_gradients(self):
        p = self.problems.laplacian(40)
        A, _ = p.build()
        A.requires_grad_()
        E, X = torch.jit.script(torch.lobpcg)(A, k=2)
        self.assertEqual(E, p.extreme(2, True), atol=1e-7, rtol=0)
        (gA,) = torch.autograd.grad(
            (E * torch.tensor([1.0, 3.0], dtype=A.dtype)).sum(), A
        )
        x, y = X.detach().unbind(-1)
        self.assertEqual(
            gA, torch.outer(x, x) + 3 * torch.outer(y, y), atol=1e-12, rtol=0
        )


instantiate_parametrized_tests(TestLobpcgWorker)


class TestLobpcgBadInput(LobpcgTestCase):
    """Each mistake is a ValueError or a TypeError that says what was found."""

    def refused(self, fact, *args, **kwargs):
        with self.subTest(fact=fact, given=sorted(kwargs)):
            with self.assertRaisesRegex(
                (ValueError, TypeError), rf"(?s)lobpcg: .*({fact})"
            ):
                torch.lobpcg(*args, **kwargs)

    def setUp(self):
        super().setUp()
        p = self.problems.indefinite(30, 10.0)
        self.A, self.B = p.build()
        self.X = self.start(30, 3)

    def test_not_a_matrix(self):
        self.refused("matri", torch.zeros(30, dtype=torch.float64))
        self.refused("matri", torch.zeros((), dtype=torch.float64))
        self.refused(r"square|30.*20", self.A[:, :20])
        self.refused(r"square|2.*30.*20", torch.zeros(2, 30, 20, dtype=torch.float64))
        self.refused("[Tt]ensor|callable", self.A.tolist())
        self.refused("[Tt]ensor|callable", None)

    def test_unsupported_dtypes(self):
        for dtype in (
            torch.int64,
            torch.int32,
            torch.uint8,
            torch.bool,
            torch.float16,
            torch.bfloat16,
        ):
            self.refused(str(dtype), torch.eye(30).to(dtype))
            self.refused(str(dtype), torch.eye(30).to(dtype), k=2, method="ortho")

    def test_not_finite(self):
        for value, batched in itertools.product(
            (math.nan, math.inf, -math.inf), (False, True)
        ):
            poisoned = {}
            for name in ("A", "B", "X", "iK"):
                M = {
                    "A": self.A,
                    "B": self.B,
                    "X": self.X,
                    "iK": torch.eye(30).double(),
                }[name].clone()
                M[2, 2] = value
                poisoned[name] = (
                    torch.stack([torch.zeros_like(M), M])[1:] if batched else M
                )
            fact = "NaN|nan|inf|finite"
            self.refused(rf"\bA\b.*({fact})", poisoned["A"], k=2)
            self.refused(rf"\bB\b.*({fact})", self.A, k=2, B=poisoned["B"])
            self.refused(rf"\bX\b.*({fact})", self.A, k=2, X=poisoned["X"])
            self.refused(
                rf"\biK\b.*({fact})", self.A, k=2, iK=poisoned["iK"], method="ortho"
            )
            for layout in ("coo", "csr"):
                S = poisoned["A"][0] if batched else poisoned["A"]
                self.refused(
                    rf"\bA\b.*({fact})", getattr(S, f"to_sparse_{layout}")(), k=2
                )

    def test_B_does_not_fit(self):
        self.refused(r"\bB\b.*(shape|29)", self.A, B=self.B[:29, :29])
        self.refused(r"\bB\b.*(shape|29)", self.A, B=self.B[:29])
        self.refused(r"\bB\b", self.A, B=self.B[0])
        self.refused(r"\bB\b.*(dtype|float32)", self.A, B=self.B.float())
        self.refused(r"\bB\b.*(device|meta)", self.A, B=self.B.to("meta"))
        self.refused(r"\bB\b", torch.stack([self.A] * 3), B=torch.stack([self.B] * 2))

    def test_B_not_positive_definite(self):
        indefinite = torch.diag(torch.linspace(-1, 1, 30).double())
        singular = torch.diag(torch.linspace(0, 1, 30).double())
        zero = torch.zeros(30, 30, dtype=torch.float64)
        for B, method in itertools.product(
            (indefinite, -self.B, zero), (None, "ortho", "basic")
        ):
            self.refused(r"\bB\b.*positive definite", self.A, k=3, B=B, method=method)
            self.refused(
                r"\bB\b.*positive definite",
                self.A,
                k=3,
                B=B.to_sparse_csr(),
                method=method,
            )
        self.refused(r"\bB\b.*positive definite", self.A, k=3, B=singular)

    def test_wrong_k_and_n(self):
        for k in (0, -1):
            self.refused(rf"\bk\b.*{k}", self.A, k=k)
        self.refused(r"\b[kn]\b.*31", self.A, k=31)
        self.refused(r"\bk\b.*5.*\b[nX]\b|\b[nX]\b.*\bk\b", self.A, k=5, n=3)
        self.refused(r"\bk\b|\bX\b", self.A, k=5, X=self.X)
        self.refused(r"\bn\b", self.A, k=1, n=0)
        self.refused(r"\bn\b", self.A, k=1, n=31)
        self.refused(r"\bk\b", self.A, k=2.5)

    def test_too_small_for_an_explicit_method(self):
        for method in ("ortho", "basic"):
            self.refused(r"m >= 3.*m=30.*11|m=30", self.A, k=11, method=method)
            self.refused(r"m=30", self.A, k=1, n=11, method=method)
        self.assertEqual(torch.lobpcg(self.A, k=10, method="ortho")[0].shape, (10,))

    def test_X_does_not_fit(self):
        self.refused(r"\bX\b.*(shape|29)", self.A, X=self.X[:29])
        self.refused(r"\bX\b", self.A, X=self.X[:, 0])
        self.refused(r"\bX\b.*(dtype|float32)", self.A, X=self.X.float())
        self.refused(r"\bX\b.*(dtype|complex)", self.A, X=self.X.to(torch.complex128))
        self.refused(r"\bX\b.*(device|meta)", self.A, X=self.X.to("meta"))
        self.refused(r"\b[Xk]\b", self.A, X=self.X[:, :0])

    def test_iK_does_not_fit(self):
        iK = torch.eye(30, dtype=torch.float64)
        self.refused(r"\biK\b.*(shape|29)", self.A, iK=iK[:29, :29])
        self.refused(r"\biK\b.*(dtype|float32)", self.A, iK=iK.float())
        self.refused(r"\biK\b.*(shape|29)", self.A, iK=iK[:29, :29], method="ortho")

    def test_unknown_method(self):
        for method in ("orto", "", "ORTHO"):
            self.refused(
                rf"{method!r}.*ortho|ortho.*{method!r}|method", self.A, method=method
            )

    def test_wrong_numbers(self):
        self.refused(r"niter.*-2", self.A, niter=-2)
        self.refused("tol", self.A, tol=-1.0)
        self.refused("tol", self.A, tol=math.nan)

    def test_sparse_must_be_symmetric(self):
        """Says by how much it is not; a relative difference at rounding level is accepted."""
        M = self.A.clone()
        M[0, 1] += 1.0
        for layout in ("coo", "csr", "csc", "bsr", "bsc"):
            blocks = ((2, 2),) if layout.startswith("bs") else ()
            S = getattr(M, f"to_sparse_{layout}")(*blocks)
            self.refused(r"\bA\b.*(symmetric|Hermitian)", S, k=2)
            self.refused(r"\bB\b.*(symmetric|Hermitian)", self.A, k=2, B=S)
        rounding = self.A * (
            1 + torch.finfo(torch.float64).eps * torch.ones(30, 30).double().triu(1)
        )
        torch.lobpcg(rounding.to_sparse_csr(), k=2, method="ortho")
        C = self.problems.get("ring45_flux1").build(torch.complex128)[0]
        self.refused(
            "Hermitian|symmetric", (C + torch.triu(C, 1).conj()).to_sparse_csr(), k=2
        )

    def test_nothing_runs_before_the_checks(self):
        apply, columns = self.counting(self.A)
        for wrong in (
            {"niter": -2},
            {"method": "orto"},
            {"k": 4},
            {"B": self.B.float()},
            {"tol": -1.0},
        ):
            with self.assertRaises((ValueError, TypeError)):
                torch.lobpcg(apply, X=self.X, **wrong)
        self.assertEqual(columns, [])


class TestLobpcgRandomized(LobpcgTestCase):
    """Random shapes, spectra, gaps, conditioning: the wanted pairs, or one warning, or an error that names m and n."""

    def test_random_pencils(self):
        try:
            from hypothesis import given, HealthCheck, settings, strategies as st
        except ImportError:
            self.skipTest("hypothesis is not installed")
        import os

        examples = int(
            os.environ.get("LOBPCG_TEST_EXAMPLES", "2000" if self.full else "60")
        )

        @st.composite
        def pencils(draw):
            m = draw(st.integers(1, 60))
            values = draw(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
            spectrum = torch.tensor(
                [float(values[i % len(values)]) for i in range(m)], dtype=torch.float64
            )
            spectrum += (
                draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-2, 1.0]))
                * torch.arange(m).double()
            )
            spectrum *= 10.0 ** draw(st.sampled_from([-20, 0, 0, 0, 20]))
            condition = 10.0 ** draw(st.integers(0, 4))
            return self.problems.prescribed(
                f"random{m}", spectrum, condition, draw(st.booleans())
            )

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            pencils(),
            st.integers(1, 6),
            st.integers(0, 3),
            st.booleans(),
            st.sampled_from([None, "ortho", "basic"]),
            st.sampled_from([torch.float64, torch.float32]),
            st.booleans(),
        )
        def check(p, k, extra, largest, method, real, with_start):
            dtype = (
                torch.zeros((), dtype=real).to(torch.complex64).dtype
                if p.is_complex
                else real
            )
            dtype = (
                torch.complex128 if p.is_complex and real == torch.float64 else dtype
            )
            k = min(k, p.m)
            n = min(k + extra, p.m)
            if not p.supports(dtype):
                return
            A, B = p.build(dtype)
            X = self.start(p.m, n, dtype) if with_start else None
            tol = self.default_tol(dtype) * max(1.0, p.condition**0.5)
            try:
                E, V, messages = self.solve(
                    A,
                    k=k,
                    B=B,
                    X=X,
                    n=n,
                    largest=largest,
                    method=method,
                    tol=tol,
                    niter=1000 if method else None,
                )
            except ValueError as error:
                self.assertTrue(method is not None and p.m < 3 * n, str(error))
                self.assertRegex(str(error), f"m={p.m}")
                return
            self.assertLessEqual(len(messages), 1)
            if not messages:
                self.assert_pairs(
                    A, B, E, V, p.extreme(k, largest), tol, p.condition, p.error(dtype)
                )

        check()


instantiate_device_type_tests(TestLobpcgForward, globals())

if __name__ == "__main__":
    run_tests()
