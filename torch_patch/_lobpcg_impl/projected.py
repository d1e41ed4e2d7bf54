"""The operators s (A - E_j B) between the B-orthogonal complement of k eigenvectors and its dual, one shift per column.

On the complement of k extreme pairs they are positive definite, s = -1 for the largest and +1 for the smallest.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import columns, deduct, take
from torch._lobpcg_impl.operand import Pencil


class Complement:
    """The operators z_j -> s (A - E_j B) z_j / scale between complement and dual, one shift per column.

    Invariants: X^H B X = I; `project` maps onto {z : X^H B z = 0}, `project_dual` onto {b : X^H b = 0}, its adjoint.
    """

    Bu: Tensor  # where u is given

    def __init__(self, pencil: Pencil, shifts: Tensor, X: Tensor, sign: float) -> None:
        self.pencil, self.space = pencil, pencil.space
        self.shifts, self.X = shifts, columns(X)  # (*, q), (*, m, k)
        self.BX = columns(pencil.B.apply(self.X))
        self.sign = sign
        self.scale = torch.ones((1, 1), dtype=shifts.dtype, device=shifts.device)
        self.quiet = self.probe = False
        # (*, m, q): a further direction to exclude, one per column, u^H B u = 1
        self.u: Optional[Tensor] = None

    def set_scale(self, b: Tensor) -> None:
        """Divide by a power of two near the norm of the operator, so that no dot product leaves the range."""
        top = self.space.largest_entries(self.raw(b))
        top = top.amax(-1, keepdim=True).unsqueeze(-1)
        one = torch.ones_like(top)
        self.scale = torch.where(
            top > 0, torch.ldexp(one, torch.frexp(top).exponent), one
        )  # (*, 1, 1)

    def raw(self, z: Tensor) -> Tensor:
        """s (A - E_j B) z_j / scale."""
        factor = self.sign / self.scale
        Az = columns(self.pencil.A.apply(z)) * factor
        return Az.addcmul_(self.pencil.B.apply(z), self.shifts[..., None, :] * -factor)

    def __call__(self, z: Tensor) -> Tensor:
        return self.project_dual(self.raw(z))

    def project(self, z: Tensor) -> Tensor:
        z = deduct(z, self.X, self.space.gram(self.BX, z))
        return z if self.u is None else z - self.u * self._forms(self.Bu, z)

    def project_dual(self, b: Tensor) -> Tensor:
        b = deduct(b, self.BX, self.space.gram(self.X, b))
        return b if self.u is None else b - self.Bu * self._forms(self.u, b)

    def _forms(self, U: Tensor, V: Tensor) -> Tensor:
        """u_j^H v_j, (*, 1, q)."""
        return self.space.joined([(U.conj() * V).sum(-2, keepdim=True)])[0]

    def exclude(self, u: Tensor) -> "Complement":
        """The same operators on the complement of u_j too; u: (*, m, q) in the complement of X."""
        part = self.restrict(slice(None))
        part.Bu = self.pencil.B.apply(u)
        size = torch.sqrt(self.space.inner(u, part.Bu, keepdim=True))
        part.u, part.Bu = u / size, part.Bu / size
        return part

    def restrict(self, columns: Any) -> "Complement":
        """The same operators for some of the columns."""
        part = object.__new__(Complement)
        part.__dict__.update(self.__dict__)
        part.shifts = self.shifts[..., columns]
        if self.u is not None:
            part.u, part.Bu = take(self.u, columns), take(self.Bu, columns)
        return part

    def dense(self) -> Tuple[Tensor, Optional[Tensor]]:
        """A and B as dense Hermitian matrices: O(m^2) memory, called for small m only."""
        pencil = self.pencil
        if pencil.is_known():
            return pencil.A.dense(), pencil.B.dense() if pencil.generalized else None
        identity = torch.eye(pencil.m, dtype=self.X.dtype, device=self.X.device)
        return (
            pencil.A.apply(identity),
            pencil.B.apply(identity) if pencil.generalized else None,
        )
