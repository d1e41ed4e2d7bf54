"""Chebyshev polynomials of C = +-D^-1 A: q(C) ~ (C - s)^-1 on the unwanted spectrum in place of a preconditioner, and a
filter of start vectors where there is one.

C is A (its negative where the largest pairs are wanted), measured in D: the identity, or B where B is diagonal, or
diag(A) where B is any other matrix, for then a positive definite A is all that is asked of it.  With T_d the Chebyshev
polynomial of degree d, x(t) = (c - t) / e the map of the interval [a, up], center c and half width e, to [-1, 1] and s
a shift before the wanted end of the spectrum,

    q(t) = (1 - T_d(x(t)) / T_d(x(s))) / (t - s),

so q(t) (t - s) is 1 up to 1 / T_d(x(s)) on the interval, and q is positive on all of the spectrum: it is a legitimate
preconditioner, of which LOBPCG loses no pair (Golub and Varga 1961 for the iteration; Knyazev 2001, section 4, for what
is asked of a preconditioner).  In each iteration q costs d - 1 products with A and nothing else (product_form, or of
a dense A a recurrence); inner products, which are what dominates an iteration without it, are needed d times less
often.
"""

import math
from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import (
    fixed_block,
    inner,
    is_single,
    largest_entries,
    norms,
    squares,
)
from torch._lobpcg_impl.operand import Dense, Operand, Pencil, Sparse
from torch._lobpcg_impl.product_form import Interval, precision, ProductForm
from torch._lobpcg_impl.sparse import row_indices


# Lanczos steps for the bound of the spectrum: with ten and a full residual the bound was below the largest eigenvalue
# in none of 180 random matrices.
_LANCZOS_STEPS = 10
# |q(t) (t - s) - 1| on the interval is at most the inverse of this.
_DAMPING = 30.0
# Above this degree a product more gains less than a product of another iteration.
_MOST = 60
# Of a dense matrix: at orders 1000 and 2000 a degree of 4 takes a third of the iterations and 1.0 to 1.3 times the
# products, three of four in single precision, 0.65 to 0.85 of the time; with 3 and 5 it is 0.0 to 0.1 more.
_MOST_DENSE = 4
_DENSE_FROM = 512  # order under which ten Lanczos steps cost more than is spared
# diag(A) is tried as a measure where it varies by more than this: the degree falls by at most the square root.
_GRADED = 4.0
# Degree of the filter of start vectors.  Of Laplacians, graphs and meshes with a multigrid cycle twelve products spare
# one in ten applications of it; twenty spare two in a hundred more, and four may pass over a small spectrum.
_FILTER = 12


class Chebyshev:
    """q for one matrix or a batch, in the measure that serves best at the time."""

    def __init__(self, choices: List["Polynomial"]) -> None:
        self.choices, self.chosen = choices, choices[0]

    def aim(self, E: Tensor, X: Tensor) -> None:
        """Set measure, interval and degree from the Ritz pairs E (*, n), X (*, m, n), wanted ones first."""
        first, *others = self.choices
        first.aim(E, X)
        self.chosen = first
        for other in others:
            other.aim(E, X)
            # An inverse at zero tells a from l by their ratio alone.
            if other.serves and 1.5 * other.degree < first.degree:
                self.chosen = other
        self.chosen.settle()

    @property
    def is_one(self) -> bool:
        """Whether q(C) D^-1 R is R itself."""
        return self.chosen.is_one

    def __call__(self, R: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """q(C) D^-1 R, R (*, m, p), in `out` where that is given, which may be R; R itself where q is one."""
        return self.chosen(R, out)

    def learn(self, W: Tensor, of_A: Tensor, of_B: Tensor) -> None:
        """Raise a bound of the spectrum that a direction's Rayleigh quotient exceeds.

        W (*, m, p), of_A and of_B (*, p): w^H A w and w^H B w.
        """
        self.chosen.learn(W, of_A, of_B)

    def widen(self) -> None:
        """Raise the bounds of the spectrum by a fifth of the width."""
        self.chosen.widen()


class Polynomial:
    """q in one measure D, (*, m) or None for the identity; definite: whether D is diag(A).

    The interval follows the Ritz values of the iteration (`aim`), its end `up` what is learned of the other end of the
    spectrum (`learn`).  bounds: for each matrix (lowest, up), as far as known.
    """

    def __init__(
        self,
        pencil: Pencil,
        sign: float,
        most: int,
        D: Optional[Tensor],
        definite: bool,
    ) -> None:
        assert isinstance(pencil.A, (Sparse, Dense))
        self.A, self.sign, self.most = pencil.A, sign, most
        self.D, self.definite = D, definite
        self.m = pencil.m
        # Where A has no batch of its own, one interval serves all.
        self.count = math.prod(self.A.tensor.shape[:-2])
        self.form: Union[ProductForm, Recurrence, None] = None
        like = pencil.empty()
        self.eps = torch.finfo(like.dtype).eps
        self.bounds = self._bounds(like)
        self.intervals: List[Interval] = []
        self.degree = 1
        self.serves = True

    # -- the spectrum ---------------------------------------------------------------------------------------------

    def _bounds(self, like: Tensor) -> List[Tuple[float, float]]:
        """For each matrix the least Ritz value of a few Lanczos steps, and a bound of the spectrum: the greatest one,
        the norm of the last residual and a hundredth of the width on top.

        The eigenvalue that the residual belongs to lies within its norm of the Ritz value, and one that is farther out
        has at this point a hardly smaller residual, so that bound is safe in practice; `learn` mends it.
        """
        batch = self.A.tensor.shape[:-2]
        steps = min(_LANCZOS_STEPS, self.m)
        v = fixed_block(self.m, 1, 1 << 21, like).expand([*batch, self.m, 1])
        v = v / norms(v, keepdim=True)
        half = None if self.D is None else self.D.rsqrt().unsqueeze(-1)
        rows = v.new_empty([*batch, steps, self.m])
        diagonal, off = [], []
        for i in range(steps):
            rows[..., i, :] = v[..., 0]
            u = v if half is None else v * half
            u = self.A.apply(u) * self.sign
            u = u if half is None else u * half
            diagonal.append(inner(v, u))  # (*, 1)
            Q = rows[..., : i + 1, :].mT
            u = u - Q @ (Q.mH @ u)
            size = norms(u, keepdim=True)
            # An invariant subspace ends the recurrence: zeros follow.
            rounding = 8 * self.eps * self.m**0.5
            going = size > rounding * diagonal[0].abs().unsqueeze(-1)
            size = size.where(going, torch.zeros_like(size))
            v = torch.where(going, u / size, torch.zeros_like(u))
            off.append(size[..., 0])
        a, b = torch.cat(diagonal, -1).double(), torch.cat(off, -1).double()
        over = torch.cumsum((b == 0).to(torch.int8), -1)[..., :-1] > 0
        a[..., 1:] = torch.where(over, a[..., :1], a[..., 1:])
        T = torch.diag_embed(a)
        if steps > 1:
            T = T + torch.diag_embed(b[..., :-1], -1)
        ritz = torch.linalg.eigvalsh(T)
        low, top, last = ritz[..., 0], ritz[..., -1], b[..., -1]
        up = top + last + 0.01 * (top - low + 2 * last)
        return list(zip(low.reshape(-1).tolist(), up.reshape(-1).tolist()))

    def learn(self, W: Tensor, of_A: Tensor, of_B: Tensor) -> None:
        """Chebyshev.learn: of (sign A, D), by a fifth of the width."""
        if self.definite and self.D is not None:
            of_B = self._forms(W).to(of_A.device, of_A.dtype)
        # A masked direction is zero.
        quotient = (of_A * self.sign / of_B).nan_to_num(-math.inf, -math.inf, -math.inf)
        for i, values in enumerate(self._each(quotient)):
            value = max(values)
            low, up = self.bounds[i]
            if value > up + 64.0 * self.eps * abs(up):
                self.bounds[i] = (low, value + 0.2 * (value - min(low, value)))

    def _forms(self, X: Tensor) -> Tensor:
        """x^H D x, (*, p)."""
        assert self.D is not None
        return (squares(X).mT @ self.D.unsqueeze(-1)).squeeze(-1)

    def widen(self) -> None:
        """Chebyshev.widen."""
        self.bounds = [(low, up + 0.2 * (up - low)) for low, up in self.bounds]

    def _each(self, values: Tensor) -> List[List[float]]:
        """The values (+, *, p) for each matrix (*) that has an interval of its own, over all of a batch (+) that A does
        not have."""
        count, p = self.count, values.shape[-1]
        numbers: List[List[float]] = values.reshape(-1, count * p).tolist()
        return [
            [x for row in numbers for x in row[i * p : (i + 1) * p]]
            for i in range(count)
        ]

    @property
    def is_one(self) -> bool:
        """Chebyshev.is_one."""
        return self.degree == 1 and (self.definite or self.D is None)

    # -- the polynomial -------------------------------------------------------------------------------------------

    def aim(self, E: Tensor, X: Tensor) -> None:
        """Set interval and degree; whether q serves: it tells wanted from unwanted, and A is positive definite where
        it must be."""
        ends = self._ends(E)
        far = all(a - l > 0.5 * abs(l) for l, a in ends)
        if self.definite and self.D is not None:
            E = E / self._forms(X).to(E.device, E.dtype)
            ends = self._ends(E)
        low, high = zip(*ends)
        self.intervals = [
            self._interval(l, a, bound) for l, a, bound in zip(low, high, self.bounds)
        ]
        degrees = [self._degree(l, i) for l, i in zip(low, self.intervals)]
        self.degree = max(1, min(max(degrees), self.most))
        positive = not self.definite or min(low) > 0.0
        self.serves = positive and far
        if not positive:
            self.degree = 1

    def _ends(self, E: Tensor) -> List[Tuple[float, float]]:
        """Least and largest of sign E for each interval: on the host, where two numbers of each are wanted."""
        rows = self._each(E)
        both = [(min(row), max(row)) for row in rows]
        return both if self.sign > 0 else [(-a, -l) for l, a in both]

    def settle(self) -> None:
        """Prepare for products."""
        if self.degree > 1:
            if self.form is None:
                if isinstance(self.A, Sparse):
                    self.form = ProductForm(self.A, self.D, self.sign)
                else:
                    self.form = Recurrence(self.A.tensor, self.sign)
            self.form.aim(self.intervals, self.degree)

    def _interval(self, l: float, a: float, bound: Tuple[float, float]) -> Interval:
        """l, a: first and last Ritz value."""
        # A multiple of the identity has no width.
        width = max(bound[1] - l, 64.0 * self.eps * abs(l), 1e-290)
        # Where all columns share an eigenvalue, nothing says how far the next is.
        a = min(max(a, l + 1e-4 * width), l + 0.9 * width)
        # Before the wanted eigenvalues, so that q is positive there.
        return Interval(0.0 if self.definite else l - 1e-3 * (a - l), a, l + width)

    def _degree(self, l: float, interval: Interval) -> int:
        x = interval.at(l)
        if not x > 1.0 + 1e-9:  # NaN too
            return self.most
        d = math.ceil(math.acosh(_DAMPING) / math.acosh(x))
        # Single precision cannot tell what is wanted from what is not.
        unclear = is_single(self.eps) and interval.a - l < 100.0 * self.eps * abs(l)
        return min(d, 20) if unclear else d

    def __call__(self, R: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Chebyshev.__call__."""
        if self.degree > 1:
            assert self.form is not None
            self.A.columns += (self.degree - 1) * R.shape[-1]
            return self.form(R, out)
        if self.D is None or self.is_one:
            return R
        return torch.div(R, self.D.unsqueeze(-1), out=out)


class Recurrence:
    """q(C) on blocks, times a positive factor for each column, C = +-A of a dense A, by the Chebyshev iteration for
    (C - s) z = r from zero.

    Products are in single precision, as in module product_form, and for the same reason: they read half of the memory.
    """

    def __init__(self, A: Tensor, sign: float) -> None:
        self.A, self.sign = A, sign
        self.M: Optional[Dense] = None  # A in units, in the precision of products
        self.unit, self.degree = 1.0, 1
        self.interval = Interval(0.0, 0.0, 0.0)

    def aim(self, intervals: List[Interval], degree: int) -> None:
        """Set the polynomial.  Cost: a copy of A where the precision changes."""
        (self.interval,), self.degree = intervals, degree
        dtype = precision(self.A.dtype, intervals)
        if self.M is not None and self.M.tensor.dtype == dtype:
            return
        self.unit, A = 1.0, self.A
        if dtype != A.dtype:
            # A power of two that brings eigenvalues near one: none leaves the range.
            self.unit = 2.0 ** -math.frexp(self.interval.half)[1]
            A = (A * self.unit).to(dtype)
        self.M = Dense("A", A)

    def __call__(self, R: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """q(C) R, R (*, m, p), in `out` where that is given, which may be R."""
        assert self.M is not None
        i, unit, r = self.interval, self.unit, R
        if self.M.tensor.dtype != R.dtype:
            top = largest_entries(R).unsqueeze(-2)
            r = R / torch.where(top > 0, top, torch.ones_like(top))
            r = r.to(self.M.tensor.dtype)
        s, e = unit * i.s, unit * i.half
        center = unit * (i.up + i.a) / 2 - s
        rho = e / center
        p = r / center
        z = p.clone()
        for _ in range(self.degree - 1):
            r = torch.add(r, self.M.apply(p), alpha=-self.sign).add_(p, alpha=s)
            following = 1.0 / (2.0 * center / e - rho)
            p.mul_(following * rho).add_(r, alpha=2.0 * following / e)
            z.add_(p)
            rho = following
        return z.to(R.dtype) if out is None else out.copy_(z)


def is_diagonal(M: Operand) -> bool:
    """Whether M is sparse and holds its diagonal alone."""
    if not isinstance(M, Sparse):
        return False
    rows = M.rows
    return rows.values().numel() == rows.shape[0] and bool(
        (row_indices(rows) == rows.col_indices()).all()
    )


def polynomial(pencil: Pencil, sign: float, most: int = _MOST) -> Optional[Chebyshev]:
    """The polynomial of a checked pencil, of degree `most` at most; None where none serves.

    Measures are the identity, or B where it is diagonal, and diag(A), where that differs from them and A is positive
    definite and its smallest pairs are wanted.  Products with a callable are the dear part of an iteration, and no
    polynomial needs fewer of them than plain LOBPCG does (1.1 to 1.6 times as many).
    """
    A, B, most = pencil.A, pencil.B, min(most, _MOST)
    if pencil.iK is not None or most < 2:
        return None
    if isinstance(A, Dense):
        if pencil.generalized or A.tensor.dim() > 2 or pencil.m < _DENSE_FROM:
            return None
        most = min(most, _MOST_DENSE)
        return Chebyshev([Polynomial(pencil, sign, most, None, False)])
    if not isinstance(A, Sparse):
        return None
    choices = []
    exact = not pencil.generalized or is_diagonal(B)
    D = None if not pencil.generalized else B.diagonal()
    if exact and (D is None or D.dim() == A.tensor.dim() - 1):
        choices.append(Polynomial(pencil, sign, most, D, False))
    if sign > 0:
        d = A.diagonal()
        ratio = d if D is None else d / D
        low, high = ratio.amin(-1), ratio.amax(-1)
        if bool((low > 0).all()) and (not exact or bool((high > _GRADED * low).any())):
            q = Polynomial(pencil, sign, most, d, True)
            if min(low for low, _ in q.bounds) > 0.0:
                choices.append(q)
    return Chebyshev(choices) if choices else None


class LowPass:
    """p(C) = T_d(x(C)) / T_d(x(0)) in the measure diag(A): one at zero, at most 1 / _DAMPING on the upper 96 % of the
    spectrum of a positive definite A.

    Blocks that a preconditioner is to serve begin with it where products with A are cheap: what is left of them are
    vectors that are smooth in the sense of A, null vectors among them in full.  up: a bound of the spectrum of each
    matrix.
    """

    def __init__(self, A: Sparse, D: Tensor, up: List[float]) -> None:
        self.A, self.D = A, D.unsqueeze(-1)
        self.form = ProductForm(A, D, 1.0)
        x = math.cosh(math.acosh(_DAMPING) / _FILTER)
        share = (x - 1.0) / (x + 1.0)
        self.form.aim([Interval(0.0, share * b, b) for b in up], _FILTER)

    def __call__(self, Z: Tensor) -> Tensor:
        """p(C) Z; Z (*, m, p) itself where a column grows, for then A is not positive semidefinite."""
        Y = self.A.apply(Z)
        self.A.columns += (_FILTER - 1) * Z.shape[-1]
        Y = Z - self.form(Y)
        grown = inner(Y, self.D * Y) > inner(Z, self.D * Z)
        return Z if bool(grown.any()) else Y


def low_pass(pencil: Pencil, sign: float) -> Optional[LowPass]:
    """The filter of a checked pencil where its smallest pairs are wanted, or None: where products with A are dear, or
    its diagonal shows that it is not positive definite."""
    A = pencil.A
    if sign < 0 or not isinstance(A, Sparse):
        return None
    D = A.diagonal()
    if not bool((D > 0).all()):
        return None
    # Gershgorin's bound.
    up = (A.row_sums() / D).amax(-1)
    return LowPass(A, D, up.reshape(-1).tolist())
