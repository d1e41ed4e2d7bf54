"""Conjugate gradients on many columns with one shift each: projected, preconditioned, deflated, restarted.

The operator K_j = s (A - E_j B) / scale is a projected.Complement, positive definite on the complement of the
eigenvectors.  Extra columns that the forward carried are deflated (Saad, Yeung, Erhel, Guyomarc'h 2000).
"""

from typing import Any, Callable, List, Optional, Tuple

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
        sweep = _Sweep(part, r, z, columns, coarse, precondition, rtol[columns])
        indefinite = sweep.run(budget)
        norm = sweep.norm
        budget -= sweep.steps
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


class _Sweep:
    """One run from residuals r of `columns` of z, improved in place.

    Columns that stop leave the block, so products are with active columns only.  One synchronisation per iteration.
    After it, norm is an estimate of |K|, steps the number of iterations.
    """

    # Before the first step there are no direction, no image of it, no r^H t and no length of a step.
    p: Any = None
    Kp: Any = None
    rho: Any = None
    alpha: Any = None
    steps = 0

    def __init__(
        self,
        op: Any,
        r: Tensor,
        z: Tensor,
        columns: Tensor,
        deflation: Optional[Deflation],
        precondition: Optional[Callable[[Tensor], Tensor]],
        rtol: Tensor,
    ) -> None:
        self.op, self.z, self.columns, self.rtol = op, z, columns, rtol
        self.deflation, self.precondition = deflation, precondition
        self.size0 = norms(take(z, columns), keepdim=True)
        if deflation is None:
            self.r, self.dz = r, torch.zeros_like(r)
        else:
            self.dz, image = deflation.solve(r)
            self.r = r - image
        self.norm = torch.zeros((), dtype=op.shifts.dtype, device=r.device)

    def run(self, budget: int) -> bool:
        """Whether K turned out to be indefinite, which ends the run."""
        while True:
            waiting = self._waiting()
            active = waiting.reshape(-1, self.columns.numel()).any(0)
            flags = active.tolist()  # the synchronisation
            if not all(flags) or self.steps >= budget:
                going = [i for i, flag in enumerate(flags) if flag]
                going = going if self.steps < budget else []
                self._leave([i for i in range(len(flags)) if i not in going])
                if not going:
                    return False
                self._keep(torch.tensor(going, device=self.r.device))
                waiting = waiting[..., going]
            good = self._step(self._direction())
            if self.steps % 8 == 0 and bool((~good & waiting).any()):
                self.z.index_add_(-1, self.columns, self.dz)
                return True

    def _waiting(self) -> Tensor:
        """(*, 1, q): which residuals are above what is asked for, and above what rounding allows."""
        eps = torch.finfo(self.op.shifts.dtype).eps
        reach = 2 * eps * self.norm * (self.size0 + norms(self.dz, keepdim=True))
        return norms(self.r, keepdim=True) > torch.maximum(reach, self.rtol)

    def _leave(self, done: List[int]) -> None:
        index = torch.tensor(done, device=self.r.device)
        self.z.index_add_(-1, self.columns[index], take(self.dz, index))

    def _keep(self, index: Tensor) -> None:
        self.op = self.op.restrict(index)
        self.deflation = self.deflation and self.deflation.restrict(index)
        self.columns, self.rtol = self.columns[index], self.rtol[index]
        self.r, self.dz = take(self.r, index), take(self.dz, index)
        self.size0 = self.size0[..., index]
        if self.p is not None:
            self.p, self.Kp = take(self.p, index), take(self.Kp, index)
            self.rho, self.alpha = self.rho[..., index], self.alpha[..., index]

    def _direction(self) -> Tensor:
        """The next direction p; r^H t, t the preconditioned residual."""
        t, precondition = self.r, self.precondition
        if precondition is not None or self.op.pencil.generalized:
            t = t if precondition is None else columnwise(precondition(t))
            t = self.op.project(t)
        if self.deflation is not None:
            t = self.deflation(t)
        new = inner(self.r, t, keepdim=True)
        if self.p is None:
            self.p = t
            return new
        # <t, r_old> = 0 for a fixed symmetric preconditioner; written out it may vary or be nonsymmetric.
        beta = new / self.rho
        if precondition is not None:
            beta = -self.alpha * inner(t, self.Kp, keepdim=True) / self.rho
        self.p = torch.addcmul(t, self.p, beta.to(t.dtype))
        return new

    def _step(self, new: Tensor) -> Tensor:
        """Go along p; (*, 1, q): where curvature and r^H t are positive, as of a definite K."""
        p = self.p
        self.rho = torch.clamp(new, min=torch.finfo(new.dtype).tiny)
        self.Kp = Kp = self.op(p)
        curvature = inner(p, Kp, keepdim=True)
        self.norm = torch.maximum(self.norm, (norms(Kp) / norms(p)).amax())
        good = (curvature > 0) & (new > 0)
        self.alpha = torch.where(good, new / curvature, torch.zeros_like(new))
        self.dz.addcmul_(p, self.alpha.to(p.dtype))
        # Not in place: without a preconditioner the first p is r.
        self.r = torch.addcmul(self.r, Kp, -self.alpha.to(p.dtype))
        self.steps += 1
        return good
