"""Conjugate gradients on many columns with one shift each: projected, preconditioned, deflated, restarted.

The operator K_j = s (A - E_j B) / scale is a projected.Complement, positive definite on the complement of the
eigenvectors.  Extra columns that the forward carried are deflated (Saad, Yeung, Erhel, Guyomarc'h 2000).

All sums over m of an iteration are two groups, since over processes a group is a message.  What projections and
deflation change in an inner product is orthogonal to the other vector: A Y and B Y were projected, the residual is in
the dual of the complement, and K p is orthogonal to Y.  So the first group is taken of t = M r as it is, and what makes
of it a direction is algebra on small matrices; the second of K p before its projection.
"""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

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
# A relative residual above this is no solution, whatever rounding allows: the error of a gradient that is worth a word.
_LOST = 1e-2


class Deflation:
    """Coarse space of further approximate eigenvectors Y, exact for any Y: directions are kept K_j-orthogonal to Y."""

    def __init__(self, op: Any, Y: Tensor) -> None:
        self.space = op.space
        self.Y = Y = op.project(columnwise(Y))
        factor = op.sign / op.scale
        images = [columnwise(M.apply(Y)) * factor for M in (op.pencil.A, op.pencil.B)]
        parts = [gram(V, image) for V in (op.X, Y) for image in images]
        in_A, in_B, of_A, of_B = self.space.joined(parts)
        self.AY, self.BY = (
            deduct(image, op.BX, c) for image, c in zip(images, (in_A, in_B))
        )
        self.shifts = op.shifts
        # What is deducted is orthogonal to Y.
        K = of_A.unsqueeze(-3) - op.shifts[..., None, None] * of_B.unsqueeze(-3)
        L, info = torch.linalg.cholesky_ex((K + K.mH) / 2)  # (*, q, p, p)
        smallest = torch.diagonal(L, dim1=-2, dim2=-1).real.amin()
        # Below sqrt(eps) of the operator's size the coarse space holds a cluster cut at k: dividing by it is noise.
        floor = torch.finfo(op.shifts.dtype).eps ** 0.5
        usable = bool(~(info != 0).any() & (smallest * smallest > floor))
        self.usable = not self.space.agree(not usable)
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

    def solve(self, c: Tensor) -> Tuple[Tensor, Tensor]:
        """z_j = Y M_j^-1 c_j and K_j z_j for c = Y^H r, (*, p, q), without a product with A."""
        c = self.coefficients(c)
        return combine(self.Y, c), combine(self.AY, c) - combine(
            self.BY, c * self.shifts[..., None, :]
        )

    def direction(self, t: Tensor, of_A: Tensor, of_B: Tensor) -> Tensor:
        """t made K_j-orthogonal to Y; of_A, of_B: (A Y)^H t and (B Y)^H t."""
        c = of_A - of_B * self.shifts[..., None, :]
        return deduct(t, self.Y, self.coefficients(c))


class State(NamedTuple):
    """How a run of conjugate gradients ended: the relative residual that most exceeds the one asked for, and that one,
    whether one is no solution, whether curvature was not positive, |K|, and the lengths of the columns
    of z, (*, q)."""

    residual: float
    asked: float
    all_done: bool
    lost: bool
    indefinite: bool
    norm: Tensor
    lengths: Tensor


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
    lengths = op.shifts.new_zeros(b.shape[:-2] + b.shape[-1:])
    for _ in range(1 + _RESTARTS):
        coarse = deflation and deflation.restrict(columns)
        sweep = _Sweep(part, r, z, columns, coarse, precondition, rtol[columns])
        indefinite = sweep.run(budget)
        norm = sweep.norm
        budget -= sweep.steps
        r = take(b, columns).sub_(part(take(z, columns)))
        size, length = op.space.joined([norms(r), norms(take(z, columns))], 2)
        lengths.index_copy_(-1, columns, length)
        # Two products and a subtraction, each with an error of a few eps |K| |z|.
        attainable = 16 * eps * (1 + norm * length)
        # NaN is late, too.
        late = (
            (~(size <= torch.maximum(attainable, 2 * rtol[columns])))
            .reshape(-1, columns.numel())
            .any(0)
        )
        excess, worst = (
            (size / rtol[columns]).reshape(-1, columns.numel()).amax(0).max(0)
        )
        asked = float(rtol[columns][worst])
        any_late, lost = torch.stack([late.any(), ~(size <= _LOST).all()]).tolist()
        all_done = not any_late
        if all_done or budget <= 0 or indefinite:
            break
        columns, r = columns[late], take(r, late)
        part = op.restrict(columns)
    return z, State(
        float(excess) * asked,
        asked,
        all_done,
        lost,
        indefinite and not all_done,
        norm,
        lengths,
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
        self.space = op.space
        parts = [norms(take(z, columns), keepdim=True)]
        if deflation is None:
            (self.size0,) = self.space.joined(parts, 1)
            self.r, self.dz = r, torch.zeros_like(r)
        else:
            self.size0, inside = self.space.joined([*parts, gram(deflation.Y, r)], 1)
            self.dz, image = deflation.solve(inside)
            self.r = r - image
        self.norm = torch.zeros((), dtype=op.shifts.dtype, device=r.device)

    def run(self, budget: int) -> bool:
        """Whether K turned out to be indefinite, which ends the run.

        Over processes the lengths that a column stops by travel with the first group, so the columns that stop have
        cost a product with the preconditioner.
        """
        split = self.space.split
        while True:
            sizes = [norms(self.r, keepdim=True), norms(self.dz, keepdim=True)]
            t, parts = self._ahead() if split else (None, [])
            length, far, *parts = self.space.joined([*sizes, *parts], 2)
            waiting = self._waiting(length, far)
            active = waiting.reshape(-1, self.columns.numel()).any(0)
            flags = active.tolist()  # the synchronisation
            if not all(flags) or self.steps >= budget:
                going = [i for i, flag in enumerate(flags) if flag]
                going = going if self.steps < budget else []
                self._leave([i for i in range(len(flags)) if i not in going])
                if not going:
                    return False
                index = torch.tensor(going, device=self.r.device)
                self._keep(index)
                t = None if t is None else take(t, index)
                waiting, *parts = (T[..., index] for T in (waiting, *parts))
            if t is None:
                t, parts = self._ahead()
            good = self._step(self._direction(t, parts))
            if self.steps % 8 == 0 and bool((~good & waiting).any()):
                self.z.index_add_(-1, self.columns, self.dz)
                return True

    def _waiting(self, length: Tensor, far: Tensor) -> Tensor:
        """(*, 1, q): which residuals are above what is asked for, and above what rounding allows; lengths of r, dz."""
        eps = torch.finfo(self.op.shifts.dtype).eps
        reach = 2 * eps * self.norm * (self.size0 + far)
        return length > torch.maximum(reach, self.rtol)

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

    @property
    def _projects(self) -> bool:
        """Whether t leaves the complement."""
        return self.precondition is not None or self.op.pencil.generalized

    def _ahead(self) -> Tuple[Tensor, List[Tensor]]:
        """t = M r, and its parts of r^H t, t^H K p, (B X)^H t, (A Y)^H t, (B Y)^H t, as far as they are needed."""
        t = self.r
        if self.precondition is not None:
            t = columnwise(self.precondition(t))
        if self.op.u is not None and self._projects:
            t = self.op.project(t)
        parts = [inner(self.r, t, keepdim=True)]
        if self.precondition is not None and self.p is not None:
            parts.append(inner(t, self.Kp, keepdim=True))
        if self._projects:
            parts.append(gram(self.op.BX, t))
        if self.deflation is not None:
            parts += [gram(self.deflation.AY, t), gram(self.deflation.BY, t)]
        return t, parts

    def _direction(self, t: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """The next direction p; r^H t."""
        given = iter(sums)
        new = next(given)
        first = self.p is None
        # <t, r_old> = 0 for a fixed symmetric preconditioner; written out it may vary or be nonsymmetric.
        along = None if first or self.precondition is None else next(given)
        if self._projects:
            t = deduct(t, self.op.X, next(given))
        if self.deflation is not None:
            t = self.deflation.direction(t, next(given), next(given))
        if first:
            self.p = t
            return new
        beta = new / self.rho if along is None else -self.alpha * along / self.rho
        self.p = torch.addcmul(t, self.p, beta.to(t.dtype))
        return new

    def _step(self, new: Tensor) -> Tensor:
        """Go along p; (*, 1, q): where curvature and r^H t are positive, as of a definite K."""
        p = self.p
        self.rho = torch.clamp(new, min=torch.finfo(new.dtype).tiny)
        self.Kp, curvature, size, length = self._image(p)
        self.norm = torch.maximum(self.norm, (size / length).amax())
        good = (curvature > 0) & (new > 0)
        self.alpha = torch.where(good, new / curvature, torch.zeros_like(new))
        self.dz.addcmul_(p, self.alpha.to(p.dtype))
        # Not in place: without a preconditioner the first p is r.
        self.r = torch.addcmul(self.r, self.Kp, -self.alpha.to(p.dtype))
        self.steps += 1
        return good

    def _image(self, p: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """K p, p^H K p, and the lengths of K p and p.

        What the projection takes off K p is orthogonal to p, and as small as the residuals of X.
        """
        op, again = self.op, self.op.u is not None
        Kp = op(p) if again else op.raw(p)
        parts = [norms(Kp), norms(p), inner(p, Kp, keepdim=True)]
        if not again:
            parts.append(gram(op.X, Kp))
        size, length, curvature, *c = self.space.joined(parts, 2)
        return (deduct(Kp, op.BX, c[0]) if c else Kp), curvature, size, length
