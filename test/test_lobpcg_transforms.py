# Owner(s): ["module: autograd"]
"""torch.lobpcg under torch.func, hooks, autocast, checkpoints, threads; transform by layout, a test for each cell."""

import functools
import itertools
import warnings
import weakref

import torch
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)
from torch.testing._internal.lobpcg_oracles import LobpcgGradientCase


class TestLobpcgGradientTransforms(LobpcgGradientCase):
    """torch.func, vectorised autograd, compilers, and everything that surrounds a backward."""

    options = dict(k=3, largest=False, tol=1e-12, niter=1000)

    def setUp(self):
        super().setUp()
        self.A, self.B = self.problems.indefinite(24, 10.0).build()
        self.exact = self.spectral_gradient(self.A, self.B, 3, False, self.loss_of_both)

    def scalar(self, A, B=None):
        return self.loss_of_both(*torch.lobpcg(A, B=B, **self.options))

    def dense_scalar(self, A, B=None):
        return self.loss_of_both(*self.reference(A, B, 3, False))

    def test_grad_and_vjp(self):
        for argnums in (0, 1, (0, 1)):
            found = torch.func.grad(self.scalar, argnums)(self.A, self.B)
            found = found if isinstance(argnums, tuple) else (found,)
            wanted = [
                self.exact[i]
                for i in (argnums if isinstance(argnums, tuple) else (argnums,))
            ]
            for f, e in zip(found, wanted):
                self.assert_close(f, e, 1e-8)
        _, pull = torch.func.vjp(self.scalar, self.A, self.B)
        for f, e in zip(pull(torch.ones((), dtype=torch.float64)), self.exact):
            self.assert_close(f, e, 1e-8)

    def test_jvp(self):
        tangents = self.weights(24, seed=5), 0.01 * self.weights(24, seed=6)
        value, tangent = torch.func.jvp(self.scalar, (self.A, self.B), tangents)
        self.assertEqual(value, self.dense_scalar(self.A, self.B), rtol=1e-9, atol=1e-9)
        self.assertEqual(
            tangent,
            sum((g * t).sum() for g, t in zip(self.exact, tangents)),
            rtol=1e-8,
            atol=1e-8,
        )

    def test_jacrev_and_jacfwd(self):
        def energies(A, B):
            E, X = torch.lobpcg(A, B=B, **self.options)
            return torch.cat([E, (X**2)[0]])

        def dense(A, B):
            E, X = self.reference(A, B, 3, False)
            return torch.cat([E, (X**2)[0]])

        expected = torch.autograd.functional.jacobian(dense, (self.A, self.B))
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            for f, e in zip(transform(energies, (0, 1))(self.A, self.B), expected):
                self.assert_close(f, e, 1e-8, transform.__name__)

    def test_hessians(self):
        A, _ = self.problems.indefinite(6).build()

        def f(solve):
            return lambda A: self.loss_of_both(*solve((A + A.mT) / 2))

        expected = torch.autograd.functional.hessian(
            f(lambda M: self.reference(M, None, 2, True)), A
        )
        of = f(lambda M: torch.lobpcg(M, k=2, tol=1e-13))
        for transform in (
            torch.func.hessian(of),
            torch.func.jacrev(torch.func.jacrev(of)),
            torch.func.jacrev(torch.func.jacfwd(of)),
        ):
            self.assert_close(transform(A), expected, 1e-6)
        # PyTorch drops the outer of two forward-mode tangents of an autograd.Function: refused, not zero.
        with self.assertRaisesRegex(NotImplementedError, r"lobpcg: .*jacfwd\(jacrev"):
            torch.func.jacfwd(torch.func.jacfwd(of))(A)

    def test_vmap(self):
        """Over A, over B, over both, with the batch dimension anywhere, nested; equal to the loop."""
        A = torch.stack([self.A, 2 * self.A, self.A + self.B])
        B = torch.stack([self.B, 3 * self.B, self.B])

        def f(A, B):
            E, X = torch.lobpcg(A, B=B, **self.options)
            return E, X * X

        for in_dims in ((0, None), (None, 0), (0, 0), (2, 0), (-1, 1)):
            a, b = (M if d is not None else M[0] for M, d in zip((A, B), in_dims))
            a = a if in_dims[0] in (0, None) else a.movedim(0, in_dims[0])
            b = b if in_dims[1] in (0, None) else b.movedim(0, in_dims[1])
            E, X = torch.func.vmap(f, in_dims=in_dims)(a, b)
            for i in range(3):
                e, x = f(
                    A[i] if in_dims[0] is not None else A[0],
                    B[i] if in_dims[1] is not None else B[0],
                )
                self.assertEqual(E[i], e, rtol=1e-9, atol=1e-9)
                self.assertEqual(X[i], x, rtol=1e-7, atol=1e-7)
        nested = torch.func.vmap(
            torch.func.vmap(lambda A: torch.lobpcg(A, **self.options)[0])
        )(A.unsqueeze(0).expand(2, 3, 24, 24))
        self.assertEqual(
            nested[1], torch.lobpcg(A, **self.options)[0], rtol=1e-9, atol=1e-9
        )

    def test_vmap_without_B_and_with_X(self):
        A = torch.stack([self.A, 2 * self.A])
        X = torch.randn(2, 24, 4, dtype=torch.float64)
        E = torch.func.vmap(lambda A, X: torch.lobpcg(A, X=X, k=3, tol=1e-11)[0])(A, X)
        self.assertEqual(E, torch.lobpcg(A, k=3, tol=1e-11)[0], rtol=1e-9, atol=1e-9)

    def test_vmap_of_grad_and_grad_of_vmap(self):
        A = torch.stack([self.A, self.A + 0.1 * self.weights(24, seed=7)])
        expected = torch.stack(
            [
                self.spectral_gradient(M, self.B, 3, False, self.loss_of_both)[0]
                for M in A
            ]
        )
        found = torch.func.vmap(torch.func.grad(self.scalar), in_dims=(0, None))(
            A, self.B
        )
        self.assert_close(found, expected, 1e-8)
        total = torch.func.grad(
            lambda A: torch.func.vmap(self.scalar, in_dims=(0, None))(A, self.B).sum()
        )(A)
        self.assert_close(total, expected, 1e-8)

    def test_vmap_of_jvp_over_batches(self):
        """First-order perturbation by dense eigenvectors; batches of one, two and no matrices, iterated and dense."""
        for size, m, dtype in itertools.product(
            (0, 1, 2), (24, 60, 200), (torch.float32, torch.float64)
        ):
            A = torch.stack(
                [
                    torch.diag(torch.arange(1.0, m + 1)) + self.weights(m, seed=i) / m
                    for i in range(3 * size)
                ]
                or [torch.eye(m)]
            )[: 3 * size].reshape(3, size, m, m)
            A, T = A.to(dtype), self.weights(m, dtype, seed=9).expand(size, m, m)
            V = torch.linalg.eigh(A.double()).eigenvectors[..., :2]
            exact = (V * (T.double() @ V)).sum(-2)
            for options in ({"method": "ortho", "n": 2}, {}):

                def tangent(a):
                    f = functools.partial(
                        torch.lobpcg, k=2, largest=False, tol=1e-6, **options
                    )
                    return torch.func.jvp(lambda A: f(A)[0], (a,), (T,))[1]

                with self.subTest(size=size, m=m, dtype=dtype, **options):
                    found = torch.func.vmap(tangent)(A)
                    self.assertEqual(found.shape, exact.shape)
                    # Inner products of length m; pairs of small matrices are corrected to rounding.
                    bound = 16 * m**0.5 * torch.finfo(dtype).eps
                    self.assertEqual(found.double(), exact, rtol=0, atol=bound)

    def test_vectorised_autograd(self):
        leaf = self.leaf(self.A)
        E, X = torch.lobpcg(leaf, **self.options)
        rows = torch.autograd.grad(
            E, leaf, torch.eye(3, dtype=torch.float64), is_grads_batched=True
        )[0]
        self.assertEqual(
            rows,
            torch.stack([torch.outer(x, x) for x in X.detach().T]),
            atol=1e-9,
            rtol=0,
        )

        def squares(A):
            return (torch.lobpcg(A, **self.options)[1] ** 2)[0]

        a, b = (
            torch.autograd.functional.jacobian(squares, self.A, vectorize=v)
            for v in (False, True)
        )
        self.assert_close(b, a, 1e-8)
        c = torch.autograd.functional.jacobian(
            squares, self.A, vectorize=True, strategy="forward-mode"
        )
        self.assert_close(c, a, 1e-8)

    def test_retain_graph_and_repeated_backward(self):
        A, B = self.leaf(self.A), self.leaf(self.B)
        value = self.scalar(A, B)
        value.backward(retain_graph=True)
        first = A.grad.clone(), B.grad.clone()
        value.backward()
        self.assertEqual(A.grad, 2 * first[0], rtol=1e-12, atol=1e-12)
        self.assertEqual(B.grad, 2 * first[1], rtol=1e-12, atol=1e-12)
        with self.assertRaises(RuntimeError):
            value.backward()

    def test_inplace_change_between_forward_and_backward_is_caught(self):
        A = self.leaf(self.A)
        M = A * 1.0
        value = self.scalar(M)
        M.add_(1.0)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            value.backward()

    def test_surroundings(self):
        """Anomaly mode, tensors saved on the CPU, checkpointing, autocast, hooks: the same numbers."""
        from torch.utils.checkpoint import checkpoint

        def run(context, function=None):
            A, B = self.leaf(self.A), self.leaf(self.B)
            calls = []
            A.register_hook(calls.append)
            with context:
                (function or self.scalar)(A, B).backward()
            self.assertEqual(len(calls), 1)
            self.assert_close(A.grad, self.exact[0], 1e-8)
            self.assert_close(B.grad, self.exact[1], 1e-8)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(torch.autograd.detect_anomaly())
        run(torch.autograd.graph.save_on_cpu())
        run(torch.autocast("cpu", dtype=torch.bfloat16))
        run(
            torch.enable_grad(),
            lambda A, B: checkpoint(self.scalar, A, B, use_reentrant=False),
        )
        run(
            torch.enable_grad(),
            lambda A, B: checkpoint(self.scalar, A, B, use_reentrant=True),
        )

    def test_hooks_see_each_gradient_once(self):
        """Hooks on the pairs, on their node and on saved tensors; what a hook returns replaces the cotangent."""
        A, B = self.leaf(self.A), self.leaf(self.B)
        packed, seen, nodes = [], [], []

        def pack(T):
            packed.append(T)
            return T

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
            E, X = torch.lobpcg(A, B=B, **self.options)
        # A, B, E, X, further pairs, residuals, their scale, which are missed and values: ten tensors, none twice.
        self.assertEqual(len(packed), 10)
        self.assertEqual(
            len({T.data_ptr() for T in packed if T.numel()}),
            len([T for T in packed if T.numel()]),
        )
        E.register_hook(lambda g: seen.append(g) or 2 * g)
        E.grad_fn.register_hook(lambda *arguments: nodes.append(arguments))
        E.sum().backward()
        self.assertEqual((len(seen), len(nodes)), (1, 1))
        X = X.detach()
        self.assert_close(A.grad, 2 * X @ X.mT, 1e-9)

    def test_inference_mode(self):
        A = self.leaf(self.A)
        expected = torch.lobpcg(self.A, B=self.B, **self.options)
        with torch.inference_mode():
            pairs = torch.lobpcg(A, B=self.B, **self.options)
        for found, wanted in zip(pairs, expected):
            self.assertTrue(found.is_inference() and not found.requires_grad)
            self.assertTrue(torch.equal(found, wanted))
        # An inference tensor is a constant like any other.
        with torch.inference_mode():
            B = self.B.clone()
        with self.assertRaisesRegex(RuntimeError, "Inference tensors cannot be saved"):
            torch.lobpcg(A, B=B, **self.options)
        with torch.no_grad():
            self.assertTrue(
                torch.equal(torch.lobpcg(A, B=B, **self.options)[0], expected[0])
            )

    def test_results_hide_nothing(self):
        """Pairs own storage of their own size, so a copy or a pickle carries neither the block nor the graph."""
        import copy
        import pickle

        for A in (self.A, self.leaf(self.A)):
            for T in torch.lobpcg(A, **self.options):
                self.assertEqual(
                    T.untyped_storage().nbytes(), T.numel() * T.element_size()
                )
                self.assertTrue(T.is_contiguous())
                for copied in (
                    copy.deepcopy(T.detach()),
                    pickle.loads(pickle.dumps(T.detach())),
                ):
                    self.assertTrue(torch.equal(copied, T) and not copied.requires_grad)
                self.assertLess(
                    len(pickle.dumps(T.detach())), T.numel() * T.element_size() + 1000
                )

    def test_every_tensor_is_made_on_the_device_of_the_input(self):
        """With a default device that holds no values, one tensor made without naming a device would be seen."""

        def results(A, B, **options):
            A, B = self.leaf(A), self.leaf(B)
            E, X = torch.lobpcg(A, B=B, **options)
            x, X = X[:4].abs().sum(-1), None
            (g,) = torch.autograd.grad(E.sum() + x.sum(), A, create_graph=True)
            values = g.values() if g.layout == torch.sparse_csr else g
            square = values.to_dense() if g.layout == torch.sparse_coo else values
            again = torch.autograd.grad(square.abs().square().sum(), A)[0].to_dense()
            return [E.detach(), g.detach().to_dense(), again]

        def tangents(A, B):
            return torch.func.jvp(
                lambda A: torch.lobpcg(A, B=B, **self.options)[0], (A,), (A,)
            )

        dense = self.A, self.B
        cases = [
            (dense, {}),
            (dense, {"niter": 1000}),
            (dense, {"niter": 1000, "iK": torch.eye(24).double()}),
        ]
        cases.append((tuple(M.to_sparse() for M in dense), {}))
        cases.append((tuple(M.to_sparse_csr() for M in dense), {}))
        for pencil, options in cases:
            for function in (
                lambda A, B: results(A, B, k=3, largest=False, **options),
                tangents,
            ):
                if function is tangents and pencil is not dense:
                    continue
                expected = function(*pencil)
                with torch.device("meta"):
                    found = function(*pencil)
                for a, b in zip(found, expected):
                    self.assertEqual(a.device.type, "cpu")
                    self.assertTrue(torch.equal(a, b))

    def test_autocast_keeps_float32(self):
        A = self.leaf(self.A.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            E, X = torch.lobpcg(A, k=3, largest=False)
            self.assertEqual((E.dtype, X.dtype), (torch.float32, torch.float32))
            E.sum().backward()
        self.assert_close(
            A.grad.double(),
            self.spectral_gradient(self.A, None, 3, False, lambda E, X: E.sum())[0],
            1e-3,
        )

    def test_no_graph_is_kept_alive(self):
        class Witness(torch.autograd.Function):
            @staticmethod
            def forward(ctx, A):
                return A.clone()

            @staticmethod
            def backward(ctx, g):
                return g

        A = self.leaf(self.A)
        M = Witness.apply(A)
        gone = weakref.ref(M.grad_fn)
        value = self.scalar(M)
        value.backward()
        del M, value
        self.assertIsNone(gone())

    def test_threads(self):
        """Eight threads build and differentiate at once."""
        from concurrent.futures import ThreadPoolExecutor

        def work(i):
            A, B = self.leaf(self.A * (1 + i)), self.leaf(self.B)
            self.scalar(A, B).backward()
            exact = self.spectral_gradient(A, B, 3, False, self.loss_of_both)
            return max(self.relative(A.grad, exact[0]), self.relative(B.grad, exact[1]))

        with ThreadPoolExecutor(8) as pool:
            self.assertLess(max(pool.map(work, range(16))), 1e-8)

    def test_global_generator_is_left_alone(self):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        for _ in range(2):
            A = self.leaf(self.A)
            value = self.scalar(A)
            (g,) = torch.autograd.grad(value, A, create_graph=True)
            g.sum().backward()
        self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_backward_is_reproducible(self):
        first, second = (
            self.gradient(self.loss_of_both, self.A, self.B, **self.options)
            for _ in range(2)
        )
        self.assertTrue(torch.equal(first[0], second[0]))
        self.assertTrue(torch.equal(first[1], second[1]))

    def test_callable_operators_are_constants(self):
        """Through a callable nothing is differentiated; a tensor beside it still is, in B or in A."""
        X = torch.randn(24, 4, dtype=torch.float64)
        E, _ = torch.lobpcg(lambda V: self.A @ V, X=X, k=3, largest=False)
        self.assertFalse(E.requires_grad)
        A = self.leaf(self.A)
        value = self.loss_of_both(
            *torch.lobpcg(A, B=lambda V: self.B @ V, **self.options)
        )
        value.backward()
        self.assert_close(A.grad, self.exact[0], 1e-8)

    def test_state_of_grad_mode_and_tracker(self):
        """A tracker sees plain tensors: nothing of the iteration is recorded for autograd."""
        A = self.leaf(self.A)
        seen = []
        E, X = torch.lobpcg(
            A,
            tracker=lambda worker: seen.append(worker.X.requires_grad),
            method="ortho",
            **self.options,
        )
        self.assertTrue(seen)
        self.assertFalse(any(seen))
        self.assertTrue(E.requires_grad and X.requires_grad)


class TestLobpcgTransformTable(LobpcgGradientCase):
    """Transform x layout x field x what is differentiated: one test for each combination.

    Oracles: the gradient g as a sum over all pairs, Re <g, t> for a tangent t, and differences of g for second
    derivatives.  A sparse gradient is compared on the stored positions.
    """

    transforms = (
        "backward",
        "double_backward",
        "forward_mode",
        "forward_over_reverse",
        "func_grad",
        "func_vjp",
        "vmap_of_grad",
        "checkpoint",
        "compile",
        "make_fx",
        "export",
    )
    # Of sparse matrices.  PyTorch has neither tangents nor batches of them in torch.func, and no graph of a gradient.
    refused = ("forward_mode", "forward_over_reverse", "vmap_of_grad", "make_fx")
    m, k = 12, 2

    def operands(self, layout, dtype, seed=0):
        i = torch.arange(self.m)
        band = ((i.unsqueeze(-1) - i).abs() <= 3).to(dtype)
        A = self.weights(self.m, dtype, 11 + seed) * band
        B = (
            4 * torch.eye(self.m, dtype=dtype)
            + 0.3 * self.weights(self.m, dtype, 12 + seed)
        ) * band
        tangents = tuple(self.weights(self.m, dtype, 13 + j) * band for j in range(2))
        return (A, B), tangents, band.real > 0 if layout == "sparse" else None

    @parametrize(
        "transform,layout,field,wanted",
        list(
            itertools.product(
                transforms, ("dense", "sparse"), ("real", "complex"), ("A", "B", "both")
            )
        ),
        name_fn=lambda *names: "_".join(names),
    )
    def test(self, transform, layout, field, wanted):
        dtype = torch.complex128 if field == "complex" else torch.float64
        matrices, tangents, stored = self.operands(layout, dtype)
        chosen = {"A": (0,), "B": (1,), "both": (0, 1)}[wanted]
        make = torch.Tensor.to_sparse if layout == "sparse" else torch.clone
        constant = [make(M) for M in matrices]
        options = dict(k=self.k, largest=False, tol=1e-12)

        def f(*operands):
            pencil = list(constant)
            for i, M in zip(chosen, operands):
                pencil[i] = M
            return self.loss_of_both(*torch.lobpcg(pencil[0], B=pencil[1], **options))

        def exact(pencil):
            found = self.spectral_gradient(*pencil, self.k, False, self.loss_of_both)
            return [found[i] if stored is None else found[i] * stored for i in chosen]

        def inner(gradients, others):
            return sum((g.conj() * t).real.sum() for g, t in zip(gradients, others))

        operands = [make(matrices[i]) for i in chosen]
        along = [tangents[i] for i in chosen]
        run = getattr(self, "by_" + transform)
        if layout == "sparse" and transform in self.refused:
            with self.assertRaises((RuntimeError, NotImplementedError, AssertionError)):
                run(f, operands, [make(t) for t in along])
            return
        found = run(f, operands, [make(t) for t in along])
        if transform == "forward_mode":
            self.assertEqual(found, inner(exact(matrices), along), rtol=1e-8, atol=1e-8)
            return
        expected = exact(matrices)
        if transform in ("double_backward", "forward_over_reverse"):
            # Central differences: error h^2 from the next derivatives, eps / h from rounding.
            h = 1e-4
            sides = []
            for sign in (1, -1):
                moved = list(matrices)
                for i in chosen:
                    moved[i] = moved[i] + sign * h * tangents[i]
                sides.append(exact(moved))
            expected = [(a - b) / (2 * h) for a, b in zip(*sides)]
        self.assertEqual(len(found), len(expected))
        for g, e in zip(found, expected):
            self.assert_close(
                g, e, 1e-5 if "double" in transform or "over" in transform else 1e-8
            )

    def by_backward(self, f, operands, tangents):
        leaves = [M.requires_grad_() for M in operands]
        return torch.autograd.grad(f(*leaves), leaves)

    def by_double_backward(self, f, operands, tangents):
        leaves = [M.requires_grad_() for M in operands]
        gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        value = sum(
            (g.to_dense().conj() * t.to_dense()).real.sum()
            for g, t in zip(gradients, tangents)
        )
        return torch.autograd.grad(value, leaves)

    def by_forward_mode(self, f, operands, tangents):
        return torch.func.jvp(f, tuple(operands), tuple(tangents))[1]

    def by_forward_over_reverse(self, f, operands, tangents):
        return torch.func.jvp(
            self.func_grad(f, operands), tuple(operands), tuple(tangents)
        )[1]

    def func_grad(self, f, operands):
        return torch.func.grad(f, tuple(range(len(operands))))

    def by_func_grad(self, f, operands, tangents):
        return self.func_grad(f, operands)(*operands)

    def by_func_vjp(self, f, operands, tangents):
        value, pull = torch.func.vjp(f, *operands)
        return pull(torch.ones_like(value))

    def by_vmap_of_grad(self, f, operands, tangents):
        batch = [torch.stack([M + 0.01 * t, M, M]) for M, t in zip(operands, tangents)]
        return [g[1] for g in torch.func.vmap(self.func_grad(f, operands))(*batch)]

    def by_checkpoint(self, f, operands, tangents):
        from torch.utils.checkpoint import checkpoint

        return self.by_backward(
            lambda *leaves: checkpoint(f, *leaves, use_reentrant=False),
            operands,
            tangents,
        )

    def by_compile(self, f, operands, tangents):
        torch._dynamo.reset()
        fullgraph = operands[0].layout == torch.strided
        return self.by_backward(
            torch.compile(f, backend="aot_eager", fullgraph=fullgraph),
            operands,
            tangents,
        )

    def by_make_fx(self, f, operands, tangents):
        from torch.fx.experimental.proxy_tensor import make_fx

        others = [M + 0.01 * t for M, t in zip(operands, tangents)]
        return make_fx(self.func_grad(f, operands), tracing_mode="real")(*others)(
            *operands
        )

    def by_export(self, f, operands, tangents):
        class Model(torch.nn.Module):
            def forward(self, *operands):
                return f(*operands)

        others = tuple(M + 0.01 * t for M, t in zip(operands, tangents))
        return self.by_backward(
            torch.export.export(Model(), others).module(), operands, tangents
        )


instantiate_parametrized_tests(TestLobpcgTransformTable)


if __name__ == "__main__":
    run_tests()
