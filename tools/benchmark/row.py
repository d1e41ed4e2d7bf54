"""The child process of one row: a case and a peer. Reads commands from stdin, answers in JSON lines.

Commands: {"do": "run", "seed": 0}, {"do": "count", "seed": 0}, {"do": "end"}. The first answer, unasked, is about the
set-up. An answer with "error" means that the row is lost; the process then ends.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import platform
import resource
import sys
import time
import warnings


def serve(request: dict) -> None:
    """Prepare the row and answer until told to end. `request`: case (dict of Case), peer, upstream, threads, clock."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints does not disturb the answers

    def answer(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        row = Row(request)
        answer(row.about())
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "end":
                break
            answer(row.run(command["seed"]) if command["do"] == "run" else row.count(command["seed"]))
    except Exception as error:  # whatever a peer raises is its result
        text = " ".join(str(error).split())
        answer({"error": f"{type(error).__name__}: {text[:300]}"})


class Row:
    """One peer on one problem."""

    def __init__(self, request: dict):
        import torch
        from benchmark import cases, peers, problems

        torch.set_num_threads(request["threads"])
        self.case = cases.Case(**request["case"])
        self.make = peers.CLASSES[request["peer"]]
        self.options = {"upstream": request["upstream"]}
        self.clock = time.perf_counter if request["clock"] == "wall" else time.process_time
        if self.case.problem["kind"] == "catalogue":
            self.instance = self.peer = None
            return
        self.instance = problems.Instance(self.case)
        self.peer = self.make(self.instance, self.options)
        self.tol = None  # settled by the first run
        self.first_call = self._first_call(problems)

    def _first_call(self, problems) -> float:
        """Seconds of the same call on a tiny problem: imports and allocations that happen once per process.

        Done before the memory is measured, so that these are not counted as the problem's.
        """
        case = dataclasses.replace(self.case, problem=problems.tiny(self.case.problem, self.case.k), iK="")
        kept = self.instance, self.peer, self.case, self.tol
        self.instance, self.case = problems.Instance(case), case
        self.peer, self.tol = self.make(self.instance, self.options), self.instance.tolerance()
        start = self.clock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._timed(0)
        seconds = self.clock() - start
        self.instance, self.peer, self.case, self.tol = kept
        return seconds

    def about(self) -> dict:
        import numpy
        import scipy

        import torch

        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
        versions["scipy"] = scipy.__version__
        for name in ("pyamg", "xitorch"):
            if name in sys.modules:
                versions[name] = getattr(sys.modules[name], "__version__", "?")
        about = {"versions": versions, "threads": torch.get_num_threads()}
        if self.instance is not None:
            about |= {"m": self.instance.m, "nnz": self.instance.nnz, "k": self.case.k, "setup": self.instance.setup}
            about["first_call"] = self.first_call
        return about

    def run(self, seed: int) -> dict:
        if self.case.kind == "starts":
            from benchmark import starts

            return starts.run(self)
        if self.tol is None:
            return self._first_run(seed)
        return self._measure(seed)

    def _first_run(self, seed: int) -> dict:
        """Settle the tolerance and the memory.

        Peers stop on criteria that differ by constants. Each gets the tolerance at which its residual is what the case
        asks for: the nominal one, lowered if the residual is larger.
        """
        resident = _reset_peak()
        before = _peak()
        self.tol = self.instance.tolerance()
        answer = self._measure(seed, keep=True)
        answer["extra_mb"] = (_peak() - resident) / 1e6
        answer["peak_mb"] = max(_peak(), before, self.highest) / 1e6
        for _ in range(3):
            excess = answer["absolute"] / self.instance.target()
            if not excess > 1.02 or not math.isfinite(excess):
                break
            self.tol *= 0.9 / excess
            memory = {name: answer[name] for name in ("extra_mb", "peak_mb")}
            answer = self._measure(seed) | memory
        return answer

    def _measure(self, seed: int, keep: bool = False) -> dict:
        gc.collect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer, pairs, gradients = self._timed(seed)
        if keep:
            self.highest = _peak()  # before the exact answers are computed
        E, X = pairs
        residual, absolute = self.instance.residuals(E, X)
        value_error = float((E.double() - self.instance.exact).abs().max())
        answer |= {"residual": residual, "absolute": absolute, "value_error": value_error, "tol": self.tol}
        if gradients:
            answer["gradient_error"] = max(self.instance.gradient_errors(*gradients))
        answer["warnings"] = sorted({str(w.message).split("\n")[0][:200] for w in caught if _relevant(w)})
        return answer

    def _timed(self, seed: int) -> tuple:
        A, B = self.instance.A, self.instance.B
        start = self.clock()
        E, X = self.peer.solve(A, B, seed, self.tol)
        forward = self.clock() - start
        if not self.case.backward:
            return {"seconds": forward}, (E, X), None
        del E, X
        A, B = (None if M is None else M.detach().requires_grad_() for M in (A, B))
        start = self.clock()
        E, X = self.peer.solve(A, B, seed, self.tol)
        self.instance.loss(E, X).backward()
        seconds = self.clock() - start
        gradients = (A.grad, None if B is None else B.grad)
        return {"seconds": seconds, "forward": forward}, (E.detach(), X.detach()), gradients

    def count(self, seed: int) -> dict:
        """Iterations and columns of A, in a run of its own that is not timed."""
        if not hasattr(self.peer, "count"):
            return {}
        from benchmark.peers import NotOffered

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counted = self.peer.count(seed, self.tol or self.instance.tolerance())
        except (NotOffered, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            return {"not_counted": f"{type(error).__name__}: {str(error)[:200]}"}
        active = counted.pop("active")
        return counted | {"columns_per_active": counted["columns"] / active}


def _relevant(warning) -> bool:
    """Not PyTorch's announcement that sparse CSR is in beta, nor a deprecation."""
    return not issubclass(warning.category, DeprecationWarning) and "beta state" not in str(warning.message)


def _peak() -> int:
    """Largest resident size so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> int:
    """Forget the peak where the system can (Linux), and return the resident size, bytes."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
        with open("/proc/self/statm") as handle:
            return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak()
