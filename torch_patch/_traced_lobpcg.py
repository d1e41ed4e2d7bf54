"""torch.lobpcg as torch.compile sees it: one operator, or a graph break where a graph cannot hold the arguments.

Not among the _lobpcg modules: TorchDynamo skips every file whose path begins with torch/_lobpcg.
"""

from typing import Any, Callable, Dict, Optional

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def traced_version(lobpcg: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """The function to trace in the place of `lobpcg`, with its parameters; `eager` is what cannot be traced."""

    def traced(
        A: Any,
        k: Optional[int] = None,
        B: Any = None,
        X: Any = None,
        n: Optional[int] = None,
        iK: Any = None,
        niter: Optional[int] = None,
        tol: Optional[float] = None,
        largest: Optional[bool] = None,
        method: Optional[str] = None,
        tracker: Any = None,
        ortho_iparams: Optional[Dict[str, int]] = None,
        ortho_fparams: Optional[Dict[str, float]] = None,
        ortho_bparams: Optional[Dict[str, bool]] = None,
    ) -> Any:
        if has_torch_function((A, B, X, iK)):
            numbers = {"k": k, "n": n, "niter": niter, "tol": tol, "largest": largest, "method": method}
            ortho = {"ortho_iparams": ortho_iparams, "ortho_fparams": ortho_fparams, "ortho_bparams": ortho_bparams}
            return handle_torch_function(lobpcg, (A, B, X, iK), A, B=B, X=X, iK=iK, tracker=tracker, **numbers, **ortho)
        for M in (B, X, iK):
            if M is not None and not isinstance(M, Tensor):
                tracker = M
        if tracker is not None or not isinstance(A, Tensor):
            parameters = (ortho_iparams, ortho_fparams, ortho_bparams)
            return eager(A, k, B, X, n, iK, niter, tol, largest, method, tracker, parameters)
        # Of these parameters only integers act on the iteration; the others are there for a tracker to read.
        names = [] if ortho_iparams is None else list(ortho_iparams.keys())
        values = [] if ortho_iparams is None else list(ortho_iparams.values())
        return torch.ops._lobpcg.lobpcg(A, k, B, X, n, iK, niter, tol, largest, method, names, values)

    return traced
