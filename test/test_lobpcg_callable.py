# Owner(s): ["module: linear algebra"]
"""torch.lobpcg with matrices known by their products: gradients in what callables read, and what they must not do."""

import itertools
import math
import unittest
import warnings

import torch
from torch._lobpcg_impl.operand import operand
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.testing._internal.common_utils import run_tests


REAL, COMPLEX = torch.float64, torch.complex128
M, K = 24, 3


def random(*shape, dtype=REAL, seed=0):
    """Numbers of size one without a pattern, and without a generator, which torch.vmap refuses."""
    t = torch.arange(1.0, math.prod(shape) + 1, dtype=REAL).reshape(shape)
    T = 1.5 * torch.sin((t + 1000 * seed).square())
    return (
        torch.complex(T, 1.5 * torch.cos((t + seed).square()))
        if dtype == COMPLEX
        else T
    )


def hermitian(T):
    return (T + T.mH) / 2


def ladder(dtype=REAL):
    """Diagonal of distinct eigenvalues, which keeps the gaps of what is added to it."""
    return torch.arange(1.0, M + 1, dtype=REAL).to(dtype)


def dense_eigenpairs(A, B, k=K, largest=False):
    """Pairs by Cholesky and eigh, differentiated by PyTorch."""
    L = torch.linalg.cholesky(B)
    C = torch.linalg.solve_triangular(L, A, upper=False)
    C = torch.linalg.solve_triangular(L, C.mH, upper=False)
    E, V = torch.linalg.eigh(hermitian(C))
    X = torch.linalg.solve_triangular(L.mH, V, upper=True)
    if largest:
        E, X = E.flip(-1), X.flip(-1)
    return E[..., :k], X[..., :k]


def loss_of(E, X):
    """A loss of values and vectors that sees no sign; every term of a gradient counts in it."""
    D = torch.arange(1.0, E.shape[-1] + 1, dtype=REAL)
    R = hermitian(random(X.shape[-2], X.shape[-2], dtype=X.dtype, seed=5))
    both = ((X * D) @ X.mH * R.conj()).real.sum((-2, -1))
    return (E.square() * D).sum(-1) + both + (X.abs().pow(4) * D).sum((-2, -1))


class Stiffness(torch.nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = torch.nn.Parameter(T.detach().clone())

    def forward(self, V):
        return self.T @ (self.T.mH @ V) / M + ladder(V.dtype)[:, None] * V


class Mass(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(w.detach().clone())

    def forward(self, V):
        return products_of_B(self.w, V)


def products_of_A(T, V):
    return T @ (T.mH @ V) / M + ladder(V.dtype)[:, None] * V


def matrix_A(T):
    return T @ T.mH / M + torch.diag_embed(ladder(T.dtype))


def products_of_B(w, V):
    near = V.roll(1, -2) + V.roll(-1, -2)
    return (1 + w.square())[..., :, None] * V + 0.1 * near


def matrix_B(w, dtype=REAL):
    shift = torch.eye(M, dtype=dtype).roll(1, 0)
    return torch.diag_embed(1 + w.square()).to(dtype) + 0.1 * (shift + shift.mT)


class CallableCase(unittest.TestCase):
    def setUp(self):
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__, None, None, None)
        warnings.filterwarnings("error", message=".*lobpcg")

    def start(self, dtype=REAL, batch=()):
        return random(*batch, M, K + 3, dtype=dtype, seed=9)

    def solve(self, A, B=None, dtype=REAL, batch=(), **options):
        options = {"k": K, "largest": False, "tol": 1e-12, **options}
        return torch.lobpcg(A, B=B, X=self.start(dtype, batch), **options)

    def assert_close(self, got, right, bar):
        for a, b in zip(got, right):
            off = (a - b).norm() / b.norm()
            self.assertLess(off.item(), bar)

    def assert_orders(self, ours, oracle, leaves, bars):
        """Gradients of order 1, 2, ... of two functions of the leaves; each order is of a sum of the one before."""
        found = []
        for function in (ours, oracle):
            value, orders = function(*leaves), []
            for _ in bars:
                g = torch.autograd.grad(value, leaves, create_graph=True)
                orders.append([x.detach() for x in g])
                value = sum(
                    (
                        x * (1 + torch.arange(x.numel()).reshape(x.shape).sin())
                    ).real.sum()
                    for x in g
                )
            found.append(orders)
        for got, right, bar in zip(*found, bars):
            self.assert_close(got, right, bar)


class TestLobpcgCallable(CallableCase):
    """Against autograd through Cholesky and eigh of the dense matrices."""

    def leaves(self, dtype=REAL):
        T = random(M, M, dtype=dtype, seed=1).requires_grad_()
        return T, random(M, seed=2).requires_grad_()

    def oracle(self, T, w):
        return loss_of(*dense_eigenpairs(matrix_A(T), matrix_B(w, T.dtype)))

    def check_forms(self, form, dtype, bars=(1e-8,), **options):
        def ours(T, w):
            A = {
                "tensor": lambda: hermitian(matrix_A(T)),
                "closure": lambda: lambda V: products_of_A(T, V),
            }[form[0]]()
            B = {
                "tensor": lambda: matrix_B(w, dtype),
                "closure": lambda: lambda V: products_of_B(w, V),
            }[form[1]]()
            return loss_of(*self.solve(A, B, dtype, **options))

        self.assert_orders(ours, self.oracle, self.leaves(dtype), bars)

    def test_gradient_in_A_and_B(self):
        self.check_forms(("closure", "closure"), REAL)

    def test_gradient_of_complex_A_and_B(self):
        self.check_forms(("closure", "closure"), COMPLEX)

    def test_tensor_A_and_callable_B(self):
        self.check_forms(("tensor", "closure"), REAL)

    def test_callable_A_and_tensor_B(self):
        self.check_forms(("closure", "tensor"), COMPLEX)

    def test_three_orders(self):
        self.check_forms(("closure", "closure"), REAL, (1e-8, 1e-6, 1e-6))

    def test_three_orders_complex(self):
        self.check_forms(("closure", "closure"), COMPLEX, (1e-8, 1e-6, 1e-6))

    def test_preconditioner_is_a_constant(self):
        d = ladder()[:, None] + 1
        self.check_forms(("closure", "closure"), REAL, iK=lambda R: R / d)

    def test_results_of_operations(self):
        """Parameters that are no leaves, each used by other parts of the loss as well."""

        def ours(T, w):
            S, v = T * 1.5, w.sin()
            pairs = self.solve(
                lambda V: products_of_A(S, V), lambda V: products_of_B(v, V)
            )
            return loss_of(*pairs) + S.square().sum() + v.sum()

        def oracle(T, w):
            S, v = T * 1.5, w.sin()
            return self.oracle(S, v) + S.square().sum() + v.sum()

        self.assert_orders(ours, oracle, self.leaves(), (1e-8, 1e-6))

    def test_gradient_of_a_result_itself(self):
        T, _ = self.leaves()
        S = T * 1.5
        value = loss_of(*self.solve(lambda V: products_of_A(S, V)))
        got = torch.autograd.grad(value, (S, T))
        R = S.detach().requires_grad_()
        eye = torch.eye(M, dtype=REAL)
        (right,) = torch.autograd.grad(loss_of(*dense_eigenpairs(matrix_A(R), eye)), R)
        self.assert_close(got, (right, 1.5 * right), 1e-8)

    def test_modules(self):
        T, w = self.leaves()
        A, B = Stiffness(T), Mass(w)
        loss_of(*self.solve(A, B)).backward()
        right = torch.autograd.grad(self.oracle(T, w), (T, w))
        self.assert_close((A.T.grad, B.w.grad), right, 1e-8)

    def test_batch(self):
        T = random(2, M, M, seed=1).requires_grad_()
        w = random(2, M, seed=2).requires_grad_()

        def ours(T, w):
            pairs = self.solve(
                lambda V: products_of_A(T, V),
                lambda V: products_of_B(w, V),
                batch=(2,),
            )
            return loss_of(*pairs).sum()

        def oracle(T, w):
            return sum(self.oracle(T[i], w[i]) for i in range(2))

        self.assert_orders(ours, oracle, (T, w), (1e-8, 1e-6))

    def test_batch_under_a_tracker(self):
        """Members are solved one by one, by a callable that knows the batch only."""
        T = random(2, 3, M, M, seed=1)
        steps = []
        E, _ = self.solve(
            lambda V: products_of_A(T, V), batch=(2, 3), tracker=steps.append
        )
        self.assertTrue(steps)
        right = torch.linalg.eigvalsh(matrix_A(T))[..., :K]
        self.assertLess((E - right).abs().max().item(), 1e-8)

    def test_a_parameter_of_both(self):
        """One tensor in A and in B: its two gradients add up."""
        w = random(M, seed=2).requires_grad_()

        def ours(w):
            return loss_of(
                *self.solve(
                    lambda V: (ladder() + w)[:, None] * V,
                    lambda V: products_of_B(w, V),
                )
            )

        def oracle(w):
            A = torch.diag(ladder() + w)
            return loss_of(*dense_eigenpairs(A, matrix_B(w)))

        self.assert_orders(ours, oracle, (w,), (1e-8, 1e-6))

    def test_hooks_run_once(self):
        """A hook on a parameter sees its whole gradient, not the parts from which lobpcg makes it."""
        w = random(M, seed=2).requires_grad_()
        seen = []
        w.register_hook(lambda g: seen.append(g) or 2 * g)
        v = w.sin()
        v.retain_grad()
        value = self.solve(lambda V: (ladder() + w + v)[:, None] * V)[0].sum()
        value.backward()
        self.assertEqual(len(seen), 1)
        self.assertLess((w.grad - 2 * seen[0]).abs().max().item(), 1e-15)
        self.assertLess((w.grad - 2 * (1 + w.cos()) * v.grad).abs().max().item(), 1e-8)

    def test_sparse_parameter(self):
        """A sparse matrix that the callable multiplies by: right on the stored entries."""
        shift = torch.eye(M, dtype=REAL).roll(1, 0)
        D = torch.diag(ladder()) + 0.1 * (shift + shift.mT)
        for S in (D.to_sparse_coo(), D.to_sparse_csr()):
            S.requires_grad_()
            (g,) = torch.autograd.grad(loss_of(*self.solve(lambda V: S @ V)), S)
            F = D.clone().requires_grad_()
            pairs = dense_eigenpairs(hermitian(F), torch.eye(M, dtype=REAL))
            (right,) = torch.autograd.grad(loss_of(*pairs), F)
            g = hermitian(g.to_dense() * (D != 0))
            self.assert_close((g,), (right * (D != 0),), 1e-8)

    def test_checkpoint(self):
        from torch.utils.checkpoint import checkpoint

        def ours(T, w):
            def body(T, w):
                S = T * 1.0
                return loss_of(
                    *self.solve(
                        lambda V: products_of_A(S, V), lambda V: products_of_B(w, V)
                    )
                )

            return checkpoint(body, T, w, use_reentrant=False)

        self.assert_orders(ours, self.oracle, self.leaves(), (1e-8, 1e-6))

    def test_checkpoint_inside(self):
        from torch.utils.checkpoint import checkpoint

        def ours(T, w):
            return loss_of(
                *self.solve(
                    lambda V: checkpoint(products_of_A, T, V, use_reentrant=False),
                    lambda V: products_of_B(w, V),
                )
            )

        self.assert_orders(ours, self.oracle, self.leaves(), (1e-8, 1e-6))

    def test_constants_are_not_recorded(self):
        A = matrix_A(self.leaves()[0].detach())
        E, X = self.solve(lambda V: A @ V)
        self.assertFalse(E.requires_grad or X.requires_grad)

    def test_detached_parameters_are_constants(self):
        T, w = self.leaves()
        E, _ = self.solve(
            lambda V: products_of_A(T.detach(), V), lambda V: products_of_B(w, V)
        )
        E.sum().backward()
        self.assertIsNone(T.grad)
        self.assertTrue(w.grad.abs().max() > 0)

    def test_no_grad(self):
        T, _ = self.leaves()
        recorded = []

        def A(V):
            recorded.append(torch.is_grad_enabled())
            return products_of_A(T, V)

        with torch.no_grad():
            E, _ = self.solve(A)
        self.assertFalse(E.requires_grad or any(recorded))

    def test_views_of_a_parameter(self):
        """Slices made inside and outside; a product that is a view of a parameter's."""
        w = random(2 * M, seed=2).requires_grad_()
        outside = w[M:]

        def ours(w_):
            return loss_of(
                *self.solve(lambda V: (ladder() + w[:M] + outside)[:, None] * V)
            )

        def oracle(w_):
            A = torch.diag(ladder() + w[:M] + w[M:])
            return loss_of(*dense_eigenpairs(A, torch.eye(M, dtype=REAL)))

        self.assert_orders(ours, oracle, (w,), (1e-8, 1e-6))

    def test_recorded_products(self):
        """Of each matrix two: one that discovers parameters, one that is pulled back."""
        T, w = self.leaves()
        recorded = {"A": 0, "B": 0}

        def counted(name, products):
            def call(V):
                recorded[name] += torch.is_grad_enabled()
                return products(V)

            return call

        pairs = self.solve(
            counted("A", lambda V: products_of_A(T, V)),
            counted("B", lambda V: products_of_B(w, V)),
        )
        self.assertEqual(recorded, {"A": 1, "B": 1})
        loss_of(*pairs).backward()
        self.assertEqual(recorded, {"A": 2, "B": 2})


class HiddenProduct(torch.autograd.Function):
    """d V, in the older style, whose operations no mode sees."""

    @staticmethod
    def forward(ctx, d, V):
        ctx.save_for_backward(d, V)
        return d[:, None] * V

    @staticmethod
    def backward(ctx, g):
        d, V = ctx.saved_tensors
        return (g * V.conj()).sum(-1).real, d[:, None] * g


class HiddenInTransforms(torch.autograd.Function):
    """d V in the newer style, which torch.func takes."""

    @staticmethod
    def forward(d, V):
        return d[:, None] * V

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        d, V = ctx.saved_tensors
        return (g * V).sum(-1), d[:, None] * g


class TestLobpcgCallableInside(CallableCase):
    """Callables that use autograd themselves."""

    def setUp(self):
        super().setUp()
        self.theta = random(M, seed=3).requires_grad_()
        self.scale = torch.tensor(0.7, dtype=REAL, requires_grad=True)

    def potential(self, theta, scale):
        """A function of theta whose Hessian at theta is known in closed form."""
        pair = theta * theta.roll(1)
        return (ladder() * theta.square()).sum() / 2 + scale * pair.sin().sum()

    def right(self, theta, scale):
        H = torch.autograd.functional.hessian(
            lambda x: self.potential(x, scale), theta, create_graph=True
        )
        return loss_of(*dense_eigenpairs(H, torch.eye(M, dtype=REAL)))

    def by_func(self, theta, scale):
        gradient = torch.func.grad(lambda x: self.potential(x, scale))

        def one(v):
            return torch.func.jvp(gradient, (theta,), (v,))[1]

        return torch.vmap(one, in_dims=1, out_dims=1)

    def by_autograd(self, theta, scale):
        def products(V):
            with torch.enable_grad():
                x = theta if theta.requires_grad else theta.detach().requires_grad_()
                (g,) = torch.autograd.grad(
                    self.potential(x, scale), x, create_graph=True
                )
                columns = [
                    torch.autograd.grad(
                        g, x, v, create_graph=torch.is_grad_enabled(), retain_graph=True
                    )[0]
                    for v in V.unbind(1)
                ]
            return torch.stack(columns, 1)

        return products

    def test_hessian_products_by_func(self):
        def ours(t, s):
            return loss_of(*self.solve(self.by_func(t, s)))

        leaves = (self.theta, self.scale)
        self.assert_orders(ours, self.right, leaves, (1e-8, 1e-6))

    def test_hessian_products_by_autograd(self):
        def ours(t, s):
            return loss_of(*self.solve(self.by_autograd(t, s)))

        leaves = (self.theta, self.scale)
        self.assert_orders(ours, self.right, leaves, (1e-8, 1e-6))

    def test_hessian_products_under_func_grad(self):
        for products in (
            lambda t, s: self.by_func(t.clone(), s),
            self.by_autograd,
        ):

            def ours(t, s):
                return loss_of(*self.solve(products(t, s)))

            leaves = (self.theta.detach(), self.scale.detach())
            got = torch.func.grad(ours, argnums=(0, 1))(*leaves)
            right = torch.autograd.grad(
                self.right(self.theta, self.scale), (self.theta, self.scale)
            )
            self.assert_close(got, right, 1e-8)

    def by_vjp(self, theta):
        gradient = torch.func.grad(lambda x: self.potential(x, 0.7))

        def products(V):
            pull = torch.func.vjp(gradient, theta)[1]
            return torch.vmap(lambda v: pull(v)[0], in_dims=1, out_dims=1)(V)

        return products

    def test_hessian_products_by_vjp(self):
        def ours(t):
            return loss_of(*self.solve(self.by_vjp(t)))

        def right(t):
            return self.right(t, 0.7)

        self.assert_orders(ours, right, (self.theta,), (1e-8, 1e-6))

    def test_what_torch_func_hides_is_an_error(self):
        """A tensor that torch.func wraps before any operation gets no substitute: its gradient must not be zero."""

        def ours(t):
            return self.solve(self.by_vjp(t))[0].sum()

        with self.assertRaisesRegex(RuntimeError, r"A hands.*\(24,\).*clone"):
            torch.func.grad(ours)(self.theta.detach())

    def test_older_functions(self):
        """What an autograd.Function reads is found where the graph ends."""
        d = (ladder() + random(M, seed=4) / 5).requires_grad_()
        E, X = self.solve(lambda V: HiddenProduct.apply(d, V))
        loss_of(E, X).backward()
        right = loss_of(*dense_eigenpairs(torch.diag(d), torch.eye(M, dtype=REAL)))
        self.assert_close((d.grad,), torch.autograd.grad(right, d), 1e-8)

    def test_older_functions_of_results(self):
        """Of what a Function hides, the leaves behind it are found."""
        d = random(M, seed=4).requires_grad_()
        D = ladder() + d.sin() / 5
        loss_of(*self.solve(lambda V: HiddenProduct.apply(D, V))).backward()
        A = torch.diag(ladder() + d.sin() / 5)
        right = loss_of(*dense_eigenpairs(A, torch.eye(M, dtype=REAL)))
        self.assert_close((d.grad,), torch.autograd.grad(right, d), 1e-8)

    def test_functions_under_func_grad_are_an_error(self):
        """Nothing can be put in the place of what an autograd.Function reads; operations beside it do not help."""
        for hidden in (HiddenProduct, HiddenInTransforms):

            def ours(d):
                def A(V):
                    return hidden.apply(d, V) + d[:, None] * V

                return self.solve(A)[0].sum()

            with self.assertRaises(RuntimeError):
                torch.func.grad(ours)(ladder())
        with self.assertRaisesRegex(
            RuntimeError, r"A depends on a tensor.*\(24,.*closure"
        ):
            torch.func.grad(ours)(ladder())

    def test_functions_of_copies_under_func_grad(self):
        """A copy made inside is seen."""
        d = ladder() + random(M, seed=4) / 5

        def ours(d):
            E, X = self.solve(lambda V: HiddenInTransforms.apply(d.clone(), V))
            return loss_of(E, X)

        def right(d):
            return loss_of(*dense_eigenpairs(torch.diag(d), torch.eye(M, dtype=REAL)))

        got = torch.func.grad(ours)(d)
        self.assert_close((got,), (torch.func.grad(right)(d),), 1e-8)


class TestLobpcgCallableTransforms(CallableCase):
    """Every transform over a parameter, against the same transform of the dense computation."""

    def setUp(self):
        super().setUp()
        self.T, self.w = random(M, M, seed=1), random(M, seed=2)
        self.V, self.v = random(M, M, seed=3), random(M, seed=4)

    def ours(self, T, w):
        return loss_of(
            *self.solve(lambda V: products_of_A(T, V), lambda V: products_of_B(w, V))
        )

    def dense(self, T, w):
        return loss_of(*dense_eigenpairs(matrix_A(T), matrix_B(w)))

    def assert_same(self, transform, bar=1e-8):
        got, right = (transform(f) for f in (self.ours, self.dense))
        flat = torch.utils._pytree.tree_leaves
        self.assert_close(flat(got), flat(right), bar)

    def test_grad(self):
        def both(f):
            return torch.func.grad(f, argnums=(0, 1))(self.T, self.w)

        self.assert_same(both)

    def test_grad_inside_autograd(self):
        """torch.func.grad in one parameter, then backward in both."""

        def transform(f):
            T, w = self.T.clone().requires_grad_(), self.w.clone().requires_grad_()
            g = torch.func.grad(f)(T, w)
            return torch.autograd.grad((g * self.V).sum(), (T, w))

        self.assert_same(transform, 1e-6)

    def test_vjp(self):
        self.assert_same(
            lambda f: torch.func.vjp(f, self.T, self.w)[1](
                torch.tensor(0.3, dtype=REAL)
            )
        )

    def test_jvp(self):
        self.assert_same(
            lambda f: torch.func.jvp(f, (self.T, self.w), (self.V, self.v))
        )

    def test_jvp_of_one(self):
        self.assert_same(
            lambda f: torch.func.jvp(lambda w: f(self.T, w), (self.w,), (self.v,))
        )

    def test_jvp_of_complex(self):
        T, V = (random(M, M, dtype=COMPLEX, seed=s) for s in (1, 2))

        def ours(T):
            return loss_of(*self.solve(lambda V: products_of_A(T, V), dtype=COMPLEX))

        def dense(T):
            eye = torch.eye(M, dtype=COMPLEX)
            return loss_of(*dense_eigenpairs(matrix_A(T), eye))

        got, right = (torch.func.jvp(f, (T,), (V,)) for f in (ours, dense))
        self.assert_close(got, right, 1e-8)

    def test_forward_ad(self):
        def transform(f):
            with forward_ad.dual_level():
                T = forward_ad.make_dual(self.T, self.V)
                w = forward_ad.make_dual(self.w, self.v)
                return tuple(forward_ad.unpack_dual(f(T, w)))

        self.assert_same(transform)

    def test_forward_over_reverse(self):
        def transform(f):
            with forward_ad.dual_level():
                T = self.T.clone().requires_grad_()
                dual = forward_ad.make_dual(T, self.V)
                (g,) = torch.autograd.grad(f(dual, self.w), T, create_graph=True)
                return (forward_ad.unpack_dual(g).tangent,)

        self.assert_same(transform, 1e-6)

    def test_grad_of_grad(self):
        def second(f):
            return torch.func.grad(
                lambda w: (torch.func.grad(f, argnums=1)(self.T, w) * self.v).sum()
            )(self.w)

        self.assert_same(second, 1e-6)

    def test_jvp_of_grad(self):
        self.assert_same(
            lambda f: torch.func.jvp(
                torch.func.grad(lambda w: f(self.T, w)), (self.w,), (self.v,)
            ),
            1e-6,
        )

    def test_hessian(self):
        def few(f):
            return lambda c: f(self.T, self.w + c[0] * self.v + c[1] * self.v.roll(1))

        self.assert_same(lambda f: torch.func.hessian(few(f))(self.v[:2] / 10), 1e-6)

    def test_jacrev(self):
        def ours(s):
            return self.solve(lambda V: products_of_A(self.T * s, V))[0]

        def dense(s):
            return torch.linalg.eigvalsh(matrix_A(self.T * s))[:K]

        s = torch.tensor([1.1], dtype=REAL)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            got, right = (jacobian(f)(s) for f in (ours, dense))
            self.assert_close((got,), (right,), 1e-8)

    def test_vmap(self):
        T, w = random(3, M, M, seed=6), random(M, 3, seed=7)
        for in_dims in ((0, 1), (None, 1), (0, None)):
            with self.subTest(in_dims=in_dims):
                args = [
                    M_ if d is not None else M_[0] if i == 0 else M_[:, 0]
                    for i, (M_, d) in enumerate(zip((T, w), in_dims))
                ]
                self.assert_same(lambda f: torch.vmap(f, in_dims)(*args))

    def test_vmap_of_grad(self):
        T = random(3, M, M, seed=6)
        self.assert_same(
            lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None))(
                T, self.w
            )
        )

    def test_vmap_of_jvp(self):
        w = random(3, M, seed=6)
        self.assert_same(
            lambda f: torch.vmap(
                lambda w, v: torch.func.jvp(lambda w: f(self.T, w), (w,), (v,))
            )(w, w.flip(0))
        )

    def test_grad_of_vmap(self):
        w = random(3, M, seed=6)

        def total(f):
            return lambda T: torch.vmap(f, (None, 0))(T, w).sum()

        self.assert_same(lambda f: torch.func.grad(total(f))(self.T))

    def test_backward_of_vmap(self):
        def transform(f):
            w = random(3, M, seed=6).requires_grad_()
            value = torch.vmap(f, (None, 0))(self.T, w).sum()
            (g,) = torch.autograd.grad(value, w, create_graph=True)
            return g, torch.autograd.grad(g.square().sum(), w)[0]

        self.assert_same(transform, 1e-6)

    def test_vmap_over_vmap(self):
        w = random(2, 2, M, seed=6)

        def twice(f):
            return torch.vmap(torch.vmap(lambda w: f(self.T, w)))(w)

        self.assert_same(twice)

    def test_vmap_over_the_start_block(self):
        X = random(3, M, K + 3, seed=6)

        def energies(X):
            def A(V):
                return products_of_A(self.T, V)

            return torch.lobpcg(A, K, X=X, largest=False, tol=1e-12)[0]

        right = torch.linalg.eigvalsh(matrix_A(self.T))[:K].expand(3, K)
        self.assert_close((torch.vmap(energies)(X),), (right,), 1e-10)

    def test_batched_cotangents(self):
        """torch.autograd.grad(is_grads_batched=True), first and second derivative."""

        def transform(f):
            w = self.w.clone().requires_grad_()
            value = f(self.T, w)
            (g,) = torch.autograd.grad(value, w, create_graph=True)
            scale = torch.tensor([1.0, 2.0], dtype=REAL)
            (first,) = torch.autograd.grad(
                value, w, scale, is_grads_batched=True, retain_graph=True
            )
            rows = torch.eye(M, dtype=REAL)[:3]
            return first, torch.autograd.grad(g, w, rows, is_grads_batched=True)[0]

        self.assert_same(transform, 1e-6)

    def test_preconditioner_of_wrapped_tensors(self):
        """A preconditioner that reads what a transform has wrapped."""

        def ours(w):
            d = ladder() + w.square()

            def A(V):
                return d[:, None] * V + 0.1 * (V.roll(1, 0) + V.roll(-1, 0))

            def iK(R):
                return R / d.detach()[:, None]

            return loss_of(*self.solve(A, iK=iK))

        def dense(w):
            A = matrix_B(w) + torch.diag(ladder() - 1)
            return loss_of(*dense_eigenpairs(A, torch.eye(M, dtype=REAL)))

        w = random(2, M, seed=6)
        for transform in (
            lambda f: torch.func.grad(f)(w[0]),
            lambda f: torch.vmap(f)(w),
            lambda f: torch.vmap(torch.func.grad(f))(w),
        ):
            self.assert_close((transform(ours),), (transform(dense),), 1e-8)


class TestLobpcgCallableContract(CallableCase):
    """What a callable must not do is named, with the matrix whose callable does it."""

    def A(self, V):
        return ladder(V.dtype)[:, None] * V

    def refused(self, error, fact, A=None, **options):
        with self.assertRaisesRegex(error, fact):
            self.solve(A or self.A, **options)

    def test_writes_to_the_block(self):
        def by_numpy(V):
            V.numpy()[...] *= 2
            return V.clone()

        for write in (lambda V: V.mul_(2.0), lambda V: V.sub_(1).add(V), by_numpy):
            for name in ("A", "B"):
                self.refused(ValueError, rf"lobpcg: {name} wrote", **{name: write})

    def test_writes_later(self):
        """Not only the first product is looked at."""
        calls = []

        def late(V):
            calls.append(V)
            return V.mul_(2.0) if len(calls) > 3 else 2.0 * self.A(V)

        self.refused(ValueError, "lobpcg: A wrote", late)

    def test_preconditioner_that_writes(self):
        self.refused(ValueError, "lobpcg: iK wrote", iK=lambda R: R.div_(2.0))

    def test_views_of_the_block(self):
        """The identity may be returned as it is, and as a view."""
        for identity in (lambda V: V, lambda V: V[:], lambda V: V.mT.mT):
            E, _ = self.solve(self.A, identity)
            self.assertLess((E - ladder()[:K]).abs().max().item(), 1e-10)
            X = self.start()
            operand(identity, "B").apply(X).zero_()
            self.assertTrue(torch.equal(X, self.start()))

    def test_not_linear(self):
        wrong = {
            "affine": lambda V: self.A(V) + 1e-3,
            "absolute": lambda V: self.A(V.abs()),
            "normalised": lambda V: self.A(V / V.norm(dim=0)),
        }
        for A in wrong.values():
            for name in ("A", "B"):
                self.refused(ValueError, rf"{name} is not linear.*\d", **{name: A})

    def test_conjugates(self):
        self.refused(
            ValueError, "A is not linear", lambda V: self.A(V).conj(), dtype=COMPLEX
        )

    def test_not_hermitian(self):
        def skew(V):
            return self.A(V) + 1e-6 * (V.roll(1, 0) - V.roll(-1, 0))

        for name in ("A", "B"):
            with self.assertWarnsRegex(UserWarning, rf"{name} is not Hermitian.*\d"):
                self.solve(**{"A": self.A, name: skew}, tol=1e-5)

    def test_products_of_limited_accuracy(self):
        """A product that is the result of an iteration itself is warned of, not refused."""

        def rounded(V):
            return self.A(V.float()).to(REAL)

        with self.assertWarnsRegex(UserWarning, "lobpcg: the callable A is .* only"):
            self.solve(rounded, tol=1e-5)

    def test_rounding_is_not_reported(self):
        """Products in several steps, of single precision and badly scaled, pass in silence."""
        T = random(M, M, seed=1)
        for dtype, size in itertools.product((torch.float32, REAL), (1e-8, 1.0, 1e8)):
            S = (T * size).to(dtype)
            X = self.start().to(dtype)
            torch.lobpcg(lambda V: S @ (S.mH @ V), K, X=X, tol=1e-4)

    def test_shape_dtype_values(self):
        wrong = {
            "shape": lambda V: self.A(V)[:-1],
            "dtype": lambda V: self.A(V).float(),
            "device": lambda V: self.A(V).to("meta"),
            "NaN": lambda V: self.A(V) * math.nan,
            "tensor": lambda V: None,
        }
        for (fact, A), grad in itertools.product(wrong.items(), (True, False)):
            with torch.set_grad_enabled(grad):
                self.refused((ValueError, TypeError), f"lobpcg: A returned .*{fact}", A)
        w = random(M, seed=2)
        for fact in ("shape", "dtype", "tensor"):

            def f(w):
                return self.solve(lambda V: wrong[fact](V * w[:, None]))[0].sum()

            with self.assertRaisesRegex((ValueError, TypeError), "lobpcg: A returned"):
                torch.func.grad(f)(w)

    def test_errors_and_interrupts_pass_through(self):
        """No mode stays behind, so what follows runs as before."""
        w = random(M, seed=2).requires_grad_()

        class Stop(Exception):
            pass

        for error in (Stop, KeyboardInterrupt):
            for after in (0, 1, 5):
                calls = []

                def A(V):
                    calls.append(V)
                    if len(calls) > after:
                        raise error
                    return (ladder() + w)[:, None] * V

                with self.assertRaises(error):
                    self.solve(A)
                with self.assertRaises(error):
                    torch.func.grad(lambda w: self.solve(A)[0].sum())(w)
                self.assertEqual(_get_current_function_mode_stack(), [])
                self.assertTrue(torch.is_grad_enabled())

    def test_parameter_changed_before_backward(self):
        w = random(M, seed=2).requires_grad_()
        v = w * 1.0
        E, _ = self.solve(lambda V: (ladder() + v)[:, None] * V)
        v.mul_(2.0)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            E.sum().backward()

    def test_a_stored_result_is_found_where_it_ends(self):
        """A callable that keeps what it computed in its first call: its parameter is the one behind it."""
        w = random(M, seed=2).requires_grad_()
        kept = []

        def A(V):
            if not kept:
                kept.append(ladder() + w.square())
            return kept[0][:, None] * V

        E, X = self.solve(A)
        loss_of(E, X).backward()
        D = torch.diag(ladder() + w.square())
        right = loss_of(*dense_eigenpairs(D, torch.eye(M, dtype=REAL)))
        self.assert_close((w.grad,), torch.autograd.grad(right, w), 1e-8)

    def test_blocks_of_any_rank(self):
        """A callable that knows (m, p) alone serves derivatives whose blocks have further dimensions."""
        w = random(M, seed=2)

        def ours(w):
            def A(V):
                m, p = V.shape
                U = products_of_B(w, V) + ladder()[:, None] * V
                return U.reshape(4, 6, p).reshape(m, p)

            return loss_of(*self.solve(A))

        def dense(w):
            D = matrix_B(w) + torch.diag(ladder())
            return loss_of(*dense_eigenpairs(D, torch.eye(M, dtype=REAL)))

        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            self.assert_close((jacobian(ours)(w),), (jacobian(dense)(w),), 1e-8)
        got, right = (torch.func.hessian(f)(w) for f in (ours, dense))
        self.assert_close((got,), (right,), 1e-6)


class Declared:
    """Products of a diagonal matrix by @ or matmul, with shape and dtype."""

    def __init__(self, d, dtype=None):
        self.d, self.shape, self.dtype = d, (len(d), len(d)), dtype or d.dtype

    def __matmul__(self, V):
        return self.d[:, None] * V


class TestLobpcgObjects(CallableCase):
    """Objects that multiply, and callables that say how large they are."""

    def check(self, A, **options):
        E, X = torch.lobpcg(A, K, largest=False, tol=1e-10, **options)
        self.assertEqual(X.shape, (M, K))
        self.assertLess((E - ladder()[:K]).abs().max().item(), 1e-8)

    def test_shape_and_dtype_take_the_place_of_X(self):
        def A(V):
            return ladder()[:, None] * V

        A.shape, A.dtype = (M, M), REAL
        self.check(A)
        self.check(Declared(ladder()))
        self.check(Declared(ladder()), B=Declared(torch.ones(M, dtype=REAL)))
        self.check(torch.diag(ladder()), iK=Declared(1 / ladder()))

    def test_gradient_through_an_object(self):
        w = random(M, seed=2).requires_grad_()
        E, _ = torch.lobpcg(Declared(ladder() + w / 9), K, largest=False)
        E.sum().backward()
        right = torch.cat([torch.ones(K), torch.zeros(M - K)]).to(REAL)
        self.assertLess((9 * w.grad - right).abs().max().item(), 1e-6)

    def test_what_does_not_fit(self):
        A, X = Declared(ladder()), self.start()
        bad = {
            "A has dtype torch.float64, X has torch.float32": dict(A=A, X=X.float()),
            r"A has shape \[24, 24\]": dict(A=A, X=X[:-1]),
            "B has shape": dict(A=A, B=Declared(ladder()[:-1])),
            "A is 24 x 3": dict(A=type("Tall", (Declared,), {})(ladder())),
            "A has dtype torch.int64": dict(A=Declared(torch.arange(1, M + 1))),
            "size is unknown": dict(A=lambda V: V),
            "A is list": dict(A=[[1.0]]),
        }
        bad["A is 24 x 3"]["A"].shape = (24, 3)
        for fact, arguments in bad.items():
            with self.assertRaisesRegex((ValueError, TypeError), f"lobpcg: .*{fact}"):
                torch.lobpcg(k=1, **arguments)

    def test_scipy(self):
        try:
            import numpy
            import scipy.sparse
            from scipy.sparse.linalg import aslinearoperator
        except ImportError:
            self.skipTest("SciPy is not installed")
        D = scipy.sparse.diags_array(numpy.arange(1.0, M + 1), format="csr")
        inverse = scipy.sparse.diags_array(1 / numpy.arange(1.0, M + 1), format="csr")
        for A in (D, aslinearoperator(D), D.toarray()):
            self.check(A)
        one = aslinearoperator(scipy.sparse.eye_array(M, format="csr"))
        self.check(aslinearoperator(D), B=one)
        self.check(torch.diag(ladder()), B=one, iK=aslinearoperator(inverse))
        X = self.start(batch=(2,))
        E, _ = torch.lobpcg(aslinearoperator(D), K, X=X, largest=False, tol=1e-10)
        self.assertLess((E - ladder()[:K]).abs().max().item(), 1e-8)

    def test_tensor_beside_an_operator_of_arrays(self):
        """The operator is a constant; the tensor keeps its gradient."""
        try:
            from scipy.sparse.linalg import aslinearoperator
        except ImportError:
            self.skipTest("SciPy is not installed")
        B = matrix_B(random(M, seed=2))
        A = torch.diag(ladder()).requires_grad_()
        E, X = torch.lobpcg(
            A, K, B=aslinearoperator(B.numpy()), largest=False, tol=1e-12
        )
        (g,) = torch.autograd.grad(loss_of(E, X), A)
        (right,) = torch.autograd.grad(loss_of(*dense_eigenpairs(hermitian(A), B)), A)
        self.assert_close((g,), (right,), 1e-8)


if __name__ == "__main__":
    run_tests()
