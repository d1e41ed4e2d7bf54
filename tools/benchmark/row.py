"""The child process of one row: a case and a peer. Reads commands from stdin, answers in JSON lines.

Commands: {"do": "run", "seed": 0}, {"do": "end"}. The first answer, unasked, is about the
set-up. An answer with "error" means that the row is lost; the process then ends.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
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
            answer(row.run(command["seed"]))
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        answer({"error": f"{package} is not installed: {sys.executable} -m pip install {package}"})
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
        self.patience = request["budget"]
        self.clock = time.perf_counter if request["clock"] == "wall" else time.process_time
        if self.case.problem["kind"] == "catalogue":
            self.instance = self.peer = None
            return
        self.instance = problems.Instance(self.case)
        self.peer = self.make(self.instance, self.options)
        self.tol = None  # settled by the first run, as the peer's variant is
        self.first_call = self._first_call(problems)

    def _first_call(self, problems) -> float:
        """Seconds of the same call on a tiny problem: imports and allocations that happen once per process.

        Done before the memory is measured, so that these are not counted as the problem's.
        """
        case = dataclasses.replace(self.case, problem=problems.tiny(self.case.problem, self.case.k), iK="", calls=1)
        kept = self.instance, self.peer, self.case, self.tol
        self.instance, self.case = problems.Instance(case), case
        self.peer, self.tol = self.make(self.instance, self.options), case.tol
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
        for name in ("pyamg", "xitorch", "primme"):
            if name in sys.modules:
                versions[name] = importlib.metadata.version(name)
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
        """Settle the memory, the peer's variant and its tolerance; the answer is the best one's last run."""
        resident = _reset_peak()
        before = _peak()
        self.tol = self.case.tol
        first = self._measure(seed, keep=True)
        memory = {"extra_mb": (_peak() - resident) / 1e6, "peak_mb": max(_peak(), before, self.highest) / 1e6}
        found = []
        for variant in self.peer.variants:
            self.peer.variant, self.tol = variant, self.case.tol
            answer = first if not found else self._measure(seed)
            found.append((self._settle(seed, answer), variant))
        # of the variants that give what is asked for, the fastest; else the one with the smallest residual
        answer, variant = min(found, key=lambda one: self._demerit(one[0]))
        self.tol, self.peer.variant = answer["tol"], variant
        return answer | memory | ({"variant": variant} if variant else {})

    def _demerit(self, answer: dict) -> tuple:
        good = self._fulfils(answer)
        return not good, answer["seconds"] if good else (answer.get("missed", 0), answer["residual"])

    def _fulfils(self, answer: dict) -> bool:
        return self.case.truncated or (answer["residual"] <= self.case.tol and not answer["missed"])

    def _settle(self, seed: int, answer: dict) -> dict:
        """The run at the loosest tolerance with which the residual is what the case asks for.

        Peers stop on criteria that differ by constants and by what they are relative to, so the same number asks more
        of one than of the other. The tolerance is moved until the residual lies within a factor of ten.
        """
        if self.peer.direct or self.case.truncated:
            return answer
        best = None
        for _ in range(5):
            excess = answer["residual"] / self.case.tol
            good = self._fulfils(answer)
            if good and (best is None or answer["tol"] > best["tol"]):
                best = answer
            if not math.isfinite(excess) or (not good and (best or excess <= 1)):
                break  # what is missed at this residual is not found by a tolerance
            if good and (excess > 0.1 or answer["seconds"] > self.patience / 5):
                break
            self.tol *= min(max(0.5 / max(excess, 1e-300), 1e-3), 1e3)
            answer = self._measure(seed)
        return best or answer

    def _measure(self, seed: int, keep: bool = False) -> dict:
        gc.collect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer, pairs, gradients = self._timed(seed)
        if keep:
            self.highest = _peak()  # before the exact answers are computed
        E, X = pairs
        answer |= self.peer.counts | {"residual": self.instance.residual(E, X), "tol": self.tol}
        if self.case.truncated:
            answer["trace"] = float(E.double().sum())
        else:
            answer["value_error"] = float((E.double() - self.instance.exact).abs().max())
            answer["missed"] = self.instance.missed(E)
        if gradients:
            answer["gradient_error"] = max(self.instance.gradient_errors(*gradients))
        said = sorted({str(w.message).split("\n")[0][:200] for w in caught if _relevant(w)})
        return answer | {"warnings": [] if self.case.truncated else said}

    def _timed(self, seed: int) -> tuple:
        A, B, calls = self.instance.A, self.instance.B, self.case.calls
        start = self.clock()
        for _ in range(calls):
            E, X = self.peer.solve(A, B, seed, self.tol)
        forward = (self.clock() - start) / calls
        if not self.case.backward:
            return {"seconds": forward}, (E, X), None
        del E, X
        start = self.clock()
        for _ in range(calls):
            A, B = (None if M is None else M.detach().requires_grad_() for M in (A, B))
            E, X = self.peer.solve(A, B, seed, self.tol)
            self.instance.loss(E, X).backward()
        seconds = (self.clock() - start) / calls
        gradients = (A.grad, None if B is None else B.grad)
        return {"seconds": seconds, "forward": forward}, (E.detach(), X.detach()), gradients


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
