"""Whether a derivative of eigenpairs exists: phases, and bases of equal eigenvalues.

Eigenvectors are defined up to a phase, and inside a cluster of equal eigenvalues up to a unitary factor.  With
G = X^H gX, a loss does not see that freedom iff Im diag(G) = 0 and the block of G over the cluster is Hermitian.
Everything that depends on values of tensors is decided inside one autograd Function, so that it also works under
vmap; its result is the mask of the pairs (i, j) whose factor F_ij = 1 / (E_j - E_i) is used.

Two eigenvalues are equal to rounding by what is known of these two: the arithmetic that they were found in, their
residuals, and the rounding of E.
"""

import math
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.accuracy import check_accuracy, is_clear
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.blocks import is_single, pairwise
from torch._lobpcg_impl.graph import Held, in_graphs, NUMBERS, Outputs
from torch._lobpcg_impl.report import first, found, members, warn
from torch._lobpcg_impl.transforms import (
    apply,
    batched_first,
    broadcast,
    Constant,
    in_transform,
    is_traced,
)
from torch.autograd import Function


class Seen(NamedTuple):
    """What decides about a derivative.  (*) is the batch of the pairs, (+) further dimensions of cotangents.

    residual, size: |r_j| and N_j of module pairs; late: relative residual of the pairs that missed the tolerance, else
    0; moved: how far residuals move the vectors, of the others in X apart; mixed: towards each other, times their gap.
    In reverse mode G = X^H gX; in forward mode G = Herm(X^H b) and b in the place of gX.  x, g, z, left: 2-norms of the
    columns of X, gX, Z = [R_j gX_j] and (I - B X X^H) gX.
    """

    E: Tensor  # (*, k), in double precision where that is known
    x: Tensor  # (*, k), in the precision of X
    T: Tensor  # (+, *, q), further eigenvalues
    residual: Tensor  # (+, *, k)
    late: Tensor  # (*, k)
    size: Tensor  # (*, k)
    moved: Optional[Tensor]  # (+, *, k); None where it has not been needed
    mixed: Optional[Tensor]  # (+, *, k, k), likewise
    G: Optional[Tensor]  # (+, *, k, k)
    gE: Optional[Tensor]  # (+, *, k)
    g: Optional[Tensor]  # (+, *, k)
    z: Optional[Tensor]  # (+, *, k)
    left: Optional[Tensor]  # (+, *, k)


_TRAILING = (1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1)


class Setting:
    """What the numbers in Seen are judged by.

    eps: unit rounding of what E and X were before they were rounded to their precision.  measured: whether `moved` is
    no bound for pairs that are late, but what they are off by.
    """

    def __init__(
        self, m: int, options: Options, eps: float, measured: bool, forward_mode: bool
    ) -> None:
        self.m, self.options, self.eps = m, options, eps
        self.measured, self.forward_mode = measured, forward_mode
        # Set where some F_ij between different pairs is 0, or a graph is traced, in which it may be.
        self.clustered = False


def pair_factors(
    seen: Seen, errors: Callable[[], Tuple[Tensor, Tensor]], setting: Setting
) -> Tuple[Tensor, bool]:
    """F: (+, *, k, k), 1 / (E_j - E_i) where that factor is used and 0 elsewhere, differentiable in E; and whether some
    pairs are a cluster to it.

    errors() finds seen.moved and seen.mixed, where the pairs do not turn out to be clear without.  Raises RuntimeError
    where no derivative exists; reports where it exists only in part or is inaccurate.
    """
    E = seen.E
    if not (
        setting.forward_mode
        or torch.is_grad_enabled()
        or in_transform()
        or is_traced(E)
    ):
        if is_clear(seen, setting):
            return _of_distinct(E), False
    G, gE = (T if T is None else T.detach() for T in (seen.G, seen.gE))
    moved, mixed = errors()
    seen = seen._replace(E=E.detach(), moved=moved, mixed=mixed, G=G, gE=gE)
    mask = apply(_PairMask, setting, *seen)
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)  # (*, k, k): E_j - E_i at (i, j)
    F = mask / torch.where(mask > 0, difference, torch.ones_like(difference))
    return F, setting.clustered


def _of_distinct(E: Tensor) -> Tensor:
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)
    difference.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    return difference.reciprocal_()


def _mask_shape(seen: Seen) -> List[int]:
    shapes = [seen.E.shape + seen.E.shape[-1:]]
    if seen.G is not None:
        shapes.append(seen.G.shape)
    if seen.gE is not None:
        shapes.append(seen.gE.shape + seen.gE.shape[-1:])
    return broadcast(*shapes)


def _hold_mask(setting: Setting, *tensors: Any) -> Held:
    setting.clustered = True
    own = ("m", "eps", "measured", "forward_mode")
    numbers = {name: getattr(setting, name) for name in own}
    return tensors, dict(setting.options.numbers(), **numbers)


def _restore_mask(
    *tensors: Any,
    m: int,
    eps: float,
    measured: bool,
    forward_mode: bool,
    **numbers: Any,
) -> Tuple[Any, ...]:
    options = Options.of_numbers(**numbers)
    return (Setting(m, options, eps, measured, forward_mode), *tensors)


def _mask_outputs(*tensors: Any, **_: Any) -> Outputs:
    return [(_mask_shape(Seen(*tensors)), tensors[0].dtype)]


_SEEN = (
    "Tensor E, Tensor x, Tensor T, Tensor residual, Tensor late, Tensor size, Tensor moved, Tensor mixed, Tensor? G, "
    "Tensor? gE, Tensor? g, Tensor? z, Tensor? left"
)


@in_graphs(
    "pair_mask",
    f"({_SEEN}, *, SymInt m, float eps, bool measured, bool forward_mode, {NUMBERS}) -> Tensor",
    _mask_outputs,
    _hold_mask,
    _restore_mask,
)
class _PairMask(Constant):
    """(setting, *seen) -> mask (+, *, k, k) of 0 and 1; a constant to autograd."""

    @staticmethod
    def forward(setting: Setting, *tensors: Any) -> Tensor:
        seen = Seen(*tensors)
        k = seen.E.shape[-1]
        mask = _pair_mask(seen, setting).to(seen.E.dtype)
        setting.clustered = setting.clustered or bool((mask.sum(-1) < k - 1).any())
        return mask.expand(_mask_shape(seen)).contiguous()

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], setting: Any, *tensors: Any) -> Any:
        mapped, _ = batched_first(info.batch_size, in_dims[1:], tensors, _TRAILING)
        mask = _PairMask.apply(setting, *mapped)
        shown = Seen(*in_dims[1:])
        if shown.E is None and shown.G is None and shown.gE is None:
            mask = mask.expand((info.batch_size,) + tuple(mask.shape))
        return mask, 0


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
    """(W, F, order) -> W, of which `order` derivatives have been taken; warns of a third where F has a cluster."""

    @staticmethod
    def forward(W: Tensor, F: Tensor, order: int) -> Tensor:
        if order > 1 and bool(((F == 0).sum(-1) > 1).any()):
            warn(
                "lobpcg: derivatives beyond the second are incomplete where eigenvalues are equal to rounding, as some "
                "are here"
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


# ------------------------------------------------------------------------------------- equal eigenvalues


def undetermined(
    E: Tensor, size: Tensor, residual: Tensor, mixed: Optional[Tensor], eps: float
) -> Tensor:
    """(*, k, k): the gap up to which rounding leaves two vectors undetermined: that of an eigensolver in eps, a modest
    multiple of eps N; but where residuals came out smaller, as those of vectors do that live where a graded matrix is
    small, a multiple of these, which determine the vectors above it.  Residuals far below rounding tell nothing: those
    of unit vectors, as of a diagonal matrix, are zero in a cluster too.

    mixed: of pairs in single precision, what mixes x_i and x_j, times their gap, and on the diagonal what E_i is off
    by, as seen in double.  Copies of one eigenvalue are twice the latter apart at most, whatever the former is by
    chance; so what is ten times farther apart than both, and than the rounding of E, is told apart.
    """
    noise = eps * size
    noise = torch.where(residual > 1e-3 * noise, torch.minimum(residual, noise), noise)
    width = pairwise(noise)
    if mixed is not None and is_single(eps):
        own = mixed.diagonal(dim1=-2, dim2=-1) + eps * E.abs()
        width = torch.minimum(width, torch.maximum(mixed, pairwise(own)))
    return 10 * width


def generic_basis(
    E: Tensor, X: Tensor, size: Tensor, width: Callable[[], Tensor]
) -> Tensor:
    """X: (*, m, k) with the vectors that rounding leaves undetermined turned by fixed angles.

    size: (*, k), rounding eps N of their eigenvalues; width(): undetermined() of them, asked for where a gap is below
    20 of it.

    A loss tr(M X diag(E) X^H) has no gradient computable from gE and G at equal eigenvalues, only its diagonal in the
    basis X.  It is recognised by the differences in gE, which vanish in a special basis: in that of unit vectors, which
    a diagonal matrix leads to, if diag(M) = 0.  In a generic basis they do not.  A residual grows by half of the gap at
    most, which is below the rounding of the residual itself.
    """
    k = E.shape[-1]
    if k == 1 or E.numel() == 0:
        return X
    # Pairs stand in order: most matrices are done with here.
    nearest = (E[..., 1:] - E[..., :-1]).abs().amin(-1)
    if bool((nearest > 20 * size.amax(-1)).all()):
        return X
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()
    distinct = ~torch.eye(k, dtype=torch.bool, device=E.device)
    equal = (gap <= width()) & distinct
    if not bool(equal.any()):
        return X
    t = torch.arange(1, k * k + 1, dtype=E.dtype, device=E.device).reshape(k, k)
    angles = torch.triu(1 + torch.sin(t * t), 1) * equal
    return X @ torch.linalg.matrix_exp(angles - angles.mT).to(X.dtype)


def generic_phases(X: Tensor) -> Tensor:
    """X, complex, with its columns turned by fixed phases.

    A loss that depends on the phase of x is recognised by Im x^H gx.  That vanishes where the loss is stationary in the
    phase, as a real part is where an entry is real, and eigensolvers return vectors with a real entry.
    """
    j = torch.arange(1, X.shape[-1] + 1, dtype=X.dtype.to_real(), device=X.device)
    return X * torch.polar(torch.ones_like(j), 1 + torch.sin(j * j))


class Gaps(NamedTuple):
    """Between the wanted eigenvalues, (*, k, k); and from each to the rest, (+, *, k)."""

    gap: Tensor
    equal: Tensor  # whether nothing tells the two apart
    exactly: Tensor  # whether rounding alone could make the difference
    error: Tensor  # how far two vectors may be mixed, times their gap
    rest: Tensor  # infinite, where nothing is known
    rounding: Tensor  # (*, k), what nothing tells an eigenvalue from


def _gaps(seen: Seen, setting: Setting) -> Gaps:
    E, T, r = seen.E, seen.T, seen.residual
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()
    distinct = ~torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
    rounding = 10 * setting.eps * seen.size
    # An error asks for more than a warning: residuals that leave the vectors undetermined.
    assert seen.mixed is not None
    width = undetermined(E, seen.size, r, seen.mixed, setting.eps)
    exactly = distinct & (gap <= width)
    blur = 10 * setting.eps * pairwise(seen.size)
    if is_single(setting.eps):
        # Of a graded matrix that is far above what residuals leave undetermined, and a factor left out is an error.
        blur = width
    error = seen.mixed
    rest = torch.full_like(E, math.inf)
    if T.shape[-1]:
        rest = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
        # Rayleigh-Ritz leaves an error of second order in what mixes two pairs.
        ratio = r / torch.maximum(rest, rounding)
        ratio = torch.where(r > 0, ratio, torch.zeros_like(ratio))
        coupling = ratio.unsqueeze(-1) * r.unsqueeze(-2)
        coupling = torch.maximum(coupling, coupling.mT)
        error, blur = error + coupling, blur + 4 * coupling
    return Gaps(gap, distinct & (gap <= blur), exactly, error, rest, rounding)


def _pair_mask(seen: Seen, setting: Setting) -> Tensor:
    """See the top of the module; reports on the way."""
    E, G, gE, x, g = seen.E, seen.G, seen.gE, seen.x, seen.g
    if not setting.forward_mode and is_clear(seen, setting):
        return ~torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
    eps, m = torch.finfo(x.dtype).eps, setting.m
    gaps = _gaps(seen, setting)
    distinct = ~torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
    mask = distinct & ~gaps.equal
    width = torch.where(gaps.gap > 0, gaps.gap, torch.ones_like(gaps.gap))
    used = torch.zeros_like(mask)
    if gE is not None:
        used = _weighs_differently(gE)
        _check_weights(seen, gaps, used)
    if G is None:
        skew = rounding = torch.zeros_like(gaps.gap)
    elif setting.forward_mode:
        skew, rounding = G.abs(), eps * math.sqrt(m) * pairwise(seen.size)
        _check_split(G, gaps, 16 * rounding)
        rounding = torch.zeros_like(rounding)
    else:
        assert g is not None
        amplitude = x.unsqueeze(-1) * g.unsqueeze(-2)  # (+, *, k, k), bounds |G_ij|
        amplitude = (amplitude + amplitude.mT) / 2
        if G.is_complex():
            _check_phase(seen, amplitude)
        skew, rounding = (G - G.mH).abs() / 2, 4 * eps * amplitude
        # Rounding in G of a loss that does not see the gauge: inner products of length m.
        noise = 2 * math.sqrt(m) * rounding
        # A column of gX whose terms cancel, as of x exp(-x) at 1, keeps the rounding of the others.
        floor = 4 * eps * pairwise(x * g.amax(-1, keepdim=True))
        _check_gauge(seen, gaps, skew, noise + floor, amplitude)
        # With a loss of values too, a skew part beyond the usual rounding, 4 eps for any m, may be more.
        used = used | (skew > (noise if gE is None else rounding))
        # Division by a gap below eps^(1/3) turns rounding in G into more than eps^(2/3).  A loss that is invariant in a
        # cluster has a Hermitian block there, skew part zero up to noise: the exact factor is zero.
        close = gaps.gap <= eps ** (1 / 3) * pairwise(seen.size)
        mask = mask & ~(close & (skew <= noise))
    # What rounding and residuals change in the numerators of C = Skew(G) o F, or, without their factor, all of it.
    lost = torch.where(mask, gaps.error * skew / width + rounding, skew)
    if gE is not None and G is not None:
        # X f(E) X^H has a skew part of gap times its slope, which may hide below the rounding of G.
        hidden = _weighs_differently(gE) & distinct & ~mask
        if bool(hidden.any()):
            least = torch.maximum(skew, rounding)
            least = torch.minimum(least, gaps.gap * _slopes(gE, G))
            lost = torch.where(hidden, least, lost)
    if gE is not None:
        lost = lost + gaps.error * (gE.unsqueeze(-1) - gE.unsqueeze(-2)).abs()
    lost = lost * (used & distinct & ~gaps.equal)
    check_accuracy(seen, gaps, setting, skew * mask, lost, mask)
    return mask


def _slopes(gE: Tensor, G: Tensor) -> Tensor:
    """(+, *, k, k): the factor of x_i x_j^H in the gradient of a smooth function X f(E) X^H, f' M_ij with a Hermitian
    M.  There gE_i = f'_i M_ii, and Herm(G)_ij = (f_i + f_j) M_ij."""
    H = (G + G.mH).abs() / 2
    diagonal = H.diagonal(dim1=-2, dim2=-1).square()
    size = ((diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2)) / 2).sqrt()
    there = size > 0
    slopes = pairwise(gE.abs()) * H / torch.where(there, size, torch.ones_like(size))
    return slopes.masked_fill(~there, math.inf)


def _weighs_differently(gE: Tensor) -> Tensor:
    """Pairs (i, j) that enter the loss with different weight: (+, *, k, k)."""
    difference = (gE.unsqueeze(-1) - gE.unsqueeze(-2)).abs()
    # A smooth symmetric loss has gE that differ by its curvature times the gap, at most eps^(1/3) in a cluster.
    least = torch.finfo(gE.dtype).eps ** (1 / 3) * gE.abs().amax(-1)
    return difference > least[..., None, None]


# -------------------------------------------------------------------------------- what does not exist

_WELL_POSED = (
    "A well-posed loss treats the vectors of a cluster alike, for example through X X^H, and symmetric functions of "
    "their eigenvalues."
)


def _cluster_text(bad: Tensor, gap: Tensor, batch: int, why: str) -> str:
    i, j = first(bad, 2)
    where = bad[..., i, j]
    width = float(gap[..., i, j].expand_as(where)[where].min())
    return (
        f"lobpcg: eigenvalues {i} and {j} are equal to rounding (gap {width:.1e}) and {why}"
        + members(bad.any(-1).any(-1), batch)
    )


def _part(text: str) -> str:
    return f"{text}; the part of the derivative that exists is returned. {_WELL_POSED}"


def _check_split(H: Tensor, gaps: Gaps, rounding: Tensor) -> None:
    """Forward mode: single tangents do not exist where H = Herm(S) splits equal eigenvalues."""
    split = gaps.equal & (H.abs() > rounding)
    if bool(split.any()):
        why = "the tangent splits them, so single tangents of these pairs do not exist"
        found(_part(_cluster_text(split, gaps.gap, gaps.gap.dim() - 2, why)))


def _check_gauge(
    seen: Seen, gaps: Gaps, skew: Tensor, noise: Tensor, amplitude: Tensor
) -> None:
    """A loss that depends on the basis of equal eigenvalues: an error, in a batch a warning that names the members."""
    if not bool(gaps.equal.any()):
        return
    # A loss that is blind to the gauge of equal eigenvalues sees gap over distance of those that are equal to rounding.
    allowed = noise + amplitude * gaps.gap / _distance(seen, gaps.equal).unsqueeze(-1)
    bad = gaps.equal & (skew > allowed)
    if not bool(bad.any()):
        return
    batch, k = seen.E.dim() - 1, seen.E.shape[-1]
    why = "the loss depends on the choice of eigenvectors among them"
    eps = torch.finfo(seen.x.dtype).eps
    certain = bad & gaps.exactly & (skew > math.sqrt(eps) * amplitude)
    if bool(certain.any()) and seen.E.numel() == k:
        text = _cluster_text(certain, gaps.gap, batch, why)
        raise RuntimeError(f"{text}; it has no gradient there. {_WELL_POSED}")
    found(_part(_cluster_text(bad, gaps.gap, batch, why)))


def _distance(seen: Seen, equal: Tensor) -> Tensor:
    """(+, *, k): from each eigenvalue to the nearest that is not equal to it, infinite where there is none."""
    E, T = seen.E, seen.T
    inside = (E.unsqueeze(-1) - E.unsqueeze(-2)).abs()
    same = equal | torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
    distance = inside.masked_fill(same, math.inf).amin(-1)
    if T.shape[-1]:
        outside = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
        outside = outside.masked_fill(outside == 0, math.inf)
        distance = torch.minimum(distance, outside)
    return distance


def _check_phase(seen: Seen, amplitude: Tensor) -> None:
    """A loss that depends on the phase of a vector: an error, in a batch a warning that names the members."""
    assert seen.G is not None
    phase = torch.diagonal(seen.G, dim1=-2, dim2=-1).imag.abs()
    size = torch.diagonal(amplitude, dim1=-2, dim2=-1)
    bad = phase > math.sqrt(torch.finfo(phase.dtype).eps) * size
    if not bool(bad.any()):
        return
    (j,) = first(bad, 1)
    E = seen.E
    text = (
        f"lobpcg: the loss depends on the phase of eigenvector {j} (Im x^H gx = {float(phase[..., j].max()):.1e}), "
        f"which is arbitrary{members(bad.any(-1), E.dim() - 1)}, so it has no gradient; use a loss invariant under "
        "x -> exp(i phi) x, such as one of abs(x) or x x^H"
    )
    if E.numel() == E.shape[-1]:
        raise RuntimeError(text)
    found(text + ". The part of the derivative that exists is returned.")


def _check_weights(seen: Seen, gaps: Gaps, differ: Tensor) -> None:
    """Equal eigenvalues must enter the loss alike: their order is not a function of the matrices.

    A smooth function X f(E) X^H weighs them differently too.  It has a derivative, of which gE and G in one basis hold
    the diagonal inside a cluster alone.
    """
    bad = gaps.equal & differ
    if seen.z is not None and bool(bad.any()):
        bad = bad & ~_is_lost_in(seen)
    if not bool(bad.any()):
        return
    text = _cluster_text(
        bad, gaps.gap, seen.E.dim() - 1, "the loss weighs them differently"
    )
    if seen.G is None:
        found(_part(text))
        return
    found(
        f"{text}, as a function of X f(E) X^H does. Such a function has a derivative there, but gradients with respect "
        "to E and X do not hold all of it; the part that they hold is returned. Write it in the projector form "
        "X f(X^H A X) X^H, with f a function of the small matrix, such as torch.linalg.matrix_exp, or as functions of "
        "X X^H and of a sum over the cluster of its eigenvalues."
    )


def _is_lost_in(seen: Seen) -> Tensor:
    """(+, *, k, k): where what gE does not hold of X f(E) X^H in a cluster, of the size of its differences in a generic
    basis, is small beside the part of the gradient that leads out of span X."""
    assert seen.gE is not None
    assert seen.z is not None
    x, z = seen.x, seen.z
    part = (seen.gE.unsqueeze(-1) - seen.gE.unsqueeze(-2)).abs() * pairwise(x)
    least = 1e-3 if is_single(torch.finfo(x.dtype).eps) else 1e-4
    return part <= least * z.amax(-1)[..., None, None]
