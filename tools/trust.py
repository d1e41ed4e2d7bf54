#!/usr/bin/env python3
"""Count what torch.lobpcg gets right, silently wrong, and warns of without reason on ordinary problems.

usage: .venv/bin/python tools/trust.py [--matrices N | --seeds LIST] [--dtype NAME ...] [options]
       .venv/bin/python tools/trust.py --training [--dtype NAME ...]
       .venv/bin/python tools/trust.py --starts [--dtype NAME ...]

The first form draws problems (torch/testing/_internal/lobpcg_ordinary.py says which, and what each verdict means),
prints one row of counts for each family, the shares, and the worst cases with the command that repeats each. The
second trains on a dense matrix and on a sparse graph with learned weights, each step started from the eigenvectors of
the last. The third measures what a start at exact eigenvectors costs beside a cold start. The exit status is 1 if the
first form found something silent and wrong or refused, 0 otherwise, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path


ROWS = (
    ("right", ("right",)),
    ("loose", ("loose",)),
    ("alarm", ("false alarm",)),
    ("warned", ("warned",)),
    ("silent", ("silent",)),
    ("refused", ("refused",)),
    ("rounding", ("rounding", "undetermined")),
    ("unsaid", ("unsaid",)),
    ("kink", ("kink", "zero: kink")),
    ("0:right", ("zero: right", "zero: loose", "zero: rounding", "zero: unsaid")),
    ("0:alarm", ("zero: false alarm", "zero: warned")),
    ("0:silent", ("zero: silent", "zero: refused")),
)
FORWARD = (
    ("fwd right", ("right",)),
    ("alarm", ("false alarm",)),
    ("warned", ("missed, warned", "E off, warned", "X mixed, warned")),
    ("E off", ("E off, silent",)),
    ("missed", ("missed, silent",)),
    ("mixed", ("X mixed, silent",)),
    ("refused", ("refused",)),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--matrices", type=int, default=200, help="how many problems, numbered from --first (200)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (0)")
    parser.add_argument("--seeds", default="", help="these problems alone: 17 or 3,17,40")
    parser.add_argument("--family", default="", help="one family alone, by the name in the table")
    parser.add_argument("--losses", default="", help="these losses alone, separated by commas")
    parser.add_argument("--most", type=int, default=2000, help="largest order of a matrix (2000); part of the problem")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float64"])
    parser.add_argument("--verbose", action="store_true", help="a line for each problem, with all that was not right")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--worst", type=int, default=20, help="how many of the worst cases to list (20)")
    parser.add_argument("--output", type=Path, help="write every verdict to this JSON file")
    parser.add_argument("--training", action="store_true", help="200 training steps instead")
    parser.add_argument("--starts", action="store_true", help="exact starts beside cold ones instead")
    return parser.parse_args(arguments)


# Problems -----------------------------------------------------------------------------------------------------------


def count(options: argparse.Namespace, dtype: str) -> list:
    """Reports of all problems, with progress on stderr."""
    import torch
    from torch.testing._internal import lobpcg_ordinary as ordinary

    last = options.first + options.matrices
    seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else list(range(options.first, last))
    losses = options.losses.split(",") if options.losses else None
    reports, start = [], time.monotonic()
    for number, seed in enumerate(seeds, 1):
        problem = ordinary.draw(seed, getattr(torch, dtype), options.most, options.family or None)
        began = time.monotonic()
        reports.append(ordinary.examine(problem, losses))
        if options.verbose:
            print(describe(reports[-1], time.monotonic() - began), flush=True)
        elif not options.quiet:
            spent = time.monotonic() - start
            print(f"\r{number}/{len(seeds)} {spent:.0f} s  {problem!r:70.70}", end="", file=sys.stderr, flush=True)
    if not options.quiet and not options.verbose:
        print("\r" + 100 * " ", end="\r", file=sys.stderr)
    return reports


def describe(report, seconds: float) -> str:
    lines = [f"{report.problem!r}  {seconds:.2f} s"]
    for name, entry in zip(("forward", "forward, with gradient"), report.forwards):
        if entry[0] != "right":
            lines.append(f"    {name}: {entry[0]} {entry[1]:.1e} {entry[2][:150]}")
    for loss, verdict, error, allowed, text in report.gradients:
        if verdict not in ("right", "zero: right"):
            lines.append(f"    {loss}: {verdict}, error {error:.1e}, rounding {allowed:.1e} {text[:150]}")
    return "\n".join(lines)


def table(reports: list, dtype: str) -> str:
    """Counts of verdicts for each family; a column stands for the verdicts named beside it in ROWS and FORWARD."""
    families = list(dict.fromkeys(r.problem.family for r in reports))
    heads = [name for name, _ in FORWARD] + ["grad:"] + [name for name, _ in ROWS]
    width = [max(7, len(head) + 1) for head in heads]
    line = lambda name, cells: f"{name:16}" + "".join(f"{c!s:>{w}}" for c, w in zip(cells, width))
    lines = [line(dtype, heads)]
    for family in families + ["all"]:
        chosen = [r for r in reports if family in ("all", r.problem.family)]
        forward = Counter(entry[0] for r in chosen for entry in r.forwards)
        gradient = Counter(entry[1] for r in chosen for entry in r.gradients)
        cells: list = [sum(forward[v] for v in verdicts) for _, verdicts in FORWARD] + [sum(gradient.values())]
        cells += [sum(gradient[v] for v in verdicts) for _, verdicts in ROWS]
        lines.append(line(family, cells))
    forward = Counter(entry[0] for r in reports for entry in r.forwards)
    wrong = sum(number for verdict, number in forward.items() if "silent" in verdict)
    calm = forward["right"] + forward["false alarm"]
    usual = gradient["right"] + gradient["false alarm"]  # of the row "all"
    lines.append(
        f"{len(reports)} matrices, {forward.total()} forward passes, {gradient.total()} gradients in {dtype}. "
        f"False alarms: {gradient['false alarm'] / max(usual, 1):.2%} of {usual} right gradients, "
        f"{forward['false alarm'] / max(calm, 1):.2%} of {calm} right forward passes. "
        f"Silent and wrong: {gradient['silent']} gradients, {wrong} forward passes. "
        f"Refused: {gradient['refused'] + forward['refused']}. "
        f"Exact gradient zero: {gradient['zero: silent']} silent and wrong, "
        f"{gradient['zero: false alarm'] + gradient['zero: warned']} warned of."
    )
    return "\n".join(lines)


def estimates(reports: list) -> str:
    """How good the errors are that warnings of gradients state, where rounding does not decide."""
    ratios = []
    for r in reports:
        for _, verdict, error, _, text in r.gradients:
            stated = re.search(r"error of (?:about )?([0-9.]+(?:e[-+]?[0-9]+)?|inf)", text)
            if stated and verdict in ("warned", "false alarm"):
                ratios.append(float(stated[1]) / max(error, 1e-300))
    good = sum(0.1 <= ratio <= 10 for ratio in ratios)
    middle = sorted(ratios)[len(ratios) // 2] if ratios else 0.0
    return f"Stated errors: {len(ratios)}, within a factor of ten {good}, median {middle:.1f} times the error."


def worst(reports: list, dtype: str, number: int, most: int) -> list[str]:
    """What the contract forbids, then false alarms, the largest errors first, with the command that repeats each."""
    found = []
    for r in reports:
        repeat = f"tools/trust.py --verbose --seeds {r.problem.seed} --dtype {dtype}"
        repeat += "" if most == 2000 else f" --most {most}"
        for what, verdict, error, text in r.bad():
            found.append((0, -error, f"{what}: {verdict}, {error:.1e}; {r.problem!r}; {repeat}  {text[:100]}"))
        for loss, verdict, error, _, text in r.gradients:
            if "false alarm" in verdict:
                found.append((1, error, f"{loss}: {verdict}, {error:.1e}; {r.problem!r}; {repeat}  {text[:160]}"))
    return [line for _, _, line in sorted(found)[:number]]


def counted(options: argparse.Namespace) -> int:
    bad, kept = 0, []
    for dtype in options.dtype:
        start = time.monotonic()
        reports = count(options, dtype)
        print(table(reports, dtype), estimates(reports), f"{time.monotonic() - start:.0f} s.")
        print(*worst(reports, dtype, options.worst, options.most), sep="\n")
        bad += sum(len(r.bad()) for r in reports)
        kept += [dict(problem=repr(r.problem), forwards=r.forwards, gradients=r.gradients) for r in reports]
    if options.output:
        options.output.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    torch.set_num_threads(1)
    if options.training or options.starts:
        from benchmark.loops import starts, training

        for dtype in options.dtype:
            for line in (training if options.training else starts)(getattr(torch, dtype)):
                print(line, flush=True)
        return 0
    return counted(options)


if __name__ == "__main__":
    sys.exit(main())
