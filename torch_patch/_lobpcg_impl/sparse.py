"""Sparse matrices (*, m, m): their fastest form for products, and Hermitian gradients on the positions that they store.

The gradient of sparse M is the Hermitian part of a product U V^H of two tall blocks, of which only the stored positions
(r, c) are computed,

    g_rc = 1/2 sum_j (U_rj conj V_cj + V_rj conj U_cj),

in O(nnz p) time and O(nnz + m p) memory.  Products and gradients are differentiable to any order.
"""

import math
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.transforms import accepts_legacy_vmap, sum_to
from torch.autograd import Function


# Elements of gathered rows held at one time by a product on a pattern: 2 MiB of float64, which stay in the cache.
_CHUNK_ELEMENTS = 1 << 18
# Bytes of a block that a sparse matrix multiplies at a time on a host.
_BLOCK = 1 << 20


def is_sparse(M: Any) -> bool:
    return isinstance(M, Tensor) and M.layout != torch.strided


def csr_matrix(crow: Tensor, col: Tensor, values: Tensor, m: int) -> Tensor:
    """Square CSR matrix with 32-bit indices where they suffice: products on a CPU take those, and would convert 64-bit
    ones each time, a tenth to a quarter of their cost."""
    if values.device.type == "cpu" and values.numel() < 1 << 31:
        crow, col = crow.to(torch.int32), col.to(torch.int32)
    return torch.sparse_csr_tensor(
        crow, col, values.resolve_conj(), (m, m), check_invariants=False
    )


def columns_at_a_time(m: int, itemsize: int) -> int:
    """How many columns of a block, of numbers of so many bytes, a sparse matrix should multiply at a time on a host:
    two blocks of them stay in the cache, and a row of them is a line of it or more."""
    return max(64 // itemsize, _BLOCK // (itemsize * max(1, m)) // 4 * 4)


def whole_rows(p: int, itemsize: int) -> int:
    """p or the next number of columns of which a row fills registers: a product on a host with fewer takes longer, with
    one or three 1.4 to 1.7 times as long as with two or four."""
    fill = max(1, 16 // itemsize)
    return -(-p // fill) * fill


def multiply(M: Tensor, V: Tensor) -> Tensor:
    """M V for a CSR matrix and V (m, p)."""
    p = V.shape[-1]
    wide = whole_rows(p, V.element_size()) if V.device.type == "cpu" else p
    if wide == p:
        return M @ V.contiguous()
    return (M @ torch.nn.functional.pad(V, (0, wide - p)))[:, :p]


def compressed_rows(M: Tensor) -> Tensor:
    """A sparse Hermitian matrix (m, m) as CSR, whose products are 7 to 16 times faster than those of COO.

    A CSC matrix holds the transpose's rows: for Hermitian M that is conj(M), so nothing is sorted.
    """
    if M.layout == torch.sparse_csc:
        values = (
            M.values().conj_physical() if M.is_complex() else M.values()
        )  # a lazy conjugate asks CSC for strides
        return csr_matrix(M.ccol_indices(), M.row_indices(), values, M.shape[-1])
    if M.layout != torch.sparse_csr:
        # blocks convert to compressed rows by way of COO alone
        coo = M if M.layout == torch.sparse_coo else M.to_sparse_coo()
        M = coo.coalesce().to_sparse_csr()
    return csr_matrix(M.crow_indices(), M.col_indices(), M.values(), M.shape[-1])


def block_diagonal(M: Tensor) -> Tensor:
    """A batch of sparse matrices (*, m, m) as one block-diagonal CSR matrix (b m, b m), batch in row-major order."""
    pattern = Pattern(M)
    size = math.prod(pattern.batch_shape) * M.shape[-1]
    rows, cols = pattern.positions(0, pattern.count)
    # Pattern's order is that of rows in both layouts that batches have.
    ends = torch.bincount(rows, minlength=size).cumsum(0)
    return csr_matrix(
        torch.cat([ends.new_zeros(1), ends]), cols, pattern.values.reshape(-1), size
    )


def row_indices(M: Tensor) -> Tensor:
    """The row of each stored element of a CSR matrix."""
    crow = M.crow_indices().to(torch.int64)
    return torch.arange(M.shape[0], device=crow.device).repeat_interleave(
        crow.diff(), output_size=M.values().numel()
    )


def by_rows(M: Tensor) -> Tensor:
    """M as CSR if it is CSC, BSR or BSC, differentiable to any order; every other M as it is.

    PyTorch can neither add two tensors of those layouts, which a second derivative does, nor multiply them fast.
    """
    if M.dim() > 2 or M.layout in (torch.strided, torch.sparse_coo, torch.sparse_csr):
        return M
    pattern = Pattern(M.detach())
    rows, cols = pattern.positions(0, pattern.count)
    height, width = pattern.block
    rows = (rows * height)[:, None, None] + torch.arange(height, device=rows.device)[
        :, None
    ]
    cols = (cols * width)[:, None, None] + torch.arange(width, device=cols.device)
    flat, order = (rows * M.shape[-1] + cols).reshape(-1).sort()
    counts = torch.bincount(flat // M.shape[-1], minlength=M.shape[-2])
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = _Values.apply(M).reshape(-1)[order]
    held = torch.sparse_csr_tensor(
        crow, flat % M.shape[-1], values.detach(), M.shape, check_invariants=False
    )
    return SparseFromValues.apply(values, Pattern(held))


def is_symmetric_pattern(M: Tensor) -> bool:
    """Whether sparse M stores position (c, r) wherever it stores (r, c).  O(nnz) time, O(m) memory.

    Every line h of the matrix gets a fixed random 64-bit number; row r sums the numbers of the columns that it stores,
    column r those of the rows.  Sums modulo 2^64 are exact, so the two agree for a symmetric pattern, and for another
    one with probability 2^-64.
    """
    pattern = Pattern(M)
    if pattern.block[0] != pattern.block[1]:
        raise ValueError(
            f"lobpcg: the gradient of a block-sparse matrix needs square blocks, got blocks of {pattern.block[0]} x "
            f"{pattern.block[1]}; use to_sparse_csr() or square blocks"
        )
    lines = pattern.block_rows * math.prod(pattern.batch_shape)
    generator = torch.Generator("cpu").manual_seed(lines)
    number = torch.randint(
        -(1 << 63), (1 << 63) - 1, (lines,), generator=generator, device="cpu"
    ).to(M.device)
    difference = torch.zeros_like(number)
    for _, _, rows, cols in pattern.chunks(1):
        difference.index_add_(0, rows, number[cols])
        difference.index_add_(0, cols, number[rows], alpha=-1)
    return not bool(difference.any())


class Pattern:
    """Stored positions of a sparse matrix (*, m, m), as flat indices into rows of tall blocks (*, m, p).

    Invariant: stored element i of `values` (a block of `block` elements for BSR and BSC) sits in block row
    positions(i, i + 1)[0] and block column positions(i, i + 1)[1], both counted through all batches.  COO duplicates
    are summed first: each position is stored once.
    """

    def __init__(self, M: Tensor) -> None:
        self.layout, self.shape, self.dtype = M.layout, M.shape, M.dtype
        self.batch_shape: Tuple[int, ...] = tuple(M.shape[:-2])
        self.block = (1, 1)
        if self.layout == torch.sparse_coo:
            M = M.coalesce()
            self.indices = M.indices()
            self.values = M.values()
        else:
            by_row = self.layout in (torch.sparse_csr, torch.sparse_bsr)
            self.compressed = M.crow_indices() if by_row else M.ccol_indices()
            self.plain = M.col_indices() if by_row else M.row_indices()
            self.values = M.values()
            if self.layout in (torch.sparse_bsr, torch.sparse_bsc):
                self.block = (int(self.values.shape[-2]), int(self.values.shape[-1]))
        self.count = (
            self.plain.numel() if hasattr(self, "plain") else self.indices.shape[1]
        )
        self.block_rows = self.shape[-2] // self.block[0]

    def positions(self, start: int, end: int) -> Tuple[Tensor, Tensor]:
        """Block rows and block columns of the stored elements start .. end - 1, counted through all batches."""
        if self.layout == torch.sparse_coo:
            index = self.indices[:, start:end]
            batch = torch.zeros_like(index[0])
            for size, coordinate in zip(self.batch_shape, index):
                batch = batch * size + coordinate
            return (
                batch * self.block_rows + index[-2],
                batch * self.block_rows + index[-1],
            )
        if start == end:  # nothing is stored
            none = self.plain.new_zeros(0, dtype=torch.int64)
            return none, none
        lines = self.compressed.shape[-1] - 1
        ends = self._line_ends()
        bounds = torch.tensor([start, end - 1], device=ends.device, dtype=ends.dtype)
        first, last = torch.searchsorted(ends, bounds, right=True).tolist()
        counts = ends[first : last + 1].clamp(max=end).diff(prepend=bounds[:1])
        line = torch.arange(first, last + 1, device=ends.device).repeat_interleave(
            counts, output_size=end - start
        )
        plain = self.plain.reshape(-1)[start:end].to(torch.int64)
        if self.batch_shape:
            plain = plain + (line // lines) * lines
        return (
            (line, plain)
            if self.layout in (torch.sparse_csr, torch.sparse_bsr)
            else (plain, line)
        )

    def _line_ends(self) -> Tensor:
        """Number of elements stored up to the end of each compressed line, counted through all batches."""
        ends = self.compressed[..., 1:].reshape(-1, self.compressed.shape[-1] - 1)
        if self.batch_shape:
            ends = (
                ends
                + torch.arange(ends.shape[0], device=ends.device)[:, None]
                * self.plain.shape[-1]
            )
        return ends.reshape(-1)

    def chunks(self, width: int) -> Iterator[Tuple[int, int, Tensor, Tensor]]:
        """(start, end, rows, columns) over all stored elements, few enough at a time for gathered rows to fit."""
        step = max(1, _CHUNK_ELEMENTS // max(1, width * max(self.block)))
        for start in range(0, self.count, step):
            end = min(start + step, self.count)
            yield (start, end) + self.positions(start, end)

    def with_values(self, values: Tensor) -> Tensor:
        """A sparse tensor of this pattern with other values, not differentiated."""
        if self.layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(
                self.indices,
                values,
                self.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        return torch.sparse_compressed_tensor(
            self.compressed,
            self.plain,
            values,
            self.shape,
            layout=self.layout,
            check_invariants=False,
        )


def _values_on_pattern(
    U: Tensor, V: Tensor, pattern: Pattern, hermitian: bool
) -> Tensor:
    """U V^H, or its Hermitian part, at the stored positions, in the shape of pattern.values."""
    height, width = pattern.block
    p = U.shape[-1]
    out = U.new_empty((pattern.count, height, width))
    U, V = (T.expand(pattern.batch_shape + T.shape[-2:]) for T in (U, V))
    pairs = [(U.reshape(-1, height, p), V.reshape(-1, width, p))]
    if hermitian:
        pairs.append((V.reshape(-1, height, p), U.reshape(-1, width, p)))
    for start, end, rows, cols in pattern.chunks(p):
        for i, (left, right) in enumerate(pairs):
            if height == width == 1:
                part = (left[rows, 0] * right[cols, 0].conj()).sum(-1).reshape(-1, 1, 1)
            else:
                part = torch.bmm(left[rows], right[cols].mH)
            out[start:end] = part if i == 0 else (out[start:end] + part) / 2
    return out.reshape(pattern.values.shape)


def _product_on_pattern(
    values: Tensor, V: Tensor, pattern: Pattern, adjoint: bool
) -> Tensor:
    """S V, or S^H V, for the matrix S with these values; V: (*, m, p)."""
    height, width = pattern.block
    p = V.shape[-1]
    values = values.reshape(-1, height, width)
    if adjoint:
        # Not .mH: PyTorch cannot mark a view of a compressed tensor's values as conjugate.
        values = torch.conj_physical(values.mT) if values.is_complex() else values.mT
        height, width = width, height
    source = V.reshape(-1, width, p)
    out = V.new_zeros((V.numel() // max(1, height * p), height, p))
    for start, end, rows, cols in pattern.chunks(p):
        if adjoint:
            rows, cols = cols, rows
        out.index_add_(0, rows, torch.matmul(values[start:end], source[cols]))
    return out.reshape(V.shape)


class PatternValues(Function):
    """(U, V) -> U V^H, or its Hermitian part, at the stored positions.

    Backward, with S the cotangent as a matrix on the pattern: U gets S V and V gets S^H U; Hermitian, the mean of S and
    S^H takes the place of both.
    """

    @staticmethod
    def forward(U: Tensor, V: Tensor, pattern: Pattern, hermitian: bool) -> Tensor:
        return _values_on_pattern(U, V, pattern, hermitian)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        U, V, ctx.pattern, ctx.hermitian = inputs
        ctx.save_for_backward(U, V)
        ctx.save_for_forward(U, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, g: Optional[Tensor]) -> Any:
        U, V = ctx.saved_tensors
        gU = gV = None
        if g is not None and ctx.needs_input_grad[0]:
            gU = PatternValues._times(ctx, g, V, False)
        if g is not None and ctx.needs_input_grad[1]:
            gV = PatternValues._times(ctx, g, U, True)
        return gU, gV, None, None

    @staticmethod
    def _times(ctx: Any, g: Tensor, V: Tensor, adjoint: bool) -> Tensor:
        product = PatternProduct.apply(g, V, ctx.pattern, adjoint)
        return (
            (product + PatternProduct.apply(g, V, ctx.pattern, not adjoint)) / 2
            if ctx.hermitian
            else product
        )

    @staticmethod
    @accepts_legacy_vmap
    def jvp(
        ctx: Any,
        dU: Optional[Tensor],
        dV: Optional[Tensor],
        _pattern: Any,
        _hermitian: Any,
    ) -> Any:
        U, V = ctx.saved_tensors
        pairs = ((dU, V), (U, dV))
        terms = [
            PatternValues.apply(*pair, ctx.pattern, ctx.hermitian)
            for pair in pairs
            if None not in pair
        ]
        return sum(terms[1:], terms[0])


class PatternProduct(Function):
    """(values, V) -> S V or S^H V.  Backward: the values get cotangent V^H (V cotangent^H) on the pattern."""

    @staticmethod
    def forward(values: Tensor, V: Tensor, pattern: Pattern, adjoint: bool) -> Tensor:
        return _product_on_pattern(values, V, pattern, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        values, V, ctx.pattern, ctx.adjoint = inputs
        ctx.save_for_backward(values, V)
        ctx.save_for_forward(values, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, g: Optional[Tensor]) -> Any:
        values, V = ctx.saved_tensors
        gvalues = gV = None
        if g is not None and ctx.needs_input_grad[0]:
            gvalues = PatternValues.apply(
                *((V, g) if ctx.adjoint else (g, V)), ctx.pattern, False
            )
        if g is not None and ctx.needs_input_grad[1]:
            gV = PatternProduct.apply(values, g, ctx.pattern, not ctx.adjoint)
        return gvalues, gV, None, None

    @staticmethod
    @accepts_legacy_vmap
    def jvp(
        ctx: Any,
        dvalues: Optional[Tensor],
        dV: Optional[Tensor],
        _pattern: Any,
        _adjoint: Any,
    ) -> Any:
        values, V = ctx.saved_tensors
        terms = [
            PatternProduct.apply(*pair, ctx.pattern, ctx.adjoint)
            for pair in ((dvalues, V), (values, dV))
            if None not in pair
        ]
        return sum(terms[1:], terms[0])


class SparseFromValues(Function):
    """values -> the sparse tensor that holds them.  PyTorch's own constructors refuse a gradient for complex CSR."""

    @staticmethod
    def forward(values: Tensor, pattern: Pattern) -> Tensor:
        return pattern.with_values(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pattern = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Optional[Tensor]) -> Any:
        if g is None:
            return None, None
        if is_sparse(g):
            # Autograd gives a sparse output a gradient on the positions that the output stores.
            return Pattern(g).values, None
        pattern = ctx.pattern
        height, width = pattern.block
        size = pattern.block_rows
        rows, cols = pattern.positions(0, pattern.count)
        blocks = g.reshape(-1, size, height, size, width).transpose(-2, -3)
        values = blocks[rows // size, rows % size, cols % size]
        return values.reshape(pattern.values.shape), None


class _Values(Function):
    """values of a compressed sparse tensor; backward: the tensor of the same pattern that holds the cotangent."""

    @staticmethod
    def forward(G: Tensor) -> Tensor:
        return G.values().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pattern = Pattern(inputs[0].detach())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Optional[Tensor]) -> Any:
        if h is None:
            return None
        _refuse_accumulation(ctx.next_functions[0][0])
        return SparseFromValues.apply(h, ctx.pattern)


def _refuse_accumulation(node: Any) -> None:
    """An error with a remedy where PyTorch is about to put a gradient into the .grad of a leaf whose layout it cannot
    accumulate: it asks whether a CSC, BSR or BSC tensor is contiguous, which those refuse to say.
    """
    if node is None or not hasattr(node, "variable"):
        return
    leaf = node.variable
    try:
        leaf.is_contiguous()
        return
    except RuntimeError:
        pass
    try:
        if not torch._C._will_engine_execute_node(node):
            return
    except (
        RuntimeError
    ):  # autograd.grad captures the gradient of a leaf: nothing is accumulated
        return
    raise RuntimeError(
        f"lobpcg: backward() cannot accumulate a gradient in a leaf of layout {leaf.layout}; PyTorch does that for "
        "strided, COO and CSR leaves only: use torch.autograd.grad, or make the leaf CSR and convert it"
    )


class SparseProduct(Function):
    """(M, V, operand) -> M V for sparse Hermitian M, the operand's numbers.  Backward: V gets M g, M the Hermitian part
    of g V^H on its pattern."""

    @staticmethod
    def forward(M: Tensor, V: Tensor, operand: Any) -> Tensor:
        return operand.with_parameters(M).apply(V)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        M, V, ctx.operand = inputs
        ctx.save_for_backward(M, V)
        ctx.save_for_forward(M, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, g: Optional[Tensor]) -> Any:
        M, V = ctx.saved_tensors
        operand = ctx.operand.with_parameters(M)
        gM = gV = None
        if g is not None and ctx.needs_input_grad[0]:
            (gM,) = operand.pullback((g, V))
        if g is not None and ctx.needs_input_grad[1]:
            gV = sum_to(operand.product(g), V.shape)
        return gM, gV, None

    @staticmethod
    @accepts_legacy_vmap
    def jvp(ctx: Any, dM: Optional[Tensor], dV: Optional[Tensor], _operand: Any) -> Any:
        M, V = ctx.saved_tensors
        operand = ctx.operand.with_parameters(M)
        terms = []
        if dM is not None:
            terms.append(operand.tangent((dM,), V))
        if dV is not None:
            terms.append(operand.product(dV))
        return sum(terms[1:], terms[0])
