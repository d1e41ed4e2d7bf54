"""From checked arguments to eigenpairs, without autograd (TorchScript dialect).

Checks of values, the choice between a dense solve and iterations, batches under a tracker.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch._lobpcg_arguments import OrthoParameters, Settings
from torch._lobpcg_iteration import EigenPairs, LOBPCG
from torch._lobpcg_operator import (
    compressed_rows,
    epsilon,
    is_sparse_layout,
    largest_entry,
    Operator,
    safe_scale,
    sparse_diagonal_is_positive,
    start_rows,
)
from torch._lobpcg_ritz import hermitian, real_diagonal


def solve(
    A: Tensor,
    B: Optional[Tensor],
    X: Optional[Tensor],
    iK: Optional[Tensor],
    batch: list[int],
    m: int,
    settings: Settings,
    tracker: None,
    ortho: OrthoParameters,
) -> EigenPairs:
    """n >= k eigenpairs of each pencil. A, B, iK: (*, m, m), dense or sparse, Hermitian, or callables; X: (*, m, n) or
    None. Dense A and B have been through hermitian_part.

    Raises ValueError on NaN, infinity, asymmetry and a B or iK that shows itself not to be positive definite.
    """
    like = A
    if not torch.jit.is_scripting():
        if not isinstance(A, Tensor):
            like = _first_tensor(A, B, X, iK)
    A, sA = _checked(A, "A", m, like)
    sB = sA
    if B is not None:
        B, sB = _checked(B, "B", m, like)
    if iK is not None:
        check_finite(iK, "iK")
    if X is not None:
        check_finite(X, "X")
    if 0 in batch:
        return _no_pairs(batch, m, settings.n, like)
    if dense_is_cheaper(A, B, iK, settings, m):
        return dense_solve(A, B, sA, sB, settings, batch)
    start = X if X is not None else start_rows(settings.n, m, 0, like).mT
    start = start.expand(batch + [m, settings.n])
    if not torch.jit.is_scripting():
        if tracker is not None and len(batch) > 0:
            return _solve_each(A, B, start, iK, batch, m, settings, tracker, ortho)
    return iterate(A, B, start, iK, settings, tracker, ortho)


def iterate(
    A: Tensor,
    B: Optional[Tensor],
    X: Tensor,
    iK: Optional[Tensor],
    settings: Settings,
    tracker: None,
    ortho: OrthoParameters,
) -> EigenPairs:
    """Run the worker on one problem or on a batch in lockstep; extremes of scale are taken out by powers of two."""
    iparams = {"m": X.size(-2), "n": settings.n, "k": settings.k, "niter": settings.niter, "chosen": settings.chosen}
    fparams = {"tol": settings.tol}
    bparams = {"largest": settings.largest, "separate": settings.separate}
    iparams.update(ortho.integers)
    fparams.update(ortho.floats)
    bparams.update(ortho.flags)
    worker = LOBPCG(A, B, X, iK, iparams, fparams, bparams, settings.method, tracker)
    with torch.no_grad():
        worker.run()
    return worker.result()


def dense_solve(
    A: Tensor, B: Optional[Tensor], sA: Tensor, sB: Tensor, settings: Settings, batch: list[int]
) -> EigenPairs:
    """All m pairs by Cholesky of B and eigh, E (*, m), X (*, m, m), residuals of the first k. Cost: about 9 m^3.

    sA, sB: powers of four that bring A and B near one. The pairs beyond k cost nothing here, and with them the backward
    solve is a sum.
    """
    m = A.size(-1)
    S = _times(A.to_dense() if is_sparse_layout(A) else A, sA)
    if B is None:
        E, X = torch.linalg.eigh(S)
        BX = X
        sB = torch.ones_like(sA)
        norm_A, norm_B = torch.linalg.vector_norm(E, dim=-1, keepdim=True) / m**0.5, torch.ones_like(E[..., :1])
    else:
        T = _times(B.to_dense() if is_sparse_layout(B) else B, sB)
        L, info = torch.linalg.cholesky_ex(T)
        if bool((info > 0).any()):
            raise ValueError(
                "lobpcg: B is not positive definite (its Cholesky factorisation fails); B must be Hermitian positive "
                "definite"
            )
        half = torch.linalg.solve_triangular(L, S, upper=False)
        C = torch.linalg.solve_triangular(L, half.mH, upper=False)
        E, V = torch.linalg.eigh(hermitian(C))
        X = torch.linalg.solve_triangular(L.mH, V, upper=True)
        BX = T @ X
        norm_A = torch.linalg.matrix_norm(S).unsqueeze(-1) / m**0.5
        norm_B = torch.linalg.matrix_norm(T).unsqueeze(-1) / m**0.5
    if settings.largest:
        E, X, BX = E.flip([-1]), X.flip([-1]), BX.flip([-1])
    # The residual costs a product with A a column: of the pairs that are asked for, not of all m.
    n = settings.k
    first = X[..., :n]
    residual = torch.linalg.vector_norm(S @ first - BX[..., :n] * E[..., None, :n], dim=-2)
    if B is None:
        norm_A = norm_A.maximum(E.abs().amax(-1, keepdim=True))
    scale = (norm_A + E[..., :n].abs() * norm_B) * torch.linalg.vector_norm(first, dim=-2)
    up = (1.0 / sA).to(E.dtype).unsqueeze(-1)
    root = sB.sqrt().to(E.dtype).unsqueeze(-1)
    E = E * up * root.square()
    residual, scale = residual * up * root, scale * up * root
    X = _times(X, sB.sqrt())
    return EigenPairs(
        E.expand(batch + [m]), X.expand(batch + [m, m]), residual.expand(batch + [n]), scale.expand(batch + [n])
    )


def _times(A: Tensor, scale: Tensor) -> Tensor:
    """scale * A, scale (*) or (); A itself where every scale is one."""
    if bool((scale == 1.0).all()):
        return A
    return A * scale.to(_real(A.dtype)).unsqueeze(-1).unsqueeze(-1)


def _no_pairs(batch: list[int], m: int, n: int, like: Tensor) -> EigenPairs:
    """The result for an empty batch."""
    E = torch.zeros(batch + [n], dtype=_real(like.dtype), device=like.device)
    return EigenPairs(E, torch.zeros(batch + [m, n], dtype=like.dtype, device=like.device), E, E)


def check_finite(A: Tensor, name: str) -> None:
    if not torch.jit.is_scripting():
        if not isinstance(A, Tensor):
            return
    _finite_size(A, name)


def _finite_size(A: Tensor, name: str) -> Tensor:
    """The largest entry of each matrix; ValueError if one is not finite."""
    largest = largest_entry(A)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(
            f"lobpcg: {name} has NaN or infinite entries; every entry must be finite: check what produced {name}"
        )
    return largest


def _real(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.complex64 or dtype == torch.float32:
        return torch.float32
    return torch.float64


def dense_is_cheaper(A: Tensor, B: Optional[Tensor], iK: Optional[Tensor], settings: Settings, m: int) -> bool:
    """One dense factorisation instead of iterations: m < 3 n, where LOBPCG does not apply, or small dense matrices.

    Measured on one thread: with k = 5, eigh costs as much as the iterations near m = 512; with a preconditioner that
    is any good, near m = 128.
    """
    if settings.iterate:
        return False
    if not torch.jit.is_scripting():
        if not isinstance(A, Tensor) or not (B is None or isinstance(B, Tensor)):
            return False
    if m < 3 * settings.n:
        return True
    dense = not is_sparse_layout(A)
    if B is not None:
        dense = dense and not is_sparse_layout(B)
    return dense and m <= (512 if iK is None else 128)


def _checked(A: Tensor, name: str, m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A, and powers of four that bring it near one, (*) or (); a sparse A as what is fastest to multiply.

    ValueError unless A is finite, Hermitian where it is sparse, and positive definite where it is B. A callable is
    trusted.
    """
    if not torch.jit.is_scripting():
        if not isinstance(A, Tensor):
            return A, torch.ones([], dtype=torch.float64)
    if is_sparse_layout(A) and A.dim() == 2:
        A = compressed_rows(A)
    scale = safe_scale(_finite_size(A, name), A.dtype)
    if is_sparse_layout(A):
        check_symmetry(A, name, m, scale, like)
    if name == "B":
        check_positive(A)
    return A, scale


def hermitian_part(A: Tensor) -> Tensor:
    """(A + A^H) / 2 of a dense matrix; A itself where that changes no bit, and for every other kind of operand."""
    if not torch.jit.is_scripting():
        if not isinstance(A, Tensor):
            return A
    if is_sparse_layout(A) or _is_hermitian(A):
        return A
    # A conjugate that is only marked as such breaks forward mode under vmap.
    return (A + (torch.conj_physical(A.mT) if A.is_complex() else A.mT)) / 2


def _is_hermitian(A: Tensor) -> bool:
    """Whether dense A (*, m, m) equals A^H to the bit; by tiles, since the transpose as a whole would miss the cache
    throughout. False under a transform, where values cannot be looked at."""
    if not torch.jit.is_scripting():
        if torch._C._are_functorch_transforms_active():
            return False
    A = A.detach()
    m, tile = A.size(-1), 512
    for i in range(0, m, tile):
        for j in range(0, i + 1, tile):
            lower = A[..., i : i + tile, j : j + tile]
            if not torch.equal(lower, A[..., j : j + tile, i : i + tile].mH):
                return False
    return True


def check_symmetry(A: Tensor, name: str, m: int, scale: Tensor, like: Tensor) -> None:
    """ValueError if sparse A is seen not to be Hermitian: |u^H A v - conj(v^H A u)| for fixed random u, v.

    A single unequal pair of entries shows with probability one, at the cost of one product with two columns. The
    rounding error of the two forms is at most 2 m eps ||A||_F / sqrt(m) |u| |v|, and sqrt(m) times smaller as a rule.
    """
    op = Operator(A, name)
    op.set_scale(scale.to(_real(A.dtype)))
    shape = list(A.shape[:-2]) + [2, m]
    rows = start_rows(2, m, 1 << 20, like).expand(shape)
    forms = rows @ op.rows(rows).mT  # (*, 2, 2): entry (i, j) is u_i . A u_j, for real u
    skew = (forms - forms.mH).abs().amax([-2, -1])
    limit = 8.0 * epsilon(A.dtype) * m * op.mean_square(m, list(A.shape[:-2])).sqrt()
    if bool((skew > limit).any()):
        raise ValueError(
            f"lobpcg: sparse {name} is not Hermitian: |u^H {name} v - (v^H {name} u)^H| = {float(skew.max())} for "
            f"fixed vectors u, v with "
            f"entries in (-1, 1), at most {float(limit.max())} expected; pass a Hermitian matrix, such as ({name} + "
            f"{name}^H) / 2"
        )


def check_positive(B: Tensor) -> None:
    """ValueError if B is not positive definite, as far as that shows at once: by its diagonal, or, dense, by Cholesky.

    Cholesky (m^3 / 3) costs as much as a few dozen iterations; above m = 4096 the iteration is left to meet a negative
    direction.
    """
    if is_sparse_layout(B):
        if not sparse_diagonal_is_positive(B):
            raise ValueError(
                "lobpcg: B is not positive definite: a diagonal entry is not positive; B must be Hermitian positive "
                "definite"
            )
        return
    d = real_diagonal(B)
    bad = bool((d <= 0).any())
    if not bad and B.size(-1) <= 4096:
        # Scaled to a unit diagonal the factorisation neither overflows nor mistakes a graded matrix for a singular one.
        s = d.rsqrt()
        bad = bool((torch.linalg.cholesky_ex(B * s.unsqueeze(-1) * s.unsqueeze(-2))[1] > 0).any())
    if bad:
        raise ValueError(
            "lobpcg: B is not positive definite (its Cholesky factorisation fails); B must be Hermitian positive "
            "definite"
        )


@torch.jit.unused
def _first_tensor(A: Any, B: Optional[Tensor], X: Optional[Tensor], iK: Optional[Tensor]) -> Tensor:
    for T in (X, B, iK):
        if isinstance(T, Tensor):
            return T
    raise AssertionError("lobpcg: no tensor among the arguments")


@torch.jit.unused
def _solve_each(
    A: Any, B: Any, X: Tensor, iK: Any, batch: list[int], m: int, settings: Settings, tracker: Any, ortho: Any
) -> EigenPairs:
    """One worker a matrix, so that a tracker sees one problem at a time; batch in row-major order."""

    def part(T: Any, position: Any) -> Any:
        if not isinstance(T, Tensor) or T.dim() == 2:
            return T
        if is_sparse_layout(T):
            dense_batch = T.to_dense().expand(batch + [m, m]) if T.layout != torch.sparse_coo else None
            if dense_batch is not None:
                return dense_batch[position].to_sparse_csr()
            for i in position[len(position) - (T.dim() - 2) :]:
                T = T[i] if T.size(0) != 1 else T[0]
            return T
        return T.expand(batch + list(T.shape[-2:]))[position]

    positions: list[Any] = [()]
    for size in batch:
        positions = [p + (i,) for p in positions for i in range(size)]
    pairs = [iterate(part(A, p), part(B, p), X[p], part(iK, p), settings, tracker, ortho) for p in positions]
    if not pairs:
        return iterate(A, B, X, iK, settings, None, ortho)
    return EigenPairs(*(torch.stack(field).reshape(batch + list(field[0].shape)) for field in zip(*pairs)))
