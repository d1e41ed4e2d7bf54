"""Tall blocks (*, m, p): their inner products, norms and combinations, and the fixed table that start blocks come from.

A block of p vectors of length m has shape (*, m, p) everywhere.  In memory its columns are contiguous, since a slice of
vectors then is, and updates and reductions run two to three times faster than on contiguous rows; `columns` makes a
block so.  A sum over m ends in a Space and nowhere else: here that of one process, which holds all rows.
"""

import math
from typing import Any, Callable, List, Tuple

import torch
from torch import Tensor


# Numbers of the table that are made at a time: few kernels for short columns, little memory for long ones.
_TABLE = 1 << 17


def is_single(eps: float) -> bool:
    """Whether eps is the unit rounding of single precision, 1.2e-7, and not that of double, 2.2e-16."""
    return eps > 1e-10


def columns(V: Tensor) -> Tensor:
    """V with every column contiguous."""
    return V.mT.contiguous().mT


def take(V: Tensor, index: Any) -> Tensor:
    """Columns `index` of V (*, m, q), the same for all of a batch; contiguous if those of V are."""
    return V.mT[..., index, :].mT


def take_each(V: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (*, p) of V (*, m, q), of each of a batch its own."""
    if V.dim() == 2:
        return V.mT.index_select(0, index).mT
    return V.mT.gather(-2, index.unsqueeze(-1).expand(index.shape + V.shape[-2:-1])).mT


def combine(V: Tensor, C: Tensor) -> Tensor:
    """V C with contiguous columns; V: (*, m, k), C: (*, k, q)."""
    return (C.mT @ V.mT).mT


def deduct(Z: Tensor, V: Tensor, C: Tensor) -> Tensor:
    """Z - V C with contiguous columns, without a temporary of the size of Z where there is no batch."""
    if Z.dim() == 2 and V.dim() == 2:
        return torch.addmm(Z.mT, C.mT, V.mT, alpha=-1).mT
    return Z - combine(V, C)


def gram(U: Tensor, V: Tensor) -> Tensor:
    """U^H V, (*, p, q)."""
    return U.mH @ V


def inner(U: Tensor, V: Tensor, keepdim: bool = False) -> Tensor:
    """Real parts of u_j^H v_j, (*, p), or (*, 1, p) with keepdim."""
    if U.is_complex():
        product = (torch.view_as_real(U) * torch.view_as_real(V)).sum((-1, -3))
        return product.unsqueeze(-2) if keepdim else product
    return (U * V).sum(-2, keepdim=keepdim)


def squares(V: Tensor) -> Tensor:
    """|v_ij|^2, without a root in between."""
    return torch.real(V.conj() * V) if V.is_complex() else V * V


def pairwise(a: Tensor) -> Tensor:
    """max(a_i, a_j), (*, k, k)."""
    return torch.maximum(a.unsqueeze(-1), a.unsqueeze(-2))


def norms(V: Tensor, keepdim: bool = False) -> Tensor:
    """2-norms of the columns, (*, p), or (*, 1, p) with keepdim."""
    if V.dim() > 2 and V.shape[-1] > 1 and V.stride(-2) != 1:
        # A reduction along rows that are short takes five times as long as to turn them and reduce along columns.
        found = torch.linalg.vector_norm(V.mT.contiguous(), dim=-1)
        return found.unsqueeze(-2) if keepdim else found
    return torch.linalg.vector_norm(V, dim=-2, keepdim=keepdim)


def safe_norms(V: Tensor) -> Tensor:
    """2-norms without overflow or underflow of squares, (*, 1, p)."""
    top = V.abs().amax(-2, keepdim=True)
    unit = torch.where(top > 0, top, torch.ones_like(top))
    return top * norms(V / unit, keepdim=True)


def largest_entries(V: Tensor, dim: int = -2) -> Tensor:
    """max |v| of each column, NaN or infinite where any entry is; (*, p).  Seven times faster than the infinity
    norm."""
    if V.is_complex():
        return V.abs().amax(dim)
    return torch.maximum(V.amax(dim), -V.amin(dim))


def fixed_block(
    m: int, count: int, first: int, like: Tensor, offset: int = 0
) -> Tensor:
    """Columns `first` to `first + count - 1` of a fixed table of pseudo-random numbers in (-1, 1), of its rows m from
    `offset` on: (m, count).

    The table is a hash of the position (two rounds of multiply and shift on 31-bit integers), so it is the same on
    every device and in every process, and no generator's state is read or changed.  Real also for complex problems: a
    real vector has a component along every eigenvector with probability one just as a complex one has.
    """
    rows = torch.empty([count, m], dtype=like.dtype, device=like.device)
    position = torch.arange(offset, offset + m, dtype=torch.int64, device=like.device)
    position *= 747796405
    column = torch.arange(first + 1, first + count + 1, device=like.device)
    column = column.unsqueeze(-1) * 891646097
    some = max(1, _TABLE // max(1, m))
    for i in range(0, count, some):
        # In place: new pages would cost as much as the arithmetic.
        h = (position + column[i : i + some]).bitwise_and_(0x7FFFFFFF)
        t = h >> 15
        h.bitwise_xor_(t).mul_(1274126177).bitwise_and_(0x7FFFFFFF)
        torch.bitwise_right_shift(h, 13, out=t)
        h.bitwise_xor_(t).mul_(668265263).bitwise_and_(0x7FFFFFFF)
        torch.bitwise_right_shift(h, 16, out=t)
        h.bitwise_xor_(t)
        rows[i : i + some] = h.to(torch.float64).div_(1073741823.5).sub_(1.0)
    return rows.mT


class Space:
    """The rows of tall blocks: this process holds all, so that its sum over them is the whole one.

    Where rows live on several processes (module processes), blocks are those that this one holds, what it sums over
    them is a part, and the methods add the parts of all.  split: whether they do.
    """

    split = False
    gram = staticmethod(gram)
    inner = staticmethod(inner)
    norms = staticmethod(norms)
    safe_norms = staticmethod(safe_norms)
    largest_entries = staticmethod(largest_entries)
    fixed_block = staticmethod(fixed_block)

    def size(self, V: Tensor) -> int:
        """The number of rows of a block, m."""
        return V.shape[-2]

    def joined(self, parts: List[Tensor], lengths: int = 0) -> List[Tensor]:
        """Whole sums for parts of them, in one message; the first `lengths` are 2-norms."""
        return parts

    def first(self, make: Callable[[], Any], order: int) -> Any:
        """What the first process makes of small tensors, a tuple of tensors of that order at most, numbers and None."""
        return make()

    def agree(self, flag: bool = False) -> bool:
        """Whether the flag is set on any process."""
        return flag


# All rows on one process.
WHOLE: Space = Space()
# The scale of what is near one as it is.
UNSCALED = torch.ones([], dtype=torch.float64)


def numbers_of(*rows: Tensor) -> List[float]:
    """The numbers of some vectors on one device, one behind the other: of a device that is no host in one transfer."""
    if rows[0].device.type != "cpu":
        return torch.cat(rows).tolist()
    found: List[float] = []
    for row in rows:
        found += row.tolist()
    return found


def all_finite(T: Tensor) -> bool:
    """Whether every number is finite; of a single one, without a kernel."""
    if T.numel() == 1:
        return math.isfinite(float(T))
    return bool(torch.isfinite(T).all())


def unscaled_range(dtype: torch.dtype) -> Tuple[float, float]:
    """Sizes of the largest entry for which safe_scale is 1."""
    single = dtype in (torch.float32, torch.complex64)
    return (1e-6, 1e6) if single else (1e-100, 1e100)


def safe_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of 4 that bring entries of size `largest` near 1; 1 where squares neither overflow nor underflow anyway.

    Squares of residuals down to eps * largest must stay normal numbers: (eps * largest)^2 > 1e-38 in single precision
    asks for largest > 1e-12; 1e-6 leaves room for preconditioned residuals.  The double-precision bounds are the same
    argument.  A power of 4 has an exact square root, which undoes the scaling of B in X.
    """
    low, high = unscaled_range(dtype)
    if largest.dim() == 0:
        value = float(largest)
        if value == 0.0 or low <= value <= high:
            return UNSCALED
    extreme = (largest > 0) & ((largest < low) | (largest > high))
    size = torch.where(extreme, largest, torch.ones_like(largest))
    return torch.pow(4.0, -torch.floor(0.5 * torch.log2(size)))
