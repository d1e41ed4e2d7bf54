"""Pairs: what a solve has found, with the pencil and the options that it was found for, and the sizes to judge it by.

All sizes are in units in which D = diag B is I (of a callable B its root mean square), where an eigenvalue, a residual
and the pencil can be compared with each other, however the unknowns are scaled.  With l_j = |D^1/2 x_j|, which is 1
where B is diagonal, and the root of the condition of D^-1/2 B D^-1/2 at most:

    |r_j| = |D^-1/2 (A x_j - E_j B x_j)| max l
    N_j   = (max(|D^-1/2 A D^-1/2|, |E_j|) + |E_j| |D^-1/2 B D^-1/2|) l_j^2, norms being root mean square eigenvalues
"""

import math
from dataclasses import dataclass
from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.blocks import is_single
from torch._lobpcg_impl.operand import Operand, Pencil
from torch._lobpcg_impl.transforms import constant


@dataclass(frozen=True)
class Pairs:
    """k eigenpairs E (*, k), X (*, m, k), X^H B X = I, and more approximate ones T (*, p), Y (*, m, p).

    residual: (*, n), |r_j| of the k pairs, then of others.  scale: (*, n), N_j.  missed: (*, k), which pairs have
    missed the tolerance; None where that is nobody's question.  values: (*, k), E before it was rounded to single
    precision, where T and Y are in double as well; None or empty where they are not.
    """

    pencil: Pencil
    options: Options
    E: Tensor
    X: Tensor
    T: Tensor
    Y: Tensor
    residual: Tensor
    scale: Tensor
    missed: Optional[Tensor] = None
    values: Optional[Tensor] = None

    @property
    def tensors(self) -> Tuple[Any, ...]:
        return (
            self.E,
            self.X,
            self.T,
            self.Y,
            self.residual,
            self.scale,
            self.missed,
            self.values,
        )

    @property
    def all_known(self) -> bool:
        """Whether the further pairs are all of the rest."""
        return self.E.shape[-1] + self.T.shape[-1] == self.pencil.m

    @property
    def exact(self) -> Optional[Tensor]:
        """E as it was found, where that is with all other pairs in double precision; None elsewhere."""
        if not is_single(torch.finfo(self.E.dtype).eps):
            return self.E if self.all_known else None
        return self.values if self.T.dtype != self.E.dtype else None

    @property
    def size(self) -> Tensor:
        """N, (*, k)."""
        return self.scale[..., : self.E.shape[-1]]

    @property
    def late(self) -> Tensor:
        """(*, k): |r_j| / N_j of pairs that have missed the tolerance, 0 for the others."""
        k = self.E.shape[-1]
        residual, scale = self.residual[..., :k], self.scale[..., :k]
        if self.missed is None:
            return torch.zeros_like(residual)
        return torch.where(self.missed, residual / scale, torch.zeros_like(residual))

    def constant(self) -> "Pairs":
        """The same, of which autograd knows nothing."""
        parameters = list(map(constant, self.pencil.parameters))
        pencil = self.pencil.with_parameters(parameters)
        return Pairs(pencil, self.options, *map(constant, self.tensors))


def missed(residual: Tensor, scale: Tensor, m: int, tol: float) -> Tensor:
    """Which pairs have missed the tolerance, by residual and scale as a solve returns them."""
    # No iteration gets below the rounding of its own residual, however small tol is.
    reachable = max(tol, 16 * math.sqrt(m) * torch.finfo(residual.dtype).eps)
    return residual > reachable * scale


def pencil_size(pairs: Pairs) -> Tensor:
    """N, (*, n).  Cost: of a generalised problem, products with two vectors."""
    pencil, n = pairs.pencil, pairs.scale.shape[-1]
    if not pencil.generalized:
        # The scale that the solve has judged by, as the vectors have length one.
        return pairs.scale
    V, E = (
        torch.cat(both, -1)[..., :n]
        for both in ((pairs.X, pairs.Y), (pairs.E, pairs.T))
    )
    masses, E = root_of_masses(pencil), E.abs()
    size_A, size_B = (
        _mean_size(M, pencil.probe(), masses) for M in pencil.operands[:2]
    )
    length = pencil.space.norms(V * masses)
    return (torch.maximum(size_A, E) + E * size_B) * length.square()


def root_of_masses(pencil: Pencil) -> Tensor:
    """D^1/2, (*, m, 1) or (*, 1, 1)."""
    d = pencil.B.diagonal()
    if d is None:
        # Not mean_square(), which looks at values: a callable may be inside of a transform here.
        V, safe_norms = pencil.probe(), pencil.space.safe_norms
        d = (safe_norms(pencil.B.product(V)) / safe_norms(V)).amax(-1)
    return d.sqrt().unsqueeze(-1).to(pencil.dtype.to_real())


def _mean_size(M: Operand, probe: Tensor, masses: Tensor) -> Tensor:
    """(*, 1): root mean square of the eigenvalues of D^-1/2 M D^-1/2, from its product with random vectors."""
    image, safe_norms = M.product(probe / masses) / masses, M.space.safe_norms
    return (safe_norms(image) / safe_norms(probe)).squeeze(-2).amax(-1, keepdim=True)


def longer(pairs: Pairs, Z: Tensor) -> Tensor:
    """(+, *, 1): by what max l grows where the columns of Z are known too, at least 1: their l is |D^1/2 z| for z of
    length one in B.  Without guards the wanted pairs alone do not tell the condition of B.  Cost: k products with B.
    """
    masses, space = root_of_masses(pairs.pencil), pairs.pencil.space
    Z = Z / space.safe_norms(Z).clamp_min(torch.finfo(Z.dtype).tiny)
    (form,) = space.joined([(Z.conj() * pairs.pencil.B.product(Z)).sum(-2)])
    form = form.abs()
    form = torch.where(form > 0, form, torch.full_like(form, math.inf))
    there = space.norms(Z * masses) / form.sqrt()
    here = space.norms(torch.cat([pairs.X, pairs.Y], -1) * masses).amax(
        -1, keepdim=True
    )
    return (there.amax(-1, keepdim=True) / here).clamp_min(1.0)


def in_masses(pairs: Pairs, R: Tensor) -> Tensor:
    """|r_j|, (*, n), for the 2-norms in pairs.residual, by what becomes of the residuals R (*, m, n)."""
    masses, space = root_of_masses(pairs.pencil), pairs.pencil.space
    length = space.safe_norms(R)
    there = length > 0
    factor = space.safe_norms(R / masses)
    factor = factor / torch.where(there, length, torch.ones_like(length))
    X = torch.cat([pairs.X, pairs.Y], -1)
    factor = torch.where(there, factor, space.safe_norms(X)[..., : R.shape[-1]])
    longest = space.norms(X * masses).amax(-1, keepdim=True)
    return pairs.residual * factor.squeeze(-2) * longest
