"""The LOBPCG iteration: k extreme eigenpairs of A x = lambda B x by products with blocks.

Follows Knyazev (2001) for the method, Hetmaniuk and Lehoucq (2006) for the choice of the basis, Duersch, Shao, Yang and
Gu (2018) for the small-matrix algebra of P, Stathopoulos and Wu (2002) for orthonormalisation by eigenvalues of the
Gram matrix. Departures from them:

- X and P are kept B-orthonormal and mutually B-orthogonal, so of the Gram matrices only the products with the new
  directions W are computed: p (2n + p) inner products an iteration instead of (3n)^2.
- W is made orthonormal to X and P, and in itself, by a change of coordinates on small matrices; only where the
  conditioning says that this loses digits are the tall blocks themselves projected (the orthogonal route), from the
  next iteration on.
- Dependent directions are left out by their eigenvalue in the Gram matrix, never by a failed factorisation.
- All matrices of a batch advance together; masks stand for what differs between them.

Invariants at the top of `update`, up to `drift`: X^H B X = I, X^H B P = 0, P^H B P = I (or a zero row where P has lost
rank), AS = A S and BS = B S for S = [X P], and the small matrix G holds S^H A S as the next Ritz problem uses it.
"""

import functools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import FEW_ITERATIONS
from torch._lobpcg_impl.basis import Basis
from torch._lobpcg_impl.blocks import (
    columns,
    deduct,
    inner,
    is_single,
    norms,
    squares,
    take_each,
)
from torch._lobpcg_impl.chebyshev import Chebyshev, low_pass, polynomial
from torch._lobpcg_impl.convergence import (
    judge_batch,
    judge_one,
    Measures,
    Progress,
    Rules,
    settled,
    Verdict,
)
from torch._lobpcg_impl.operand import Pencil, Sparse
from torch._lobpcg_impl.report import members
from torch._lobpcg_impl.ritz import (
    hermitian,
    real_diagonal,
    Ritz,
    ritz_fresh,
    ritz_step,
    whiten_scaled,
)
from torch._lobpcg_impl.unreached import unreached


# Fresh columns that join a caller's block: a second one saves a third of the iterations and none of the products.
_FRESH = 1
# A caller's block holds no more of the last pair found than this many times what was blended into it of any vector: a
# tenth less than random delays a vector by a few iterations, of the dozens in which the found ones have come out of it.
_GENERIC = 10.0
# Columns of a caller's block with a relative residual above this may be as far from eigenvectors as random ones, which
# have a third to one; what is nearer gains by staying as it is.
_FAR = 0.1
# Columns that go on behind those that are known while fresh ones have to settle.  A start that is right pays for them,
# so there are no more until one has turned out to be wrong twice.
_SEEKERS = 2


class EigenPairs(NamedTuple):
    """Eigenpairs in the order wanted (ascending for the smallest, descending for the largest) and how good they are.

    E: (*, n) real; X: (*, m, n), X^H B X = I; residual: (*, n), 2-norms of A x_j - E_j B x_j (a dense solve: of fewer,
    k or more); scale: (*, n), (||A|| + |E_j| ||B||) ||x_j||, norms as root mean square eigenvalues: pair j has
    converged iff residual_j <= tol scale_j.

    missed: (*, k), whether a wanted pair falls short of what was asked for, None: judged by the residual; error:
    (*, k), bounds on the errors of its eigenvalues; at_rounding: whether nothing better was to be had.

    Of one dense matrix, rest: the pairs beyond k where they are asked for, which E and X lack then; numbers: E,
    residual and scale on the host.
    """

    E: Tensor
    X: Tensor
    residual: Tensor
    scale: Tensor
    missed: Optional[Tensor] = None
    error: Optional[Tensor] = None
    at_rounding: bool = False
    rest: Optional[Tuple[Tensor, Tensor]] = None
    numbers: Optional[List[List[float]]] = None


class Kept(NamedTuple):
    """The best pairs of each matrix near rounding level; level: (*), the largest rho / N of a wanted pair."""

    level: Tensor
    X: Tensor
    e: Tensor
    residual: Tensor
    scale: Tensor
    measures: Measures


class LOBPCG:
    """Worker of one lobpcg call; what a tracker is called with.

    A, B, iK, X as given to lobpcg, X the start block (*, m, n); iparams: m, n, k, niter, ...; fparams: tol, ...;
    bparams: largest, ...
    While running: X (*, m, n), E (*, n), R residual block, S = [X P W]; ivars: istep, converged_count (leading pairs
    that have converged, the fewest over a batch), iterations_left; tvars["rerr"] (*, n): residual / ((||A|| + |E|
    ||B||) ||x||); bvars["force_stop"]: set it to stop. Subclasses may override update_converged_count, stop_iteration
    and run.
    """

    def __init__(
        self,
        A: Any,
        B: Any,
        X: Tensor,
        iK: Any,
        iparams: Dict[str, int],
        fparams: Dict[str, float],
        bparams: Dict[str, bool],
        method: str,
        tracker: Any,
        pencil: Optional[Pencil] = None,  # A, B, iK, checked
    ) -> None:
        self.A, self.B, self.iK, self.X = A, B, iK, X
        self.iparams, self.fparams, self.bparams = iparams, fparams, bparams
        self.method, self.tracker = method, tracker
        self.ivars: Dict[str, int] = {
            "istep": 0,
            "converged_count": 0,
            "iterations_left": iparams["niter"],
        }
        self.fvars: Dict[str, float] = {}
        self.bvars: Dict[str, bool] = {"force_stop": False}
        self.tvars: Dict[str, Tensor] = {}

        self.pencil = Pencil.of(A, B, iK, X).checked() if pencil is None else pencil
        self.space = self.pencil.space
        self.m, self.n = self.space.size(X), X.shape[-1]
        self.batch = X.shape[:-2]
        self.sign = -1.0 if bparams["largest"] else 1.0
        self.eps = torch.finfo(X.dtype).eps
        self.tiny = (
            1e-30 if is_single(self.eps) else 1e-290
        )  # keeps quotients finite, far below every square that counts
        # Small matrices are double whatever the blocks are: eigh of a graded Gram matrix in single precision loses
        # eps |A| / gap in every step.  Of a single problem they live in host memory: a device spends 1 ms on a 24 x 24
        # eigh, a host 60 microseconds, and the decisions read those numbers anyway.
        self.host = len(self.batch) == 0
        self.place = torch.device("cpu") if self.host else X.device
        self.wide = torch.promote_types(X.dtype, torch.float64)
        self.norm_A, self.norm_B = (
            op.mean_square(self.pencil.probe)
            .to(device=self.place, dtype=torch.float64)
            .sqrt()
            .unsqueeze(-1)
            for op in (self.pencil.A, self.pencil.B)
        )
        self._set_graded_scale()
        self.fvars["A_norm"] = (
            float(self.norm_A.max()) if self.norm_A.numel() > 0 else 0.0
        )
        self.fvars["B_norm"] = (
            float(self.norm_B.max()) if self.norm_B.numel() > 0 else 0.0
        )
        self.probe = iparams.get(
            "chosen", self.n
        )  # index of the first column that no caller has chosen
        # Guard columns gain from the wanted ones' directions without directions of their own: a third of the work less
        # for a tenth more iterations, which pays where work and not the number of kernels makes the time: above a
        # size, and where a callable, a multigrid cycle say, preconditions a sparse matrix column by column.
        A, iK = self.pencil.A, self.pencil.iK
        stored = max(A.stored, 0 if iK is None else iK.stored)
        called = iK is not None and iK.stored == 0 and isinstance(A, Sparse)
        sizes = max(stored, 100 * self.m * math.prod(self.batch))
        self.small = sizes <= 262144 and not called
        self.orthogonal_left = 0  # iterations for which W is projected explicitly
        self.drift = (
            0.0  # bound on the loss of the invariants since they were last enforced
        )
        self.guarded = False  # fresh columns join the block and have to settle
        self.joined = 0  # how many did, last
        self.given = X if iparams.get("chosen", 0) > 0 else None  # the caller's block
        self.blended: Optional[Tensor] = None  # how long what was added to it is: (*)
        self.seekers = (
            _SEEKERS  # columns behind the wanted ones that go on then, at most
        )
        self.again = False  # whether a search has led to another
        self.settling = (
            False  # whether all wanted pairs have converged, but not settled
        )
        self.best_rerr = float("inf")
        self.progress = Progress(
            math.prod(self.batch), iparams["k"], self.sign, self.eps
        )
        self.active = 0
        self._clear(X)

    def _set_graded_scale(self) -> None:
        """D = diag(B), in whose scale rho is measured, and the row norms of A and B in that scale.

        root: D^-1/2 (*, m, 1), None where D is taken as a multiple of the identity: without B, or of a callable its
        root mean square.  rows: (*, m, 2), D times the squared row norms of D^-1/2 A D^-1/2 and of D^-1/2 B D^-1/2.
        """
        pencil = self.pencil
        self.root: Optional[Tensor] = None
        d = pencil.B.diagonal()
        if d is None:
            return
        d = d.to(torch.float64).clamp_min(self.tiny)
        rows = []
        for op, norm in ((pencil.A, self.norm_A), (pencil.B, self.norm_B)):
            squares = op.row_squares(d)
            if squares is None:
                (total,) = self.space.joined([d.sum(-1, keepdim=True)])
                norm = norm.to(d.device) / (total / self.m)
                squares = norm.square().expand(d.shape)
            rows.append(squares * d)
        real = self.X.dtype.to_real()
        self.d_B = d.unsqueeze(-1).to(real)
        self.root = d.rsqrt().unsqueeze(-1).to(real)
        self.rows = torch.stack(torch.broadcast_tensors(*rows), -1).to(real)

    def _clear(self, X: Tensor) -> None:
        """The state before the first iteration."""
        small: Any = {"dtype": self.wide, "device": self.place}
        self.basis = Basis(X[..., :0], self.pencil, 0)  # filled by start()
        self.W = X  # residuals, then new directions: (*, m, n)
        self.E = X.new_zeros(self.batch + (self.n,), dtype=X.dtype.to_real())
        self.length = self.E  # 2-norms of W, where W is
        # Small, as everything that follows: E before it is rounded, G, ...
        self.e = torch.zeros(
            self.batch + (self.n,), dtype=torch.float64, device=self.place
        )
        self.G = torch.zeros(self.batch + (self.n, self.n), **small)
        self.unit = torch.ones((1, 1), **small)  # of the order of the last Ritz problem
        self.polynomial: Optional[Chebyshev] = None
        self.lost: Optional[Tensor] = None  # whether a vector of [X P] is zero
        self.w_index = torch.zeros(
            self.batch + (0,), dtype=torch.int64, device=X.device
        )
        self.w_valid = self.E
        self.forms_K: Optional[Tensor] = None  # r^H K r of the last W, where W is
        self.forms_B = self.e  # w^H B w, where small matrices are
        self.least_B = self.least_K = self.e.new_ones(())
        self.reach = 0.0  # |K r| / |r|, of several processes; 0: not known
        self.d = self.e[..., :0]  # of the last Ritz step
        self.least = 1.0
        self.residual = torch.zeros_like(self.e)
        self.scale = torch.zeros_like(self.e)
        self.measures = Measures(self.e, self.e, self.e, self.e, self.e, self.eps)
        self.kept: Optional[Kept] = None
        self.R = self.S = X

    def down(self, *tensors: Tensor) -> List[Tensor]:
        """Tensors (*, p, q_i) where small matrices live, in double; of a single problem on a device one transfer."""
        if self.place == tensors[0].device:
            return [T.to(torch.promote_types(T.dtype, torch.float64)) for T in tensors]
        widths = [T.shape[-1] for T in tensors]
        return list(
            torch.cat(tensors, -1).to(self.place).to(self.wide).split(widths, -1)
        )

    def up(self, C: Tensor, e: Tensor) -> Tuple[Tensor, Tensor]:
        """Coordinates (*, q, p) and eigenvalues (*, n), n <= p, where blocks live, in their precision; one transfer."""
        X = self.W
        if self.place == X.device:
            return C.to(X.dtype), e.to(X.dtype.to_real())
        row = C.new_zeros((1, C.shape[-1]))
        row[0, : e.shape[-1]] = e
        both = torch.cat([C, row]).to(X.dtype).to(X.device)
        return both[:-1], torch.real(both[-1, : e.shape[-1]])

    def __str__(self) -> str:
        return (
            f"LOBPCG: m={self.m}, n={self.n}, k={self.iparams['k']}, method={self.method}, step {self.ivars['istep']}, "
            f"{self.ivars['converged_count']} converged"
        )

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Iterate until stop_iteration() says so; then E, X, residual, scale hold the result."""
        self.start()
        self.update_residual()
        self.update_converged_count()
        self.guard_against_missed_pairs()
        self.call_tracker()
        while not self.stop_iteration():
            self.update()
            self.call_tracker()
        self.restore_best()

    def update(self) -> None:
        """One iteration: Ritz step on [X P W], residuals, the next active set."""
        self.ivars["istep"] += 1
        self.ivars["iterations_left"] -= 1
        self.new_directions()
        self.ritz()
        # A twentieth of the residual lost to rounding delays nothing; below 64 eps there is nothing to win.  Where all
        # that is left to do is to settle, less than half of the digits decide.
        least = self.eps ** (0.25 if self.settling else 0.5)
        current = max(self.fparams["tol"], min(self.best_rerr, least))
        if self.drift > max(0.05 * current, 64.0 * self.eps):
            self.restore()
        self.update_residual()
        self.update_converged_count()
        if self.converged() and self.drift > 8.0 * self.eps:
            # The verdict is given on fresh products where carried ones may have lost a digit of the residual, and the
            # pairs are returned B-orthonormal to rounding, whatever tol is.
            length = self.m**0.5  # of inner products of m terms
            rounding = (32.0 + length) * self.eps
            if (
                self.drift > 1e-3 * self.fparams["tol"]
                or self.orthonormality_loss() > rounding
            ):
                self.restore()
                self.update_residual()
                self.update_converged_count()
        if self.guarded and self.converged() and self.n < self.m:
            self.search()

    def orthonormality_loss(self) -> float:
        """max |X^H B X - I|. Cost: n^2 inner products and a transfer."""
        X = self.basis.part(0, self.n)
        G = self.space.gram(X, self.basis.of_B(0, self.n))
        G.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return float(G.abs().max())

    def converged(self) -> bool:
        return self.ivars["converged_count"] >= self.iparams["k"]

    def stop_iteration(self) -> bool:
        """Whether to stop: asked to, all wanted pairs converged, out of iterations, or no digit left to win."""
        if self.bvars["force_stop"]:
            return True
        if self.ivars["iterations_left"] == 0 or self.converged():
            return True
        return self.active == 0 or self.progress.stalled(self.ivars["istep"])

    def call_tracker(self) -> None:
        if self.tracker is not None:
            self.expose()
            self.tracker(self)

    def expose(self) -> None:
        """X, R, S for whoever looks from outside; views, no copy."""
        basis = self.basis
        self.X = basis.part(0, self.n)
        self.R = self.W
        self.S = basis.part(0, basis.q)

    def result(self) -> EigenPairs:
        """The pairs in the scale of the problem as it was given."""
        self.expose()
        E, X = self.E, self.X
        residual, scale = (T.to(E.device, E.dtype) for T in (self.residual, self.scale))
        if self.pencil.rescaled:
            sA, sB = (
                scale.to(E.dtype).unsqueeze(-1)
                for scale in (self.pencil.scale_A, self.pencil.scale_B)
            )
            root = sB.sqrt()
            E = E / sA * sB
            X = X * root.unsqueeze(-1)
            residual = residual / sA * root
            scale = scale / sA * root
        # Columns that joined the block on the way differ from member to member of a batch.
        n = self.iparams["n"]
        E, X, residual, scale = (T[..., :n] for T in (E, X, residual, scale))
        k = self.iparams["k"]
        missed = self.missed().to(E.device)
        # Relative to |E|: the same in every scale.
        error = self.measures.value_error(k) / self.e[..., :k].abs().clamp_min(
            self.tiny
        )
        at_rounding = (
            self.ivars["iterations_left"] != 0 and not self.bvars["force_stop"]
        )
        return EigenPairs(E, X, residual, scale, missed, error, at_rounding)

    def missed(self) -> Tensor:
        """Which wanted pairs fall short of what was asked for: (*, k)."""
        k, measures = self.iparams["k"], self.measures
        missed = measures.rerr[..., :k] > self.fparams["tol"]
        if not self.bparams.get("accurate", False):
            return missed
        above = measures.rho[..., :k] > measures.floor[..., :k]
        return missed & above | measures.inaccurate(k)

    # -- start --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Orthonormal X from X0, columns that depend on others replaced by fresh ones; then Rayleigh-Ritz on X
        alone."""
        niter = self.iparams["niter"]
        # A solve of few iterations is cut short on purpose: it takes the products that these cost without q.
        whole = niter < 0 or niter >= FEW_ITERATIONS
        if whole and self.pencil.iK is not None:
            count = min(self.iparams["k"], self.m - self.n)
            smooth = low_pass(self.pencil, self.sign)
            given, own = self.W[..., : self.probe], self.W[..., self.probe :]
            if smooth is not None and own.shape[-1] > 0:
                own = smooth(own)
            Z = unreached(self.pencil, self.sign, count, smooth)
            self.W = torch.cat([given.mT, own.mT, Z.mT], -2).mT
        self.complete_start(0)
        if whole:
            most = self.iparams.get("ortho_degree", 60)
            self.polynomial = polynomial(self.pencil, self.sign, most)

    def complete_start(self, first: int) -> None:
        """Set X, AX, BX, E from a start block (*, m, n) in W; directions that it lacks come from the fixed table, from
        column `first` on.

        Guarantee: X^H B X = I to rounding, S^H A S = diag(E), P empty.
        """
        self.n = n = self.W.shape[-1]
        self.basis = Basis(self.W, self.pencil, 2 * self.most())
        # The block moves on in the basis, and nothing holds its start: on large problems that is a tenth of the memory.
        X = self.X = self.W = self.R = self.S = self.basis.part(0, n)
        for attempt in range(3):
            self.unit_columns(X)
            (G,) = self.down(hermitian(self.space.gram(X, self.pencil.B.apply(X))))
            self.check_start(X, G)
            # Columns closer than sqrt(eps) to the span of the others carry fewer than half of their digits.
            whiten = functools.partial(whiten_scaled, G, self.eps**0.5 * n, self.tiny)
            T, _, dropped = self.space.first(whiten, n)
            self.basis.combine(self.up(T, self.e[..., :0])[0])
            X = self.basis.part(0, n)
            missing = dropped.unsqueeze(-2).to(X.device)
            some = bool(missing.any())
            if some and attempt == 0 and first == 0 and self.probe > 0:
                self.check_rank(int((~dropped).sum(-1).min()))
            if attempt > 0 and not some:
                break
            if some:
                fresh = self.space.fixed_block(self.m, n, first + attempt * n, X)
                X.copy_(torch.where(missing, fresh, X))
        self.W = columns(torch.empty_like(X))
        self.refresh()

    def most(self) -> int:
        """How many columns go on at most, unless pairs have to settle."""
        return self.n if self.small else min(self.n, self.iparams["k"] + 2)

    def unit_columns(self, X: Tensor) -> None:
        """Make columns of length one, or zero; twice, so that neither overflow nor underflow of a square is seen."""
        top = self.space.largest_entries(X)
        X.div_(top.unsqueeze(-2).clamp_min(self.tiny))
        X.div_(self.space.norms(X).unsqueeze(-2).clamp_min(self.tiny))

    def check_rank(self, rank: int) -> None:
        """Error if the caller's X holds fewer independent columns than pairs are wanted."""
        if rank < self.iparams["k"]:
            raise ValueError(
                f"lobpcg: X has numerical rank {rank}, fewer than k={self.iparams['k']}; X needs at least k linearly "
                "independent columns: pass such an X, or leave X out"
            )

    def check_start(self, X: Tensor, G: Tensor) -> None:
        """Error if B is seen not to be positive definite (X: unit or zero columns, G = X^H B X)."""
        if self.pencil.generalized:
            there = (self.space.norms(X) > 0.5).to(G.device)
            bad = (real_diagonal(G) <= 0) & there
            if bool(bad.any()):
                self.raise_not_positive("B", bad)

    def guard_against_missed_pairs(self) -> None:
        """Decide when fresh columns join a caller's block, which may lack a wanted vector with nothing in it to show
        that: now if it is almost invariant, else once its pairs have converged (see search()).  What is not almost
        invariant is blended with generic columns; where it was no better than these, that is all.

        An exact solution and a wrong invariant subspace (eigenvectors, but not the extreme ones) cannot be told apart
        by their residuals, nor can vectors of all of a matrix from those of one of its blocks.  The joined columns see
        what the others do not; the run ends when they have settled (see settled()).
        """
        k, niter = self.iparams["k"], self.iparams["niter"]
        rerr = self.tvars["rerr"][..., :k]
        if rerr.numel() == 0 or niter == 0:
            return
        suspicious = bool((rerr < self.eps**0.25).any())
        whole = niter < 0 or niter >= FEW_ITERATIONS
        self.guarded = suspicious or (whole and self.iparams.get("chosen", 0) > 0)
        if suspicious and self.n < self.m:
            self.join(self.n, max(_FRESH, k // 4))
        elif self.guarded and self.pencil.iK is not None and self.n < self.m:
            # With iK a few iterations more would be half of the solve: a fresh column takes the last guard's place.
            self.probe = max(k, self.n - _FRESH)
            self.join(self.probe, _FRESH)
            self.guarded = False
        elif self.guarded and self.n < self.m:
            self.blend()
        if self.blended is None:
            self.given = None

    def blend(self) -> None:
        """Add a generic vector to each of the caller's columns that is far from an eigenvector, as long as its relative
        residual, which its error is no less than.

        A random block stays one, but lacks no vector any more.  Cost: n products.
        """
        rerr = self.tvars["rerr"]
        if not bool((rerr > _FAR).any(-1).all()):
            return
        X, first = self.basis.part(0, self.n), 3 * self.n + 7
        Z = self.space.fixed_block(self.m, self.n, first, self.W)
        size = rerr.masked_fill(rerr <= _FAR, 0.0).to(X.device, X.dtype.to_real())
        size = size * self.space.norms(X)
        self.blended = torch.linalg.vector_norm(size, dim=-1).to(self.place)
        self.W = X + Z * (size / self.space.norms(Z)).unsqueeze(-2)
        self.complete_start(first + self.n)
        self.update_residual()
        self.update_converged_count()

    def is_generic(self) -> bool:
        """Whether the caller's block held hardly more of the last wanted pair found than it holds, since it was
        blended, of any vector: then one that is missed, which is farther out, would have been found before that pair,
        as from a random block.

        Cost: a product with B for each column, and no memory beyond the caller's block but a copy for the time.
        """
        if self.given is None or self.blended is None:
            return False
        k, B = self.iparams["k"], self.pencil.B
        V = columns(self.given.clone())
        self.unit_columns(V)
        x = self.basis.part(k - 1, 1)
        Bx = B.apply(x)
        both = [self.space.gram(V, B.apply(V)), self.space.gram(V, Bx)]
        G, S = self.down(*both)
        T = whiten_scaled(hermitian(G), self.eps**0.5 * V.shape[-1], self.tiny)[0]
        share = torch.linalg.vector_norm(T.mH @ S, dim=(-2, -1))
        length = self.space.norms(Bx).squeeze(-1).to(share.device, share.dtype)
        mixed = self.blended.to(share.dtype) * length / self.m**0.5
        return bool((share <= _GENERIC * mixed).all())

    def join(self, kept: int, count: int) -> None:
        """Go on with the first `kept` columns of X and `count` fresh ones, P empty."""
        count = min(count, self.m - kept)
        if count <= 0:
            return
        first = 3 * self.n + 11 + 100 * self.ivars["istep"]
        fresh = self.space.fixed_block(self.m, count, first, self.W)
        fresh = fresh.expand(self.batch + fresh.shape)
        X = self.basis.part(0, kept)
        BX = self.basis.of_B(0, kept)
        k = self.iparams["k"]
        self.before, self.joined = (self.e[..., :k], self.measures.rho[..., :k]), count
        fresh = deduct(fresh, X, self.space.gram(BX, fresh))
        self.W = torch.cat([X.mT, fresh.mT], -2).mT
        self.complete_start(first + 7)
        self.progress.restart(self.ivars["istep"])
        self.update_residual()
        self.update_converged_count()

    def search(self) -> None:
        """At convergence: join fresh columns, unless those that joined before have found less than they might have.

        r generic columns that go on find at most r vectors of a repeated eigenvalue; if fewer than r pairs are new,
        none of their eigenvalues has another copy.  What a first search has found may all be simple, so r grows after
        the second.
        """
        k = self.iparams["k"]
        if not self.joined:
            if self.is_generic():
                self.guarded = False
                return
            # In the place of the caller's guards: only a column that nobody chose has to settle then.  The others gain
            # from its directions, a product each.
            self.probe, self.seekers = k, 1
            self.join(k, max(self.n - k, _FRESH))
            return
        e, rho = self.before
        # More than the eigenvalues could still improve by, and than rounding.
        known = torch.maximum(rho, 100.0 * self.eps * self.measures.size[..., :k])
        new = (e - self.e[..., :k]) * self.sign > known
        if int(new.sum(-1).max()) >= min(self.joined, self.seekers):
            count = max(self.n - k, 2 * self.joined)
            self.seekers, self.again = (count if self.again else _SEEKERS), True
            self.probe = k
            self.join(k, count)

    # -- one iteration ------------------------------------------------------------------------------------------------

    def new_directions(self) -> None:
        """Append W to S: the active residuals, preconditioned, where asked for projected, of length one; and their
        images."""
        basis = self.basis
        first = basis.extend(self.active)
        new = basis.part(first, self.active)
        length = self.length
        if self.active < self.n:
            length = take_each(length.unsqueeze(-2), self.w_index).squeeze(-2)
        if self.pencil.iK is not None:
            W, length = self.precondition(length)
        elif self.polynomial is not None:
            W, length = self.filter(length, new)
        else:
            W = self.residuals(new)
        if self.orthogonal_left > 0:
            W, length = self.project(W, length, first)
        length = length.clamp_min(self.tiny)
        if not self.host:
            # Masked columns become zero.
            length = length / self.w_valid.to(length.dtype)
        torch.div(W, length.unsqueeze(-2), out=new)
        basis.multiply(first)

    def residuals(self, out: Tensor) -> Tensor:
        """The residuals of the columns that go on, in `out`."""
        if self.active == self.n:
            return out.copy_(self.W)
        if out.dim() == 2:
            torch.index_select(self.W.mT, 0, self.w_index, out=out.mT)
            return out
        return out.copy_(take_each(self.W, self.w_index))

    def precondition(self, length: Tensor) -> Tuple[Tensor, Tensor]:
        """K R and its lengths, R the residuals that go on, `length` theirs; forms_K < 0 where r^H K r < 0 proves that
        K is not positive definite, beyond the dot product's rounding error, m eps ||r|| ||K r||.
        """
        assert self.pencil.iK is not None
        R = self.W if self.active == self.n else take_each(self.W, self.w_index)
        W = self.pencil.iK.apply(R)
        product, length = length, norms(W)
        self.forms_K = inner(R, W) + self.eps * self.m * product * length
        if self.space.split:
            # Lengths cost a message, and Rayleigh-Ritz asks for their size alone: it is that of the last iteration.
            if self.reach == 0.0:
                length = self.space.norms(W)
                self.reach = float((length / product.clamp_min(self.tiny)).mean())
            length = product * self.reach
        return W, length

    def filter(self, length: Tensor, out: Tensor) -> Tuple[Tensor, Tensor]:
        """q(A) R, in `out`, and its lengths, q aimed at the spectrum behind the block."""
        assert self.polynomial is not None
        self.polynomial.aim(self.e, self.basis.part(0, self.n))
        W = self.residuals(out)
        if self.polynomial.is_one:
            return W, length
        lengths = norms(self.polynomial(W, W))
        # Far beyond the interval q may overflow: what is lost is an iteration without it.
        if not math.isfinite(float(lengths.sum())):
            self.polynomial.widen()
            return self.residuals(out), length
        return W, lengths

    def project(self, W: Tensor, length: Tensor, known: int) -> Tuple[Tensor, Tensor]:
        """W - S S^H B W for S = [X P], `known` vectors, twice, of length one in between: twice is enough (Giraud,
        Langou, Rozloznik 2005); and its length.

        Over processes once, which costs one message instead of four: the change of coordinates takes out the rest.
        """
        basis = self.basis
        S = basis.part(0, known)
        for _ in range(self.iparams.get("ortho_i_max", 2)):
            W = W / length.clamp_min(self.tiny).unsqueeze(-2)
            (c,) = self.space.joined([basis.coordinates(W, known)])
            W = deduct(W, S, c)
            if self.space.split:
                return W, torch.ones_like(length)
            length = norms(W)
        return W, length

    def ritz(self) -> None:
        """Rayleigh-Ritz on S = [X P W]; X and P, their images, E and G move on."""
        first = self.basis.q - self.active
        blocks = list(self.basis.grams(first, self.W))
        if self.forms_K is not None:
            blocks.append(self.forms_K.unsqueeze(-1).to(blocks[0].dtype))
        gram_A, gram_B, *forms = self.down(*self.space.joined(blocks))
        if forms:
            self.least_K = torch.real(forms[0]).min()
        if self.polynomial is not None:
            self.polynomial.learn(
                self.basis.part(first, self.active),
                real_diagonal(gram_A.narrow(-1, first, self.active)),
                real_diagonal(gram_B.narrow(-1, first, self.active)),
            )
        active = self.w_index.to(self.place) if self.active < self.n else None
        if self.unit.shape[-1] != gram_B.shape[-1]:
            self.unit = torch.eye(gram_B.shape[-1], dtype=self.wide, device=self.place)
        step = functools.partial(
            ritz_step,
            self.G,
            self.lost,
            gram_A,
            gram_B,
            self.unit,
            self.n,
            self.sign,
            active,
            self.eps,
            self.tiny,
            self.host,
        )
        forms_B = real_diagonal(gram_B.narrow(-1, first, self.active))
        if self.pencil.generalized:
            self.forms_B = forms_B
            self.least_B = self.forms_B.min()
        if self.space.split and forms:
            self.reach *= float(forms_B.clamp_min(self.tiny).sqrt().mean())
        self.advance(Ritz(*self.space.first(step, gram_B.shape[-1])))

    def advance(self, step: Ritz) -> None:
        """Take a Ritz step."""
        self.e, self.G, self.lost = step.e, step.G, step.lost
        self.d, self.least = step.d, step.least
        C, self.E = self.up(step.C, step.e)
        self.basis.combine(C)

    def refresh(self) -> None:
        """Enforce the invariants: fresh products with [X P], an orthonormal basis of its span, Rayleigh-Ritz in it.

        Cost: n + p products with A (and B). The span, and so what P remembers, is kept.
        """
        self.basis.multiply(0)
        grams = self.space.joined(list(self.basis.grams(0, self.W)))
        gram_A, gram_B = (hermitian(G) for G in self.down(*grams))
        step = self.space.first(
            lambda: ritz_fresh(gram_A, gram_B, self.n, self.sign, self.eps, self.tiny),
            gram_B.shape[-1],
        )
        self.advance(Ritz(*step))
        self.d = self.d[..., :0]
        self.drift = 4.0 * self.eps

    def restore(self) -> None:
        """refresh(), and fresh columns in the place of those of X that depend on the others: where rounding has eaten
        all that directions bring, a zero would pass for an eigenvector."""
        self.refresh()
        n = self.n
        if self.lost is not None and bool(self.lost[..., :n].any()):
            self.W = columns(self.basis.part(0, n).clone())
            self.complete_start(5 * n + 17 + 100 * self.ivars["istep"])

    def update_residual(self) -> None:
        """W := A X - B X E of all n columns, their norms, and rerr."""
        basis, n = self.basis, self.n
        X = basis.part(0, n)
        AX = basis.of_A(0, n, self.W)
        BX = basis.of_B(0, n)
        torch.addcmul(AX, BX, self.E.unsqueeze(-2).to(AX.dtype), value=-1, out=self.W)
        numbers, lengths = [norms(self.W).unsqueeze(-1)], 1
        if self.pencil.generalized:
            numbers.append(norms(X).unsqueeze(-1))
            lengths = 2 if self.root is None else 3
        if self.root is not None:
            numbers += self.graded_numbers(X)
        numbers = self.space.joined(numbers, lengths)
        self.length = numbers[0].squeeze(-1)
        self.residual, *others = (
            torch.real(T).squeeze(-1) for T in self.down(*numbers)
        )
        size = self.e.abs()
        if self.pencil.generalized:
            self.scale = (self.norm_A + size * self.norm_B) * others[0]
        else:
            # ||A|| >= |E_j|
            self.scale = torch.maximum(self.norm_A, size.amax(-1, keepdim=True)) + size
        self.tvars["rerr"] = self.residual / self.scale.clamp_min(self.tiny)
        self.measures = self.measured(size, others)

    def graded_numbers(self, X: Tensor) -> List[Tensor]:
        """Columns (*, n, 1), of the rows held here: rho = |D^-1/2 r|; sums of x_a^2 D_a w_a^2 and of x_a^4 D_a^2 w_a^2,
        w the row norms of A, then of B, in the scale of D."""
        sizes = squares(X)
        rows: Any = self.rows
        masses: Any = self.d_B
        ends = sizes.mT @ rows, sizes.square().mT @ (rows * masses)
        root: Any = self.root
        rho = norms(self.W * root).unsqueeze(-1)
        return [rho, *(column for end in ends for column in end.split(1, -1))]

    def measured(self, size: Tensor, numbers: List[Tensor]) -> Measures:
        """The measures of the pairs; size: |E|; numbers: |x|, then those of graded_numbers, with B.

        Rounding the entries of A and B by a relative eps each changes the residual by eps N, and x^H A x by eps times
        the root of the sum with fourth powers: much less where a graded pencil is large and x is not.
        """
        rerr, tiny = self.tvars["rerr"], self.tiny
        if not self.pencil.generalized:
            scale = self.scale.clamp_min(tiny)
            return Measures(self.e, rerr, self.residual, scale, scale, self.eps)
        if self.root is None:
            unit = self.norm_B.clamp_min(tiny)
            scale = torch.maximum(self.norm_A / unit, size) + size
            scale = scale.clamp_min(tiny)
            rho = self.residual / unit.sqrt()
            return Measures(self.e, rerr, rho, scale, scale, self.eps)
        _, rho, A2, B2, A4, B4 = numbers
        scale = torch.maximum(A2.sqrt(), size) + size * B2.sqrt()
        noise = A4.sqrt() + size * B4.sqrt()
        return Measures(
            self.e, rerr, rho, scale.clamp_min(tiny), noise.clamp_min(tiny), self.eps
        )

    def update_converged_count(self) -> int:
        """Active set and converged_count from how good the pairs are."""
        k, measures = self.iparams["k"], self.measures
        done = self.done()
        # Below the floor no direction gains a digit; what it does is noise.
        locked = measures.rho <= measures.floor
        locked = locked | done
        settled: Optional[Tensor] = None
        candidates = self.n if self.small else k
        more = candidates
        if self.joined:
            settled = self.settled()
            candidates = more = min(self.n, max(self.probe, k) + self.seekers)
        elif self.bparams.get("separate", False) and self.n > k:
            settled, more = self.separated(), max(candidates, k + 1)
        rules = Rules(k, candidates, more, self.loss())
        definite: Optional[Tensor] = None
        if self.pencil.generalized or self.pencil.iK is not None or not self.host:
            definite = torch.stack([self.least_B, self.least_K])
        if self.host:
            verdict = judge_one(
                measures,
                done,
                locked,
                settled,
                rules,
                self.d,
                self.least,
                definite,
                self.w_index,
            )
        else:
            masked = self.d.shape[-1] - self.w_valid.sum(-1)
            assert definite is not None
            verdict = judge_batch(
                measures, done, locked, settled, rules, self.d, masked, definite
            )
        self.check_verdict(verdict)
        self.active, self.ivars["converged_count"] = verdict.active, verdict.lead
        self.best_rerr = verdict.worst
        self.w_index, self.w_valid = verdict.index, verdict.valid
        self.settling = max(verdict.awaited, default=0.0) < 0.0
        self.progress.note(self.ivars["istep"], verdict, self.orthonormality_loss)
        if verdict.nearest < 200.0 * self.eps and not self.converged():
            self.keep_best()
        return self.ivars["converged_count"]

    def keep_best(self) -> None:
        """Near rounding level the best pairs of each matrix are kept: what follows can be worse, even diverge."""
        level = self.measures.level[..., : self.iparams["k"]].amax(-1)
        X = self.basis.part(0, self.n)
        now = Kept(level, X, self.e, self.residual, self.scale, self.measures)
        old = self.kept
        if old is None or old.X.shape != X.shape:
            self.kept = now._replace(X=columns(X.clone()))
        else:
            self.kept = self.chosen(level < old.level, now, old)

    def chosen(self, first: Tensor, one: Kept, other: Kept) -> Kept:
        """Of each matrix the pairs of `one` where first (*) says so, else those of `other`."""
        if self.host:
            return one._replace(X=columns(one.X.clone())) if bool(first) else other

        def pick(a: Tensor, b: Tensor) -> Tensor:
            where = first.reshape(first.shape + (1,) * (a.dim() - first.dim()))
            return torch.where(where, a, b)

        numbers: Any = map(pick, one.measures[:-1], other.measures[:-1])
        measures = Measures(*numbers, eps=self.eps)  # type: ignore[misc]
        tensors: Any = map(pick, one[:-1], other[:-1])
        return Kept(*tensors, measures=measures)  # type: ignore[misc]

    def restore_best(self) -> None:
        """The best pairs again where the last are five times worse, unless these have a trace better by more than their
        loss of orthonormality explains: then a pair that was missed before has come in.
        """
        kept, k = self.kept, self.iparams["k"]
        if kept is None or kept.X.shape[-1] != self.n or self.converged():
            return
        X = self.basis.part(0, k)
        (G,) = self.down(self.space.gram(X, self.pencil.B.apply(X)))
        G.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        loss = self.eps + G.abs().amax((-2, -1))
        size = kept.measures.size[..., :k].amax(-1)
        gain = (kept.e[..., :k] - self.e[..., :k]).sum(-1) * self.sign
        level = self.measures.level[..., :k].amax(-1)
        worse = ~(level <= 5.0 * kept.level)
        restored = worse & ~((loss < 1e-3) & (gain > 20.0 * k * loss * size))
        now = Kept(
            level,
            self.basis.part(0, self.n),
            self.e,
            self.residual,
            self.scale,
            self.measures,
        )
        best = self.chosen(restored, kept, now)
        self.basis.part(0, self.n).copy_(best.X)
        self.e, self.residual, self.scale = best.e, best.residual, best.scale
        self.measures, self.tvars["rerr"] = best.measures, best.measures.rerr
        self.E = self.e.to(self.E.device, self.E.dtype)

    def done(self) -> Tensor:
        """Which pairs have converged: (*, n).  Without tol the wanted ones have to be accurate besides."""
        k, tol = self.iparams["k"], self.fparams["tol"]
        done = self.measures.rerr <= tol
        if not self.bparams.get("accurate", False):
            return done
        # On the host a look at the residuals spares twenty small operations in most iterations.
        if not self.host or bool(done.any()):
            accurate = self.measures.accurate(k, tol, self.bparams["separate"])
            # A guard is needed as long as it is worse than the pairs that it serves.
            rho = self.measures.rho
            served = rho[..., k:] <= rho[..., :k].amax(-1, keepdim=True)
            done = torch.cat([done[..., :k] & accurate, done[..., k:] & served], -1)
        return done

    def settled(self) -> Tensor:
        """Whether a column that no caller chose shows that no pair was missed: (*).

        Of the columns behind the wanted ones, up to one more than the caller chose, at least one is no caller's. Five
        iterations carry even a weight of 1 / m on a missed eigenvector into view.
        """
        k = self.iparams["k"]
        last = min(max(self.probe, k), self.n - 1)
        # In single precision the root of the default tolerance, 0.02, is no eigenvalue found.
        small = max(min(self.fparams["tol"] ** 0.5, 1.2e-4), 8.0 * self.eps)
        late = self.ivars["istep"] >= 5
        return settled(self.measures, self.residual, self.norm_B, k, last, small, late)

    def separated(self) -> Tensor:
        """Whether the first guard column tells how far the next eigenvalue is, which a derivative depends on: (*)."""
        k = self.iparams["k"]
        small = max(100.0 * self.fparams["tol"], 8.0 * self.eps)
        return settled(self.measures, self.residual, self.norm_B, k, k, small, True)

    def check_verdict(self, verdict: Verdict) -> None:
        """Errors that the numbers show; digits lost by the last Ritz step; from a loss on, ten iterations of the
        orthogonal route."""
        if not verdict.total < float("inf"):
            self.raise_not_finite()
        if verdict.least_B < 0.0:
            self.raise_not_positive("B", self.forms_B < 0.0)
        if verdict.least_K < 0.0:
            assert self.forms_K is not None
            self.raise_not_positive("iK", self.forms_K < 0.0)
        self.drift += 4.0 * self.eps + self.eps / verdict.least
        if self.orthogonal_left > 0:
            self.orthogonal_left -= 1
        elif verdict.losses and self.method != "basic":
            self.orthogonal_left = 10

    def loss(self) -> float:
        """Gram eigenvalues under this bound cost three digits (single precision: two), which the orthogonal route would
        keep."""
        return max(1e-3, self.eps**0.25)

    def raise_not_positive(self, name: str, bad: Tensor) -> None:
        where = members(bad.any(-1), len(self.batch))
        raise ValueError(
            f"lobpcg: {name} is not positive definite{where}: x^H {name} x <= 0 for a vector x met in iteration "
            f"{self.ivars['istep']}; {name} must be Hermitian positive definite"
        )

    def raise_not_finite(self) -> None:
        bad = ~torch.isfinite(self.tvars["rerr"]).all(-1)
        raise ValueError(
            f"lobpcg: a product with A, B or iK is NaN or infinite in iteration {self.ivars['istep']}"
            f"{members(bad, len(self.batch))}; check the operator, or rescale it"
        )
