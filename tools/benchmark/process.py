"""Rows as child processes: start, ask, stop. One per case and peer; those of a case live at once, all idle but one."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmark.cases import Case


BENCH = Path(__file__).resolve().parents[1] / "bench.py"
SILENCE = 8.0  # seconds without a line of progress
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Row:
    """The parent's end of a row. `error` is None while the row lives; `say` is told now and then that it runs."""

    spoken = time.monotonic()  # when a line of progress was last written, by any row

    def __init__(self, case: Case, peer: str, options: Options, say: Callable[[str], None] = lambda text: None):
        self.case, self.peer, self.options = case, peer, options
        self.say = say
        self.error: str | None = None
        self.patience = options.timeout * (10 if case.kind == "starts" else 1)
        request = {"case": dataclasses.asdict(case), "peer": peer}
        request |= {name: getattr(options, name) for name in ("upstream", "threads", "clock", "budget")}
        environment = os.environ | dict.fromkeys(THREADS, str(options.threads)) | {"PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [options.beside if peer == "beside" else options.python, str(BENCH), "--row", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.noise: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about: dict = {}

    def ready(self) -> None:
        """Wait until the row is set up; rows are created first, so that they set up side by side."""
        self.about = self._answer()

    def ask(self, **command: object) -> dict:
        """Send a command, return the answer; an empty dict, with `error` set, if the row is lost."""
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the process has ended; the answer says why
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        start = time.monotonic()
        while True:
            silence = time.monotonic() - Row.spoken
            if silence >= SILENCE:
                self.say(f"running for {time.monotonic() - start:.0f} s")
                Row.spoken, silence = time.monotonic(), 0.0
            left = start + self.patience - time.monotonic()
            try:
                line = self.answers.get(timeout=max(min(SILENCE - silence, left), 0.0))
                break
            except queue.Empty:
                if left <= 0:
                    self.error = f"no answer within {self.patience:g} s"
                    self.close()
                    return {}
        if line is None:
            status = self.process.wait()
            self.error = f"the process ended with status {status}: " + (self.noise[-1] if self.noise else "no message")
            return {}
        message = json.loads(line)
        self.error = message.get("error")
        return {} if self.error else message

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def _listen(self) -> None:
        for line in self.process.stderr:
            if line.strip():
                self.noise = [*self.noise[-20:], line.strip()]


@dataclasses.dataclass(frozen=True)
class Options:
    """How the rows run."""

    python: str
    threads: int = 1
    repeats: int = 5
    budget: float = 60.0
    timeout: float = 900.0
    upstream: str = ""
    clock: str = "wall"
    beside: str = ""
