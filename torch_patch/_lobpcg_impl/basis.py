"""The basis S = [X P W] of LOBPCG, in one buffer, with its images A S and B S where a product is dear.

Linear combinations move vectors and images alike, so row j of the buffer holds s_j and, where images are kept, A s_j
and with a B B s_j beside it: one product with a small matrix updates all of them.  Of an iteration only A W and B W are
needed before the update, and A X and B X after it: where the products with X cost less than updating the images would,
nothing but S is held, a third or half of the memory.
"""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import columns, gram
from torch._lobpcg_impl.operand import Identity, Operand, Pencil, Sparse


# Numbers up to which an update writes a second buffer.  Above, where that would be the larger part of a call's memory
# and no cache holds either, it replaces the rows by pieces.
_TWO_BUFFERS_UP_TO = 1 << 20
# Numbers of each row updated at a time: the pieces stay in the cache with their result.
_PIECE = 4096
# Columns from which updating the image of a vector takes longer than a product with a matrix that holds one number a
# row, and how many more each further number asks for: 4 n flops against a product and the change between rows and
# columns, measured on one thread.
_IMAGES_UP_TO, _IMAGES_PER_STORED = 16, 1.0


def _keeps_images(pencil: Pencil, n: int) -> bool:
    """Whether the images of n columns are kept rather than computed again."""
    stored = 0
    for M in (pencil.A, pencil.B):
        if isinstance(M, Sparse):
            stored += M.rows.values().numel() // max(1, M.rows.shape[0])
        elif not isinstance(M, Identity):
            return True
    return n <= _IMAGES_UP_TO + _IMAGES_PER_STORED * stored


class Basis:
    """Vectors X, then P, then W, q in all; their views are blocks (*, m, count) with contiguous columns.

    The buffer, (*, vectors, c m) with c = 1 (no images), 2 or 3, grows to the largest q needed.
    """

    def __init__(self, X: Tensor, pencil: Pencil, more: int) -> None:
        """more: how many vectors are expected beside X."""
        self.m, self.n = X.shape[-2:]
        self.q = self.n  # vectors in use
        self.pencil = pencil
        self.images = _keeps_images(pencil, self.n)
        # Blocks in a row of the buffer; without B, B S is S.
        self.count = 1 + self.images * (1 + pencil.generalized)
        # For results; not views of X, which would keep it alive.
        self.room, self.piece = X.new_empty(0, 0), X.new_empty(0)
        self._allocate(X, self.n + more)
        self.part(0, self.n).copy_(X)

    def _allocate(self, like: Tensor, count: int) -> None:
        shape: List[int] = [*like.shape[:-2], count, self.count * self.m]
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
            old = self.rows
            self._allocate(old, self.q + count)
            self.rows[..., :first, :].copy_(old[..., :first, :])
        return first

    def part(self, first: int, count: int, image: int = 0) -> Tensor:
        """View (*, m, count) of vectors `first`, ...: of S, or of the images that are kept, A S (1) and B S (2)."""
        key = (image, first, count)
        if key not in self.views:
            self.views[key] = (
                self.rows.narrow(-2, first, count).narrow(-1, image * self.m, self.m).mT
            )
        return self.views[key]

    def of_A(self, first: int, count: int, out: Tensor) -> Tensor:
        """A S for these vectors: what is kept, or computed in `out` (*, m, count or more)."""
        if self.images:
            return self.part(first, count, 1)
        return self._product(self.pencil.A, first, count, out)

    def of_B(self, first: int, count: int, out: Optional[Tensor] = None) -> Tensor:
        """B S, likewise, elsewhere if `out` is not given."""
        if not self.pencil.generalized:
            return self.part(first, count)
        if self.images:
            return self.part(first, count, 2)
        if out is None:
            if self.room.shape[-1] < count:
                self.room = columns(torch.empty_like(self.part(first, count)))
            out = self.room
        return self._product(self.pencil.B, first, count, out)

    def _product(self, M: Operand, first: int, count: int, out: Tensor) -> Tensor:
        out = out[..., :count]
        return M.apply_to(self.part(first, count), out)

    def multiply(self, first: int) -> None:
        """Bring the images of the vectors from `first` on up to date."""
        if self.images:
            count = self.q - first
            V = self.part(first, count)
            self.pencil.A.apply_to(V, self.part(first, count, 1))
            if self.pencil.generalized:
                self.pencil.B.apply_to(V, self.part(first, count, 2))

    def grams(self, first: int, room: Tensor) -> Tuple[Tensor, Tensor]:
        """W^H A S and W^H B S, (*, q - first, q), W the vectors from `first` on; room: (*, m, p), overwritten."""
        S, count = self.part(0, self.q), self.q - first
        if self.images:
            W = self.part(first, count)
            gram_A = gram(W, self.part(0, self.q, 1))
            if not self.pencil.generalized:
                return gram_A, gram(W, S)
            return gram_A, gram(W, self.part(0, self.q, 2))
        found = []
        for image in (self.of_A, self.of_B):
            width = room.shape[-1]
            ends = [*range(first, self.q, width), self.q]
            parts = [gram(image(i, end - i, room), S) for i, end in zip(ends, ends[1:])]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        return found[0], found[1]

    def coordinates(self, V: Tensor, count: int) -> Tensor:
        """S^H B V for the first vectors of S."""
        if self.images:
            return gram(self.of_B(0, count), V)
        return gram(self.part(0, count), self.pencil.B.apply(V))

    def combine(self, C: Tensor) -> None:
        """S := S C and its images; C: (*, q, p), columns are the coordinates of the new vectors."""
        p, C = C.shape[-1], C.mT
        if self.in_place:
            self._combine_pieces(C)
        else:
            torch.matmul(
                C, self.rows.narrow(-2, 0, self.q), out=self.spare.narrow(-2, 0, p)
            )
            self.rows, self.spare = self.spare, self.rows
            self.views, self.spare_views = self.spare_views, self.views
        self.q = p

    def _combine_pieces(self, C: Tensor) -> None:
        width, shape = self.rows.shape[-1], C.shape[:-1]
        # Where no cache is to be met, four pieces bound the memory.
        on_host = self.rows.device.type == "cpu"
        piece = _PIECE if on_host else max(_PIECE, width // 4)
        size = shape.numel() * piece
        if self.piece.numel() < size:
            # New pages cost as much as the product.
            self.piece = C.new_empty(size)
        for i in range(0, width, piece):
            part = self.rows[..., i : i + piece]
            new = self.piece[: shape.numel() * part.shape[-1]]
            new = new.view([*shape, part.shape[-1]])
            torch.matmul(C, part[..., : self.q, :], out=new)
            part[..., : shape[-1], :].copy_(new)
