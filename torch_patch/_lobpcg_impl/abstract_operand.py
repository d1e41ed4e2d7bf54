"""What solver and derivative ask of a Hermitian matrix; module operand has the kinds that are given as tensors."""

from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import all_finite, Space, unscaled_range, WHOLE
from torch._lobpcg_impl.report import members


# A function that makes a block (*, m, 2) of fixed numbers, or returns the one it made before.
Probe = Callable[[], Tensor]


class Operand:
    """A Hermitian linear map on blocks (*, m, p).

    parameters: the tensors that a derivative is taken in.  batch: the shape (*).  stored: numbers held, 0 if unknown.
    columns: how many vectors `apply` has multiplied so far.  space: the rows of blocks.
    """

    parameters: Tuple[Tensor, ...] = ()
    batch: Tuple[int, ...] = ()
    stored = 0
    columns = 0
    space: Space = WHOLE

    def __init__(self, name: str) -> None:
        self.name = name

    def with_parameters(self, *parameters: Tensor) -> "Operand":
        return self

    def with_gradient(self, probe: Probe) -> "Operand":
        """The operand in a form in which gradients of any order exist; probe(): a block of fixed numbers."""
        return self

    def mapped(self, size: int, in_dims: Sequence[Optional[int]]) -> "Operand":
        """The operand of a batch of `size`, of whose parameters those with in_dims hold one for each member."""
        return self

    def apply(self, V: Tensor) -> Tensor:
        """The product with V (+, *, m, p), same shape and dtype, not recorded by autograd; V is not written to."""
        self.columns += V.shape[-1]
        return self._multiply(V)

    def apply_to(self, V: Tensor, out: Tensor) -> Tensor:
        """The same in `out`, which shares no memory with V."""
        return out.copy_(self.apply(V))

    def _multiply(self, V: Tensor) -> Tensor:
        raise NotImplementedError

    def product(self, V: Tensor) -> Tensor:
        """The product with V, differentiable in the parameters and V."""
        return self.apply(V)

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Tensor, ...]:
        """Cotangents of the parameters for cotangents U of the products with V, summed over the pairs (U, V);
        differentiable in U and V.  That of a Hermitian matrix is the Hermitian part of sum U V^H.
        """
        return ()

    def tangent(self, tangents: Sequence[Optional[Tensor]], V: Tensor) -> Tensor:
        """The tangent of the product at fixed V for tangents of the parameters, which act through their Hermitian
        parts; differentiable."""
        return torch.zeros_like(V)

    def largest(self, probe: Probe) -> Tensor:
        """The size of the largest entry of each matrix, NaN or infinite if any entry is: (*) or ().

        probe(), here and below: a block (*, m, 2) of fixed numbers; its product tells where entries are not known.
        """
        raise NotImplementedError

    def is_near_one(self, probe: Probe, dtype: torch.dtype) -> bool:
        """Whether this is one matrix, not zero, whose entries are finite, and its largest such that safe_scale is 1."""
        largest = self.largest(probe)
        low, high = unscaled_range(dtype)
        return largest.dim() == 0 and low <= float(largest) <= high

    def mean_square(self, probe: Probe) -> Tensor:
        """||M||_F^2 / m, the mean of the squared eigenvalues, of each matrix: (*) or ()."""
        raise NotImplementedError

    def diagonal(self) -> Optional[Tensor]:
        """The diagonal, real, (*, m); None where it is not known."""
        return None

    def row_squares(self, d: Tensor) -> Optional[Tensor]:
        """Sums of the squared entries of each row of D^-1/2 M D^-1/2, D = diag(d), d (*, m) in double: (*, m); None
        where entries are not known."""
        return None

    def scaled(self, scale: Tensor) -> "Operand":
        """scale * M for powers of two (*) or ()."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrix, (*, m, m)."""
        raise NotImplementedError

    def where_stored(self) -> Optional[Tensor]:
        """Where entries are that a gradient is returned for, (*, m, m); None where it is a full matrix."""
        return None

    def in_double(self) -> "Operand":
        raise NotImplementedError

    def member(self, position: Tuple[int, ...]) -> "Operand":
        """The operand of one matrix of the batch; a batch dimension of size 1, or none, serves all positions."""
        return self

    def check_finite(self, probe: Probe) -> Tensor:
        """largest(); ValueError where it is not finite."""
        largest = self.largest(probe)
        if not all_finite(largest):
            where = members(~torch.isfinite(largest), largest.dim())
            raise ValueError(
                f"lobpcg: {self.name}{where} has NaN or infinite entries; every entry must be finite: check what "
                f"produced {self.name}"
            )
        return largest

    def check_hermitian(self, probe: Probe) -> None:
        """ValueError where the matrix is seen not to be Hermitian."""

    def check_positive(self) -> None:
        """ValueError where the matrix is seen at once not to be positive definite."""
