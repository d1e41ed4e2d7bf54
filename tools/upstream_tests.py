#!/usr/bin/env python3
"""Run PyTorch's own tests with and without the patch, and say what the patch fixed and what it broke.

The tests come from the source tree of a release (--tree; without it, Debian's source package is downloaded once). They
run in a copy: on the baseline as they are, on the patched PyTorch with this project's classes woven in. A test counts
as broken if it fails with the patch and does not without, or if it is one of ours and fails; one over operators, which
are ours with the patch alone, unless it fails for a plain operator, too. Exit status 1 if there is
one, or if a file came to its end on the baseline alone. A word at least every ten seconds; at the end a table, which
can be pasted into a pull request (--summary FILE writes it there, too).

With --python alone (default: .venv, else this interpreter) both PyTorches are made of the one it imports, patched or
not, by links, and that one is only read. With --baseline both interpreters are taken as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from patchset.errors import PatchError
from patchset.plan import unpatched_stages
from patchset.series import load_series
from patchset.steps import contents_after, make_overlay
from patchset.target import find_target
from upstream.source import fetched, FetchError


ROOT = Path(__file__).resolve().parent.parent


class Job(NamedTuple):
    """A file of PyTorch's tests, which of its tests, and what the environment is to say."""

    file: str
    select: str = ""  # pytest's -k
    slow_gradcheck: bool = False

    def __str__(self) -> str:
        return f"{self.file}{f' -k {self.select!r}' * bool(self.select)}{' (slow gradcheck)' * self.slow_gradcheck}"


# Of the tests over the operator database those of lobpcg, and of a plain operator: one that fails for that, without the
# patch, does not run on this PyTorch for any operator.
CONTROL = "sin"
OPERATORS = f"lobpcg or _{CONTROL}_cpu"

# What the patch can reach: its own functions, gradcheck, sparse gradients, and the lists of all functions and modules.
JOBS = [
    Job("test_autograd.py", "test_lobpcg", slow_gradcheck=True),
    Job("test_linalg.py", "lobpcg"),
    Job("test_lobpcg_formulas.py"),
    Job("test_autograd.py"),
    Job("autograd/test_functional.py"),
    Job("test_overrides.py"),
    Job("test_public_bindings.py"),
    Job("dynamo/test_trace_rules.py"),
    Job("test_sparse.py", "grad"),
    Job("test_sparse_csr.py", "grad"),
    Job("distributions/test_distributions.py", "grad"),
    # what runs over the operator database, of which lobpcg is a member with the patch alone
    Job("test_ops.py", OPERATORS),
    Job("test_ops_gradients.py", OPERATORS),
    Job("test_ops_fwd_gradients.py", OPERATORS),
    Job("test_ops_jit.py", OPERATORS),
    Job("test_meta.py", OPERATORS),
    Job("test_decomp.py", OPERATORS),
    Job("test_proxy_tensor.py", OPERATORS),
    Job("functorch/test_ops.py", OPERATORS),
    Job("functorch/test_vmap.py", OPERATORS),
    Job("functorch/test_aotdispatch.py", OPERATORS),
    Job("test_jit.py", "lobpcg"),
]

# Of tests of an older release on a newer PyTorch, beside the helpers that upstream/older_tests.py brings back: a call
# of super that pytest's own instances of a class send into an endless recursion.
RESPELLED = {"super(self.__class__, self)": "super()"}
SILENCE = 8.0  # seconds until a file that runs is spoken of

# test -> passed, failed, skipped, crashed; "" -> finished, where the file came to its end; " " -> why not imported
Outcomes = dict[str, str]


# --- the two trees of tests and the two PyTorches


def copy_tests(tree: Path, folder: Path, woven: bool) -> None:
    """The tests of `tree`, in which nothing changes; with this project's classes, if they are to be woven in."""
    if not (tree / "test").is_dir():
        raise PatchError(f"{tree} has no test/", "the source tree of a release", "name it with --tree")
    shutil.copytree(tree / "test", folder, symlinks=True)
    if woven:
        stages, _ = unpatched_stages(load_series(ROOT), find_target(str(tree)))
        for stage in stages:
            for path, data in stage.files.items():
                if path.startswith("test/"):
                    (folder / path[len("test/") :]).write_bytes(data)
    for file in {job.file for job in JOBS if (folder / job.file).exists()}:
        text = (folder / file).read_text(encoding="utf-8")
        for old, new in RESPELLED.items():
            text = text.replace(old, new)
        (folder / file).write_text(text, encoding="utf-8")


def torch_of(python: str) -> Path:
    """The folder that holds the torch which `python` imports."""
    probe = "import importlib.util as u; print(u.find_spec('torch').origin)"
    done = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise PatchError(f"{python} finds no torch", "an interpreter that has one", "name it with --python")
    return Path(done.stdout.strip()).parent.parent


def make_pytorches(torch: Path, folder: Path) -> tuple[Path, Path]:
    """The PyTorch in the folder `torch`, patched and unpatched, by links."""
    target = find_target(str(torch))
    stages, original = unpatched_stages(load_series(ROOT), target)
    for name, number in (("patched", len(stages)), ("baseline", 0)):
        make_overlay(folder / name, target.root, contents_after(stages, number, original))
    return folder / "patched", folder / "baseline"


# --- running


class Runner(NamedTuple):
    """One of the two sides: an interpreter, the PyTorch that goes in front of its own, the tests."""

    name: str
    python: str
    torch: Path | None
    tests: Path
    timeout: float

    @property
    def words(self) -> str:
        return "with the patch" if self.name == "patched" else "without the patch"

    def run(self, job: Job) -> Outcomes:
        report = self.tests.parent / f"{self.name}-{JOBS.index(job)}.xml"
        log = report.with_suffix(".log")
        path = os.pathsep.join([*([str(self.torch)] if self.torch else []), str(ROOT / "tools" / "upstream")])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        env |= {"PYTORCH_TEST_WITH_SLOW_GRADCHECK": "1"} if job.slow_gradcheck else {}
        options = ["-v", "--tb=short", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "older_tests"]
        options += [f"--junitxml={report}", *(["-k", job.select] if job.select else [])]
        command = [self.python, "-W", "ignore", "-m", "pytest", *options, Path(job.file).name]
        place = (self.tests / job.file).parent
        say(f"{job}: running {self.words}")
        begin = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(command, cwd=place, env=env, stdout=output, stderr=output)
            while not ended(process) and time.monotonic() - begin < self.timeout:
                at = {test: outcome for test, outcome in read_log(log).items() if outcome != "crashed"}
                last = f"; at {list(at)[-1].split(' ')[0]}" if at else ""
                say(f"{job}: {self.words} {counts({**at, '': ''})}, {time.monotonic() - begin:.0f} s{last}")
            process.kill()
            process.wait()
        found = read_report(report) if report.exists() else read_log(log)
        say(f"{job}: {self.words} {counts(found)}, {time.monotonic() - begin:.0f} s")
        return found


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process comes to its end within SILENCE."""
    try:
        process.wait(SILENCE)
    except subprocess.TimeoutExpired:
        return False
    return True


def say(text: str) -> None:
    print(text, flush=True)


def read_report(path: Path) -> Outcomes:
    """What pytest wrote when the file had come to its end."""
    found: Outcomes = {"": "finished"}
    words = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    for case in ElementTree.parse(path).iter("testcase"):
        test = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        outcome = next((words[part.tag] for part in case if part.tag in words), "passed")
        for part in case:
            if part.tag == "error" and part.get("message") == "collection failure":
                found[" "] = reason(part.text or "")
        if found.get(test) != "failed":
            found[test] = outcome
    return found


def reason(traceback: str) -> str:
    """The error at the end of what pytest shows of a file that it cannot import."""
    errors = re.findall(r"^E +(\w.*)", traceback, re.MULTILINE)
    return re.sub(r" \(/.*\)$", "", errors[-1]) if errors else "no reason given"


def read_log(path: Path) -> Outcomes:
    """What pytest said before a crash or the time limit: the test that it was at has no outcome."""
    lines = re.findall(r"^\S+?::(\S+) ?([A-Z]*)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    words = {"PASSED": "passed", "XFAIL": "skipped", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed"}
    return {test: words.get(word, "crashed") for test, word in lines}


# --- comparing


class Difference(NamedTuple):
    fixed: list[str]
    broken: list[str]
    unfinished: bool  # with the patch alone


def compare(baseline: Outcomes, patched: Outcomes) -> Difference:
    bad = ("failed", "crashed")
    failing = [
        {test for test, outcome in side.items() if test.strip() and outcome in bad} for side in (baseline, patched)
    ]
    ran = {test for test, outcome in patched.items() if outcome == "passed"}
    fixed = sorted(failing[0] & ran)
    # Where the baseline was cut short, a test that it did not reach tells nothing, unless it is ours.
    broken = sorted(test for test in failing[1] - failing[0] if _control(test) not in failing[0])
    return Difference(fixed, broken, "" in baseline and "" not in patched)


def _control(test: str) -> str:
    """The test of the plain operator that stands beside one of lobpcg's; what is none of these has none."""
    return test.replace("_lobpcg_cpu", f"_{CONTROL}_cpu") if "_lobpcg_cpu" in test else ""


class Row(NamedTuple):
    job: Job
    before: Outcomes
    after: Outcomes
    difference: Difference

    @property
    def line(self) -> str:
        fixed, broken = (", ".join(tests) or "none" for tests in self.difference[:2])
        cells = (f"`{self.job}`", counts(self.before), counts(self.after), fixed, broken)
        return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """Markdown, for a pull request."""
    head = ["| tests | without the patch | with it | fixed | broken |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *(row.line for row in rows)])


def counts(outcomes: Outcomes) -> str:
    if " " in outcomes:
        return f"not imported: {outcomes[' ']}"
    words = [outcome for test, outcome in outcomes.items() if test]
    text = f"{sum(w in ('failed', 'crashed') for w in words)} failed, {words.count('passed')} passed"
    return text if "" in outcomes else text + ", cut short"


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="source tree of a PyTorch release")
    parser.add_argument("--python", help="the interpreter of the patched side")
    parser.add_argument("--baseline", help="the interpreter of the unpatched side")
    parser.add_argument("--only", action="append", metavar="WORD", help="files whose name contains WORD")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="files at the same time")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one file on one side")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="where to write the table")
    parser.add_argument("--keep", type=Path, help="a folder to be made, for the logs and the copies")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    venv = ROOT / ".venv/bin/python"
    python = options.python or str(venv if venv.exists() else sys.executable)
    jobs = [job for job in JOBS if not options.only or any(word in str(job) for word in options.only)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.keep:
            options.keep.mkdir(parents=True)
            folder = options.keep.resolve()
        try:
            tree = options.tree or fetched(ROOT / "build" / "pytorch-source")
            patched, baseline = (None, None) if options.baseline else make_pytorches(torch_of(python), folder)
            copy_tests(tree, folder / "tests-baseline", False)
            copy_tests(tree, folder / "tests-patched", True)
        except (FetchError, PatchError) as error:
            print(f"upstream_tests: {error}", file=sys.stderr)
            return 2
        sides = (
            Runner("baseline", options.baseline or python, baseline, folder / "tests-baseline", options.timeout),
            Runner("patched", python, patched, folder / "tests-patched", options.timeout),
        )
        with ThreadPoolExecutor(options.jobs) as pool:
            running = [(job, [pool.submit(side.run, job) for side in sides]) for job in jobs]
            rows = []
            for job, both in running:
                before, after = (side.result() for side in both)
                rows.append(Row(job, before, after, report(job, before, after)))
    text = table(rows)
    if options.summary:
        options.summary.write_text(text + "\n", encoding="utf-8")
    print(text)
    differences = [row.difference for row in rows]
    broken = [test for difference in differences for test in difference.broken]
    unfinished = sum(difference.unfinished for difference in differences)
    fixed = sum(len(difference.fixed) for difference in differences)
    print(f"fixed: {fixed}; broken: {len(broken) or 'none'}" + f"; cut short: {unfinished} files" * bool(unfinished))
    return 1 if broken or unfinished else 0


def report(job: Job, before: Outcomes, after: Outcomes) -> Difference:
    difference = compare(before, after)
    for word, tests in (("fixed", difference.fixed), ("broken", difference.broken)):
        for test in tests:
            say(f"{job}: {word} {test}")
    return difference


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
