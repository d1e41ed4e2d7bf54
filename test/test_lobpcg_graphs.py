# Owner(s): ["module: autograd"]
"""torch.lobpcg in graphs: torch.compile, torch.export, make_fx, tensors without values."""

import functools
import itertools
import warnings

import torch
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)
from torch.testing._internal.lobpcg_oracles import LobpcgGradientCase


class TestLobpcgGraphs(LobpcgGradientCase):
    """torch.compile, torch.export, make_fx, tensors without values: a graph computes what an eager call does."""

    options = dict(k=3, largest=False)

    def setUp(self):
        super().setUp()
        self.A, self.B = self.problems.indefinite(24, 10.0).build()
        torch._dynamo.reset()

    def hermitian(self, m, dtype=torch.float64, batch=(), definite=False):
        M = self.weights(m, dtype, 3 + definite)
        M = M @ M.mH / m + torch.eye(m, dtype=dtype) if definite else M
        scale = torch.arange(
            1, 1 + torch.Size(batch).numel(), dtype=M.real.dtype
        ).reshape(tuple(batch) + (1, 1))
        return M * scale

    def pairs_and_gradients(self, function, A, B=None):
        A, B = self.leaf(A), self.leaf(B)
        E, X = function(A, B)
        leaves = [M for M in (A, B) if M is not None]
        return [
            E.detach(),
            X.detach(),
            *torch.autograd.grad(self.loss_of_both(E, X), leaves),
        ]

    def assert_compiled_as_eager(self, A, B=None, dynamic=None, **options):
        def f(A, B):
            return torch.lobpcg(A, B=B, **options)

        torch._dynamo.reset()
        compiled = torch.compile(
            f, backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        pairs = zip(
            self.pairs_and_gradients(f, A, B), self.pairs_and_gradients(compiled, A, B)
        )
        for eager, found in pairs:
            self.assertEqual(eager.stride(), found.stride())
            self.assertTrue(torch.equal(eager, found), f"{options}")

    def test_compile_equals_eager_to_the_bit(self):
        for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
            A, B = self.hermitian(24, dtype), self.hermitian(24, dtype, definite=True)
            self.assert_compiled_as_eager(A, **self.options)
            self.assert_compiled_as_eager(A, B, **self.options)
        A, B = self.hermitian(40), self.hermitian(40, definite=True)
        skew = A + torch.triu(torch.ones_like(A), 1)
        self.assert_compiled_as_eager(skew, B, **self.options)
        for options in (
            dict(k=2, method="ortho", tol=1e-9, niter=300),
            dict(k=2, method="basic", n=5, niter=300),
            dict(k=4, largest=True, niter=300, ortho_iparams={"i_max": 3}),
            dict(k=2, largest=False, niter=300, iK=torch.linalg.inv(A + 10 * B)),
            dict(
                k=2, largest=False, niter=300, X=torch.eye(40, 4, dtype=A.dtype) + 0.1
            ),
        ):
            self.assert_compiled_as_eager(A, B, **options)

    def test_compile_batches(self):
        for a, b in (((2,), None), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), ())):
            A = self.hermitian(12, torch.complex128, a)
            B = (
                None
                if b is None
                else self.hermitian(12, torch.complex128, b, definite=True)
            )
            self.assert_compiled_as_eager(A, B, **self.options)
            self.assert_compiled_as_eager(A, B, dynamic=True, **self.options)

    def test_compile_dynamic_sizes(self):
        """One function, sizes on both sides of every choice by size; values of k."""

        def f(A, k):
            return torch.lobpcg(A, k=k, largest=False)

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
        for m, k in ((9, 2), (10, 2), (40, 2), (3, 2), (40, 1), (40, 5), (600, 2)):
            A = self.hermitian(m)
            for eager, found in zip(
                *(
                    self.pairs_and_gradients(lambda A, B: g(A, k), A)
                    for g in (f, compiled)
                )
            ):
                self.assertTrue(torch.equal(eager, found), f"m={m}, k={k}")

    def test_compile_the_function_itself(self):
        compiled = torch.compile(torch.lobpcg, backend="aot_eager", fullgraph=True)
        expected = torch.lobpcg(self.A, 3, self.B)
        self.assertEqual(compiled(self.A, 3, self.B), expected, rtol=0, atol=0)
        with torch.inference_mode():
            self.assertEqual(
                compiled(self.A.clone(), 3, self.B.clone()), expected, rtol=0, atol=0
            )

    def test_graph_breaks(self):
        def breaks(f, *arguments):
            torch._dynamo.reset()
            return torch._dynamo.explain(f)(*arguments).graph_break_count

        def tracker(worker):
            seen.append(worker.ivars["istep"])

        seen = []
        self.assertEqual(breaks(lambda A: torch.lobpcg(2 * A, k=2)[0] + 1, self.A), 0)

        def tracked(A):
            return torch.lobpcg(2 * A, k=2, tracker=tracker)[0] + 1

        def preconditioned(A):
            return torch.lobpcg(2 * A, k=2, iK=lambda R: R.clone())[0] + 1

        for f in (tracked, preconditioned):
            self.assertEqual(breaks(f, self.A), 1)
            self.assertEqual(
                torch.compile(f, backend="aot_eager")(self.A), f(self.A), rtol=0, atol=0
            )
            torch._dynamo.reset()
            with self.assertRaises(torch._dynamo.exc.Unsupported):
                torch.compile(f, backend="aot_eager", fullgraph=True)(self.A)
        self.assertGreater(len(seen), 0)

    def test_compile_with_sparse_matrices(self):
        """TorchDynamo breaks the graph at sparse tensors; the result is right."""
        S = self.hermitian(12).to_sparse_coo().coalesce()
        indices = S.indices()

        def f(values):
            return self.loss_of_both(
                *torch.lobpcg(
                    torch.sparse_coo_tensor(indices, values, S.shape), **self.options
                )
            )

        def g(A):
            return self.loss_of_both(*torch.lobpcg(A, **self.options))

        for function, leaf in ((f, S.values()), (g, S), (g, S.to_sparse_csr())):
            torch._dynamo.reset()
            results = []
            for version in (function, torch.compile(function, backend="aot_eager")):
                argument = leaf.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(version(argument), argument)
                results.append(gradient.to_dense())
            self.assertTrue(torch.equal(*results))

    def test_compiled_transforms(self):
        A, B = self.hermitian(8), self.hermitian(8, definite=True)
        two = torch.stack([A, A + B])

        def f(A, B):
            return self.loss_of_both(*torch.lobpcg(A, B=B, **self.options, tol=1e-12))

        func = torch.func
        for transform, arguments in (
            (func.grad(f, (0, 1)), (A, B)),
            (func.vmap(f, (0, None)), (two, B)),
            (func.vmap(func.grad(f, (0, 1)), (0, None)), (two, B)),
            (lambda A, B: func.jvp(f, (A, B), (B, A)), (A, B)),
            (func.jacrev(func.grad(f)), (A, B)),
            (func.hessian(f), (A, B)),
        ):
            torch._dynamo.reset()
            compiled = torch.compile(transform, backend="aot_eager", fullgraph=True)
            self.assertEqual(
                compiled(*arguments), transform(*arguments), rtol=1e-11, atol=1e-11
            )

    def test_wrong_gradients_are_refused_when_the_graph_runs(self):
        """A graph knows no values when it is made; errors and warnings come when it runs, as in an eager call."""
        double = torch.diag(
            torch.tensor([1.0, 1.0, *range(2, 10)], dtype=torch.float64)
        )
        well = self.hermitian(30)
        vectors, phase = self.loss_of_vectors, lambda E, X: X.imag.sum()
        for A, loss, error, warning, options in (
            (
                double,
                vectors,
                (RuntimeError, "eigenvalues 0 and 1 are equal"),
                None,
                dict(k=2, largest=False),
            ),
            (
                double,
                vectors,
                None,
                "k=1 asked for equals one that was not asked for",
                dict(k=1, largest=False),
            ),
            (
                well,
                vectors,
                None,
                "gradient of eigenpairs that have not converged",
                dict(k=2, niter=2),
            ),
            (
                well.to(torch.complex128),
                phase,
                (RuntimeError, "phase of eigenvector 0"),
                None,
                dict(k=2),
            ),
            (
                well * float("nan"),
                vectors,
                (ValueError, "NaN or infinite"),
                None,
                dict(k=2),
            ),
        ):

            def f(A):
                return loss(*torch.lobpcg(A, **options))

            torch._dynamo.reset()
            for version in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
                leaf = self.leaf(A)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    if error is None:
                        version(leaf).backward()
                    else:
                        with self.assertRaisesRegex(*error):
                            version(leaf).backward()
                messages = " ".join(str(w.message) for w in caught)
                if warning is not None:
                    self.assertIn(warning, messages)

    def test_shapes_without_values(self):
        """Fake and meta tensors: shapes, dtypes and strides as with values, whichever way the pairs are found."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        def operands(dtype, a, b):
            return self.hermitian(24, dtype, a), None if b is None else self.hermitian(
                24, dtype, b, definite=True
            )

        def description(A, B, **options):
            leaves = [M.requires_grad_() for M in (A, B) if M is not None]
            E, X = torch.lobpcg(A, B=B, **options)
            gradients = torch.autograd.grad(self.loss_of_both(E, X), leaves)
            return [(T.shape, T.dtype, T.stride()) for T in (E, X, *gradients)]

        batches = (((), None), ((2,), ()), ((2, 1), (3,)), ((0,), None))
        for dtype, (a, b) in itertools.product(
            (torch.float32, torch.complex128), batches
        ):
            for options in (
                dict(k=3),
                dict(k=3, method="ortho", n=5),
                dict(k=8, largest=False),
            ):
                A, B = operands(dtype, a, b)
                expected = description(*map(self.leaf, (A, B)), **options)
                with torch.device("meta"):
                    moved = [None if M is None else M.to("meta") for M in (A, B)]
                    self.assertEqual(description(*moved, **options), expected)
                with FakeTensorMode() as mode:
                    moved = [None if M is None else mode.from_tensor(M) for M in (A, B)]
                    self.assertEqual(description(*moved, **options), expected)

    def test_sparse_without_values(self):
        """A graph of the pairs of a sparse matrix; that of their gradient is refused."""
        from torch.fx.experimental.proxy_tensor import make_fx

        S = self.hermitian(24).to_sparse_coo().coalesce()

        def f(S):
            return torch.lobpcg(S, **self.options)

        for mode in ("real", "fake"):
            graph = make_fx(f, tracing_mode=mode)(S)
            self.assertEqual(graph(2 * S), f(2 * S), rtol=0, atol=0)
            with self.assertRaisesRegex(
                NotImplementedError, "A is sparse and requires a gradient"
            ):
                make_fx(lambda S: f(S.requires_grad_())[0], tracing_mode=mode)(
                    S.clone()
                )

    def test_bad_arguments_without_values(self):
        A = torch.zeros(8, 8, device="meta")
        for error, arguments, options in (
            (ValueError, (A[1:],), dict(k=1)),
            (ValueError, (A,), dict(k=9)),
            (TypeError, (A.half(),), dict(k=1)),
            (NotImplementedError, (A,), dict(k=1, tracker=print)),
            (NotImplementedError, (A,), dict(k=1, iK=lambda R: R)),
        ):
            with self.assertRaisesRegex(error, "^lobpcg: "):
                torch.lobpcg(*arguments, **options)

    def test_make_fx_on_other_values(self):
        """A graph made with one pair of matrices is right for another: no value has entered it."""
        from torch.fx.experimental.proxy_tensor import make_fx

        A, B = self.hermitian(8), self.hermitian(8, definite=True)
        others = (
            A.flip(-1, -2) + torch.diag(torch.arange(8.0)),
            B.flip(-1, -2) + torch.eye(8),
        )

        def f(A, B):
            return self.loss_of_both(*torch.lobpcg(A, B=B, **self.options, tol=1e-12))

        func = torch.func
        transforms = {
            "value": f,
            "gradient": func.grad(f, (0, 1)),
            "tangent": lambda A, B: func.jvp(f, (A, B), (B, A))[1],
            "reverse over reverse": func.jacrev(func.grad(f)),
            "forward over reverse": func.hessian(f),
            "reverse over forward": func.jacrev(
                lambda A, B: func.jvp(f, (A, B), (B, A))[1]
            ),
        }
        for mode, (name, transform) in itertools.product(
            ("real", "fake", "symbolic"), transforms.items()
        ):
            if mode == "symbolic" and name == "reverse over forward":
                continue  # PyTorch cannot allocate the tangents; torch.linalg.eigh fails as well
            graph = make_fx(transform, tracing_mode=mode)(A, B)
            self.assertEqual(
                graph(*others),
                transform(*others),
                rtol=1e-11,
                atol=1e-11,
                msg=f"{mode}, {name}",
            )

    @parametrize("dtype", [torch.float64, torch.complex128])
    @parametrize("generalized", [False, True])
    def test_values_while_a_graph_is_traced(self, dtype, generalized):
        """make_fx on tensors with values solves as an eager call does: A^H is a view that they do not resolve."""
        from torch.fx.experimental.proxy_tensor import make_fx

        A = self.hermitian(8, dtype)
        B = self.hermitian(8, dtype, definite=True) if generalized else None
        seen = []

        def f(A, B):
            E, X = torch.lobpcg(A, B=B, **self.options)
            seen.append(E)
            return E, X

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_fx(f, tracing_mode="real")(A, B)
        self.assertEqual(
            seen[-1], torch.lobpcg(A, B=B, **self.options)[0], rtol=0, atol=0
        )

    def test_third_derivative_in_a_graph(self):
        """Traced, and of a graph that is differentiated where it is run."""
        from torch.fx.experimental.proxy_tensor import make_fx

        A = self.hermitian(5)

        def f(A):
            return self.loss_of_both(*torch.lobpcg(A, k=1, tol=1e-13))

        def third(f):
            of_second = (
                lambda A: torch.func.grad(
                    lambda A: torch.func.grad(f)(A).square().sum()
                )(A)
                .square()
                .sum()
            )
            return torch.func.grad(of_second)

        other = A.flip(-1, -2) + torch.diag(torch.arange(5.0))
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(third(f), tracing_mode=mode)(A)
            self.assertEqual(
                graph(other), third(f)(other), rtol=1e-11, atol=1e-11, msg=mode
            )
        graph = make_fx(f, tracing_mode="fake")(A)

        def by_backward(f):
            leaf = self.leaf(A)
            value = f(leaf)
            for _ in range(2):
                (g,) = torch.autograd.grad(value, leaf, create_graph=True)
                value = g.square().sum()
            return torch.autograd.grad(value, leaf)[0]

        self.assertEqual(by_backward(graph), by_backward(f), rtol=1e-9, atol=1e-9)
        self.assertEqual(
            torch.func.hessian(graph)(A), torch.func.hessian(f)(A), rtol=1e-9, atol=1e-9
        )
        two = torch.stack([A, 2 * A])
        for transform in (torch.func.grad, torch.func.jacrev):
            of_graph, of_f = (torch.func.vmap(transform(g)) for g in (graph, f))
            self.assertEqual(of_graph(two), of_f(two), rtol=1e-9, atol=1e-9)

    def test_repeated_eigenvalues_in_a_graph(self):
        """A graph knows of no cluster while it is traced; where it runs, second derivatives are those of an eager call,
        and a third is warned of."""
        from torch.fx.experimental.proxy_tensor import make_fx

        double = torch.diag(torch.tensor([1.0, 1, 3, 4, 6, 9], dtype=torch.float64))

        def f(A):
            return self.loss_of_subspace(*torch.lobpcg(A, k=2, largest=False))

        def second(A):
            T = self.weights(6, seed=7)
            return torch.func.grad(lambda A: (torch.func.grad(f)(A) * T).sum())(A)

        def third(A):
            return torch.func.grad(lambda A: second(A).square().sum())(A)

        expected = second(double)
        for mode in ("real", "fake", "symbolic"):
            of_second, of_third = (
                make_fx(g, tracing_mode=mode)(double + torch.diag(torch.arange(6.0)))
                for g in (second, third)
            )
            self.assertEqual(of_second(double), expected, rtol=1e-11, atol=1e-11)
            for version in (third, of_third):
                with self.assertWarnsRegex(RuntimeWarning, "beyond the second are"):
                    version(double)

    def test_export_round_trip(self):
        """Exported, lowered, stored and loaded: the same pairs and gradients, at other sizes too."""
        import io

        class Model(torch.nn.Module):
            def forward(self, A, B):
                return torch.lobpcg(A, k=3, B=B, largest=False)

        any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        A, B = self.hermitian(24), self.hermitian(24, definite=True)
        for strict, shapes in itertools.product(
            (False, True), (None, (any_size, any_size))
        ):
            program = torch.export.export(
                Model(), (A, B), dynamic_shapes=shapes, strict=strict
            )
            stored = io.BytesIO()
            torch.export.save(program, stored)
            stored.seek(0)
            for version in (
                program,
                program.run_decompositions(),
                torch.export.load(stored),
            ):
                for m in (24,) if shapes is None else (24, 31):
                    C, D = self.hermitian(m), self.hermitian(m, definite=True)
                    pairs = zip(
                        *(
                            self.pairs_and_gradients(f, C, D)
                            for f in (Model(), version.module())
                        )
                    )
                    for eager, found in pairs:
                        self.assertTrue(torch.equal(eager, found))

    def test_operators_keep_their_contract(self):
        """Schema, shapes, autograd and tracing, as torch.library checks them, static and dynamic."""
        operators = torch.ops._lobpcg
        tests = (
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        )
        for dtype in (torch.float64, torch.complex128):
            # PyTorch's check of schemas takes a view that is marked as conjugate for a changed argument.
            tested = tests if dtype.is_complex else ("test_schema", *tests)
            check = functools.partial(torch.library.opcheck, test_utils=tested)
            A, B = self.hermitian(12, dtype), self.hermitian(12, dtype, definite=True)
            numbers = dict(
                k=2,
                n=4,
                chosen=0,
                niter=1000,
                tol=1e-8,
                largest=False,
                method="ortho",
                iterate=False,
            )
            numbers.update(differentiated=True, accurate=False)
            numbers.update(ortho_names=[], ortho_values=[])
            pairs = operators.solve(A, B, None, None, **numbers)
            # The loss of opcheck is the sum of everything, which a phase changes.
            a, b = (self.leaf(M, not dtype.is_complex) for M in (A, B))
            check(
                operators.lobpcg.default,
                (a, 2, b, *[None] * 7),
                dict(ortho_iparams=None),
            )
            check(operators.solve.default, (a, b, None, None), numbers)
            for iterate, differentiated in itertools.product((False, True), repeat=2):
                options = dict(numbers, iterate=iterate, differentiated=differentiated)
                found = operators.solve(
                    A.to("meta"), B.to("meta"), None, None, **options
                )
                for made, T in zip(operators.solve(A, B, None, None, **options), found):
                    self.assertEqual(
                        (T.shape, T.dtype, T.stride()),
                        (made.shape, made.dtype, made.stride()),
                    )
            E, X, T, Y, residual, scale, *_ = pairs
            b = (X * torch.arange(12).unsqueeze(-1)).requires_grad_()
            check(
                operators.resolvent.default,
                (A, B, None, E, X, b, T, Y, residual),
                numbers,
            )
            check(
                operators.nearest_outside.default,
                (A, B, None, E, X, torch.zeros_like(E), T, Y, residual),
                numbers,
            )
            G, late = X.mH @ b.detach(), torch.zeros_like(E)
            x, g = X.norm(dim=-2), b.detach().norm(dim=-2)
            check(
                operators.moved_by_residuals.default,
                (A, B, None, E, X, late, T, Y, residual[:2], late + 1, scale[:2]),
                numbers,
            )
            mixed = (E.unsqueeze(-1) - E).abs() + 1
            check(
                operators.mixed_by_residuals.default,
                (A, B, None, E, X, mixed, T, Y, residual[:2], scale[:2]),
                numbers,
            )
            check(
                operators.pair_mask.default,
                (
                    E,
                    x,
                    T,
                    residual[:2],
                    *[late] * 3,
                    mixed,
                    (G + G.mH) / 2,
                    E,
                    g,
                    g,
                    late,
                ),
                dict(numbers, m=12, eps=2e-16, measured=True, forward_mode=False),
            )
            check(operators.second_order_at_most.default, (b, E.diag()), dict(order=2))

    def test_subclass_with_torch_function(self):
        """A torch function mode or subclass sees torch.lobpcg, compiled or not."""

        class Counting(torch.Tensor):
            calls = []

            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function is torch.lobpcg:
                    cls.calls.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})

        A = self.A.as_subclass(Counting)
        torch.lobpcg(A, k=2)
        self.assertEqual(len(Counting.calls), 1)
        E = torch.compile(lambda A: torch.lobpcg(A, k=2)[0], backend="eager")(A)
        self.assertEqual(E.as_subclass(torch.Tensor), torch.lobpcg(self.A, k=2)[0])


instantiate_parametrized_tests(TestLobpcgGraphs)


if __name__ == "__main__":
    run_tests()
