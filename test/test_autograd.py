# Owner(s): ["module: autograd"]

import textwrap

import torch
from torch.autograd import Function
from torch.testing._internal.common_utils import (
    TestCase,
    gradcheck,
    gradgradcheck,
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
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
            ctx.set_materialize_grads(False)  # as gradcheck cannot compare the sparse zeros that would follow
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
        return lambda X: self.Planted.apply(X, getattr(self, first), getattr(self, second))

    def matrix(self, *batch, m=3, dtype=torch.float64):
        """A positive definite (*batch, m, m) with simple eigenvalues, symmetric to the bit."""
        M = torch.randn(*batch, m, m, dtype=dtype, generator=torch.Generator().manual_seed(m))
        A = M @ M.mH + torch.diag(torch.arange(1.0, m + 1)).to(dtype)
        return ((A + A.mH) / 2).requires_grad_()

    def sparse_matrix(self, layout, dtype=torch.float64):
        """A 4 x 4 matrix whose stored entries, by 2 x 2 blocks or one by one, are a symmetric proper subset."""
        A = self.matrix(m=4, dtype=dtype).detach()
        block = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
        A[:2, 2:] = A[2:, :2] = 0
        if not block:
            A[0, 3], A[3, 0] = 1 + A[0, 1], (1 + A[0, 1]).conj()
        return A.to_sparse(layout=layout, **block).requires_grad_()

    # What is accepted

    functions = {
        "eigh": lambda A: TestSymmetricGradcheck.projector(torch.linalg.eigh(A)[1][..., :2]),
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
        batched_forward = name != "planted"  # a Function's jvp has no rule for the vmap used there
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
                func, A, symmetric=True, fast_mode=fast_mode, check_fwd_over_rev=True, check_batched_grad=True
            )
        )

    @modes
    @batches
    def test_symmetric_gradient_passes(self, batch, fast_mode):
        for name in ("eigh", "eigvalsh", "cholesky", "logdet", "planted"):
            A = self.matrix(*batch)
            options = {"symmetric": True, "check_symmetric_grad": True, "fast_mode": fast_mode}
            self.assertTrue(torch.autograd.gradcheck(self.function(name), A, **options))
            self.assertTrue(torch.autograd.gradgradcheck(self.function(name), A, **options))

    # What is rejected

    @modes
    @batches
    @dtypes
    @parametrize("mode", ["backward", "forward"])
    def test_off_diagonal_doubled_fails(self, mode, dtype, batch, fast_mode):
        options = {"check_forward_ad": mode == "forward", "check_backward_ad": mode == "backward"}
        options.update(check_undefined_grad=False, fast_mode=fast_mode, symmetric=True)
        func = self.planted("off_diagonal_doubled")
        with self.assertRaisesRegex(RuntimeError, "Jacobian .*mismatch"):
            torch.autograd.gradcheck(func, self.matrix(*batch, dtype=dtype), **options)

    @modes
    @batches
    @dtypes
    @parametrize("rule", ["lower_triangle", "with_skew_part"])
    def test_gradient_with_skew_part_fails_on_demand(self, rule, dtype, batch, fast_mode):
        A, func = self.matrix(*batch, dtype=dtype), self.planted(rule)
        check = torch.autograd.gradcheck
        self.assertTrue(check(func, A, symmetric=True, fast_mode=fast_mode, check_forward_ad=True))
        self.assertFalse(
            check(func, A, symmetric=True, check_symmetric_grad=True, fast_mode=fast_mode, raise_exception=False)
        )
        with self.assertRaisesRegex(RuntimeError, "gradient of output 0 with respect to input 0 .* skew part"):
            check(func, A, symmetric=True, check_symmetric_grad=True, fast_mode=fast_mode)

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
            with self.assertRaisesRegex(RuntimeError, "of the first gradient with respect to input 0 .* skew part"):
                check(func, A, check_symmetric_grad=True, **options)
            # With cotangents of the user's own, those are what counts.
            for weight in (0.0, 1.0):
                gf = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
                passed = check(func, A, gf, check_symmetric_grad=True, raise_exception=False, **options)
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
                    func, A, symmetric=True, check_symmetric_grad=True, rtol=1e-6, fast_mode=fast_mode
                )

    # Which perturbations func sees

    @modes
    @dtypes
    def test_func_sees_symmetric_matrices_only(self, dtype, fast_mode):
        seen = []

        def func(A, C):
            given = (A, torch.autograd.forward_ad.unpack_dual(A)[1])  # A and its tangent, if it has one
            hidden = torch._C._functorch.is_legacy_batchedtensor  # the values are out of reach under vmap
            seen.extend(X.detach() for X in given if X is not None and not hidden(X))
            return (A @ C @ A).sum(-1)

        C = torch.ones(3, 3, dtype=dtype, requires_grad=True)
        torch.autograd.gradcheck(
            func, (self.matrix(dtype=dtype), C), symmetric=(True, False), fast_mode=fast_mode, check_forward_ad=True,
            check_batched_grad=True, check_batched_forward_grad=True,
        )
        self.assertGreater(len({tuple(X.flatten().tolist()) for X in seen}), 3)
        for X in seen:
            self.assertEqual(X, X.mH, rtol=0, atol=0)

    def test_unmarked_input_is_perturbed_entry_by_entry(self):
        A, B = self.matrix(), self.matrix()
        func = self.planted("lower_triangle")
        for symmetric, passes in (((True, True), True), ((True, False), False), ((False, True), False)):
            self.assertEqual(
                torch.autograd.gradcheck(
                    lambda A, B: func(A) * func(B), (A, B), symmetric=symmetric, raise_exception=False
                ),
                passes,
            )

    def test_flags(self):
        A, b = self.matrix(), torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        self.assertTrue(torch.autograd.gradcheck(torch.linalg.solve, [A, b], symmetric=[True, False]))
        # A flag on a constant has no effect, whatever its shape; True leaves alone what is not a differentiable tensor.
        self.assertTrue(torch.autograd.gradcheck(torch.linalg.solve, (A, b.detach()), symmetric=(True, True)))
        self.assertTrue(torch.autograd.gradcheck(torch.linalg.matrix_power, (A, 3), symmetric=True))
        self.assertTrue(torch.autograd.gradgradcheck(torch.linalg.solve, (A, b), symmetric=(True, False)))

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
            torch.autograd.gradcheck(lambda A, B: Undefined.apply(A), (A, B), symmetric=True, check_symmetric_grad=True)
        )

    # Sparse matrices

    @modes
    @dtypes
    @parametrize("masked", [False, True])
    @parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"])
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
                func(rule), A, symmetric=True, masked=masked, fast_mode=fast_mode, raise_exception=False, **options
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
            self.assertEqual(torch.autograd.gradcheck(lambda X, f=func: f(X.to_dense()), A, **options), passes)

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
            self.message(TypeError, torch.linalg.matrix_power, (A, 3), symmetric=(True, True)),
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
            self.message(ValueError, torch.linalg.pinv, A[:, :2], torch.autograd.gradgradcheck, symmetric=True),
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
            M = torch.randn(m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
            A = (M @ torch.linalg.inv(M @ M.mT + torch.eye(m)) @ M.mT).requires_grad_()
            self.assertTrue(torch.autograd.gradcheck(torch.trace, A, symmetric=True, fast_mode=True))

    def test_empty(self):
        for shape in ((0, 3, 3), (2, 0, 0)):
            A = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            self.assertTrue(
                torch.autograd.gradcheck(lambda X: X.sum((-2, -1)), A, symmetric=True, check_symmetric_grad=True)
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
        one_sided = torch.sparse_coo_tensor([[0, 1, 0], [0, 1, 1]], [1.0, 1.0, 0.0], (2, 2), dtype=torch.float64)
        self.assertExpectedInline(
            self.message(ValueError, torch.Tensor.to_dense, one_sided.requires_grad_(), symmetric=True),
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
        for options in ({}, {"fast_mode": True}, {"check_forward_ad": True, "check_backward_ad": False}):
            self.assertExpectedInline(
                self.message(ValueError, changes, (A, A.detach().clone().requires_grad_()), symmetric=True, **options),
                """\
gradcheck: expected func to leave its inputs unchanged, but it changed input 1 in place; clone it in
func""",
            )
        self.assertIn(
            "gradgradcheck: expected func to leave",
            self.message(ValueError, changes, (A, A), torch.autograd.gradgradcheck, symmetric=True),
        )
        for layout in (torch.sparse_coo, torch.sparse_csr):
            S = self.sparse_matrix(layout)
            message = self.message(ValueError, lambda X: X.mul_(2).to_dense(), S, symmetric=True)
            self.assertIn("changed input 0 in place", message)

    def test_modes_that_give_no_gradient(self):
        A = self.matrix()
        self.assertExpectedInline(
            self.message(
                ValueError, torch.logdet, A, symmetric=True, check_symmetric_grad=True, check_forward_ad=True,
                check_backward_ad=False,
            ),
            """\
gradcheck: check_symmetric_grad looks at what backward returns, which check_backward_ad=False leaves
out; set check_backward_ad=True""",
        )
        self.assertExpectedInline(
            self.message(
                ValueError, torch.logdet, A, torch.autograd.gradgradcheck, symmetric=True, check_symmetric_grad=True,
                check_fwd_over_rev=True, check_rev_over_rev=False,
            ),
            """\
gradgradcheck: check_symmetric_grad looks at what double backward returns, which
check_rev_over_rev=False leaves out; set check_rev_over_rev=True""",
        )

    def test_message_of_a_skew_gradient(self):
        A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64, requires_grad=True)
        with self.assertRaises(RuntimeError) as caught:
            torch.autograd.gradcheck(self.planted("lower_triangle"), A, symmetric=True, check_symmetric_grad=True)
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
        with mock.patch("torch.testing._internal.common_utils.TEST_WITH_SLOW_GRADCHECK", slow):
            self.assertTrue(gradcheck(torch.linalg.eigvalsh, (A,), symmetric=True, check_symmetric_grad=True))
            self.assertTrue(gradgradcheck(torch.linalg.eigvalsh, (A,), symmetric=(True,), check_symmetric_grad=True))
            for wrapper, func in (
                (gradcheck, self.planted("off_diagonal_doubled")),
                (gradgradcheck, self.planted(second="off_diagonal_doubled")),
            ):
                with self.assertRaisesRegex(RuntimeError, "Jacobian mismatch") as caught:
                    wrapper(func, A, symmetric=True)
                self.assertEqual("in fast mode" in str(caught.exception), not slow)

    def test_without_marks_nothing_changes(self):
        X = self.matrix().detach().tril().requires_grad_()  # not symmetric
        messages = []
        for options in ({}, {"symmetric": False}, {"symmetric": (False,)}, {"check_symmetric_grad": False}):
            with self.assertRaises(RuntimeError) as caught:
                torch.autograd.gradcheck(self.planted("off_diagonal_doubled"), X, **options)
            messages.append(str(caught.exception))
            self.assertTrue(torch.autograd.gradcheck(self.planted(), X, **options))
            self.assertTrue(torch.autograd.gradgradcheck(self.planted(), X, **options))
        self.assertEqual(messages[1:], messages[:1] * 3)
        with self.assertRaisesRegex(ValueError, "at least one input tensor to require gradient"):
            torch.autograd.gradcheck(torch.logdet, X.detach(), symmetric=True)

    def test_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        torch.autograd.gradcheck(
            torch.logdet, self.matrix(), symmetric=True, check_symmetric_grad=True, fast_mode=True
        )
        self.assertEqual(torch.get_rng_state(), before)


instantiate_parametrized_tests(TestSymmetricGradcheck)

if __name__ == "__main__":
    run_tests()
