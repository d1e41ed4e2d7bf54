"""Pairs: what a solve has found, with the pencil and the options that it was found for."""

import math
from dataclasses import dataclass
from typing import Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.operand import Pencil


@dataclass(frozen=True)
class Pairs:
    """k eigenpairs E (*, k), X (*, m, k), X^H B X = I, and more approximate ones T (*, p), Y (*, m, p).

    residual, scale: (*, n), n >= k, of the k pairs, then of the others, as far as they are known.
    """

    pencil: Pencil
    options: Options
    E: Tensor
    X: Tensor
    T: Tensor
    Y: Tensor
    residual: Tensor
    scale: Tensor

    @property
    def tensors(self) -> Tuple[Tensor, ...]:
        return self.E, self.X, self.T, self.Y, self.residual, self.scale

    @property
    def all_known(self) -> bool:
        """Whether the further pairs are all of the rest."""
        return self.E.shape[-1] + self.T.shape[-1] == self.X.shape[-2]


def is_late(residual: Tensor, scale: Tensor, m: int, k: int, tol: float) -> Tensor:
    """(*, k): whether a pair has missed the tolerance."""
    # No iteration gets below the rounding of its own residual, however small tol is.
    reachable = max(tol, 16 * math.sqrt(m) * torch.finfo(residual.dtype).eps)
    return residual[..., :k] > reachable * scale[..., :k]
