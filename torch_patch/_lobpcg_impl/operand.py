"""Operand: a Hermitian matrix that acts on blocks, in whatever form it is given; Pencil: the three of one problem.

Solver and derivative know a matrix by what it does: its product with a block (*, m, p), the cotangent of its parameters
for a cotangent of that product, the tangent of the product, its norm, scale and checks.  Layouts, conversions and
batches are inside.  The parameters of an operand are the tensors that autograd sees: the matrix itself, if it is a
tensor.  `with_parameters` is the same operand on other tensors, live ones in the place of detached ones; what was
converted once for products stays with it.

To add a kind of operand, write a subclass of Operand, as in module matrix_free, and name it in `operand`.
"""

import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl import arguments
from torch._lobpcg_impl.abstract_operand import Operand, Probe
from torch._lobpcg_impl.blocks import (
    gram,
    largest_entries,
    safe_scale,
    Space,
    UNSCALED,
    unscaled_range,
    WHOLE,
)
from torch._lobpcg_impl.constructor import around_constructor, keep_graph_of_values
from torch._lobpcg_impl.matrix_free import MatrixFree
from torch._lobpcg_impl.report import members
from torch._lobpcg_impl.sparse import (
    block_diagonal,
    by_rows,
    columns_at_a_time,
    compressed_rows,
    csr_matrix,
    is_sparse,
    is_symmetric_pattern,
    multiply,
    Pattern,
    PatternProduct,
    PatternValues,
    row_indices,
    SparseFromValues,
    SparseProduct,
    whole_rows,
)
from torch._lobpcg_impl.transforms import (
    batched_first,
    broadcast,
    in_transform,
    is_traced,
    sum_to,
    twin,
    unwrapped,
)


# Columns up to which A V is (V^T A)^T on a CPU: a thin block from the left reads A by rows, as it lies.  Measured in
# real arithmetic with AVX512, AVX2 and SSE at m = 600 to 4000: 1.05 to 2 times as fast up to here, slower beyond 10.
_FROM_THE_LEFT_UP_TO = 6
_FROM_THE_LEFT_ABOVE = 512  # order under which a product costs less than the choice
# Cholesky (m^3 / 3) costs as much as a few dozen iterations; above this order the iteration is left to meet a
# direction along which B is negative.
_CHOLESKY_CHECK_BELOW = 4097


def operand(M: Any, name: str, batch: Sequence[int] = ()) -> "Operand":
    """The operand that M, a tensor, a callable or None for the identity, stands for.

    batch: the batch shape of the problem, which a callable does not tell.
    """
    if M is None:
        return Identity(name)
    if not isinstance(M, Tensor):
        return MatrixFree(name, M, batch)
    return Sparse(name, M) if is_sparse(M) else Dense(name, M)


class Identity(Operand):
    """The B that is left out."""

    def apply(self, V: Tensor) -> Tensor:
        return V

    def product(self, V: Tensor) -> Tensor:
        return V

    def mean_square(self, probe: Probe) -> Tensor:
        return torch.ones([], dtype=torch.float64)

    def largest(self, probe: Probe) -> Tensor:
        return torch.ones([], dtype=torch.float64)

    def scaled(self, scale: Tensor) -> Operand:
        return self

    def in_double(self) -> Operand:
        return self


class _Matrix(Operand):
    """A matrix given as a tensor, (*, m, m)."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(name)
        self.tensor = tensor

    @property
    def parameters(self) -> Tuple[Tensor, ...]:  # type: ignore[override]
        return (self.tensor,)

    @property
    def batch(self) -> Tuple[int, ...]:  # type: ignore[override]
        return () if self.tensor is None else tuple(self.tensor.shape[:-2])

    def with_parameters(self, *parameters: Tensor) -> "_Matrix":
        same = twin(self)
        (same.tensor,) = parameters
        return same

    def in_double(self) -> Operand:
        return operand(
            self.tensor.to(torch.promote_types(self.tensor.dtype, torch.float64)),
            self.name,
        )

    def scaled(self, scale: Tensor) -> Operand:
        if bool((scale == 1.0).all()):
            return self
        return operand(self._times(scale.to(self.tensor.dtype.to_real())), self.name)

    def _times(self, scale: Tensor) -> Tensor:
        raise NotImplementedError


class Dense(_Matrix):
    """A strided matrix or batch."""

    @property
    def stored(self) -> int:  # type: ignore[override]
        return self.tensor.numel()

    def _multiply(self, V: Tensor) -> Tensor:
        A, p = self.tensor, V.shape[-1]
        if A.dim() > 2:
            return torch.matmul(A, V)
        if V.dim() > 2:
            # One matrix and many blocks are one product with a wide block instead of many products.
            return _unfold(torch.matmul(A, _fold(V)), V)
        from_the_left = (
            p <= _FROM_THE_LEFT_UP_TO
            and A.shape[-1] > _FROM_THE_LEFT_ABOVE
            and self.name != "iK"  # need not equal its adjoint to the bit
            and V.device.type == "cpu"
            and not A.is_complex()
        )
        if (
            not from_the_left
            or torch.is_grad_enabled()
            or in_transform()
            or is_traced(A, V)
        ):
            return torch.matmul(A, V)
        return torch.mm(V.mT, A).mT

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Tensor, ...]:
        U, V = _side_by_side(self.tensor, pairs)
        P = torch.matmul(U, V.mH / 2)
        # One sum with the transpose, so that the result is Hermitian to the bit.
        return (sum_to(P + _adjoint(P), self.tensor.shape),)

    def tangent(self, tangents: Sequence[Optional[Tensor]], V: Tensor) -> Tensor:
        (M,) = tangents
        return _dense_tangent(M, V)

    def largest(self, probe: Probe) -> Tensor:
        if self.tensor.shape[-1] == 0:
            return self.tensor.new_zeros(self.tensor.shape[:-2], dtype=torch.float64)
        return largest_entries(self.tensor.flatten(-2), -1).to(torch.float64)

    def is_near_one(self, probe: Probe, dtype: torch.dtype) -> bool:
        M = self.tensor
        if M.dim() > 2 or M.is_complex() or not M.numel():
            return super().is_near_one(probe, dtype)
        least, most = map(float, torch.aminmax(M))
        low, high = unscaled_range(dtype)
        return low <= max(-least, most) <= high

    def mean_square(self, probe: Probe) -> Tensor:
        return (
            torch.linalg.vector_norm(self.tensor, dim=(-2, -1)).square()
            / self.tensor.shape[-1]
        )

    def diagonal(self) -> Tensor:
        d = self.tensor.diagonal(dim1=-2, dim2=-1)
        return d.real if d.is_complex() else d

    def row_squares(self, d: Tensor) -> Tensor:
        s = d.rsqrt()
        M = self.tensor * (s.unsqueeze(-1) * s.unsqueeze(-2))
        return torch.linalg.vector_norm(M, dim=-1).square()

    def _times(self, scale: Tensor) -> Tensor:
        return self.tensor * scale[..., None, None]

    def dense(self) -> Tensor:
        return self.tensor

    def member(self, position: Tuple[int, ...]) -> Operand:
        return Dense(self.name, _at(self.tensor, position, 2))

    def check_positive(self) -> None:
        d = self.diagonal()
        bad = (d <= 0).any(-1)
        if not bool(bad.any()) and self.tensor.shape[-1] < _CHOLESKY_CHECK_BELOW:
            # Scaled to a unit diagonal the factorisation neither overflows nor mistakes a graded matrix for a singular
            # one.
            s = d.rsqrt()
            scaled = self.tensor * s.unsqueeze(-1) * s.unsqueeze(-2)
            bad = torch.linalg.cholesky_ex(scaled)[1] > 0
        if bool(bad.any()):
            raise ValueError(
                f"lobpcg: {self.name} is not positive definite{members(bad, bad.dim())} (its Cholesky factorisation "
                f"fails); {self.name} must be Hermitian positive definite"
            )


class Sparse(_Matrix):
    """A sparse matrix in any layout, or a batch of them in COO or CSR.

    Products are with one CSR matrix, made once: of a batch, with its block-diagonal matrix.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(name, tensor)
        if tensor.dim() > 2 and tensor.layout not in (
            torch.sparse_coo,
            torch.sparse_csr,
        ):
            raise ValueError(
                f"lobpcg: a batch of sparse matrices in layout {tensor.layout}; batches must be COO or CSR: convert "
                "with to_sparse_csr()"
            )
        self.made: Dict[str, Any] = {}  # shared by all copies with other parameters

    def with_gradient(self, probe: Probe) -> Operand:
        """ValueError where a position (r, c) is stored without (c, r): the gradient has no place there."""
        M = self.tensor
        if not M.requires_grad:
            return self
        if not is_symmetric_pattern(M.detach()):
            raise ValueError(
                f"lobpcg: the gradient of sparse {self.name} is Hermitian and lives on its stored positions, but "
                f"{self.name} stores a position (r, c) without (c, r); make its pattern symmetric, with explicit "
                "zeros, or pass a dense matrix"
            )
        if M.grad_fn is not None:
            keep_graph_of_values(M)
        M = by_rows(around_constructor(M))
        return self if M is self.tensor else Sparse(self.name, M)

    def _once(self, what: str, make: Callable[[Tensor], Any]) -> Any:
        if what not in self.made:
            # No level of torch.func maps a sparse tensor, so what is inside holds the values.
            self.made[what] = make(unwrapped(self.tensor.detach()))
        return self.made[what]

    @property
    def rows(self) -> Tensor:
        """The CSR matrix of products, (m, m), or (b m, b m) for a batch of b."""
        return self._once(
            "rows", block_diagonal if self.tensor.dim() > 2 else compressed_rows
        )

    @property
    def pattern(self) -> Pattern:
        return self._once("pattern", Pattern)

    @property
    def stored(self) -> int:  # type: ignore[override]
        return self.rows.values().numel()

    def _multiply(self, V: Tensor) -> Tensor:
        if self.tensor.dim() > 2:
            batch, (m, p) = self.tensor.shape[:-2], V.shape[-2:]
            V = V.expand(V.shape[: max(0, V.dim() - 2 - len(batch))] + batch + (m, p))
            extra = V.dim() - 2 - len(batch)
            tall = V.reshape((math.prod(V.shape[:extra]), -1, p)).movedim(
                0, -2
            )  # (b m, +, p)
            U = multiply(self.rows, tall.reshape(tall.shape[0], -1))
            return U.reshape(tall.shape).movedim(-2, 0).reshape(V.shape)
        if V.dim() > 2:
            return _unfold(multiply(self.rows, _fold(V)), V)
        return multiply(self.rows, V)

    def apply_to(self, V: Tensor, out: Tensor) -> Tensor:
        if V.dim() > 2 or V.device.type != "cpu":
            return super().apply_to(V, out)
        self.columns += V.shape[-1]
        (m, p), size = V.shape, V.element_size()
        width = columns_at_a_time(m, size)
        # Products take rows, columns are what blocks are made of: some at a time, in memory that is mapped already.
        v, u = (V.new_empty(m * min(width, whole_rows(p, size))) for _ in range(2))
        for i in range(0, p, width):
            part = V[:, i : i + width]
            q = part.shape[-1]
            wide = whole_rows(q, size)
            rows, image = (b[: m * wide].view(m, wide) for b in (v, u))
            rows[:, :q].copy_(part)
            rows[:, q:].zero_()
            # A product that replaces nothing: mm would fill its result with zeros first.
            torch.addmm(image, self.rows, rows, beta=0.0, out=image)
            out[:, i : i + width].copy_(image[:, :q])
        return out

    def product(self, V: Tensor) -> Tensor:
        return SparseProduct.apply(self.tensor, V, self)

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Tensor, ...]:
        U, V = _side_by_side(self.tensor, pairs)
        return (
            SparseFromValues.apply(
                PatternValues.apply(U, V, self.pattern, True), self.pattern
            ),
        )

    def tangent(self, tangents: Sequence[Optional[Tensor]], V: Tensor) -> Tensor:
        (M,) = tangents
        if M is None or not is_sparse(M):
            return _dense_tangent(M, V)
        pattern = Pattern(M)
        V = V.expand(pattern.batch_shape + V.shape[-2:]) if pattern.batch_shape else V
        return (
            PatternProduct.apply(pattern.values, V, pattern, False)
            + PatternProduct.apply(pattern.values, V, pattern, True)
        ) / 2

    def _per_matrix(self, values: Tensor, how: str) -> Tensor:
        """Sum or largest ("sum", "amax") of nonnegative numbers, one for each stored element of `rows`, over each
        matrix of a batch: (*)."""
        batch = self.tensor.shape[:-2]
        which = row_indices(self.rows) // max(1, self.tensor.shape[-1])
        zeros = values.new_zeros(math.prod(batch))
        return zeros.scatter_reduce(0, which, values, how).reshape(batch)

    def largest(self, probe: Probe) -> Tensor:
        values = self.rows.values().abs().to(torch.float64)
        if self.tensor.dim() == 2:
            return values.amax() if values.numel() else values.new_zeros(())
        return self._per_matrix(values, "amax")

    def mean_square(self, probe: Probe) -> Tensor:
        values, m = self.rows.values(), max(1, self.tensor.shape[-1])
        if self.tensor.dim() == 2:
            return torch.linalg.vector_norm(values).square() / m
        return self._per_matrix(values.abs().square(), "sum") / m

    def diagonal(self) -> Tensor:
        # Looked at in the forward first: inside of torch.func no kernel takes a CSR matrix.
        return self._once("diagonal", lambda _: self._diagonal())

    def _diagonal(self) -> Tensor:
        M, m = self.rows, self.tensor.shape[-1]
        row, values = row_indices(M), M.values()
        # Not .real: a view of stored values cannot be viewed again.
        values = torch.real(values.clone()) if values.is_complex() else values
        values = torch.where(row == M.col_indices(), values, torch.zeros_like(values))
        return (
            values.new_zeros(M.shape[0])
            .index_add(0, row, values)
            .reshape(self.tensor.shape[:-2] + (m,))
        )

    def row_squares(self, d: Tensor) -> Tensor:
        d = d.unsqueeze(-1)
        squares = self._with_entries(lambda v: v.abs().to(torch.float64).square())
        return (squares._multiply(1.0 / d) / d)[..., 0]

    def row_sums(self) -> Tensor:
        """Sums of |a_ij| over j, (*, m)."""
        sizes = self._with_entries(torch.abs)
        return sizes._multiply(torch.ones_like(self.diagonal()).unsqueeze(-1))[..., 0]

    def _with_entries(self, change: Callable[[Tensor], Tensor]) -> "Sparse":
        other, M = twin(self), self.rows
        values = change(M.values())
        rows = csr_matrix(M.crow_indices(), M.col_indices(), values, M.shape[0])
        other.made = {"rows": rows}
        return other

    def _times(self, scale: Tensor) -> Tensor:
        M, m = self.rows, self.tensor.shape[-1]
        if self.tensor.dim() == 2:
            return csr_matrix(M.crow_indices(), M.col_indices(), M.values() * scale, m)
        batch = self.tensor.shape[:-2]
        factors = scale.expand(batch).reshape(-1)[row_indices(M) // m]
        pattern = self.pattern
        return pattern.with_values((M.values() * factors).reshape(pattern.values.shape))

    def where_stored(self) -> Tensor:
        ones = torch.ones_like(self.pattern.values)
        return self.pattern.with_values(ones).to_dense() != 0

    def dense(self) -> Tensor:
        return self.tensor.to_dense()

    def member(self, position: Tuple[int, ...]) -> Operand:
        batch, m = self.tensor.shape[:-2], self.tensor.shape[-1]
        if not batch:
            return self
        which = int(_at(torch.arange(math.prod(batch)).reshape(batch), position))
        M = self.rows
        crow = M.crow_indices()[which * m : (which + 1) * m + 1]
        stored = slice(int(crow[0]), int(crow[-1]))
        return Sparse(
            self.name,
            csr_matrix(
                crow - crow[0],
                M.col_indices()[stored] - which * m,
                M.values()[stored],
                m,
            ),
        )

    def check_hermitian(self, probe: Probe) -> None:
        """By |u^H M v - conj(v^H M u)| for fixed random u, v: a single unequal pair of entries shows with probability
        one, at the cost of one product with two columns.

        The rounding error of the two forms is at most 2 m eps ||M||_F / sqrt(m) |u| |v|, and sqrt(m) times smaller as a
        rule.
        """
        V = probe()
        # (*, 2, 2): entry (i, j) is u_i . M u_j, for real u
        forms = gram(V, self._multiply(V))
        skew = (forms - forms.mH).abs().amax((-2, -1))
        size = self.mean_square(probe).sqrt()
        limit = 8.0 * torch.finfo(V.dtype).eps * V.shape[-2] * size
        bad = skew > limit
        if bool(bad.any()):
            name = self.name
            raise ValueError(
                f"lobpcg: sparse {name} is not Hermitian{members(bad, bad.dim())}: |u^H {name} v - (v^H {name} u)^H| = "
                f"{float(skew.max())} for fixed vectors u, v with entries in (-1, 1), at most {float(limit.max())} "
                f"expected; pass a Hermitian matrix, such as ({name} + {name}^H) / 2"
            )

    def check_positive(self) -> None:
        bad = (self.diagonal() <= 0).any(-1)
        if bool(bad.any()):
            raise ValueError(
                f"lobpcg: {self.name} is not positive definite{members(bad, bad.dim())}: a diagonal entry is not "
                f"positive; {self.name} must be Hermitian positive definite"
            )


def _dense_tangent(M: Optional[Tensor], V: Tensor) -> Tensor:
    if M is None:
        return torch.zeros_like(V)
    return (torch.matmul(M, V) + torch.matmul(M.mH, V)) / 2


def _adjoint(M: Tensor) -> Tensor:
    """M^H, not a conjugate that is only marked as such: that breaks forward mode under vmap."""
    return torch.conj_physical(M.mT) if M.is_complex() else M.mT


def _fold(V: Tensor) -> Tensor:
    """(*, m, p) as (m, * p): batches become columns."""
    return V.movedim(-2, 0).reshape(V.shape[-2], -1)


def _unfold(U: Tensor, V: Tensor) -> Tensor:
    """(m, * p) in the shape of V (*, m, p)."""
    return U.reshape((U.shape[0],) + tuple(V.shape[:-2]) + (V.shape[-1],)).movedim(
        0, -2
    )


def _side_by_side(
    M: Tensor, pairs: Sequence[Tuple[Tensor, Tensor]]
) -> Tuple[Tensor, Tensor]:
    """U, V whose product U V^H is the sum over the pairs; batches that M lacks become columns, too."""
    if len(pairs) == 1:
        U, V = pairs[0]
    else:
        U, V = (torch.cat(_expanded(blocks), -1) for blocks in zip(*pairs))
    return (_fold(U), _fold(V)) if M.dim() == 2 and U.dim() > 2 else (U, V)


def _expanded(blocks: Sequence[Tensor]) -> List[Tensor]:
    batch = max((block.shape[:-2] for block in blocks), key=len)
    return [block.expand(batch + block.shape[-2:]) for block in blocks]


def _at(T: Tensor, position: Tuple[int, ...], trailing: int = 0) -> Tensor:
    """T at one position of the batch, to which T's own batch dimensions broadcast."""
    batch = T.shape[: T.dim() - trailing]
    return T[
        tuple(
            i if size > 1 else 0
            for i, size in zip(position[len(position) - len(batch) :], batch)
        )
    ]


def hermitian_part(M: Any, look: bool = True) -> Any:
    """(M + M^H) / 2 of a dense matrix; M itself where that changes no bit, and for everything else.

    look: whether values can be looked at, which they cannot be under a transform or a tracer.
    """
    if not isinstance(M, Tensor) or is_sparse(M) or (look and _is_hermitian(M)):
        return M
    return (M + _adjoint(M)) / 2


def _is_hermitian(M: Tensor) -> bool:
    """Whether dense M (*, m, m) equals M^H to the bit; by tiles, since the transpose as a whole would miss the cache
    throughout."""
    if M.requires_grad:
        M = M.detach()
    m, tile = M.shape[-1], 256
    if m <= tile:
        return torch.equal(M, M.mH)
    for i in range(0, m, tile):
        for j in range(0, i + 1, tile):
            lower = M[..., i : i + tile, j : j + tile]
            if not torch.equal(lower, M[..., j : j + tile, i : i + tile].mH):
                return False
    return True


class Pencil:
    """A, B and iK of one problem.

    batch: their batch shape together with that of the start block.  scale_A, scale_B: powers of four, (*) or (), by
    which `checked` has multiplied A and B.  space: the rows of blocks, m on all processes together.
    """

    space: Space = WHOLE

    def __init__(
        self,
        A: Operand,
        B: Operand,
        iK: Optional[Operand],
        like: Tensor,
        batch: List[int],
    ) -> None:
        self.A, self.B, self.iK = A, B, iK
        self.m, self.dtype, self.device, self.batch = (
            like.shape[-2],
            like.dtype,
            like.device,
            batch,
        )
        self.scale_A = self.scale_B = UNSCALED
        self.rescaled = False

    @classmethod
    def of(cls, A: Any, B: Any, iK: Any, X: Optional[Tensor]) -> "Pencil":
        like, _ = arguments.model_of(A, X, B)
        batch = arguments.batch_shape(A=A, B=B, X=X, iK=iK)
        return cls(
            operand(A, "A", batch),
            operand(B, "B", batch),
            None if iK is None else operand(iK, "iK", batch),
            like,
            batch,
        )

    @property
    def generalized(self) -> bool:
        return not isinstance(self.B, Identity)

    @property
    def operands(self) -> Tuple[Operand, ...]:
        return (self.A, self.B) if self.iK is None else (self.A, self.B, self.iK)

    @property
    def parameters(self) -> Tuple[Any, ...]:
        """Those of A, then of B, then of iK."""
        both = (*self.A.parameters, *self.B.parameters)
        return both if self.iK is None else (*both, *self.iK.parameters)

    def split(self, values: Sequence[Any]) -> List[Tuple[Any, ...]]:
        """One value for each parameter, as those of A, of B and of iK."""
        first, own = 0, []
        for M in self.operands:
            last = first + len(M.parameters)
            own.append(tuple(values[first:last]))
            first = last
        return own

    def holds(self, parameters: Sequence[Any]) -> bool:
        """Whether these are its own tensors, of which there are some."""
        own = self.parameters
        return bool(own) and all(S is T for S, T in zip(own, parameters))

    def probe(self) -> Tensor:
        """Two fixed vectors, (*, m, 2), of which no start block has one."""
        block = self.space.fixed_block(self.m, 2, 1 << 20, self.empty())
        return block.expand([*self.batch, *block.shape])

    def with_parameters(
        self, parameters: Sequence[Any], X: Optional[Tensor] = None
    ) -> "Pencil":
        """The same pencil on other tensors; their batch shape may be another."""
        A, B, iK = self.A, self.B, self.iK
        of_A = len(A.parameters)
        of_B = of_A + len(B.parameters)
        same = twin(self)
        same.A = A.with_parameters(*parameters[:of_A])
        if of_B > of_A:
            same.B = B.with_parameters(*parameters[of_A:of_B])
        if iK is not None:
            same.iK = iK.with_parameters(*parameters[of_B:])
        batches = [M.batch for M in same.operands]
        same.batch = broadcast(*batches, () if X is None else X.shape[:-2])
        return same

    def mapped(
        self,
        size: int,
        in_dims: Sequence[Optional[int]],
        parameters: Sequence[Any],
        others: Sequence[Any],
        dims_of_others: Sequence[Optional[int]],
        trailing: Sequence[int],
    ) -> Tuple["Pencil", List[Any], List[Any], int]:
        """The pencil of a batch of `size`, its parameters and other tensors, with `trailing` dimensions that are not
        batch; and the largest number of batch dimensions below the mapped one.

        Matrices and other tensors get the mapped dimension as their first batch dimension; the parameters of a callable
        have any shape and stay as they are: the callable is mapped itself.
        """
        dims = [tuple(own) for own in self.split(in_dims)]
        values = self.split(parameters)
        known = [isinstance(M, (_Matrix, Identity)) for M in self.operands]
        matrices = [T for own, is_known in zip(values, known) if is_known for T in own]
        depth = [d for own, is_known in zip(dims, known) if is_known for d in own]
        moved, deepest = batched_first(
            size,
            (*dims_of_others, *depth),
            (*others, *matrices),
            (*trailing, *(2 for _ in matrices)),
        )
        rest = iter(moved[len(others) :])
        found = [
            next(rest) if is_known else T
            for own, is_known in zip(values, known)
            for T in own
        ]
        A, B, *iK = (
            M if all(d is None for d in own) else M.mapped(size, own)
            for M, own in zip(self.operands, dims)
        )
        pencil = self.of_operands(A, B, iK[0] if iK else None)
        return pencil, found, moved[: len(others)], deepest

    def with_gradients(self) -> "Pencil":
        """The pencil in a form in which gradients of any order exist.  ValueError where they do not."""
        A, B, iK = self.A, self.B, self.iK
        A, B = A.with_gradient(self.probe), B.with_gradient(self.probe)
        if iK is not None and in_transform():
            # A constant, whose tensors a transform has wrapped all the same.
            iK = iK.with_gradient(self.probe)
        if A is self.A and B is self.B and iK is self.iK:
            return self
        return self.of_operands(A, B, iK)

    def bare(self) -> "Pencil":
        """The pencil without its tensors, for an autograd Function to keep beside those that it saves."""
        return self.with_parameters([None] * len(self.parameters))

    def of_operands(self, A: Operand, B: Operand, iK: Optional[Operand]) -> "Pencil":
        same = twin(self)
        same.A, same.B, same.iK = A, B, iK
        return same

    def checked(self) -> "Pencil":
        """The pencil near size one, its values checked; iK stays as it is.

        Raises ValueError unless A, B and iK are finite, A and B Hermitian where they are sparse and linear where they
        are callables, and B positive definite as far as that shows at once.
        """
        same = self.of_operands(self.A, self.B, self.iK)
        same.A, same.scale_A = self._near_one(self.A)
        if self.generalized:
            same.B, same.scale_B = self._near_one(self.B)
        same.rescaled = same.A is not self.A or same.B is not self.B
        for M in (same.A, same.B):
            M.check_hermitian(self.probe)
        same.B.check_positive()
        if isinstance(self.iK, _Matrix):  # the products of a callable are checked, each
            self.iK.check_finite(self.probe)
        return same

    def _near_one(self, M: Operand) -> Tuple[Operand, Tensor]:
        if M.is_near_one(self.probe, self.dtype):
            return M, UNSCALED
        scale = safe_scale(M.check_finite(self.probe), self.dtype)
        return (M if scale is UNSCALED else M.scaled(scale)), scale

    def member(self, position: Tuple[int, ...]) -> "Pencil":
        """The pencil of one matrix of the batch."""
        iK = None if self.iK is None else self.iK.member(position)
        same = self.of_operands(self.A.member(position), self.B.member(position), iK)
        same.batch = []
        same.scale_A, same.scale_B = (
            _at(scale, position) for scale in (self.scale_A, self.scale_B)
        )
        return same

    def is_dense(self) -> bool:
        """Whether a factorisation of A and B costs no conversion."""
        return isinstance(self.A, Dense) and isinstance(self.B, (Dense, Identity))

    def is_known(self) -> bool:
        """Whether A and B have entries, which a factorisation could start from."""
        return isinstance(self.A, _Matrix) and isinstance(self.B, (_Matrix, Identity))

    def in_double(self) -> "Pencil":
        same = self.of_operands(self.A.in_double(), self.B.in_double(), self.iK)
        same.dtype = torch.promote_types(self.dtype, torch.float64)
        return same

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the pencil's dtype and device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
