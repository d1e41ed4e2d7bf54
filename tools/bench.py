#!/usr/bin/env python3
"""Measure torch.lobpcg beside its peers: times, residuals, gradient errors, memory, and which bars are met.

usage: python3 tools/bench.py [--case GLOB ...] [--peer GLOB ...] [--output DIR] [options]
       python3 tools/bench.py --publish DIR
       python3 tools/bench.py --list

Prints the table, and with --output writes bench.json, bench.md and the picture bench.svg into DIR; what was measured
before and stands in DIR/bench.json is kept, unless it is measured anew. The exit status is 0 when every bar that could
be measured is met, 1 when one is not, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmark import report as reports
from benchmark.cases import CASES, select
from benchmark.plot import draw
from benchmark.process import Options, Row


ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "tools" / "benchmark" / "times.svg"


def measure_case(name: str, peers: list[str], options: Options, say: Callable) -> tuple[dict, dict]:
    """The rows of a case, and the versions that they ran on. The peers take turns, in an order that reverses.

    Every turn starts from the same vectors, those for which the tolerance was settled.
    """
    rows = {}
    for peer in peers:
        rows[peer] = Row(CASES[name], peer, options, lambda text, peer=peer: say(name, peer, {}, text))
    runs: dict = {peer: [] for peer in peers}
    counted: dict = {peer: {} for peer in peers}
    notes = dict.fromkeys(peers, "")
    turns = dict.fromkeys(peers, 0)
    try:
        for row in rows.values():
            row.ready()
        for peer in peers:
            if rows[peer].error:
                say(name, peer, {}, rows[peer].error)
            else:
                first = rows[peer].ask(do="run", seed=0)
                # memory is the first run's: later ones find pages that are already mapped
                counted[peer] = {key: first[key] for key in ("extra_mb", "peak_mb", "variant") if key in first}
                runs[peer], turns[peer], notes[peer] = plan(first, options, CASES[name].kind, CASES[name].calls)
                say(name, peer, first, rows[peer].error)
        for turn in range(1, options.repeats + 1):
            for peer in peers[:: 1 if turn % 2 else -1]:
                if turn <= turns[peer] and not rows[peer].error:
                    answer = rows[peer].ask(do="run", seed=0)
                    runs[peer] += [answer] if answer else []
    finally:
        for row in rows.values():
            row.close()
    versions = {}
    for row in rows.values():
        versions |= row.about.get("versions", {})
    summary = {
        peer: reports.summarize(rows[peer].about, runs[peer], counted[peer], rows[peer].error, notes[peer])
        for peer in peers
    }
    return summary, versions


def plan(first: dict, options: Options, kind: str, calls: int = 1) -> tuple[list, int, str]:
    """From the first answer: the runs to keep of it, how many more to make, and a remark.

    The first run is the warm-up. Where the budget allows only one more, or none, it is the measurement itself.
    """
    if not first:
        return [], 0, ""
    if kind == "starts":
        return [first], 0, "all starts in one run"
    affordable = int(options.budget / (calls * (first["seconds"] + first.get("forward", 0.0))))
    if affordable < 2:
        return [first], 0, "no warm-up (time budget)"
    turns = min(options.repeats, affordable)
    return [], turns, "fewer turns (time budget)" if turns < options.repeats else ""


def progress(name: str, peer: str, answer: dict, error: str | None) -> None:
    text = error or f"{answer['seconds']:.3g} s"
    Row.spoken = time.monotonic()
    print(f"bench.py: {name} {peer}: {text}", file=sys.stderr, flush=True)


def default_python() -> str:
    """The repository's environment if it is there, else the running interpreter."""
    for path in (ROOT / ".venv" / "bin" / "python", ROOT / ".venv" / "Scripts" / "python.exe"):
        if path.exists():
            return str(path)
    return sys.executable


def compile_report(results: dict, versions: dict, rules: Options) -> dict:
    return {
        "results": results,
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": rules.threads,
        "repeats": rules.repeats,
        "clock": rules.clock,
        "bars": reports.verdicts(results),
        "studies": reports.studies(results),
    }


def write(report: dict, folder: Path) -> None:
    """bench.json, bench.md and bench.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(reports.markdown(report), encoding="utf-8")
    (folder / "bench.svg").write_text(draw(report), encoding="utf-8")


def publish(report: dict) -> None:
    """The table of README.md, and the picture beside it."""
    readme = ROOT / "README.md"
    readme.write_text(reports.publish(report, readme.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(draw(report), encoding="utf-8")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], metavar="GLOB", help="cases to run (default: all)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="GLOB", help="peers to run (default: the case's)"
    )
    parser.add_argument("--list", action="store_true", help="list cases, bars, peers and metrics")
    parser.add_argument("--python", default=default_python(), help="interpreter of the rows (%(default)s)")
    parser.add_argument(
        "--beside", default="", metavar="PYTHON", help="another interpreter whose torch.lobpcg takes turns"
    )
    parser.add_argument("--upstream", default="", metavar="FILE", help="wheel, or unpatched _lobpcg.py, for that peer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of the row, for a machine with other load (%(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each row after its warm-up (%(default)s)")
    parser.add_argument("--budget", type=float, default=60, help="seconds a row may take for its turns (%(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a run (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write bench.json, .md and .svg there")
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="write README.md's table and picture from DIR, without measuring"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--row"]:
        from benchmark import row  # in the chosen interpreter

        row.serve(json.loads(argv[1]))
        return 0
    options = arguments(argv)
    if options.list:
        print(reports.listing())
        return 0
    if options.publish:
        publish(json.loads((options.publish / "bench.json").read_text(encoding="utf-8")))
        return 0
    try:
        chosen = select(options.case, options.peer, bool(options.beside))
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    upstream = str(Path(options.upstream).resolve()) if options.upstream else ""
    names = ("python", "threads", "repeats", "budget", "timeout", "clock", "beside")
    rules = Options(upstream=upstream, **{name: getattr(options, name) for name in names})
    results, versions, report = {}, {}, {}
    kept = options.output and options.output / "bench.json"
    if kept and kept.exists():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        results = {name: rows for name, rows in earlier["results"].items() if name in CASES}
        versions = earlier["versions"]
    for name, peers in chosen.items():
        results[name], found = measure_case(name, peers, rules, progress)
        versions |= found
        results = {known: results[known] for known in CASES if known in results}
        report = compile_report(results, versions, rules)
        if options.output:  # after each case: an interrupted run leaves what it has
            write(report, options.output)
    print(reports.markdown(report))
    return 1 if any(judged["met"] is False for judged in report["bars"] + report["studies"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
