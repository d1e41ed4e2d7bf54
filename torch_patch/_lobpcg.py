"""torch.lobpcg: k extreme eigenpairs of A x = lambda B x, differentiable in A and B (TorchScript dialect)."""

import warnings
from typing import Any, Optional

import torch
from torch import Tensor
from torch._lobpcg_arguments import (
    check_alike,
    check_block,
    check_broadcast,
    check_dtype,
    check_matrix,
    ortho_parameters,
    OrthoParameters,
    Settings,
    settle,
)
from torch._lobpcg_autograd import differentiable_eigenpairs, LOBPCGAutogradFunction  # noqa: F401
from torch._lobpcg_iteration import EigenPairs, LOBPCG  # noqa: F401
from torch._lobpcg_operators import define_operators, eigenpairs_in_graph, is_traced
from torch._lobpcg_solver import dense_is_cheaper, hermitian_part, solve
from torch._traced_lobpcg import traced_version
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
    r"""Computes the :attr:`k` largest or smallest eigenvalues of a Hermitian pencil, with eigenvectors.

    The eigenpairs satisfy, with :math:`\Lambda = \operatorname{diag}(E)`,

    .. math::
        A X = B X \Lambda, \qquad X^H B X = I,

    where :math:`A` is Hermitian (real: symmetric), not necessarily definite, and :math:`B` Hermitian positive definite.
    Only products with blocks of vectors are needed, so :attr:`A` may be large and sparse. Differentiable in
    :attr:`A` and :attr:`B`, dense and sparse, to any order and in both modes; see :ref:`lobpcg-gradient`.

    Where the matrices are dense and small (m up to 512; 128 if :attr:`iK` is given), or too small for the method
    (m < 3 n), one dense factorisation replaces the iterations, unless :attr:`method`, :attr:`niter` or
    :attr:`tracker` asks for them.

    **When not to use it.** For all eigenvalues, or more than a third of them, :func:`torch.linalg.eigh` is faster, as
    it is for dense matrices of a few hundred rows. Interior eigenvalues, and matrices that are not Hermitian, are
    beyond it. Without a preconditioner the smallest eigenvalues of a large matrix may take hundreds of iterations.

    **Cost.** An iteration takes at most one product of :attr:`A`, :attr:`B` and :attr:`iK` with a block of n columns,
    and :math:`O(m n^2)` operations besides. The number of iterations grows with the square root of the width of the
    spectrum over the gap behind the n columns. Memory is :math:`O(m n)`. The gradient of a loss of eigenvalues alone
    costs one product of tall blocks for each matrix; one of eigenvectors solves k linear systems besides, at about
    the price of the forward.

    .. note:: A dense :attr:`A` or :attr:`B` enters through its Hermitian part :math:`\frac12 (A + A^H)`, so gradients
        are Hermitian. A sparse one must be Hermitian, and its gradient lives on the stored entries.

    .. warning:: Eigenvectors are determined up to a factor of modulus one (real: a sign), inside a repeated eigenvalue
        up to a unitary matrix, and a gradient exists only for a loss that does not see that freedom, such as one of
        :math:`|x|` or :math:`x x^H`. One that sees it is an error or a warning that names the eigenvalues; only a
        dependence on the sign goes unnoticed, and the gradient is then that of the sign returned.

    .. warning:: A gradient amplifies the residual of the pairs by the inverse of the gap between eigenvalues: its
        relative error is about the residual over the gap. Pairs that have not converged are warned of, once in
        forward and once in backward.

    Args:
        A (Tensor): :math:`(*, m, m)`, float32, float64, complex64 or complex128; strided, COO, CSR, CSC, BSR or BSC
            (batches: strided, COO or CSR). Outside TorchScript also a callable that maps blocks :math:`(*, m, p)` to
            their products, a constant to autograd; then :attr:`X` gives size, dtype and device.
        k (int, optional): number of pairs. Default: the columns of :attr:`X`, or 1.
        B (Tensor, optional): :math:`(*, m, m)`, as :attr:`A`. Default: the identity.
        X (Tensor, optional): start block :math:`(*, m, n)`, with at least :attr:`k` independent columns; not changed,
            not differentiated. Default: fixed pseudo-random numbers, the same in every call.
        n (int, optional): columns of the default start block, at least :attr:`k`. The pairs beyond :attr:`k` are not
            returned; they speed up the iteration and the gradient. Default: max(4, k) more, if m >= 3 n allows.
        iK (Tensor, optional): preconditioner, Hermitian positive definite, an approximation of :math:`A^{-1}` (or of
            :math:`(A - \sigma B)^{-1}`) where the smallest pairs are sought: :math:`(*, m, m)` in any layout, or,
            outside TorchScript, a callable on blocks. Used in backward as well; not differentiated.
        niter (int, optional): most iterations. 0: Rayleigh-Ritz on the start block alone; -1: until the residual
            cannot improve any more. Default: 1000.
        tol (float, optional): a pair has converged when
            :math:`\|A x - \lambda B x\|_2 \le tol (\|A\| + |\lambda| \|B\|) \|x\|_2`, norms being the root mean square
            of the eigenvalues. Default: the square root of the spacing of floating-point numbers at 1.
        largest (bool, optional): the largest (in descending order) or the smallest (ascending). Default: True.
        method (str, optional): "ortho" orthogonalises the new directions explicitly where digits would be lost
            otherwise, "basic" never. Default: "ortho".
        tracker (callable, optional): called with the worker before the first and after every iteration; batches are
            then solved one matrix at a time. The worker has the attributes A, B, iK, X, E, R (residuals), S (the
            basis), iparams, fparams, bparams, ivars, fvars, bvars, tvars; ``worker.bvars["force_stop"] = True`` stops
            it. Not in TorchScript.
        ortho_iparams (dict, optional): entries join the worker's iparams under names that begin with ``ortho_``.
            ``ortho_iparams={"i_max": 2}`` sets how often "ortho" projects; other entries have no effect.
        ortho_fparams (dict, optional): the same for fparams; without effect.
        ortho_bparams (dict, optional): the same for bparams; without effect.

    Returns:
        E, real, :math:`(*, k)`, and X, :math:`(*, m, k)`.

    Raises:
        ValueError: a shape, number or value that does not fit; NaN or infinity; a sparse matrix that is not Hermitian;
            B or iK that shows itself not to be positive definite; m < 3 n where iterations are asked for.
        TypeError: a dtype that is not supported or differs between arguments.
        RuntimeError: in backward, a gradient that does not exist.

    Warns:
        UserWarning: once, if pairs have not converged, with the residual reached and the tolerance.
        RuntimeWarning: in backward, a gradient that exists only in part or is inaccurate.

    Examples::

        >>> # standard: a chain of six masses and seven springs, eigenvalues 4 sin^2(pi j / 14)
        >>> A = 2 * torch.eye(6).double() - torch.ones(5).double().diag(1) - torch.ones(5).double().diag(-1)
        >>> E, X = torch.lobpcg(A, k=2, largest=False)
        >>> torch.allclose(E, 4 * torch.sin(torch.pi * torch.tensor([1, 2]).double() / 14).square())
        True

        >>> # generalized, with masses of 1 to 6: X is orthonormal with respect to B
        >>> B = torch.arange(1, 7).double().diag()
        >>> E, X = torch.lobpcg(A, k=2, B=B, largest=False)
        >>> torch.allclose(A @ X, B @ X * E), torch.allclose(X.mT @ B @ X, torch.eye(2).double())
        (True, True)

        >>> # gradient in both: dE_0 = x^T dA x - E_0 x^T dB x
        >>> A, B = A.requires_grad_(), B.requires_grad_()
        >>> E, X = torch.lobpcg(A, k=2, B=B, largest=False)
        >>> gA, gB = torch.autograd.grad(E[0], (A, B))
        >>> x = X[:, :1]
        >>> torch.allclose(gA, x @ x.mT), torch.allclose(gB, -E[0] * x @ x.mT)
        (True, True)

        >>> # sparse, with a preconditioner: the diagonal saves 976 of 1000 iterations
        >>> d = torch.logspace(0, 4, 1000, dtype=torch.float64).requires_grad_()
        >>> i, j, one = torch.arange(1000), torch.arange(999), torch.ones(999, dtype=torch.float64)
        >>> index = torch.stack([torch.cat([i, j, j + 1]), torch.cat([i, j + 1, j])])
        >>> A = torch.sparse_coo_tensor(index, torch.cat([d + 2, -one, -one]), (1000, 1000))
        >>> def jacobi(R):
        ...     return R / (d.detach() + 2).unsqueeze(-1)
        >>> steps = []
        >>> E, X = torch.lobpcg(A, k=3, largest=False, iK=jacobi, tracker=steps.append)
        >>> len(steps) < 50
        True
        >>> (g,) = torch.autograd.grad(E.sum(), d, retain_graph=True)
        >>> torch.allclose(g, X.square().sum(-1))
        True

        >>> # a loss of eigenvectors: the projector onto their span does not see signs, so it has a gradient
        >>> (g,) = torch.autograd.grad((X @ X.mT)[0, 5], d)
        >>> bool(g.isfinite().all())
        True

    References: Knyazev (2001), SIAM J. Sci. Comput. 23(2), 517-541. Hetmaniuk and Lehoucq (2006), J. Comput. Phys.
    218, 324-332. Duersch, Shao, Yang and Gu (2018), SIAM J. Sci. Comput. 40(5), C655-C676. Stathopoulos and Wu (2002),
    SIAM J. Sci. Comput. 23(6), 2165-2182. Gradient: Magnus (1985), Econometric Theory 1, 179-191.
    """
    if not torch.jit.is_scripting():
        ortho = (ortho_iparams, ortho_fparams, ortho_bparams)
        return _lobpcg_eager(A, k, B, X, n, iK, niter, tol, largest, method, tracker, ortho)
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
        raise RuntimeError(
            "lobpcg: a scripted call cannot differentiate; call torch.lobpcg without torch.jit.script where A or B "
            "requires grad"
        )
    parameters = ortho_parameters(ortho_iparams, ortho_fparams, ortho_bparams)
    A = hermitian_part(A)
    if B is not None:
        B = hermitian_part(B)
    pairs = solve(A, B, X, iK, batch, m, settings, None, parameters)
    _warn_unconverged(pairs, settings.k, settings.tol, settings.niter)
    return pairs.E[..., : settings.k], pairs.X[..., : settings.k]


@torch.jit.unused
def _lobpcg_eager(
    A: Any,
    k: Optional[int],
    B: Any,
    X: Any,
    n: Optional[int],
    iK: Any,
    niter: Optional[int],
    tol: Optional[float],
    largest: Optional[bool],
    method: Optional[str],
    tracker: Any,
    ortho: Any,
) -> tuple[Tensor, Tensor]:
    """lobpcg outside TorchScript: callables allowed, autograd and transforms recorded."""
    if has_torch_function((A, B, X, iK)):
        numbers: dict[str, Any] = {"k": k, "n": n, "niter": niter, "tol": tol, "largest": largest, "method": method}
        parameters = dict(zip(("ortho_iparams", "ortho_fparams", "ortho_bparams"), ortho))
        return handle_torch_function(
            lobpcg, (A, B, X, iK), A, B=B, X=X, iK=iK, tracker=tracker, **numbers, **parameters
        )
    settings = _settings(A, k, B, X, n, iK, niter, tol, largest, method, tracker)
    if is_traced(A, B, X, iK):
        if tracker is not None:
            raise NotImplementedError(
                "lobpcg: a tracker looks at values, which do not exist while a graph is traced; leave it out, or call "
                "lobpcg outside of what is traced"
            )
        integers = ortho[0] or {}
        return eigenpairs_in_graph(A, B, X, iK, (*settings, list(integers), list(integers.values())))
    run = _Solver(settings, ortho_parameters(*ortho), tracker)
    A, B = hermitian_part(A), None if B is None else hermitian_part(B)
    return differentiable_eigenpairs(A, B, X, iK, run, settings.k, settings.largest, settings.tol)


def _settings(
    A: Any,
    k: Optional[int],
    B: Any,
    X: Any,
    n: Optional[int],
    iK: Any,
    niter: Optional[int],
    tol: Optional[float],
    largest: Optional[bool],
    method: Optional[str],
    tracker: Any,
) -> Settings:
    """The settings of an eager call, its arguments checked as far as shapes, dtypes and numbers tell."""
    for T, name in ((A, "A"), (B, "B"), (iK, "iK")):
        if T is not None and not isinstance(T, Tensor) and not callable(T):
            raise TypeError(
                f"lobpcg: {name} is {type(T).__name__}; it must be a tensor or a callable on blocks (*, m, p)"
            )
    for number, name in ((k, "k"), (n, "n"), (niter, "niter")):
        if number is not None and (isinstance(number, bool) or not hasattr(number, "__index__")):
            raise TypeError(f"lobpcg: {name} is {type(number).__name__} ({number}); it must be an int")
    model = next((T for T in (A, X, B) if isinstance(T, Tensor)), None)
    if model is None:
        raise ValueError("lobpcg: A is a callable, so its size is unknown; pass a start block X (*, m, n)")
    if isinstance(A, Tensor):
        check_matrix(A, "A")
    check_dtype(model, "X" if model is X else "B" if model is B else "A")
    if model.dim() < 2:
        raise ValueError(f"lobpcg: X has shape {list(model.shape)}; it must be (*, m, n)")
    m = model.size(-2)
    tensors = [T if isinstance(T, Tensor) else None for T in (B, X, iK)]
    _check_others(model, tensors[0], tensors[1], tensors[2], m)
    columns = None if X is None else X.size(-1)
    return settle(m, model.dtype, k, n, columns, niter, tol, largest, method, tracker is not None)


class _Solver:
    """The forward of one problem: (A, B, X, iK, whether a derivative may be asked for) -> pairs, with a warning where
    some have not converged."""

    def __init__(self, settings: Settings, parameters: OrthoParameters, tracker: Any) -> None:
        self.settings, self.parameters, self.tracker = settings, parameters, tracker

    def __call__(self, A: Any, B: Any, X: Any, iK: Any, separate: bool) -> EigenPairs:
        settings = self.settings._replace(separate=separate)
        m = next(T for T in (A, X, B) if isinstance(T, Tensor)).size(-2)
        batch = self.batch(A, B, X, iK)
        pairs = solve(A, B, X, iK, batch, m, settings, self.tracker, self.parameters)
        _warn_unconverged(pairs, settings.k, settings.tol, settings.niter)
        return pairs

    def batch(self, A: Any, B: Any, X: Any, iK: Any) -> list[int]:
        # Not torch.broadcast_shapes: its first call imports a symbolic algebra package, 0.8 s.
        shape: list[int] = []
        for T, name in ((A, "A"), (B, "B"), (X, "X"), (iK, "iK")):
            if isinstance(T, Tensor):
                shape = check_broadcast(shape, T, name)
        return shape

    def sizes(self, A: Any, B: Any, X: Any, iK: Any) -> tuple[list[int], int, int]:
        """Batch shape, number of pairs and of residuals that the call returns."""
        batch, settings, m = self.batch(A, B, X, iK), self.settings, A.size(-1)
        if 0 not in batch and dense_is_cheaper(A, B, iK, settings, m):
            return batch, m, settings.k
        return batch, settings.n, settings.n


def _solver(*numbers: Any) -> _Solver:
    """The solver of the operator's numbers: the fields of Settings, names and values of the integer parameters."""
    *fields, names, values = numbers
    return _Solver(Settings(*fields), ortho_parameters(dict(zip(names, values)), None, None), None)


def _call(
    A: Tensor,
    k: Optional[int],
    B: Optional[Tensor],
    X: Optional[Tensor],
    n: Optional[int],
    iK: Optional[Tensor],
    niter: Optional[int],
    tol: Optional[float],
    largest: Optional[bool],
    method: Optional[str],
    names: list[str],
    values: list[int],
) -> tuple[Tensor, Tensor]:
    """torch.lobpcg as an operator."""
    settings = _settings(A, k, B, X, n, iK, niter, tol, largest, method, None)
    return eigenpairs_in_graph(A, B, X, iK, (*settings, names, values))


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
            f"lobpcg: {int(missed.sum())} of {missed.numel()} eigenpairs have not converged: relative residual "
            f"{float(rerr)}, tolerance {tol}, niter={niter}; raise niter or tol, pass a larger n or a preconditioner "
            f"iK",
            stacklevel=2,
        )


define_operators(_call, _solver, lambda A, B, X, iK, *numbers: _solver(*numbers).sizes(A, B, X, iK), hermitian_part)
# torch.compile traces what this attribute names in the place of the function that has it.
lobpcg._torchdynamo_inline = traced_version(lobpcg, _lobpcg_eager)  # type: ignore[attr-defined]
