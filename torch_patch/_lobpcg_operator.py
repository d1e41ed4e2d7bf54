"""Products of A, B and the preconditioner with a block, in whatever form they are given (TorchScript dialect).

A block of p vectors of length m is stored as rows, shape (*, p, m): a slice of vectors is then contiguous, and the
updates of LOBPCG run 2 to 3 times faster than on columns. `Operator` hides the layout: dense, batched dense, sparse
(converted once to the compressed rows that multiply fastest), batches of sparse matrices (laid out as one
block-diagonal matrix), and, outside TorchScript, any callable on blocks (*, m, p).
"""

from typing import Any

import torch
from torch import Tensor


def epsilon(dtype: torch.dtype) -> float:
    """Spacing of the floating-point numbers at 1 (torch.finfo cannot be scripted)."""
    if dtype == torch.float32 or dtype == torch.complex64:
        return 1.1920928955078125e-07
    return 2.220446049250313e-16


def is_sparse_layout(A: Tensor) -> bool:
    return A.layout != torch.strided


def start_rows(count: int, m: int, first: int, like: Tensor) -> Tensor:
    """Rows `first` to `first + count - 1` of a fixed table of pseudo-random numbers in (-1, 1): (count, m).

    The table is a hash of the position (two rounds of multiply and shift on 31-bit integers), so it is the same on
    every device and in every process, and no generator's state is read or changed. Real also for complex problems: a
    real vector has a component along every eigenvector with probability one just as a complex one has.
    """
    rows = torch.empty([count, m], dtype=like.dtype, device=like.device)
    column = torch.arange(m, dtype=torch.int64, device=like.device)
    for i in range(count):
        h = (column * 747796405 + (first + i + 1) * 891646097) & 0x7FFFFFFF
        h = ((h ^ (h >> 15)) * 1274126177) & 0x7FFFFFFF
        h = ((h ^ (h >> 13)) * 668265263) & 0x7FFFFFFF
        h = h ^ (h >> 16)
        rows[i] = (h.to(torch.float64) / 1073741823.5 - 1.0).to(like.dtype)
    return rows


def csr_matrix(crow: Tensor, col: Tensor, values: Tensor, m: int) -> Tensor:
    """Square CSR matrix of values' dtype and device (scripted constructors take neither from values)."""
    return torch.sparse_csr_tensor(crow, col, values, [m, m], dtype=values.dtype, device=values.device)


def compressed_rows(A: Tensor) -> Tensor:
    """A sparse Hermitian matrix (m, m) as CSR with 32-bit indices where they suffice.

    COO products are 7 to 16 times slower than CSR ones; 32-bit indices save another tenth to a quarter of the time.
    A CSC matrix holds the transpose's rows: for Hermitian A that is conj(A), so nothing is sorted. A itself if it is of
    that form already.
    """
    if A.layout == torch.sparse_csr:
        if (A.crow_indices().dtype == torch.int32) == _few(A.values()) and not A.values().is_conj():
            return A
    if A.layout == torch.sparse_csc:
        values = A.values().conj_physical() if A.is_complex() else A.values()  # a lazy conjugate asks CSC for strides
        crow, col = A.ccol_indices(), A.row_indices()
    else:
        if A.layout != torch.sparse_csr:
            # blocks convert to compressed rows by way of COO alone
            coo = A if A.layout == torch.sparse_coo else A.to_sparse()
            A = coo.coalesce().to_sparse_csr()
        values, crow, col = A.values(), A.crow_indices(), A.col_indices()
    if _few(values):
        crow, col = crow.to(torch.int32), col.to(torch.int32)
    return csr_matrix(crow, col, values.resolve_conj(), A.size(-1))


def _few(values: Tensor) -> bool:
    """Whether 32-bit indices are the better ones."""
    return values.device.type == "cpu" and values.numel() < 2147483647


def _block_diagonal(A: Tensor) -> Tensor:
    """A batch of sparse matrices (*, m, m) as one block-diagonal CSR matrix (b m, b m), batch in row-major order."""
    m, count = A.size(-1), 1
    for size in A.shape[:-2]:
        count *= size
    if A.layout == torch.sparse_coo:
        coo = A.coalesce()
        index, values = coo.indices(), coo.values()
        which = torch.zeros_like(index[0])
        for i in range(A.dim() - 2):
            which = which * A.size(i) + index[i]
        flat = torch.sparse_coo_tensor(
            torch.stack([which * m + index[-2], which * m + index[-1]]),
            values,
            [count * m, count * m],
            dtype=values.dtype,
            device=values.device,
        )
        return compressed_rows(flat)
    if A.layout != torch.sparse_csr:
        raise ValueError(
            f"lobpcg: a batch of sparse matrices in layout {A.layout}; batches must be COO or CSR: convert with "
            "to_sparse_csr()"
        )
    # Every matrix of a CSR batch stores as many values as the others.
    stored = A.values().size(-1)
    which = torch.arange(count, device=A.device).unsqueeze(-1)
    starts = A.crow_indices().to(torch.int64).reshape(count, m + 1)[:, :m] + which * stored
    col = A.col_indices().to(torch.int64).reshape(count, stored) + which * m
    end = torch.full([1], count * stored, dtype=torch.int64, device=A.device)
    crow = torch.cat([starts.reshape(-1), end])
    return compressed_rows(csr_matrix(crow, col.reshape(-1), A.values().reshape(-1), count * m))


class Operator:
    """One of A, B, iK as a linear map on rows, times a power of two (see safe_scale).

    Guarantee: `rows(V)` for V (*, p, m) returns the rows of (scale * matrix) applied to each vector, the same shape and
    dtype; nothing is written to V. `columns` counts the vectors multiplied so far.
    """

    def __init__(self, matrix: Tensor, name: str):
        self.name = name
        self.scale = torch.ones([], dtype=torch.float64)
        self.scaled = False
        self.columns = 0
        self.stored = 0  # numbers held; a callable's are not known
        self.call: None = None
        self.matrix = torch.empty([0])
        self.sparse = False
        self.blocks = False
        if not torch.jit.is_scripting():
            if not isinstance(matrix, Tensor):
                self.call = matrix
                return
        self.sparse = is_sparse_layout(matrix)
        self.blocks = self.sparse and matrix.dim() > 2
        if self.blocks:
            self.matrix = _block_diagonal(matrix)
        elif self.sparse:
            self.matrix = compressed_rows(matrix)
        else:
            self.matrix = matrix
        self.stored = self.matrix.values().numel() if self.sparse else self.matrix.numel()

    def rows(self, V: Tensor) -> Tensor:
        self.columns += V.size(-2)
        U = self._product(V)
        if self.scaled:
            U = U * self.scale
        return U

    def set_scale(self, scale: Tensor) -> None:
        """From here on stand for scale * matrix; scale: (*) powers of two, one a matrix."""
        self.scale = scale.unsqueeze(-1).unsqueeze(-1)
        self.scaled = bool((scale != 1.0).any())

    def mean_square(self, m: int, batch: list[int]) -> Tensor:
        """||scale * matrix||_F^2 / m, the mean of the squared eigenvalues, of each matrix: (*) or ()."""
        factor = self.scale.squeeze(-1).squeeze(-1)
        if self.blocks:
            values = self.matrix.values().abs().square()  # .conj() fails on values of a batch in CSR
            square = csr_matrix(self.matrix.crow_indices(), self.matrix.col_indices(), values, self.matrix.size(1))
            ones = torch.ones([self.matrix.size(1), 1], dtype=values.dtype, device=values.device)
            return (square @ ones).reshape(batch + [m]).sum(-1) / m
        if self.sparse:
            return torch.linalg.vector_norm(self.matrix.values() * factor).square() / m
        if self.scaled:
            return torch.linalg.vector_norm(self.matrix * self.scale, dim=[-2, -1]).square() / m
        return torch.linalg.vector_norm(self.matrix, dim=[-2, -1]).square() / m

    def _product(self, V: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.call is not None:
                return _called(self.call, self.name, V)
        if not self.sparse:
            return _dense_rows(self.matrix, V)
        m, p = V.size(-1), V.size(-2)
        if self.blocks:
            tall = V.mT.reshape(-1, p)  # (b m, p)
            return (self.matrix @ tall).reshape(V.mT.shape).mT
        if V.dim() > 2:
            flat = V.reshape(-1, m)
            return (self.matrix @ flat.mT.contiguous()).mT.reshape(V.shape)
        return (self.matrix @ V.mT.contiguous()).mT


def _dense_rows(A: Tensor, V: Tensor) -> Tensor:
    """Rows of A v. Wide blocks by 256 rows of A at a time, which stay in the cache: at m = 2000 with 15 vectors in half
    the time."""
    p, m = V.size(-2), V.size(-1)
    if p <= 10 or m <= 512 or A.dim() > 2 or V.dim() > 2 or V.device.type != "cpu":
        return (A @ V.mT).mT
    U = torch.empty_like(V)
    for i in range(0, m, 256):
        torch.mm(V, A[i : i + 256].mT, out=U[:, i : i + 256])
    return U


@torch.jit.unused
def _called(call: Any, name: str, V: Tensor) -> Tensor:
    block = V.mT  # (*, m, p)
    U = call(block)
    if not isinstance(U, Tensor):
        raise TypeError(
            f"lobpcg: {name} returned {type(U).__name__}; a callable {name} must map a block (*, m, p) to a tensor of "
            f"the same shape"
        )
    if U.shape != block.shape or U.dtype != block.dtype or U.device != block.device:
        raise ValueError(
            f"lobpcg: {name} returned shape {tuple(U.shape)}, {U.dtype}, {U.device} for a block of shape "
            f"{tuple(block.shape)}, "
            f"{block.dtype}, {block.device}; a callable must keep shape, dtype and device"
        )
    # Seen here a NaN has a name; later it would be a factorisation that fails.
    if U.numel() > 0 and not bool(torch.isfinite(max_abs(U, list(range(U.dim()))))):
        raise ValueError(
            f"lobpcg: {name} returned NaN or infinite values for a finite block; check the callable {name}"
        )
    return U.mT


def max_abs(A: Tensor, dims: list[int]) -> Tensor:
    """max |a| over dims, NaN or infinite if any entry is; seven times faster than the infinity norm."""
    if A.is_complex():
        return A.abs().amax(dims)
    return torch.maximum(A.amax(dims), -A.amin(dims))


def largest_entry(A: Tensor) -> Tensor:
    """max |a_ij| of each matrix, NaN or infinite if any entry is: (*) for dense, () for sparse (all its matrices
    together)."""
    values = A
    if is_sparse_layout(A):
        values = A.coalesce().values() if A.layout == torch.sparse_coo else A.values()
        if values.numel() == 0:
            return torch.zeros([], dtype=torch.float64, device=A.device)
        return max_abs(values.flatten(), [0]).to(torch.float64)
    if A.size(-1) == 0:
        return torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    return max_abs(A, [-2, -1]).to(torch.float64)


def safe_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of 4 that bring entries of size `largest` near 1; 1 where squares neither overflow nor underflow anyway.

    Squares of residuals down to eps * largest must stay normal numbers: (eps * largest)^2 > 1e-38 in single precision
    asks for largest > 1e-12; 1e-6 leaves room for preconditioned residuals. The double-precision bounds are the same
    argument.
    A power of 4 has an exact square root, which undoes the scaling of B in X.
    """
    low, high = 1e-100, 1e100
    if dtype == torch.float32 or dtype == torch.complex64:
        low, high = 1e-6, 1e6
    extreme = (largest > 0) & ((largest < low) | (largest > high))
    size = torch.where(extreme, largest, torch.ones_like(largest))
    return torch.pow(4.0, -torch.floor(0.5 * torch.log2(size)))


def sparse_diagonal_is_positive(B: Tensor) -> bool:
    """Whether every diagonal entry of sparse B (*, m, m) is stored and positive. Cost: a few passes over the stored
    values."""
    M = _block_diagonal(B) if B.dim() > 2 else compressed_rows(B)
    crow, col, values = M.crow_indices(), M.col_indices(), M.values()
    values = (
        torch.real(values.clone()) if values.is_complex() else values
    )  # a view of stored values cannot be viewed again
    row = torch.repeat_interleave(
        torch.arange(M.size(0), device=col.device, dtype=col.dtype), (crow[1:] - crow[:-1]).to(torch.int64)
    )
    return int(((row == col) & (values > 0)).sum()) == M.size(0)
