"""torch.lobpcg: k extreme eigenpairs of A x = lambda B x, differentiable in A and B (TorchScript dialect)."""

import warnings
from typing import Optional

import torch
from torch import Tensor
from torch._lobpcg_arguments import check_alike, check_block, check_broadcast, check_dtype, check_matrix, settle
from torch._lobpcg_autograd import differentiable_eigenpairs, LOBPCGAutogradFunction
from torch._lobpcg_iteration import EigenPairs, LOBPCG
from torch._lobpcg_solver import solve
from torch.overrides import handle_torch_function, has_torch_function


__all__ = ["lobpcg"]


def lobpcg(
    A: Tensor,
    k: Optional[int] = None,
    B: Optional[Tensor] = None,
    X: Optional[Tensor] = None,
    n: Optional[int] = None,
    iK: Optional[Tensor] = None,
    niter: Optional[int] = None,
    tol: Optional[float] = None,
    largest: Optional[bool] = None,
    method: Optional[str] = None,
    tracker: None = None,
    ortho_iparams: Optional[dict[str, int]] = None,
    ortho_fparams: Optional[dict[str, float]] = None,
    ortho_bparams: Optional[dict[str, bool]] = None,
) -> tuple[Tensor, Tensor]:
    """docstring follows"""
    if not torch.jit.is_scripting():
        tensors = (A, B, X, iK)
        if has_torch_function(tensors):
            return handle_torch_function(
                lobpcg,
                tensors,
                A,
                k=k,
                B=B,
                X=X,
                n=n,
                iK=iK,
                niter=niter,
                tol=tol,
                largest=largest,
                method=method,
                tracker=tracker,
                ortho_iparams=ortho_iparams,
                ortho_fparams=ortho_fparams,
                ortho_bparams=ortho_bparams,
            )
        return _lobpcg_eager(A, k, B, X, n, iK, niter, tol, largest, method, tracker)
    check_matrix(A, "A")
    m = A.size(-1)
    batch = _check_others(A, B, X, iK, m)
    columns: Optional[int] = None
    if X is not None:
        columns = X.size(-1)
    settings = settle(m, A.dtype, k, n, columns, niter, tol, largest, method, False)
    needs_grad = A.requires_grad
    if B is not None:
        needs_grad = needs_grad or B.requires_grad
    if needs_grad:
        raise RuntimeError("lobpcg: a scripted call cannot differentiate; call torch.lobpcg without torch.jit.script where A or B requires grad")
    pairs = solve(A, B, X, iK, batch, m, settings, None)
    _warn_unconverged(pairs, settings.k, settings.tol, settings.niter)
    return pairs.E[..., : settings.k], pairs.X[..., : settings.k]


@torch.jit.unused
def _lobpcg_eager(A, k, B, X, n, iK, niter, tol, largest, method, tracker) -> tuple[Tensor, Tensor]:
    """lobpcg outside TorchScript: callables allowed, autograd and transforms recorded."""
    for T, name in ((A, "A"), (B, "B"), (iK, "iK")):
        if T is not None and not isinstance(T, Tensor) and not callable(T):
            raise TypeError(f"lobpcg: {name} is {type(T).__name__}; it must be a tensor or a callable on blocks (*, m, p)")
    model = next((T for T in (A, X, B) if isinstance(T, Tensor)), None)
    if model is None:
        raise ValueError("lobpcg: A is a callable, so its size is unknown; pass a start block X (*, m, n)")
    if isinstance(A, Tensor):
        check_matrix(A, "A")
    check_dtype(model, "X" if model is X else "B" if model is B else "A")
    if model.dim() < 2:
        raise ValueError(f"lobpcg: X has shape {list(model.shape)}; it must be (*, m, n)")
    m = model.size(-2)
    batch = _check_others(model, *(T if isinstance(T, Tensor) else None for T in (B, X, iK)), m)
    settings = settle(
        m, model.dtype, k, n, X.size(-1) if X is not None else None, niter, tol, largest, method, tracker is not None
    )

    def run(A, B, X, iK) -> EigenPairs:
        shape = torch.broadcast_shapes(*(T.shape[:-2] for T in (A, B, X, iK) if isinstance(T, Tensor)))
        pairs = solve(A, B, X, iK, list(shape), m, settings, tracker)
        _warn_unconverged(pairs, settings.k, settings.tol, settings.niter)
        return pairs

    return differentiable_eigenpairs(A, B, X, iK, run, settings.k, settings.largest, settings.tol)


def _check_others(A: Tensor, B: Optional[Tensor], X: Optional[Tensor], iK: Optional[Tensor], m: int) -> list[int]:
    """Check B, X and iK against A; the batch shape of all together."""
    batch = list(A.shape[:-2])
    if B is not None:
        check_matrix(B, "B")
        check_block(B, "B", m)
        check_alike(B, "B", A, "A")
        batch = check_broadcast(batch, B, "B")
    if X is not None:
        check_block(X, "X", m)
        check_alike(X, "X", A, "A")
        batch = check_broadcast(batch, X, "X")
    if iK is not None:
        check_matrix(iK, "iK")
        check_block(iK, "iK", m)
        check_alike(iK, "iK", A, "A")
        batch = check_broadcast(batch, iK, "iK")
    return batch


def _warn_unconverged(pairs: EigenPairs, k: int, tol: float, niter: int) -> None:
    """One warning if a wanted pair has not converged."""
    residual, scale = pairs.residual[..., :k], pairs.scale[..., :k]
    if residual.numel() == 0:
        return
    missed = residual > tol * scale
    if bool(missed.any()):
        rerr = (residual / torch.where(scale > 0, scale, torch.ones_like(scale))).max()
        warnings.warn(
            f"lobpcg: {int(missed.sum())} of {missed.numel()} eigenpairs have not converged: relative residual {float(rerr)}, "
            f"tolerance {tol}, niter={niter}; raise niter or tol, pass a larger n or a preconditioner iK"
        )
