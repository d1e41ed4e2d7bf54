"""A Chebyshev approximation of (C - s)^-1 as the product of its linear factors, C = +-D^-1 A of a sparse A.

With T_d the Chebyshev polynomial of degree d, x(t) = (c - t) / e the map of an interval to [-1, 1], s a shift outside,

    q(t) = (1 - T_d(x(t)) / T_d(x(s))) / (t - s)

has the zeros x_j = cosh(eta + 2 pi i j / d), j = 1, ..., d - 1, cosh eta = x(s), on an ellipse around [-1, 1].  Two
that are conjugates of each other make a real quadratic, and b -> (Y^2 + f Y + g) b is Y ((Y + f) b) + g b: two products
with the matrix, each of which takes the sum with it, and no other pass over a block.  A three-term recurrence has a
pass more in every step, which is a third of its time.

What these products cost is the way of matrix and block through memory, so they are in single precision: a direction of
search need not be exact, and q of a matrix that differs by rounding is as positive (Kressner, Ma and Shao 2023 do so
with factorizations).  Iterations are as many.  Only where the interval begins so close to the shift that this rounding
would blur the two are products in the precision of A.
"""

import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import columns, largest_entries
from torch._lobpcg_impl.operand import Sparse
from torch._lobpcg_impl.sparse import (
    columns_at_a_time,
    csr_matrix,
    row_indices,
    whole_rows,
)


# How far from the origin of Y the shift may lie, in half widths of the interval.  Zeros crowd at the shift, d^-2 apart,
# and each is exact to eps of its distance from the origin: in single precision and d = 60 the error of a product is
# 2e-5 with the origin at the shift, 3e-5 here and 4e-3 with the origin in the middle (a recurrence: 2e-5).
_NEAR = 0.05
# The distance from shift to interval, in half widths, below which products are in the precision of A: single precision
# moves eigenvalues by 1e-7 of that width.
_BLURRED = 1e-5
# Factors are taken in the order of the fractional parts of multiples of this, which spreads the zeros of each partial
# product over the whole ellipse, so that it is as even as the whole.
_GOLDEN = 0.6180339887498949


class Interval(NamedTuple):
    """[a, up] of one matrix, where q damps, and the shift s < a."""

    s: float
    a: float
    up: float

    @property
    def half(self) -> float:
        return 0.5 * (self.up - self.a)

    def at(self, t: float) -> float:
        """x(t): above 1 for t < a."""
        return (self.a + self.up - 2.0 * t) / (self.up - self.a)


class _Factors(NamedTuple):
    """q = scale * product over Y = unit (o - C) / e of Y + numbers[0], for even degrees, and then of
    Y^2 + numbers[i] Y + numbers[i + 1]."""

    unit: float
    scale: float
    numbers: List[float]


def _factors(interval: Interval, origin: float, degree: int) -> _Factors:
    d, e = degree, interval.half
    eta = math.acosh(interval.at(interval.s))
    # In units of the ellipse's capacity, so that no partial product leaves the range.
    unit = 2.0 * math.exp(-eta)
    scale = unit / (e * (1.0 + math.exp(-2.0 * eta * d)))
    # x = 1 - (t - a) / e, without the cancellation of c - o.
    middle = interval.at(origin)
    numbers = [unit * (math.cosh(eta) + middle)] if d % 2 == 0 else []
    pairs = range(1, (d + 1) // 2)
    for j in sorted(pairs, key=lambda j: j * _GOLDEN % 1.0):
        angle = 2.0 * math.pi * j / d
        x = middle - math.cosh(eta) * math.cos(angle)
        y = math.sinh(eta) * math.sin(angle)
        numbers += [unit * 2.0 * x, unit * unit * (x * x + y * y)]
    return _Factors(unit, scale, numbers)


class ProductForm:
    """q(C) D^-1 on blocks; D (*, m) or None for the identity.

    A batch is one block-diagonal matrix with factors for each.  Blocks are held by rows here, (m, p) contiguous, which
    is what sparse products take.
    """

    def __init__(self, A: Sparse, D: Optional[Tensor], sign: float) -> None:
        self.sign, self.order = sign, A.tensor.shape[-1]
        self.rows = A.rows  # D^-1 A
        self.inverse: Optional[Tensor] = None
        if D is not None:
            self.inverse = D.reshape(-1, 1).reciprocal()
            values = self.rows.values() * self.inverse[row_indices(self.rows), 0]
            self.rows = self._matrix(values)
        self.shifted = self.M = self.rows  # D^-1 A - o; the same in units
        self.origins: List[float] = []
        self.dtype = self.rows.dtype  # of the products
        self.on: Optional[Tensor] = None  # places of the diagonal among the values
        self.alpha = self.unit = 1.0
        self.scale: Any = 1.0
        self.single = False
        self.numbers: List[Any] = []
        self.buffers: Tuple[Tensor, ...] = ()

    def _matrix(self, values: Tensor) -> Tensor:
        M = self.rows
        return csr_matrix(M.crow_indices(), M.col_indices(), values, M.shape[0])

    def aim(self, intervals: List[Interval], degree: int) -> None:
        """Set the polynomial.  Cost: a pass over the stored elements of a batch; else only where origin or precision
        change."""
        far = [abs(i.s - o) > _NEAR * i.half for i, o in zip(intervals, self.origins)]
        moves = any(far) or not far
        if moves:
            self._move([0.0 if abs(i.s) <= _NEAR * i.half else i.s for i in intervals])
        dtype = precision(self.rows.dtype, intervals)
        if moves or dtype != self.dtype:
            self._set_precision(dtype, intervals)
        each = [_factors(i, o, degree) for i, o in zip(intervals, self.origins)]
        self.single = degree % 2 == 0
        if len(each) == 1:
            self.scale, self.numbers = each[0].scale, each[0].numbers
            self.alpha = -self.sign * each[0].unit / intervals[0].half / self.unit
            return
        self.alpha = -self.sign
        units = [f.unit / i.half for f, i in zip(each, intervals)]
        row = row_indices(self.shifted)
        factors = self._of_rows(units)[row, 0]
        self.M = self._matrix((self.shifted.values() * factors).to(dtype))
        self.scale = self._of_rows([f.scale for f in each])
        real = self.M.values().dtype.to_real()
        self.numbers = [
            self._of_rows(list(f)).to(real) for f in zip(*(f.numbers for f in each))
        ]

    def _set_precision(self, dtype: torch.dtype, intervals: List[Interval]) -> None:
        self.dtype, self.unit, self.M = dtype, 1.0, self.shifted
        if dtype != self.rows.dtype and len(intervals) == 1:
            # A power of two that brings entries near one: none leaves the range.
            self.unit = 2.0 ** -math.frexp(intervals[0].half)[1]
            self.M = self._matrix((self.shifted.values() * self.unit).to(dtype))

    def _of_rows(self, numbers: List[float]) -> Tensor:
        """A number for each matrix of a batch as one for each row, (m, 1)."""
        values = self.rows.values()
        column = torch.tensor(numbers, dtype=torch.float64)
        column = column.to(values.device, values.dtype.to_real())
        return column.repeat_interleave(self.order).unsqueeze(-1)

    def _move(self, origins: List[float]) -> None:
        """Set the origin of each matrix."""
        self.origins = origins
        self.shifted = self.rows
        if any(o != 0.0 for o in origins):
            if self.on is None:
                self.rows, self.on = _diagonal_places(self.rows)
            values = self.rows.values().clone()
            if len(origins) == 1:
                values[self.on] -= self.sign * origins[0]
            else:
                values[self.on] -= self.sign * self._of_rows(origins)[:, 0]
            self.shifted = self._matrix(values)

    def __call__(self, R: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """q(C) D^-1 R, R (*, m, p), in `out` where that is given, which may be R; columns are contiguous."""
        out = columns(torch.empty_like(R)) if out is None else out
        if R.dim() == 2:
            self._pieces(R, out)
            return out
        # Many blocks of one matrix are a wide block.
        M, p = self.rows.shape[0], R.shape[-1]
        wide = R.reshape(-1, M, p).movedim(0, 1)  # (M, +, p)
        Z = torch.empty(wide.shape, dtype=R.dtype, device=R.device)
        self._product(wide.reshape(M, -1), Z.view(M, -1))
        return out.copy_(Z.movedim(1, 0).reshape(R.shape))

    def _pieces(self, R: Tensor, out: Tensor) -> None:
        """Some columns at a time on a host, so that three blocks fit into a cache."""
        p = width = R.shape[-1]
        if R.device.type == "cpu":
            width = columns_at_a_time(R.shape[0], self.dtype.itemsize)
        for i in range(0, p, width):
            self._product(R[:, i : i + width], out[:, i : i + width])

    def _product(self, R: Tensor, out: Tensor) -> None:
        """out := q(C) D^-1 R, R (m, p)."""
        m, p = R.shape
        size, factor = self.inverse, self.scale
        if self.dtype != R.dtype:
            # In units of its largest entry a column is not beyond what single precision holds.
            R = R if self.inverse is None else R * self.inverse
            top = largest_entries(R)
            top = torch.where(top > 0, top, torch.ones_like(top))
            size, factor = top.reciprocal(), top * self.scale
        wide = whole_rows(p, self.dtype.itemsize)
        b, v = (buffer.view(m, wide) for buffer in self._buffers(m * wide, R))
        if size is None:
            b[:, :p].copy_(R)
        else:
            torch.mul(R, size, out=b[:, :p])
        b[:, p:].zero_()
        torch.mul(self._factored(b, v)[:, :p], factor, out=out)

    def _buffers(self, size: int, like: Tensor) -> Tuple[Tensor, ...]:
        """Memory of two blocks, held: new pages cost more than a product with them."""
        held = self.buffers[0] if self.buffers else None
        if held is None or held.dtype != self.dtype or held.numel() < size:
            new = (like.new_empty(size, dtype=self.dtype) for _ in range(2))
            self.buffers = tuple(new)
        return tuple(buffer[:size] for buffer in self.buffers)

    def _factored(self, b: Tensor, v: Tensor) -> Tensor:
        """The product of the factors of q, without its scale, and b, in one of b and v, (m, p) contiguous."""
        numbers = iter(self.numbers)
        if self.single:
            self._step(next(numbers), b, b, v)
            b, v = v, b
        for f, g in zip(numbers, numbers):
            self._step(f, b, b, v)
            self._step(g, b, v, b)
        return b

    def _step(self, c: Any, T: Tensor, U: Tensor, out: Tensor) -> None:
        """out := c T + Y U."""
        if isinstance(c, float):
            torch.addmm(T, self.M, U, beta=c, alpha=self.alpha, out=out)
        else:
            torch.mul(T, c, out=out)
            torch.addmm(out, self.M, U, alpha=self.alpha, out=out)


def precision(dtype: torch.dtype, intervals: List[Interval]) -> torch.dtype:
    """In which products are with a matrix of that dtype."""
    clear = all(i.a - i.s > _BLURRED * i.half for i in intervals)
    return _single(dtype) if clear else dtype


def _single(dtype: torch.dtype) -> torch.dtype:
    """Single precision, real or complex as dtype is."""
    return torch.complex64 if dtype.is_complex else torch.float32


def _diagonal_places(M: Tensor) -> Tuple[Tensor, Tensor]:
    """CSR M with every diagonal element stored, once, and their places among the values."""
    row = row_indices(M)
    on = (row == M.col_indices()).nonzero()[:, 0]
    m = M.shape[0]
    i = torch.arange(m, device=M.device)
    if on.numel() == m and bool((row[on] == i).all()):
        return M, on
    lines = (torch.cat([index.to(torch.int64), i]) for index in (row, M.col_indices()))
    values = torch.cat([M.values(), M.values().new_zeros(m)])
    M = torch.sparse_coo_tensor(
        torch.stack(list(lines)), values, (m, m), check_invariants=False
    )
    M = M.coalesce().to_sparse_csr()
    M = csr_matrix(M.crow_indices(), M.col_indices(), M.values(), m)
    return M, (row_indices(M) == M.col_indices()).nonzero()[:, 0]
