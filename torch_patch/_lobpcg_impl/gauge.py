"""Whether a derivative of eigenpairs exists, and how accurate it can be: phases, clusters, convergence.

Eigenvectors are defined up to a phase, and inside a cluster of equal eigenvalues up to a unitary factor.  With
G = X^H gX, a loss does not see that freedom iff Im diag(G) = 0 and the block of G over the cluster is Hermitian.
Everything that depends on values of tensors is decided inside one autograd Function, so that it also works under
vmap; its result is the mask of the pairs (i, j) whose factor F_ij = 1 / (E_j - E_i) is used.
"""

import math
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.graph import Held, in_graphs, Outputs
from torch._lobpcg_impl.pairs import is_late
from torch._lobpcg_impl.transforms import batched_first, broadcast
from torch.autograd import Function


class CheckOptions:
    """Sizes and tolerance of the problem whose derivative is checked.

    `pair_eps`: unit rounding of the arithmetic in which the pairs were found, before they were rounded to their dtype.
    """

    def __init__(
        self,
        m: int,
        k: int,
        tol: float,
        pair_eps: float,
        largest: bool,
        forward_mode: bool = False,
    ) -> None:
        self.m, self.k, self.tol, self.pair_eps = m, k, tol, pair_eps
        self.largest, self.forward_mode = largest, forward_mode
        # Set by the check: whether some F_ij between different pairs is 0, or a graph is traced, where it may be.
        self.clustered = False

    def numbers(self) -> Dict[str, Any]:
        """What an operator's schema can hold."""
        return {name: v for name, v in vars(self).items() if name != "clustered"}


def pair_factors(
    E: Tensor,
    X: Tensor,
    G: Optional[Tensor],
    gE: Optional[Tensor],
    gX: Optional[Tensor],
    T: Tensor,
    Y: Tensor,
    residual: Tensor,
    scale: Tensor,
    options: CheckOptions,
) -> Tensor:
    """F: (+, *, k, k), 1 / (E_j - E_i) where that factor is used and 0 elsewhere, differentiable in E.

    E: (*, k), X: (*, m, k), cotangents gE, gX and G = X^H gX with any further leading dimensions, or None; in
    forward mode G is S = X^H (dA X - dB X E).  T: (*, q) further eigenvalues, Y: (*, m, p) vectors.
    Raises RuntimeError where no derivative exists; warns where it exists only in part or is inaccurate.
    """
    mask = _PairMask.apply(
        E.detach(),
        None if G is None else G.detach(),
        None if gE is None else gE.detach(),
        _lengths(X, Y),
        None if gX is None else torch.linalg.vector_norm(gX.detach(), dim=-2),
        T.detach(),
        residual,
        scale,
        options,
    )
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)  # (*, k, k): E_j - E_i at (i, j)
    return mask / torch.where(mask > 0, difference, torch.ones_like(difference))


def _lengths(X: Tensor, Y: Tensor) -> Tensor:
    """Norms of the columns of (*, m, k) and (+, *, m, p), side by side."""
    x, y = (torch.linalg.vector_norm(V.detach(), dim=-2) for V in (X, Y))
    return torch.cat([x.expand(tuple(y.shape[:-1]) + (x.shape[-1],)), y], -1)


def _hold_order(W: Tensor, F: Tensor, order: int) -> Held:
    return (W, F), {"order": order}


@in_graphs(
    "second_order_at_most",
    "(Tensor W, Tensor F, *, int order) -> Tensor",
    lambda W, F, order: [(W.shape, W.dtype)],
    _hold_order,
    lambda W, F, order: (W, F, order),
)
class SecondOrderAtMost(Function):
    """(W, F, order) -> W, W being what `order` derivatives have been taken of; warns of a third where F has a cluster."""

    @staticmethod
    def forward(W: Tensor, F: Tensor, order: int) -> Tensor:
        if order > 1 and bool(((F == 0).sum(-1) > 1).any()):
            warnings.warn(
                "lobpcg: derivatives beyond the second are incomplete where eigenvalues are equal to rounding, as some "
                "are here",
                RuntimeWarning,
                stacklevel=2,
            )
        return W.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, F, ctx.order = inputs
        ctx.save_for_backward(F)
        ctx.save_for_forward(F)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (F,) = ctx.saved_tensors
        return SecondOrderAtMost.apply(g, F, ctx.order + 1), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        (F,) = ctx.saved_tensors
        return SecondOrderAtMost.apply(t, F, ctx.order + 1)

    @staticmethod
    def vmap(
        info: Any, in_dims: Tuple[Any, ...], W: Tensor, F: Tensor, order: int
    ) -> Any:
        if in_dims[0] is None:
            W = W.expand((info.batch_size, *W.shape))
        else:
            W = W.movedim(in_dims[0], 0)
        # F is looked at as a whole, so its batches may stand anywhere but last.
        F = F if in_dims[1] is None else F.movedim(in_dims[1], 0)
        return SecondOrderAtMost.apply(W, F, order), 0


_MASK_TENSORS = (
    "Tensor E, Tensor? G, Tensor? gE, Tensor x, Tensor? g, Tensor T, Tensor residual, Tensor scale"
)
_MASK_NUMBERS = (
    "SymInt m, SymInt k, float tol, float pair_eps, bool largest, bool forward_mode"
)


def _mask_shape(E: Tensor, G: Any, gE: Any, *_: Any) -> List[int]:
    shapes = [E.shape + E.shape[-1:]]
    shapes += [] if G is None else [G.shape]
    shapes += [] if gE is None else [gE.shape + gE.shape[-1:]]
    return broadcast(*shapes)


def _hold_mask(*arguments: Any) -> Held:
    *tensors, options = arguments
    options.clustered = True
    return tensors, options.numbers()


def _mask_outputs(*tensors: Any, **numbers: Any) -> Outputs:
    return [(_mask_shape(*tensors), tensors[0].dtype)]


@in_graphs(
    "pair_mask",
    f"({_MASK_TENSORS}, *, {_MASK_NUMBERS}) -> Tensor",
    _mask_outputs,
    _hold_mask,
    lambda *tensors, **numbers: (*tensors, CheckOptions(**numbers)),
)
class _PairMask(Function):
    """(E, G, gE, ...) -> mask (+, *, k, k) of 0 and 1; a constant to autograd."""

    @staticmethod
    def forward(
        E: Tensor,
        G: Optional[Tensor],
        gE: Optional[Tensor],
        x: Tensor,
        g: Optional[Tensor],
        T: Tensor,
        residual: Tensor,
        scale: Tensor,
        options: CheckOptions,
    ) -> Tensor:
        mask = _pair_mask(E, G, gE, x, g, T, residual, scale, options).to(E.dtype)
        options.clustered = options.clustered or bool(
            (mask.sum(-1) < options.k - 1).any()
        )
        return mask.expand(_mask_shape(E, G, gE)).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return (None,) * 9

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], *inputs: Any) -> Any:
        tensors, _ = batched_first(
            info.batch_size,
            in_dims[:-1],
            inputs[:-1],
            trailing=(1, 2, 1, 1, 1, 1, 1, 1),
        )
        mask = _PairMask.apply(*tensors, inputs[-1])
        if all(dim is None for dim in in_dims[:3]):
            mask = mask.expand((info.batch_size,) + tuple(mask.shape))
        return mask, 0


def _first(condition: Tensor, dims: int) -> List[int]:
    """Trailing `dims` indices of the first true element."""
    return condition.nonzero()[0, -dims:].tolist()


def _pencil_size(x: Tensor, scale: Tensor) -> Tensor:
    """(*, k, k): |x_i| (|A| + |E_j| |B|) |x_j|, the size of the pencil in units of an eigenvalue."""
    size = x.unsqueeze(-1) * scale.unsqueeze(-2)
    return torch.maximum(size, size.mT)


def _rounding(E: Tensor, size: Tensor, options: CheckOptions) -> Tuple[Tensor, Tensor]:
    """What rounding does to an eigenvalue, and up to which gap two are equal to rounding; (*, k, k)."""
    eps = torch.finfo(E.dtype).eps
    rounding = options.pair_eps * size
    # sqrt(m) for sums of length m, times a modest factor.
    blur = 16 * math.sqrt(options.m) * rounding
    if options.pair_eps < eps:
        # The pairs of a matrix given in single precision, found in double: E is rounded, and the data once per entry.
        rounding = rounding + eps * E.abs().amax(-1)[..., None, None]
        blur = torch.maximum(blur + rounding, 4 * eps * size)
    return rounding, blur


def generic_basis(E: Tensor, X: Tensor, scale: Tensor, options: CheckOptions) -> Tensor:
    """X: (*, m, k) with the vectors of equal eigenvalues turned by fixed angles; they stay eigenvectors to rounding.

    A loss tr(M X diag(E) X^H) has no gradient computable from gE and G at equal eigenvalues, only its diagonal in the
    basis X.  It is recognised by the differences in gE, which vanish in a special basis: in that of unit vectors, which
    a diagonal matrix leads to, if diag(M) = 0.  In a generic basis they do not.
    """
    k = E.shape[-1]
    if k == 1 or E.numel() == 0:
        return X
    size = _pencil_size(torch.linalg.vector_norm(X, dim=-2), scale)
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()
    equal = (gap <= _rounding(E, size, options)[1]) & ~torch.eye(
        k, dtype=torch.bool, device=E.device
    )
    if not bool(equal.any()):
        return X
    t = torch.arange(1, k * k + 1, dtype=E.dtype, device=E.device).reshape(k, k)
    angles = torch.triu(1 + torch.sin(t * t), 1) * equal
    return X @ torch.linalg.matrix_exp(angles - angles.mT).to(X.dtype)


def _pair_mask(
    E: Tensor,
    G: Optional[Tensor],
    gE: Optional[Tensor],
    x: Tensor,
    g: Optional[Tensor],
    T: Tensor,
    residual: Tensor,
    scale: Tensor,
    options: CheckOptions,
) -> Tensor:
    k, m = options.k, options.m
    eps = torch.finfo(E.dtype).eps
    # B^-1 measures residuals; the longest of the B-orthonormal vectors stands for the root of its norm.
    x, longest = x[..., :k], x.amax(-1, keepdim=True)
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()  # (*, k, k)
    distinct = ~torch.eye(k, dtype=torch.bool, device=E.device)
    size = _pencil_size(x, scale[..., :k])
    rounding, blur = _rounding(E, size, options)
    equal = distinct & (gap <= blur)
    _check_outside(
        E, gE, longest, g, gap, equal, T, residual, scale, rounding, blur, options
    )
    amplitude: Any = None
    if G is not None and g is not None:
        amplitude = x.unsqueeze(-1) * g.unsqueeze(-2)  # (+, *, k, k): bound on |G_ij|
        amplitude = (amplitude + amplitude.mT) / 2
        if G.is_complex():
            _check_phase(G, amplitude, eps)
    # Division by a gap below eps^(1/3) turns rounding in G into more than eps^(2/3); elsewhere nothing can go wrong.
    close = distinct & (gap <= eps ** (1 / 3) * size)
    if not bool(close.any()):
        return distinct.expand(gap.shape)
    if options.forward_mode:
        assert G is not None
        split = equal & (G.abs() > 16 * math.sqrt(m) * eps * size)
        if bool(split.any()):
            i, j = _first(split, 2)
            _warn_cluster(
                i,
                j,
                gap,
                "the tangent splits them, so single tangents of these pairs do not exist",
            )
        return distinct & ~equal
    used = torch.zeros_like(equal)
    if gE is not None:
        _check_weights(gE, gap, equal)
        used = _weighs_differently(gE)
    mixing = _mixing(E, longest, T, residual, rounding, options) / torch.where(
        gap > 0, gap, torch.ones_like(gap)
    )
    if G is None:
        if gE is not None:
            spread = (gE.unsqueeze(-1) - gE.unsqueeze(-2)).abs()
            _check_blur(
                used & close & ~equal, mixing * spread, _size(gE.abs()), gap, eps
            )
        return distinct & ~equal
    skew = (G - G.mH).abs() / 2
    # Rounding in G of a loss that does not see the gauge: inner products of length m.
    noise = 8 * math.sqrt(m) * eps * amplitude
    # A loss that is blind to the gauge of equal eigenvalues sees gap over distance of those that are equal to rounding.
    seen = equal & (
        skew > noise + amplitude * gap / _distance(E, T, equal).unsqueeze(-1)
    )
    if bool(seen.any()):
        i, j = _first(seen, 2)
        why = "the loss depends on the choice of eigenvectors among them"
        if bool((seen & (skew > math.sqrt(eps) * amplitude)).any()):
            i, j = _first(seen & (skew > math.sqrt(eps) * amplitude), 2)
            raise RuntimeError(
                _cluster_text(i, j, gap, why)
                + "; it has no gradient there. "
                + _WELL_POSED
            )
        _warn_cluster(i, j, gap, why)
    # A loss that is invariant in a cluster has a Hermitian block, skew part zero up to noise: the exact factor is zero.
    invariant = close & (skew <= noise)
    used = used | (skew > noise)
    if gE is not None:
        # With a loss of values too, a skew part beyond the usual rounding (4 eps for any m) may be more than rounding.
        used = used | (skew > 4 * eps * amplitude)
    used = used & distinct & ~equal
    # What rounding and residuals change in C = Skew(G) o F, and the largest part of the gradient inside span X.
    width = torch.where(used, gap, torch.full_like(gap, math.inf))
    lost = torch.where(invariant, skew, mixing * skew + eps * amplitude)
    error, total = lost / width, _size((skew / width).flatten(-2))
    if gE is not None:
        error = error + mixing * (gE.unsqueeze(-1) - gE.unsqueeze(-2)).abs()
        total = torch.maximum(total, _size(gE.abs()))
    _check_blur(used & close, error, total, gap, eps)
    return distinct & ~equal & ~invariant


def _distance(E: Tensor, T: Tensor, equal: Tensor) -> Tensor:
    """(*, k): from each eigenvalue to the nearest that is not equal to it, infinite where there is none."""
    inside = (E.unsqueeze(-1) - E.unsqueeze(-2)).abs()
    same = equal | torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
    distance = inside.masked_fill(same, math.inf).amin(-1)
    if T.shape[-1]:
        outside = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
        distance = torch.minimum(
            distance,
            torch.where(outside > 0, outside, torch.full_like(outside, math.inf)),
        )
    return distance


def _size(parts: Tensor) -> Tensor:
    """Largest of nonnegative numbers (*, p) as (*, 1, 1)."""
    return parts.amax(-1)[..., None, None]


_WELL_POSED = (
    "A well-posed loss treats the vectors of a cluster alike, for example through X X^H, and symmetric functions of "
    "their eigenvalues."
)


def _cluster_text(i: int, j: int, gap: Tensor, why: str) -> str:
    width = float(gap[..., i, j].min())
    return f"lobpcg: eigenvalues {i} and {j} are equal to rounding (gap {width:.1e}) and {why}"


def _warn_cluster(i: int, j: int, gap: Tensor, why: str) -> None:
    text = (
        _cluster_text(i, j, gap, why)
        + "; the part of the derivative that exists is returned. "
        + _WELL_POSED
    )
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
    return (
        difference
        > torch.finfo(gE.dtype).eps ** (1 / 3) * gE.abs().amax(-1)[..., None, None]
    )


def _check_weights(gE: Tensor, gap: Tensor, equal: Tensor) -> None:
    """Equal eigenvalues must enter the loss alike: their order is not a function of the matrices."""
    seen = equal & _weighs_differently(gE)
    if bool(seen.any()):
        i, j = _first(seen, 2)
        _warn_cluster(i, j, gap, "the loss weighs them differently")


def _mixing(
    E: Tensor,
    x: Tensor,
    T: Tensor,
    residual: Tensor,
    rounding: Tensor,
    options: CheckOptions,
) -> Tensor:
    """How much two pairs mix, times their gap: rounding, and |r_i| |r_j| / (distance to the rest) by Rayleigh-Ritz."""
    if not T.shape[-1]:
        return rounding
    r = residual[..., : options.k] * x
    rest = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
    rest = torch.where(rest > 0, rest, torch.ones_like(rest))
    return rounding + (r / rest).unsqueeze(-1) * r.unsqueeze(-2)


def _check_blur(
    used: Tensor, error: Tensor, total: Tensor, gap: Tensor, eps: float
) -> None:
    """Warn where the gradient between two close pairs lost more than half of the digits; (*, k, k) each."""
    relative = error / torch.where(total > 0, total, torch.ones_like(total))
    # 4e-7 in double precision, 1e-2 in single.
    blurred = used & (relative > 30 * math.sqrt(eps))
    if bool(blurred.any()):
        i, j = _first(blurred, 2)
        gap, relative = torch.broadcast_tensors(gap, relative)
        warnings.warn(
            f"lobpcg: the loss distinguishes eigenpairs {i} and {j}, whose gap {float(gap[..., i, j].min()):.1e} is so "
            f"small that the gradient has a relative error of about {float(relative[..., i, j].max()):.1e}. Tighten "
            "tol, or use a loss that treats the two alike.",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_outside(
    E: Tensor,
    gE: Optional[Tensor],
    x: Tensor,
    g: Optional[Tensor],
    gap: Tensor,
    equal: Tensor,
    T: Tensor,
    residual: Tensor,
    scale: Tensor,
    rounding: Tensor,
    blur: Tensor,
    options: CheckOptions,
) -> None:
    """One warning where a pair that matters missed the tolerance or is close to the rest of the spectrum.

    The estimate of the gradient's relative error is (|r_j| |x_j| + rounding) / (distance to the rest).
    """
    k = options.k
    residual, scale = residual[..., :k], scale[..., :k]
    if T.shape[-1]:
        # Errors inside the block are of second order after Rayleigh-Ritz: the distance to the rest counts.
        nearest = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
    else:
        eye = torch.eye(k, dtype=torch.bool, device=E.device)
        nearest = torch.where(equal | eye, torch.full_like(gap, math.inf), gap).amin(-2)
    error = (residual * x + torch.diagonal(rounding, dim1=-2, dim2=-1)) / nearest
    late = is_late(residual, scale, options.m, k, options.tol)
    if bool(late.any()):
        relative = residual / torch.where(scale > 0, scale, torch.ones_like(scale))
        worst = torch.where(late, relative, torch.zeros_like(relative)).max()
        error = torch.where(late, error, torch.zeros_like(error)).max()
        warnings.warn(
            f"lobpcg: gradient of eigenpairs that have not converged: relative residual {float(worst):.1e} where "
            f"tol={options.tol:.1e} was asked for; estimated relative error of the gradient (residual over gap) "
            f"{float(error):.1e}. Raise niter or n, pass a preconditioner iK, or loosen tol if that "
            "is accurate enough.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if not T.shape[-1]:
        return
    matters = torch.zeros_like(error, dtype=torch.bool)
    if gE is not None:
        matters = matters | (gE != 0)
    if g is not None:
        matters = matters | (g != 0)
    # The estimate is good to a factor of ten; two digits are the least that is returned without a word.
    near = matters & (
        (error > 0.01) | (nearest <= torch.diagonal(blur, dim1=-2, dim2=-1))
    )
    if bool(near.any()):
        (j,) = _first(near, 1)
        nearest, error = torch.broadcast_tensors(nearest, error)
        _warn_near(j, k, float(nearest[..., j].min()), float(error[..., j].max()))
        return
    inaccuracy = residual * x + torch.diagonal(blur, dim1=-2, dim2=-1)
    missed = (E.unsqueeze(-1) - T.unsqueeze(-2)) * (
        -1.0 if options.largest else 1.0
    ) > inaccuracy.unsqueeze(-1)
    if bool(missed.any()):
        _warn_missed(float(T.max() if options.largest else T.min()), k, options.largest)


def _warn_missed(value: float, k: int, largest: bool) -> None:
    warnings.warn(
        f"lobpcg: an eigenvalue near {value:.6g} was missed, so the pairs are not the k={k} "
        f"{'largest' if largest else 'smallest'} ones, and the gradient is that of the pairs returned. Tighten tol, "
        "raise "
        "n, or pass another start block X.",
        RuntimeWarning,
        stacklevel=2,
    )


def _warn_near(j: int, k: int, gap: float, error: float) -> None:
    warnings.warn(
        f"lobpcg: the distance {gap:.1e} of eigenvalue {j} of the k={k} asked for to those that were not is so small "
        f"that the gradient has an estimated relative error of {error:.1e} (residual over gap). Raise k until the "
        "cluster is complete, tighten tol, or use a loss that does not depend on this pair.",
        RuntimeWarning,
        stacklevel=2,
    )
