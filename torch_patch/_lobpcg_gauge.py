"""Whether a derivative of eigenpairs exists, and how accurate it can be: phases, clusters, convergence.

Eigenvectors are defined up to a phase, and inside a cluster of equal eigenvalues up to a unitary factor.  With
G = X^H gX, a loss does not see that freedom iff Im diag(G) = 0 and the block of G over the cluster is Hermitian.
Everything that depends on values of tensors is decided inside one autograd Function, so that it also works under
vmap; its result is the mask of the pairs (i, j) whose factor F_ij = 1 / (E_j - E_i) is used.
"""

import math
import warnings
from typing import Optional

import torch
from torch import Tensor
from torch._lobpcg_complement import warn_cut_cluster
from torch._lobpcg_function import batched_first, broadcast
from torch.autograd import Function


class CheckOptions:
    """Sizes and tolerance of the problem whose derivative is checked."""

    def __init__(self, m: int, k: int, tol: float, forward_mode: bool = False) -> None:
        self.m, self.k, self.tol, self.forward_mode = m, k, tol, forward_mode
        self.clustered = False  # set by the check: whether some F_ij between different pairs is 0


def pair_factors(
    E: Tensor,
    X: Tensor,
    G: Optional[Tensor],
    gE: Optional[Tensor],
    gX: Optional[Tensor],
    T: Tensor,
    residual: Tensor,
    scale: Tensor,
    options: CheckOptions,
) -> Tensor:
    """F: (+, *, k, k), 1 / (E_j - E_i) where that factor is used and 0 elsewhere, differentiable in E.

    E: (*, k), X: (*, m, k), cotangents gE, gX and G = X^H gX with any further leading dimensions, or None; in
    forward mode G is S = X^H (dA X - dB X E).  T: (*, p) further eigenvalues.  Raises RuntimeError where no derivative
    exists; warns where it exists only in part or is inaccurate.
    """
    mask = _PairMask.apply(
        E.detach(),
        None if G is None else G.detach(),
        None if gE is None else gE.detach(),
        torch.linalg.vector_norm(X.detach(), dim=-2),
        None if gX is None else torch.linalg.vector_norm(gX.detach(), dim=-2),
        T.detach(),
        residual,
        scale,
        options,
    )
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)  # (*, k, k): E_j - E_i at (i, j)
    return mask / torch.where(mask > 0, difference, torch.ones_like(difference))


class SecondOrderAtMost(Function):
    """W -> W; warns where a third derivative passes through."""

    @staticmethod
    def forward(W, order):
        return W.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return _warn_third(g, ctx.order), None

    @staticmethod
    def jvp(ctx, t, _):
        return _warn_third(t, ctx.order)

    @staticmethod
    def vmap(info, in_dims, W, order):
        return SecondOrderAtMost.apply(W, order), in_dims[0]


def _warn_third(g: Tensor, order: int) -> Tensor:
    if order < 1:
        return SecondOrderAtMost.apply(g, order + 1)
    warnings.warn(
        "lobpcg: derivatives beyond the second are incomplete where eigenvalues are equal to rounding, as some are "
        "here",
        RuntimeWarning,
        stacklevel=2,
    )
    return g


class _PairMask(Function):
    """(E, G, gE, ...) -> mask (+, *, k, k) of 0 and 1; a constant to autograd."""

    @staticmethod
    def forward(E, G, gE, x, g, T, residual, scale, options):
        mask = _pair_mask(E, G, gE, x, g, T, residual, scale, options).to(E.dtype)
        options.clustered = options.clustered or bool((mask.sum(-1) < options.k - 1).any())
        shapes = [mask.shape] + ([] if G is None else [G.shape]) + ([] if gE is None else [gE.shape + gE.shape[-1:]])
        return mask.expand(broadcast(*shapes)).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return (None,) * 9

    @staticmethod
    def jvp(ctx, *_):
        return None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors, _ = batched_first(info.batch_size, in_dims[:-1], inputs[:-1], trailing=(1, 2, 1, 1, 1, 1, 1, 1))
        mask = _PairMask.apply(*tensors, inputs[-1])
        if all(dim is None for dim in in_dims[:3]):
            mask = mask.expand((info.batch_size,) + tuple(mask.shape))
        return mask, 0


def _first(condition: Tensor, dims: int) -> list:
    """Trailing `dims` indices of the first true element."""
    return condition.nonzero()[0, -dims:].tolist()


def _pair_mask(E, G, gE, x, g, T, residual, scale, options) -> Tensor:
    k, m = options.k, options.m
    eps = torch.finfo(E.dtype).eps
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()  # (*, k, k)
    distinct = ~torch.eye(k, dtype=torch.bool, device=E.device)
    # |x_i| (|A| + |E_j| |B|) |x_j|: the size of the pencil in units of an eigenvalue.
    size = x.unsqueeze(-1) * scale[..., None, :k]
    size = torch.maximum(size, size.mT)
    # Rounding in eigenvalues: eps |A| times a modest factor, sqrt(m) for sums of length m.
    equal = distinct & (gap <= 16 * math.sqrt(m) * eps * size)
    _check_convergence(E, x, gap, equal, T, residual, scale, options)
    if T.shape[-1] and gE is not None:
        _check_cut(E, gE, x, T, scale, options)
    amplitude = None
    if G is not None and g is not None:
        amplitude = x.unsqueeze(-1) * g.unsqueeze(-2)  # (+, *, k, k): bound on |G_ij|
        amplitude = (amplitude + amplitude.mT) / 2
        if G.is_complex():
            _check_phase(G, amplitude, eps)
    # Division by a gap below eps^(1/3) turns rounding in G into more than eps^(2/3); elsewhere nothing can go wrong.
    close = distinct & (gap <= eps ** (1 / 3) * size)
    if not bool(close.any()):
        return distinct.expand(gap.shape)
    if gE is not None:
        _check_weights(gE, gap, equal)
    if G is None:
        if gE is not None:
            _check_blur(_weighs_differently(gE) & distinct & ~equal, E, x, gap, size, T, residual, options)
        return distinct & ~equal
    if options.forward_mode:
        if bool((equal & (G.abs() > 16 * math.sqrt(m) * eps * size)).any()):
            i, j = _first(equal & (G.abs() > 16 * math.sqrt(m) * eps * size), 2)
            _warn_cluster(i, j, gap, "the tangent splits them, so single tangents of these pairs do not exist")
        return distinct & ~equal
    skew = (G - G.mH).abs() / 2
    # Rounding in G of a loss that does not see the gauge: inner products of length m.
    noise = 8 * math.sqrt(m) * eps * amplitude
    seen = equal & (skew > noise)
    if bool(seen.any()):
        i, j = _first(seen, 2)
        why = "the loss depends on the choice of eigenvectors among them"
        if bool((seen & (skew > math.sqrt(eps) * amplitude)).any()):
            i, j = _first(seen & (skew > math.sqrt(eps) * amplitude), 2)
            raise RuntimeError(_cluster_text(i, j, gap, why) + "; it has no gradient there. " + _WELL_POSED)
        _warn_cluster(i, j, gap, why)
    # A loss that is invariant in a cluster has a Hermitian block, skew part zero up to noise: the exact factor is zero.
    invariant = close & (skew <= noise)
    used = skew > noise if gE is None else (skew > noise) | _weighs_differently(gE)
    _check_blur(used & distinct & ~equal, E, x, gap, size, T, residual, options)
    return distinct & ~equal & ~invariant


_WELL_POSED = (
    "A well-posed loss treats the vectors of a cluster alike, for example through X X^H, and symmetric functions of "
    "their eigenvalues."
)


def _cluster_text(i: int, j: int, gap: Tensor, why: str) -> str:
    width = float(gap[..., i, j].min())
    return f"lobpcg: eigenvalues {i} and {j} are equal to rounding (gap {width:.1e}) and {why}"


def _warn_cluster(i: int, j: int, gap: Tensor, why: str) -> None:
    text = _cluster_text(i, j, gap, why) + "; the part of the derivative that exists is returned. " + _WELL_POSED
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _check_phase(G: Tensor, amplitude: Tensor, eps: float) -> None:
    phase = torch.diagonal(G, dim1=-2, dim2=-1).imag.abs()
    seen = phase > math.sqrt(eps) * torch.diagonal(amplitude, dim1=-2, dim2=-1)
    if bool(seen.any()):
        (j,) = _first(seen, 1)
        raise RuntimeError(
            f"lobpcg: the loss depends on the phase of eigenvector {j} (Im x^H gx = {float(phase[..., j].max()):.1e}), "
            "which is arbitrary, so it has no gradient; use a loss invariant under x -> exp(i phi) x, such as one of "
            "abs(x) or x x^H"
        )


def _weighs_differently(gE: Tensor) -> Tensor:
    """Pairs (i, j) that enter the loss with different weight: (+, *, k, k)."""
    difference = (gE.unsqueeze(-1) - gE.unsqueeze(-2)).abs()
    # A smooth symmetric loss has gE that differ by its curvature times the gap, at most eps^(1/3) in a cluster.
    return difference > torch.finfo(gE.dtype).eps ** (1 / 3) * gE.abs().amax(-1)[..., None, None]


def _check_weights(gE: Tensor, gap: Tensor, equal: Tensor) -> None:
    """Equal eigenvalues must enter the loss alike: their order is not a function of the matrices."""
    seen = equal & _weighs_differently(gE)
    if bool(seen.any()):
        i, j = _first(seen, 2)
        _warn_cluster(i, j, gap, "the loss weighs them differently")


def _check_blur(used: Tensor, E, x, gap, size, T, residual, options: CheckOptions) -> None:
    """Warn where single vectors of a close pair matter and are not accurate to two digits.

    After Rayleigh-Ritz the vectors i and j mix by |r_i| |r_j| / (distance to the rest), plus rounding, over their gap.
    """
    k = options.k
    r = residual[..., :k] * x
    coupling = torch.finfo(E.dtype).eps * size
    if T.shape[-1]:
        rest = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
        rest = torch.where(rest > 0, rest, torch.ones_like(rest))
        coupling = coupling + (r / rest).unsqueeze(-1) * r.unsqueeze(-2)
    blurred = used & (coupling > 0.01 * gap)
    if bool(blurred.any()):
        i, j = _first(blurred, 2)
        error = float((coupling / gap)[..., i, j].max())
        warnings.warn(
            f"lobpcg: the loss distinguishes eigenpairs {i} and {j}, whose gap {float(gap[..., i, j].min()):.1e} is so "
            f"small that their vectors, and the gradient, have a relative error of about {error:.1e}. Tighten tol, or "
            "use a loss that treats the two alike.",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_cut(E: Tensor, gE: Tensor, x: Tensor, T: Tensor, scale: Tensor, options: CheckOptions) -> None:
    gap = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs()  # (*, k, p)
    rounding = 16 * math.sqrt(options.m) * torch.finfo(E.dtype).eps * (x * scale[..., : options.k]).unsqueeze(-1)
    cut = (gap <= rounding).any(-1) & (gE != 0)
    if bool(cut.any()):
        (j,) = _first(cut, 1)
        warn_cut_cluster(j, options.k, float(gap[..., j, :].min()))


def _check_convergence(E, x, gap, equal, T, residual, scale, options) -> None:
    """One warning where a pair missed the tolerance, with |r_j| |x_j| / gap as estimate of the gradient's error."""
    k = options.k
    eps = torch.finfo(E.dtype).eps
    residual, scale = residual[..., :k], scale[..., :k]
    # No iteration gets below the rounding of its own residual, however small tol is.
    late = residual > max(options.tol, 16 * math.sqrt(options.m) * eps) * scale
    if not bool(late.any()):
        return
    if T.shape[-1]:
        # Errors inside the block are of second order after Rayleigh-Ritz: the distance to the rest counts.
        nearest = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
    else:
        eye = torch.eye(k, dtype=torch.bool, device=E.device)
        nearest = torch.where(equal | eye, torch.full_like(gap, math.inf), gap).amin(-2)
    relative = residual / torch.where(scale > 0, scale, torch.ones_like(scale))
    worst = torch.where(late, relative, torch.zeros_like(relative)).max()
    error = torch.where(late, residual * x / nearest, torch.zeros_like(residual)).max()
    warnings.warn(
        f"lobpcg: gradient of eigenpairs that have not converged: relative residual {float(worst):.1e} where "
        f"tol={options.tol:.1e} was asked for; estimated relative error of the gradient (residual over gap) "
        f"{float(error):.1e}. Raise niter or n, pass a preconditioner iK, or loosen tol if that is accurate enough.",
        RuntimeWarning,
        stacklevel=2,
    )
