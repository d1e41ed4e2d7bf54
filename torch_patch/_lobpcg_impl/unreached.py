"""Start vectors that products with a preconditioner iK do not reach, as where both A and iK are singular.

A pseudoinverse of a graph's Laplacian, or a multigrid cycle for it, has no part in the null space of A, or a small
one.  New directions K r, K = iK, then hold nothing of the vectors there; a block loses the little of them that it
started with to the smooth vectors that K serves first, and a wanted pair is missed without a trace in any residual.
Conjugate gradients on A z = 0 from a generic z, preconditioned by K, take away what K reaches and leave the rest; a
filter before them, where products with A are cheap, spares two of five applications of K.
Where A is indefinite, and K positive, such as |A|^-1 but for the null space, they do so on A K A z = 0.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.operand import Pencil


Map = Callable[[Tensor], Tensor]

# Each lowers the energy of what a multigrid cycle reaches by 100, from one to below the 1 / m of a null vector.
_STEPS = 6
# K does not reach z if (z^H K z) (z^H A z) lies this far below |z|^4 in the scale in which K A is near one.  Six steps
# with a diagonal K smooth a vector to 1e-2.
_BLIND = 1e-3


def unreached(
    pencil: Pencil, sign: float, count: int, smooth: Optional[Map] = None
) -> Tensor:
    """Columns (*, m, p) that K does not reach, p = count, or none where it reaches all.

    sign: -1 where the largest pairs are wanted; smooth: damps what is large in A and keeps null vectors.  Cost: at most
    seven products of a column with A and with K, of an indefinite A three times that; where K leaves something, of
    count columns.
    """
    iK, A = pencil.iK, pencil.A
    assert iK is not None
    K = iK.apply

    def plain(V: Tensor) -> Tensor:
        return A.apply(V) * sign

    def squared(V: Tensor) -> Tensor:
        return A.apply(K(A.apply(V)))

    def generic(first: int, count: int) -> Tensor:
        """Columns of length one."""
        space = pencil.space
        Z = space.fixed_block(pencil.m, count, (1 << 22) + first, pencil.empty())
        return (Z / space.norms(Z, keepdim=True)).expand([*pencil.batch, *Z.shape])

    begin, apply = smooth or _same, plain
    Z, blind, definite = _relax(pencil, K, plain, begin(generic(0, 1)))
    if count > 0 and not definite:
        begin, apply = _same, squared
        Z, blind, definite = _relax(pencil, K, squared, generic(0, 1))
    if count == 0 or not definite or not bool(blind.any()):
        return Z[..., :0]
    if count > 1:
        more, _, _ = _relax(pencil, K, apply, begin(generic(1, count - 1)))
        Z = torch.cat([Z.mT, more.mT], -2).mT
    return Z


def _same(Z: Tensor) -> Tensor:
    return Z


def _relax(
    pencil: Pencil, K: Map, apply: Map, Z: Tensor
) -> Tuple[Tensor, Tensor, bool]:
    """Columns Z (*, m, p), generic or smooth, after conjugate gradients on apply(Z) = 0; whether K does not reach them,
    (*, 1, p); and whether nothing has shown that the operator is indefinite on what K reaches.
    """
    tiny, space = torch.finfo(pencil.dtype).tiny ** 0.5, pencil.space
    inner = space.inner
    R = -apply(Z)
    P = W = K(R)
    rho = inner(R, W, keepdim=True)
    scale = torch.zeros_like(rho)
    negative = torch.zeros_like(rho, dtype=torch.bool)
    for to_go in reversed(range(_STEPS)):
        AP = apply(P)
        curvature = inner(P, AP, keepdim=True)
        # Where A or K is not positive definite nothing is gained.
        going = (curvature > tiny) & (rho > tiny)
        negative = negative | ((curvature < -tiny) & (rho > tiny))
        step = torch.where(going, rho / curvature, torch.zeros_like(rho))
        scale = torch.where(scale == 0, step, scale)
        Z, R = Z + P * step, R - AP * step
        square = inner(Z, Z, keepdim=True)
        # A vector that K does not reach would have left about 1 / m.
        left = square > 1e-4 / pencil.m
        if not bool(left.any()):
            return Z, left, not bool(negative.any())
        if to_go == 0 or not bool((going & left).any()):
            break
        W = K(R)
        new = inner(R, W, keepdim=True)
        P, rho = W + P * torch.where(going, new / rho, torch.zeros_like(rho)), new
    form, reached = -inner(Z, R, keepdim=True), inner(Z, K(Z), keepdim=True)
    below = -_BLIND * square**2
    negative = negative | (form * reached.abs() * scale < below)
    blind = left & ((form * reached * scale).abs() <= -below)
    return Z, blind & (scale > 0), not bool(negative.any())
