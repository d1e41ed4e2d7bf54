"""The basis S = [X P W] of LOBPCG with its images A S and B S, in one buffer (TorchScript dialect).

Linear combinations move vectors and images alike, so row j of the buffer holds s_j, A s_j and, where there is a B,
B s_j side by side: one product with a small matrix updates all of them.
"""

import torch
from torch import Tensor
from torch._lobpcg_operator import Operator


class Basis:
    """Rows X, then P, then W, (*, q, c m) with c = 2 images or 3; the buffer grows to the largest q needed.

    Up to a million numbers the update writes a second buffer; above, where that would be the larger part of the memory
    of a call and no cache holds either, it replaces the rows by pieces (5 % slower).
    """

    def __init__(self, X: Tensor, general: bool):
        self.n, self.m = X.size(-2), X.size(-1)
        self.q = self.n  # vectors in use
        self.general = general
        self.image_B = 2 if general else 0  # without B, B S is S
        self.in_place = False
        self.rows, self.spare = X, X
        # Views are made once for each place and buffer: on short vectors making them would be a tenth of the time.
        self.views: dict[int, Tensor] = {}
        self.spare_views: dict[int, Tensor] = {}
        self.allocate(X, self.n)
        self.part(0, 0, self.n).copy_(X)

    def allocate(self, like: Tensor, count: int) -> None:
        width = 3 * self.m if self.general else 2 * self.m
        shape = list(like.shape[:-2]) + [count, width]
        self.rows = like.new_empty(shape)
        self.in_place = self.rows.numel() > 1048576
        self.spare = self.rows if self.in_place else like.new_empty(shape)
        self.views, self.spare_views = (
            torch.jit.annotate(dict[int, Tensor], {}),
            torch.jit.annotate(dict[int, Tensor], {}),
        )

    def extend(self, count: int) -> int:
        """Make room for count more vectors; the place of the first."""
        first = self.q
        self.q = first + count
        if self.rows.size(-2) < self.q:
            # Once or twice in a call: P and W are largest at the start.
            old = self.rows
            self.allocate(old, self.q + count)
            self.rows.narrow(-2, 0, first).copy_(old.narrow(-2, 0, first))
        return first

    def part(self, image: int, first: int, count: int) -> Tensor:
        """View (*, count, m) of vectors `first`, ...: of S (image 0), A S (1), B S (image_B)."""
        key = (first * 65536 + count) * 4 + image
        if key not in self.views:
            self.views[key] = self.rows.narrow(-2, first, count).narrow(-1, image * self.m, self.m)
        return self.views[key]

    def wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views X, A X, B X."""
        return self.part(0, 0, self.n), self.part(1, 0, self.n), self.part(self.image_B, 0, self.n)

    def multiply(self, first: int, op_A: Operator, op_B: Operator) -> None:
        """Images of the vectors from `first` on."""
        V = self.part(0, first, self.q - first)
        self.part(1, first, self.q - first).copy_(op_A.rows(V))
        if self.general:
            self.part(2, first, self.q - first).copy_(op_B.rows(V))

    def gram(self, first: int) -> tuple[Tensor, Tensor]:
        """W^H A S and W^H B S, (*, q - first, q), W the vectors from `first` on."""
        W = self.part(0, first, self.q - first).conj()
        return W @ self.part(1, 0, self.q).mT, W @ self.part(self.image_B, 0, self.q).mT

    def combine(self, C: Tensor) -> None:
        """S := C S and its images; C: (*, p, q), rows are the coordinates of the new vectors."""
        p = C.size(-2)
        if self.in_place:
            width = self.rows.size(-1)
            # 16384 numbers of each row stay in the cache with their result; elsewhere four pieces bound the memory.
            piece = 16384 if self.rows.device.type == "cpu" else max(16384, width // 4)
            for i in range(0, width, piece):
                part = self.rows.narrow(-1, i, min(piece, width - i))
                part.narrow(-2, 0, p).copy_(C @ part.narrow(-2, 0, self.q))
        else:
            torch.matmul(C, self.rows.narrow(-2, 0, self.q), out=self.spare.narrow(-2, 0, p))
            self.rows, self.spare = self.spare, self.rows
            self.views, self.spare_views = self.spare_views, self.views
        self.q = p
