"""Conjugate gradients on many columns with one shift each: projected, preconditioned, deflated, restarted.

The operator K_j = s (A - E_j B) / scale is a projected.Complement, positive definite on the complement of the
eigenvectors.  Extra columns that the forward carried are deflated (Saad, Yeung, Erhel, Guyomarc'h 2000).
"""

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import (
    columns as columnwise,
    combine,
    deduct,
    gram,
    inner,
    norms,
    take,
)


_RESTARTS = 2


class Deflation:
    """Coarse space of further approximate eigenvectors Y, exact for any Y: directions are kept K_j-orthogonal to Y."""

    def __init__(self, op: Any, Y: Tensor) -> None:
        self.Y = Y = op.project(columnwise(Y))
        factor = op.sign / op.scale
        self.AY = op.project_dual(columnwise(op.pencil.A.apply(Y))) * factor
        self.BY = op.project_dual(columnwise(op.pencil.B.apply(Y))) * factor
        self.shifts = op.shifts
        K = gram(Y, self.AY).unsqueeze(-3) - op.shifts[..., None, None] * gram(
            Y, self.BY
        ).unsqueeze(-3)
        L, info = torch.linalg.cholesky_ex((K + K.mH) / 2)  # (*, q, p, p)
        smallest = torch.diagonal(L, dim1=-2, dim2=-1).real.amin()
        # Below sqrt(eps) of the operator's size the coarse space holds a cluster cut at k: dividing by it is noise.
        floor = torch.finfo(op.shifts.dtype).eps ** 0.5
        self.usable = bool(~(info != 0).any() & (smallest * smallest > floor))
        self.inverse = torch.cholesky_inverse(L) if self.usable else L

    def restrict(self, columns: Tensor) -> "Deflation":
        part = object.__new__(Deflation)
        part.__dict__.update(self.__dict__)
        part.shifts, part.inverse = (
            self.shifts[..., columns],
            self.inverse[..., columns, :, :],
        )
        return part

    def coefficients(self, c: Tensor) -> Tensor:
        """M_j^-1 c_j for c: (*, p, q), M_j = Y^H K_j Y."""
        return (self.inverse @ c.mT.unsqueeze(-1)).squeeze(-1).mT

    def solve(self, r: Tensor) -> Tuple[Tensor, Tensor]:
        """z_j = Y M_j^-1 Y^H r_j and K_j z_j, without a product with A."""
        c = self.coefficients(gram(self.Y, r))
        return combine(self.Y, c), combine(self.AY, c) - combine(
            self.BY, c * self.shifts[..., None, :]
        )

    def __call__(self, t: Tensor) -> Tensor:
        c = gram(self.AY, t) - gram(self.BY, t) * self.shifts[..., None, :]
        return deduct(t, self.Y, self.coefficients(c))


class State:
    """How a run of conjugate gradients ended: the relative residual that most exceeds the one asked for, and that one,
    whether curvature was not positive, |K|."""

    def __init__(
        self,
        residual: float,
        asked: float,
        all_done: bool,
        indefinite: bool,
        norm: Tensor,
    ) -> None:
        self.residual, self.asked, self.all_done = residual, asked, all_done
        self.indefinite, self.norm = indefinite, norm


def conjugate_gradients(
    op: Any,
    b: Tensor,
    z: Optional[Tensor],
    deflation: Optional[Deflation],
    precondition: Optional[Callable[[Tensor], Tensor]],
    rtol: Tensor,
    budget: int,
) -> Tuple[Tensor, State]:
    """Independent conjugate gradients on the unit columns b_j from z_j, or zero, restarted from the true residual where
    rounding asks.  b: (*, m, q), rtol: (q,).

    Every column stops at rtol_j or at the accuracy attainable for it, c eps |K| |z_j|: its recursive residual would go
    on shrinking while the true one does not.
    """
    eps = torch.finfo(op.shifts.dtype).eps
    columns = torch.arange(b.shape[-1], device=b.device)
    indefinite = False
    part, r = op, b
    if z is None:
        z = torch.zeros_like(b)
    else:
        r = r - part(z)
    for _ in range(1 + _RESTARTS):
        coarse = deflation and deflation.restrict(columns)
        norm, used, indefinite = _sweep(
            part, r, z, columns, coarse, precondition, rtol[columns], budget
        )
        budget -= used
        r = take(b, columns).sub_(part(take(z, columns)))
        size = norms(r)
        # Two products and a subtraction, each with an error of a few eps |K| |z|.
        attainable = 16 * eps * (1 + norm * norms(take(z, columns)))
        late = (
            (size > torch.maximum(attainable, 2 * rtol[columns]))
            .reshape(-1, columns.numel())
            .any(0)
        )
        excess, worst = (
            (size / rtol[columns]).reshape(-1, columns.numel()).amax(0).max(0)
        )
        asked = float(rtol[columns][worst])
        all_done = not bool(late.any())
        if all_done or budget <= 0 or indefinite:
            break
        columns, r = columns[late], take(r, late)
        part = op.restrict(columns)
    return z, State(
        float(excess) * asked, asked, all_done, indefinite and not all_done, norm
    )


def _sweep(
    op: Any,
    r: Tensor,
    z: Tensor,
    columns: Tensor,
    deflation: Optional[Deflation],
    precondition: Optional[Callable[[Tensor], Tensor]],
    rtol: Tensor,
    budget: int,
) -> Tuple[Tensor, int, bool]:
    """One run from residuals r of `columns` of z, improved in place: estimate of |K|, iterations, is K indefinite.

    Columns that stop leave the block, so products are with active columns only.  One synchronisation per iteration.
    """
    eps = torch.finfo(op.shifts.dtype).eps
    size0 = norms(take(z, columns), keepdim=True)
    tiny = torch.finfo(op.shifts.dtype).tiny
    if deflation is None:
        dz = torch.zeros_like(r)
    else:
        dz, image = deflation.solve(r)
        r = r - image
    norm = torch.zeros((), dtype=op.shifts.dtype, device=r.device)
    nothing: Any = None  # before the first step
    p = Kp = rho = alpha = nothing
    step = 0
    while True:
        size = norms(r, keepdim=True)
        reach = 2 * eps * norm * (size0 + norms(dz, keepdim=True))
        active = (size > torch.maximum(reach, rtol)).reshape(-1, columns.numel()).any(0)
        flags = active.tolist()  # the synchronisation
        if not all(flags) or step >= budget:
            going = [i for i, flag in enumerate(flags) if flag and step < budget]
            done = torch.tensor(
                [i for i in range(len(flags)) if i not in going], device=r.device
            )
            z.index_add_(-1, columns[done], take(dz, done))
            if not going:
                return norm, step, False
            keep = torch.tensor(going, device=r.device)
            op = op.restrict(keep)
            deflation = deflation and deflation.restrict(keep)
            columns, rtol, r, dz, size0 = (
                columns[keep],
                rtol[keep],
                take(r, keep),
                take(dz, keep),
                size0[..., keep],
            )
            size, reach = size[..., keep], reach[..., keep]
            if p is not None:
                p, Kp, rho, alpha = (
                    take(p, keep),
                    take(Kp, keep),
                    rho[..., keep],
                    alpha[..., keep],
                )
        t = r
        if precondition is not None or op.pencil.generalized:
            t = op.project(t if precondition is None else columnwise(precondition(t)))
        if deflation is not None:
            t = deflation(t)
        new = inner(r, t, keepdim=True)
        if p is None:
            p = t
        else:
            # <t, r_old> = 0 for a fixed symmetric preconditioner; written out it may vary or be nonsymmetric.
            beta = (
                new / rho
                if precondition is None
                else -alpha * inner(t, Kp, keepdim=True) / rho
            )
            p = torch.addcmul(t, p, beta.to(p.dtype))
        rho = torch.clamp(new, min=tiny)
        del t
        Kp = op(p)
        curvature = inner(p, Kp, keepdim=True)
        norm = torch.maximum(norm, (norms(Kp) / norms(p)).amax())
        good = (curvature > 0) & (new > 0)
        alpha = torch.where(good, new / curvature, torch.zeros_like(new))
        dz.addcmul_(p, alpha.to(p.dtype))
        # Not in place: without a preconditioner the first p is r.
        r = torch.addcmul(r, Kp, -alpha.to(p.dtype))
        step += 1
        if step % 8 == 0 and bool((~good & (size > torch.maximum(reach, rtol))).any()):
            z.index_add_(-1, columns, dz)
            return norm, step, True
