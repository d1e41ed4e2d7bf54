"""The basis S = [X P W] of LOBPCG with its images A S and B S, in one buffer.

Linear combinations move vectors and images alike, so row j of the buffer holds s_j, A s_j and, where there is a B,
B s_j side by side: one product with a small matrix updates all of them.
"""

from typing import Dict, List, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import gram
from torch._lobpcg_impl.operand import Pencil


# Numbers up to which an update writes a second buffer.  Above, where that would be the larger part of a call's memory
# and no cache holds either, it replaces the rows by pieces (5 % slower).
_TWO_BUFFERS_UP_TO = 1 << 20
# Numbers of each row updated at a time: the pieces stay in the cache with their result.
_PIECE = 16384


class Basis:
    """Vectors X, then P, then W, q in all; their views are blocks (*, m, count) with contiguous columns.

    The buffer, (*, vectors, c m) with c = 2 images or 3, grows to the largest q needed.
    """

    def __init__(self, X: Tensor, generalized: bool) -> None:
        self.m, self.n = X.shape[-2:]
        self.q = self.n  # vectors in use
        self.generalized = generalized
        self.image_B = 2 if generalized else 0  # without B, B S is S
        self._allocate(X, self.n)
        self.part(0, 0, self.n).copy_(X)

    def _allocate(self, like: Tensor, count: int) -> None:
        width = (3 if self.generalized else 2) * self.m
        shape: List[int] = [*like.shape[:-2], count, width]
        self.rows = like.new_empty(shape)
        self.in_place = self.rows.numel() > _TWO_BUFFERS_UP_TO
        self.spare = self.rows if self.in_place else like.new_empty(shape)
        # Views are made once for each place and buffer: on short vectors making them would be a tenth of the time.
        self.views: Dict[Tuple[int, int, int], Tensor] = {}
        self.spare_views: Dict[Tuple[int, int, int], Tensor] = {}

    def extend(self, count: int) -> int:
        """Make room for count more vectors; the place of the first."""
        first = self.q
        self.q = first + count
        if self.rows.shape[-2] < self.q:
            # Once or twice in a call: P and W are largest at the start.
            old = self.rows
            self._allocate(old, self.q + count)
            self.rows[..., :first, :].copy_(old[..., :first, :])
        return first

    def part(self, image: int, first: int, count: int) -> Tensor:
        """View (*, m, count) of vectors `first`, ...: of S (image 0), A S (1), B S (image_B)."""
        key = (image, first, count)
        if key not in self.views:
            self.views[key] = (
                self.rows.narrow(-2, first, count).narrow(-1, image * self.m, self.m).mT
            )
        return self.views[key]

    def wanted(self) -> Tuple[Tensor, Tensor, Tensor]:
        """Views X, A X, B X."""
        return (
            self.part(0, 0, self.n),
            self.part(1, 0, self.n),
            self.part(self.image_B, 0, self.n),
        )

    def multiply(self, first: int, pencil: Pencil) -> None:
        """Images of the vectors from `first` on."""
        V = self.part(0, first, self.q - first)
        self.part(1, first, self.q - first).copy_(pencil.A.apply(V))
        if self.generalized:
            self.part(2, first, self.q - first).copy_(pencil.B.apply(V))

    def grams(self, first: int) -> Tuple[Tensor, Tensor]:
        """W^H A S and W^H B S, (*, q - first, q), W the vectors from `first` on: sums over the rows held here."""
        W = self.part(0, first, self.q - first)
        return gram(W, self.part(1, 0, self.q)), gram(
            W, self.part(self.image_B, 0, self.q)
        )

    def combine(self, C: Tensor) -> None:
        """S := S C and its images; C: (*, q, p), columns are the coordinates of the new vectors."""
        p, C = C.shape[-1], C.mT
        if self.in_place:
            width = self.rows.shape[-1]
            # Where no cache is to be met, four pieces bound the memory.
            piece = (
                _PIECE if self.rows.device.type == "cpu" else max(_PIECE, width // 4)
            )
            for i in range(0, width, piece):
                part = self.rows[..., i : i + piece]
                part[..., :p, :].copy_(C @ part[..., : self.q, :])
        else:
            torch.matmul(
                C, self.rows.narrow(-2, 0, self.q), out=self.spare.narrow(-2, 0, p)
            )
            self.rows, self.spare = self.spare, self.rows
            self.views, self.spare_views = self.spare_views, self.views
        self.q = p
