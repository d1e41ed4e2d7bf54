"""Forward- and reverse-mode derivatives of k extreme eigenpairs, tensors in, tensors out.

A X = B X diag(E), X^H B X = I.  Herm and Skew are the parts of a square matrix.  With G = X^H gX, the reduced
resolvents R_j of module resolvent, and F_ij = 1 / (E_j - E_i), but 0 on the diagonal and inside a cluster
(Magnus 1985; Giles 2008, NA-08-01; generalized to B != I):

    reverse   W    = X (diag(gE) + Skew(G) o F) - [R_j gX_j]
              gA   = Herm(W X^H)
              gB   = -Herm(W diag(E) X^H) - 1/2 X Herm(G) X^H

    forward   b    = dA X - dB X diag(E),  S = X^H b
              dE   = Re diag(S)
              dX   = X (Herm(S) o F - 1/2 X^H dB X) - [R_j b_j]

Textbooks have G o F and S o F with the diagonals of Herm(G) and X^H dB X only, which is the same for distinct
eigenvalues: F is antisymmetric, so Herm(G) o F cancels in gA and leaves 1/2 Herm(G) in gB, and Skew(S) o F is
-1/2 X^H dB X off the diagonal.  Here no such part is divided by a gap, and the formulas hold inside a cluster as well:
there the normalisation X^H B X = I still ties the vectors to each other, whatever basis of the cluster X is.

All of it consists of differentiable operations, so every order of derivative follows from this one.  Only a cluster
needs more: there diag(E) varies as a full matrix, L = diag(E) + N, N_ij = Herm(X^H (A X - B X diag(E)))_ij for i and j
in one cluster.  N is 0, and its differential is Herm(S).  The equations with L in the place of diag(E),

    C L - L C = Skew(G),    A Z - B Z L = (I - B X X^H) gX,    W = X (diag(gE) + C) - Z,    V = W L  in gB,

are solved to first order in N, which makes the second derivative exact; diag(E) itself is a constant there.
"""

import dataclasses
import math
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.accuracy import least_residual
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.at_once import weights_at_once
from torch._lobpcg_impl.blocks import gram, is_single, norms, safe_norms
from torch._lobpcg_impl.complement import in_double, is_small, solve_on_complement
from torch._lobpcg_impl.gauge import (
    generic_basis,
    generic_phases,
    pair_factors,
    SecondOrderAtMost,
    Seen,
    Setting,
    undetermined,
)
from torch._lobpcg_impl.iteration import EigenPairs
from torch._lobpcg_impl.measured import Gradient, measured_error
from torch._lobpcg_impl.operand import Pencil
from torch._lobpcg_impl.pairs import in_masses, longer, missed, Pairs, pencil_size
from torch._lobpcg_impl.report import members, OneWarning
from torch._lobpcg_impl.resolvent import (
    distance_of_quotient,
    mixed_by_residuals,
    moved_by_residuals,
    nearest_outside,
    reduced_resolvent,
)
from torch._lobpcg_impl.solver import (
    dense_is_cheaper,
    dense_solve,
    found_in_double,
    keeps_double,
    solve,
    warn_unconverged,
)
from torch._lobpcg_impl.transforms import broadcast, in_transform, is_traced


# The first searches the span of the pairs and of what the residuals point to, which holds the neighbour that a narrow
# gap has mixed in; Ritz values of a span that contains X are never farther from the end of the spectrum than those of
# X, so what follows does not settle on whatever eigenvalue is near.  The others are Newton's: they leave no share of
# far ones.
_MOST_STEPS = 4
# Measured relative errors from which on a word is said: above, in double precision and of pairs that have converged, no
# gradient may come in silence; of others the forward has spoken, and single precision has digits to spare.
WORTH_A_WORD, WORTH_A_WORD_IN_DOUBLE = 5e-3, 7e-4
# Residuals above so many times rounding are left by steps that have not come to their end.
_NEAR = 16.0


def find_pairs(
    pencil: Pencil, X: Optional[Tensor], options: Options
) -> Tuple[Tensor, ...]:
    """The forward of one problem, with a warning where pairs have not converged: E and X, and where a derivative may
    follow the other tensors of Pairs.

    They neither alias an argument nor keep a whole block alive, and what was found in double is rounded to the dtype of
    the matrices, once.
    """
    k = options.k
    found = solve(pencil, X, options)
    if _is_plain(found, options):
        return _rounded_at_once(found, pencil, options)
    warn_unconverged(found, pencil, options)
    # All m, of a dense solve, or as many as were asked for: columns may have joined the block on the way.
    n = found.E.shape[-1] if found.E.shape[-1] == pencil.m else options.n
    last = n if options.differentiated else k
    further = found.rest or (found.E[..., k:last], found.X[..., k:last])
    residual, scale = found.residual[..., :n], found.scale[..., :n]
    pairs = Pairs(
        pencil,
        options,
        found.E[..., :k],
        found.X[..., :k],
        *further,
        residual,
        scale,
        missed(residual[..., :k], scale[..., :k], pencil.m, options.tol),
        found.E[..., : k if keeps_double(pencil, options) else 0],
    )
    pairs = corrected(pairs)
    kept = pairs.tensors if options.differentiated else pairs.tensors[:2]
    return tuple(_rounded(pairs, T) for T in kept)


def _rounded(pairs: Pairs, T: Tensor) -> Tensor:
    dtype = pairs.pencil.dtype
    if T is pairs.missed:
        dtype = torch.bool
    elif T is pairs.T or T is pairs.Y or T is pairs.values:
        # In double where they were found in it, to stay in it.
        wide = pairs.values is not None and pairs.values.shape[-1]
        dtype = T.dtype if wide else dtype if T is pairs.Y else dtype.to_real()
    elif T is not pairs.X:
        dtype = dtype.to_real()
    return T.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _is_plain(found: EigenPairs, options: Options) -> bool:
    """Whether these are the pairs of one dense matrix of which nothing is to be said, and which `corrected` would leave
    as they are, by the same rules from the numbers on the host."""
    if found.numbers is None:
        return False
    values, residual, scale = found.numbers
    for r, s in zip(residual, scale):
        if not r <= options.tol * s:
            return False
    if not options.differentiated:
        return True
    if found.X.is_complex():
        return False  # phases are turned
    rounding = 20 * torch.finfo(found.E.dtype).eps * max(scale)
    return all(abs(b - a) > rounding for a, b in zip(values, values[1:]))


def _rounded_at_once(
    found: EigenPairs, pencil: Pencil, options: Options
) -> Tuple[Tensor, ...]:
    """Plain pairs, in memory of their own and in the dtype of the matrices."""
    E, X, residual, scale = found[:4]
    dtype, exact = pencil.dtype, E[:0]
    real, wide = dtype.to_real(), X.dtype != dtype
    if not (options.largest or wide):
        E, X = E.clone(), X.clone()
    if found.rest is None:
        return (E.to(real), X.to(dtype)) if wide else (E, X)
    if wide:
        # Columns of length one have an entry of their size nearly.
        X = X.hardshrink(torch.finfo(dtype).tiny ** 0.5).to(dtype)
        exact = E if options.largest else E.clone()
        E, residual, scale = E.to(real), residual.to(real), scale.to(real)
    late = E.isnan()  # none: plain pairs are finite
    return (E, X, *found.rest, residual, scale, late, exact)


def _without_tiny(X: Tensor, dtype: torch.dtype) -> Tensor:
    """X in double, to be rounded to single precision, without what is left in it of entries that are zero: products of
    two would leave the range."""
    size, least = X.abs(), torch.finfo(dtype).tiny ** 0.5
    return X.masked_fill(size < least * size.amax(-2, keepdim=True), 0.0)


def corrected(pairs: Pairs) -> Pairs:
    """Pairs fit for a derivative, where one may follow: a generic basis of vectors that rounding leaves undetermined
    (see `generic_basis`), residuals in the scale of module pairs, and, as for every small known pencil, a Newton step.

    Derivatives take the pairs as exact, so their error is |r| / gap.  The step x_j - R_j r_j, then Rayleigh-Ritz, makes
    that error quadratic in |r|: at m = 200 and tol = 1e-8 it fell from 2e-7 to 1e-13.  Single precision is corrected in
    double, which leaves the rounding of the result: at m = 100, gap 1e-3, the gradient's error fell from 2e-4 to 1e-6.
    Pairs that have not converged stay as they are, to be reported as such.
    """
    wanted = pairs.options.differentiated
    # Without B a dense solve is as good as the step.
    if not (wanted or pairs.pencil.generalized) or not pairs.X.numel():
        return pairs
    pairs = _newton_step(pairs)
    X = pairs.X
    if X.dtype != pairs.pencil.dtype:
        X = _without_tiny(X, pairs.pencil.dtype)
        pairs = dataclasses.replace(pairs, X=X)
    if not wanted:
        return pairs
    size, residual = pencil_size(pairs), _in_masses(pairs)
    pairs = dataclasses.replace(pairs, residual=residual, scale=size)
    turned = _generic(pairs)
    if X.is_complex():
        turned = generic_phases(turned)
    if turned is not X:
        pairs = dataclasses.replace(pairs, X=turned)
        pairs = dataclasses.replace(pairs, residual=_in_masses(pairs))
    return pairs


def _generic(pairs: Pairs) -> Tensor:
    """generic_basis() of the wanted pairs."""
    E, X, k = pairs.E, pairs.X, pairs.E.shape[-1]
    eps = torch.finfo(E.dtype).eps
    size, r = (T[..., :k].to(E.dtype) for T in (pairs.scale, pairs.residual))

    def width() -> Tensor:
        if not is_single(eps):
            return undetermined(E, size, r, None, eps)
        gap = (E.unsqueeze(-1) - E.unsqueeze(-2)).abs()
        return undetermined(E, size, r, mixed_by_residuals(pairs, r, gap), eps)

    return generic_basis(E, X, eps * size, width)


def _in_masses(pairs: Pairs) -> Tensor:
    """|r_j| of module pairs, (*, n), for the 2-norms of the residuals in pairs.residual."""
    pencil, n = pairs.pencil, pairs.residual.shape[-1]
    if not pencil.generalized:
        return pairs.residual
    V = torch.cat([pairs.X, pairs.Y], -1)[..., :n]
    values = torch.cat([pairs.E, pairs.T], -1)[..., :n]
    pencil = pencil if pencil.dtype == V.dtype else pencil.in_double()
    return in_masses(pairs, _residuals(pencil, values, V))


def _newton_step(pairs: Pairs) -> Pairs:
    """The pairs after the step, E and X in its precision, or as they were where it does not help."""
    pencil, E, X = pairs.pencil, pairs.E, pairs.X
    m, k = X.shape[-2:]
    residual, scale = pairs.residual[..., :k], pairs.scale[..., :k]
    eps = torch.finfo(E.dtype).eps
    late = pairs.missed
    if k == m or not is_small(pencil) or (late is not None and bool(late.any())):
        return pairs
    # A dense forward in double is at rounding level already: nothing to win.
    if (
        not is_single(eps)
        and not pencil.generalized
        and dense_is_cheaper(pencil, pairs.options)
    ):
        return pairs
    if not is_single(eps) and bool((residual <= math.sqrt(m) * eps * scale).all()):
        return pairs
    pencil, E, X = pencil.in_double(), in_double(E), in_double(X)
    r = _residuals(pencil, E, X)
    before, rounding = norms(r), math.sqrt(m) * torch.finfo(E.dtype).eps * scale
    for step in range(_MOST_STEPS):
        # A relative error of the step is as good as the square of what it corrects.
        Z = solve_on_complement(pencil, E, X, r, pairs.options.sign, 1e-4, use="step")
        V, empty = _joined(pencil, X, Z) if step == 0 else (X - Z, None)
        ritz, V, there = _extreme_of_span(pairs, pencil, V, empty)
        moved = _residuals(pencil, ritz, V)
        after = norms(moved)
        better = ((after.amax(-1) < before.amax(-1)) & there).unsqueeze(-1)
        E, before = torch.where(better, ritz, E), torch.where(better, after, before)
        better = better.unsqueeze(-1)
        X, r = torch.where(better, V, X), torch.where(better, moved, r)
        done = bool((before <= rounding).all())
        if done or (step > 0 and not bool(better.any())):
            break
    residual = torch.cat([before, pairs.residual[..., k:]], -1)
    pairs = dataclasses.replace(pairs, E=E, X=X, residual=residual)
    if done or bool((before <= _NEAR * rounding).all()):
        return pairs
    return _densely(pairs)


def _densely(pairs: Pairs) -> Pairs:
    """The pairs of each matrix, or those of a dense solve in double precision where its residuals are smaller: where a
    gap is as narrow as the residuals were, a few steps do not tell two vectors from each other."""
    pencil = pairs.pencil.in_double()
    found = dense_solve(pencil.checked(), pairs.options)
    k = pairs.E.shape[-1]
    n = k + pairs.T.shape[-1]
    E, X = found.E, found.X
    if found.rest is not None:
        E, X = (torch.cat(both, -1) for both in zip((E, X), found.rest))
    E, X = E[..., :n], X[..., :n]
    residual = norms(_residuals(pencil, E, X))
    residual = torch.cat([residual, pairs.residual[..., n:]], -1)
    better = residual[..., :k].amax(-1) < pairs.residual[..., :k].amax(-1)

    def pick(new: Tensor, old: Tensor) -> Tensor:
        where = better.reshape(better.shape + (1,) * (old.dim() - better.dim()))
        return torch.where(where, new, old)

    return dataclasses.replace(
        pairs,
        E=pick(E[..., :k], pairs.E),
        X=pick(X[..., :k], pairs.X),
        T=pick(E[..., k:], pairs.T),
        Y=pick(X[..., k:], pairs.Y),
        residual=pick(residual, pairs.residual),
    )


def _joined(pencil: Pencil, X: Tensor, Z: Tensor) -> Tuple[Tensor, Tensor]:
    """X beside a basis of span Z, orthonormal in B, and 1 for each column that this basis lacks: (*, 2 k).

    The columns of Z may all point to one neighbour, and those of pairs that are exact are rounding.
    """
    tiny = torch.finfo(Z.dtype).tiny
    Z = Z / safe_norms(Z).clamp_min(tiny)
    size, U = torch.linalg.eigh(gram(Z, pencil.B.apply(Z)))
    there = size > 1e-10 * size.amax(-1, keepdim=True).clamp_min(tiny)
    root = torch.where(there, size, torch.ones_like(size)).rsqrt() * there
    empty = torch.cat([torch.zeros_like(root), (~there).to(root.dtype)], -1)
    return torch.cat([X, Z @ (U * root.unsqueeze(-2))], -1), empty


def _extreme_of_span(
    pairs: Pairs, pencil: Pencil, V: Tensor, empty: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """The k extreme Ritz pairs of span V, and whether V has full rank but for the columns that are empty, (*)."""
    k = pairs.E.shape[-1]
    G, H = gram(V, pencil.B.apply(V)), gram(V, pencil.A.apply(V))
    if empty is not None:
        # What is not there gets an eigenvalue beyond the other end.
        far = 4 * V.shape[-1] * pairs.options.sign * H.abs().amax((-2, -1))
        G = G + torch.diag_embed(empty)
        H = H + torch.diag_embed(far.unsqueeze(-1) * empty)
    L, info = torch.linalg.cholesky_ex(G)
    H = torch.linalg.solve_triangular(L, (H + H.mH) / 2, upper=False)
    H = torch.linalg.solve_triangular(L, H.mH, upper=False)
    ritz, C = torch.linalg.eigh((H + H.mH) / 2)
    if pairs.options.largest:
        ritz, C = ritz.flip(-1), C.flip(-1)
    C = torch.linalg.solve_triangular(L.mH, C[..., :k], upper=True)
    return ritz[..., :k], V @ C, info == 0


def _residuals(pencil: Pencil, E: Tensor, X: Tensor) -> Tensor:
    return pencil.A.apply(X) - pencil.B.apply(X) * E.unsqueeze(-2)


def _factors(
    pairs: Pairs,
    G: Optional[Tensor],
    gE: Optional[Tensor],
    b: Optional[Tensor],
    Z: Optional[Tensor],
    forward_mode: bool = False,
) -> Tuple[Tensor, bool]:
    """F, in double precision where E is known in it, and whether some of the pairs are a cluster to it.

    Z = [R_j b_j]; without b, in reverse mode, gX is 0."""
    known = pairs.constant() if _may_be_differentiated() else pairs
    T, space = known.T, known.pencil.space
    blocks = [known.X]
    if b is not None and Z is not None:
        b, Z = b.detach(), Z.detach()
        if forward_mode or G is None:
            inside = space.gram(known.X, b)
        else:
            inside = G.detach()
        blocks += [b, Z, b - known.pencil.B.product(known.X) @ inside]
    x, *lengths = space.joined([norms(V) for V in blocks], len(blocks))
    g, z, left = lengths or (None, None, None)
    residual = known.residual[..., : known.E.shape[-1]]
    E, eps, values = pairs.E, torch.finfo(known.E.dtype).eps, known.E
    if is_single(eps) and known.exact is not None:
        values, eps = known.exact, eps * eps
        E = values + (E - known.E)
    elif is_single(eps) and _was_in_double(known):
        values, nearest = _values_in_double(known)
        E, T = (
            values + (E - known.E),
            torch.cat([nearest, T[..., nearest.shape[-1] :]], -1),
        )
        eps = eps * eps
    if not pairs.all_known:
        T = _with_values_outside(known, Z, values, T)
        if Z is not None and pairs.pencil.generalized:
            residual = residual * longer(known, Z)
    seen = Seen(
        E, x, T, residual, known.late, known.size, None, None, G, gE, g, z, left
    )

    def errors() -> Tuple[Tensor, Tensor]:
        least = least_residual(residual, 10 * eps * known.size)
        gap = (values.unsqueeze(-1) - values.unsqueeze(-2)).abs()
        mixed = mixed_by_residuals(known, least, gap)
        if not T.shape[-1]:
            return torch.zeros_like(residual), mixed
        nearest = (values.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)
        least = torch.maximum(residual, least)
        return moved_by_residuals(known, least, nearest), mixed

    measured = is_small(pairs.pencil)
    setting = Setting(pairs.pencil.m, pairs.options, eps, measured, forward_mode)
    F, clustered = pair_factors(seen, errors, setting)
    return F, clustered


def _was_in_double(pairs: Pairs) -> bool:
    """Whether the pairs have gone through double precision, in `corrected` or in a dense solve."""
    if is_small(pairs.pencil):
        return True
    return pairs.all_known and pairs.pencil.is_known() and found_in_double(pairs.pencil)


def _values_in_double(pairs: Pairs) -> Tuple[Tensor, Tensor]:
    """E and the first of T before they were rounded to single precision, but for the square of that rounding: gaps
    below eps |E| are told then.  They are Rayleigh quotients of the rounded vectors."""
    k = pairs.E.shape[-1]
    V = in_double(torch.cat([pairs.X, pairs.Y[..., :4]], -1))
    pencil = pairs.pencil.in_double()
    BV = pencil.B.product(V)
    values = (V.conj() * pencil.A.product(V)).sum(-2) / (V.conj() * BV).sum(-2)
    values = torch.real(values) if values.is_complex() else values
    return values[..., :k], values[..., k:]


def _with_values_outside(
    pairs: Pairs, Z: Optional[Tensor], E: Tensor, T: Tensor
) -> Tensor:
    """T with more Ritz values of the complement: guard columns may be missing, or miss an eigenvalue.

    The Rayleigh quotients of Z = [R_j b_j] lie at the near end of the spectrum: R_j amplifies that end most.  They lie
    too far inside where b_j sees little of the nearest vector, so a small pencil gets the eigenvalue itself, but not
    where pairs are late: what is orthogonal to those is not what is beyond them.
    """
    late, found = pairs.late > 0, []
    if Z is not None:
        quotients = distance_of_quotient(pairs.pencil, pairs.E, Z, pairs.options.sign)
        if is_small(pairs.pencil):
            far = pairs.options.sign * math.inf
            quotients = quotients.masked_fill(~late.any(-1, keepdim=True), far)
        found.append(E + quotients)
    if Z is None or is_small(pairs.pencil):
        found.append(E[..., -1:] + nearest_outside(pairs, late))
    lead = broadcast(*(V.shape[:-1] for V in found))
    return torch.cat([V.expand(*lead, V.shape[-1]) for V in (T, *found)], -1)


Cotangents = Tuple[Optional[Tensor], ...]


def reverse_mode(
    pairs: Pairs, gE: Optional[Tensor], gX: Optional[Tensor], need_A: bool, need_B: bool
) -> Tuple[Cotangents, Cotangents]:
    """Cotangents of the parameters of A and of those of B, None where not needed.

    gE: (*, k) or None, gX: (*, m, k) or None, not both None.  Without gX there is no linear system to solve.
    """
    A, B, E, X = pairs.pencil.A, pairs.pencil.B, pairs.E, pairs.X
    W: Any = None if need_B else weights_at_once(pairs, gE, gX)
    if W is not None:
        return A.pullback((W, X)), ()
    # (*, k, k)
    G = None if gX is None else pairs.pencil.space.gram(X, gX)
    shifts = None if _may_be_differentiated() else pairs.exact
    with OneWarning() as said:
        Z: Any = None if gX is None else reduced_resolvent(pairs, gX, shifts)
        F, clustered = _factors(pairs, G, gE, gX, Z)
        N = None
        if clustered and _may_be_differentiated():
            E, F, N = _in_cluster(pairs, F)
        if G is None or gX is None:
            W = X * gE.unsqueeze(-2)  # type: ignore[union-attr]
        else:
            # In double precision where F is.
            K = G.to(torch.promote_types(G.dtype, F.dtype))
            K = (K - K.mH) / 2
            C = (K * F).to(G.dtype)
            if N is not None:
                C = (K.to(G.dtype) + N @ C - C @ N) * F
                Z = reduced_resolvent(pairs, gX, E)
                Z = Z + reduced_resolvent(pairs, B.product(Z @ N), E)
            W = X @ (C if gE is None else C + torch.diag_embed(gE)) - Z
        if N is not None:
            W = SecondOrderAtMost.apply(W, F.detach(), 0)
        V: Any = None
        if need_B or said.doubtful:
            V = W * E.unsqueeze(-2)
            if N is not None:
                V = V + W @ N
            if G is not None:
                V = V + X @ ((G + G.mH) / 4)
        if said.doubtful and is_small(pairs.pencil) and not in_transform():
            _measure(
                said, pairs, Gradient(gE, gX, F, W, V, said.hidden()), need_A, need_B
            )
    gA: Cotangents = A.pullback((W, X)) if need_A else (None,) * len(A.parameters)
    if not need_B:
        return gA, (None,) * len(B.parameters)
    return gA, B.pullback((-V, X))


def _measure(
    said: OneWarning, pairs: Pairs, gradient: Gradient, need_A: bool, need_B: bool
) -> None:
    """Replace what was estimated by what is measured."""
    if is_traced(pairs.E) or pairs.pencil.m == 1:
        return
    with torch.no_grad():
        error, gap = measured_error(pairs, gradient, need_A, need_B)
    if bool(error.isnan().any()):
        return
    single = is_single(torch.finfo(pairs.pencil.dtype).eps)
    late = pairs.missed is not None and bool(pairs.missed.any())
    least = WORTH_A_WORD if single or late else WORTH_A_WORD_IN_DOUBLE
    # The worst, where none is bad.
    bad = error >= error.max().clamp(max=least)
    where = members(bad, error.dim())
    said.measured(
        float(error.max()),
        least,
        f"lobpcg: the gradient has an estimated relative error of {{estimate}}{where}: the narrowest gap beside its "
        f"k={pairs.E.shape[-1]} eigenvalues is {float(gap.min()):.1e}, in a pencil of size "
        f"{float(pairs.size.max()):.1e}. Tighten tol, raise k past a cluster, or use a loss that treats close "
        "eigenvalues alike.",
    )


def _may_be_differentiated() -> bool:
    """Whether what is computed now can be differentiated later: create_graph=True, or any forward mode or
    torch.func."""
    return torch.is_grad_enabled() or in_transform()


def _in_cluster(pairs: Pairs, F: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """E and F constant in clustered pairs, and N = 0 that varies in their place; see the top of the module."""
    E, X = pairs.E, pairs.X
    apart = (F.detach() == 0).to(
        E.dtype
    )  # 1 between pairs of a cluster, and on the diagonal
    clustered = (apart.sum(-1) > 1).to(E.dtype)  # (*, k)
    S = X.mH @ (
        pairs.pencil.A.product(X) - pairs.pencil.B.product(X) * E.detach().unsqueeze(-2)
    )
    N = (S + S.mH) / 2 * (apart * clustered.unsqueeze(-1))
    E = E.detach() * clustered + E * (1 - clustered)
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)
    F = (1 - apart) / torch.where(apart > 0, torch.ones_like(difference), difference)
    return E, F, N - N.detach()


def forward_mode(
    pairs: Pairs, dA: Sequence[Optional[Tensor]], dB: Sequence[Optional[Tensor]]
) -> Tuple[Tensor, Tensor]:
    """Tangents of E and X for tangents of the parameters of A and B, not all None."""
    A, B, E, X = pairs.pencil.A, pairs.pencil.B, pairs.E, pairs.X
    moves_B = any(tangent is not None for tangent in dB)
    b = A.tangent(dA, X)
    dBX = B.tangent(dB, X) if moves_B else None
    if dBX is not None:
        b = b - dBX * E.unsqueeze(-2)
    S = X.mH @ b  # (*, k, k)
    H = (S + S.mH) / 2
    with OneWarning():
        Z = reduced_resolvent(pairs, b)
        F, _ = _factors(pairs, H, None, b, Z, forward_mode=True)
    inside = (H * F).to(H.dtype)
    if dBX is not None:
        inside = inside - X.mH @ dBX / 2
    dX = X @ inside - Z
    return _real_diagonal(S), dX


def _real_diagonal(G: Tensor) -> Tensor:
    d: Any = torch.diagonal(G, dim1=-2, dim2=-1)
    return torch.real(d) if d.is_complex() else d
