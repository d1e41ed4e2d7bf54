"""From measurements to a table: medians, ratios, bars, exponents, Markdown. No measurement here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from benchmark.cases import Bar, CASES, GROUPS, METRICS, PEERS, STUDIES, Study


# the peers of the overview
OVERVIEW = ("beside", "upstream", "eigh", "evr", "scipy", "eigsh", "shift-invert", "adjoint", "primme")
ITERATIVE = ("scipy", "eigsh", "primme")  # no factorisation
# the cases and the peers in the README
PUBLISHED = (
    "laplacian-50x50-k4", "laplacian-100x100-k4", "laplacian-100x100-k20", "laplacian-100x100-k100",
    "laplacian-400x400-k4", "laplacian-100x100-k20-amg", "laplacian-400x400-k4-amg", "laplacian-50x50x50-k10-amg",
    "graph-geometric", "graph-blobs", "elements-2d", "elements-2d-amg",
    "goe-500-k5", "goe-1000-k5", "goe-2000-k5", "goe-2000-k50", "generalized-500",
    "batch-1000x16", "batch-64x200", "batch-16x600", "small-10", "small-100", "small-100-grad",
    "truncated-k64-niter5", "truncated-k256-niter20", "grad-dense-500", "grad-dense-2000",
    "grad-100x101", "grad-100x101-amg",
)  # fmt: skip
PUBLISHED_PEERS = ("upstream", "eigh", "evr", "scipy", "eigsh", "shift-invert", "adjoint", "primme")
# residuals of peers that stopped by the same request differ by less than the last iteration gains
LARGER = 1.05


def summarize(about: dict, runs: list[dict], counted: dict, error: str | None, warm_up: str) -> dict:
    """One row: medians over its runs, the worst residual and errors, what was counted."""
    row = {key: value for key, value in about.items() if key not in ("versions", "threads")}
    for name in ("seconds", "forward", "tol", "trace", "iterations", "columns", "columns_iK"):
        values = [run[name] for run in runs if name in run]
        if values:
            row[name] = median(values)
            if name == "seconds":
                row["spread"] = (max(values) - min(values)) / row[name] if row[name] else 0.0
    worst = (
        "residual",
        "missed",
        "value_error",
        "gradient_error",
        "extra_mb",
        "peak_mb",
        "failures",
        "starts",
        "warned",
    )
    for name in worst:
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            row[name] = max(values, key=lambda value: math.inf if math.isnan(value) else value)
    row |= counted
    row["runs"], row["warm_up"] = len(runs), warm_up
    row["notes"] = sorted({text for run in runs for text in run.get("warnings", []) + run.get("examples", [])})
    if error:
        row["error"] = error
    return row


def verdict(bar: Bar, case: str, results: dict) -> dict:
    """What the bar asks, what was reached, and whether it is met: True, False, or None where a figure is missing.

    A time counts only with a residual no larger than the other peer's, or within what the case asks for.
    """
    row = results.get(case, {}).get(bar.peer, {})
    value, limit, reason = row.get(bar.metric), bar.limit, ""
    answer = {"case": case, "bar": str(bar), "met": None, "reached": None}
    if value is None:
        return answer | {"reason": row.get("error") or f"no {bar.metric} of {bar.peer}"}
    if not bar.against:
        return answer | {"met": value <= limit, "reached": value, "reason": ""}
    other = results.get(bar.against_case or case, {}).get(bar.against, {})
    reference = other.get(bar.against_metric or bar.metric)
    if reference is None:
        return answer | {"reason": other.get("error") or f"no figure of {bar.against} to compare with"}
    ratio = value / reference if reference else math.inf
    met = ratio <= limit
    if bar.metric == "seconds" and larger_residual(row, other, case):
        met, reason = False, f"residual larger: {row['residual']:.1e} against {other['residual']:.1e}"
    return answer | {"met": met, "reached": ratio, "reason": reason}


def larger_residual(row: dict, other: dict, case: str) -> bool:
    """Whether row's residual exceeds both the other's and the one that the case asks for."""
    if "residual" not in row or "residual" not in other:
        return False
    return row["residual"] > LARGER * max(CASES[case].tol, other["residual"])


def right(row: dict, case: str) -> bool:
    """Whether the row has a time, and its pairs are those that were asked for."""
    if "seconds" not in row or "error" in row or row.get("missed"):
        return False
    return CASES[case].truncated or row.get("residual", math.inf) <= LARGER * CASES[case].tol


def best_peer(rows: dict, case: str, among: tuple = tuple(PEERS)) -> tuple[str, float] | None:
    """The fastest of these peers whose pairs are right, and the time of torch.lobpcg over its; None without one.

    Versions of torch.lobpcg are not among them, unless the case has no other peer.
    """
    if not right(rows.get("patched", {}), case):
        return None
    others = {peer: row for peer, row in rows.items() if peer in among and peer != "patched" and right(row, case)}
    strangers = {peer: row for peer, row in others.items() if peer not in ("beside", "upstream")} or others
    if not strangers:
        return None
    peer = min(strangers, key=lambda name: strangers[name]["seconds"])
    return peer, rows["patched"]["seconds"] / strangers[peer]["seconds"]


def verdicts(results: dict) -> list[dict]:
    return [verdict(bar, name, results) for name in results for bar in CASES[name].bars]


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Slope of the least-squares line through (log x, log y); NaN for fewer than two different x."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y)]
    if len({a for a, _ in points}) < 2:
        return math.nan
    mean_a = sum(a for a, _ in points) / len(points)
    mean_b = sum(b for _, b in points) / len(points)
    return sum((a - mean_a) * (b - mean_b) for a, b in points) / sum((a - mean_a) ** 2 for a, _ in points)


def study(plan: Study, results: dict) -> dict | None:
    """The points of a study and its exponent; None unless two of its cases or more were measured."""
    rows = [results.get(name, {}).get(plan.peer, {}) for name in plan.cases]
    points = [(row[plan.axis], row[plan.metric]) for row in rows if row.get(plan.metric) and row.get(plan.axis)]
    if len(points) < 2:
        return None
    slope = exponent(*zip(*points))
    complete = len(points) == len(plan.cases)
    return {
        "name": plan.name,
        "axis": plan.axis,
        "metric": plan.metric,
        "points": points,
        "exponent": slope,
        "limit": plan.limit,
        "met": slope <= plan.limit if complete else None,
    }


def studies(results: dict) -> list[dict]:
    return [found for plan in STUDIES if (found := study(plan, results))]


# --- Markdown


def overview(results: dict, peers: tuple = OVERVIEW) -> str:
    """One line a case: the time of torch.lobpcg, and over those of the peers. Less than 1: torch.lobpcg is faster."""
    lines = []
    for name, rows in sorted(results.items(), key=lambda item: list(GROUPS).index(CASES[item[0]].group)):
        best, ours = best_peer(rows, name), rows.get("patched", {})
        if CASES[name].kind != "time":
            continue
        cells = []
        for peer in peers:
            row = rows.get(peer, {})
            mark = "" if right(row, name) else " missed" if row.get("missed") else " (residual)"
            ratio = ours["seconds"] / row["seconds"] if row.get("seconds") and ours.get("seconds") else None
            cells.append("" if ratio is None else two_digits(ratio) + mark)
        shown = [two_digits(ours.get("seconds")), two_digits(best[1]) if best else ""]
        lines.append([f"`{name}`", CASES[name].title, *shown, *cells])
    return table(["`--case`", "problem", "seconds", "over the best peer", *peers], lines)


def number(value: float | None) -> str:
    """Three digits; small and large ones in scientific notation; a dash for nothing."""
    if value is None:
        return "-"
    if not math.isfinite(value) or (value == int(value) and abs(value) < 1e6):
        return f"{value:g}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def two_digits(value: float | None) -> str:
    return number(None if value is None else float(f"{value:.2g}"))


def word(met: bool | None) -> str:
    return {True: "met", False: "NOT met", None: "not measured"}[met]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


# column -> metric
_COLUMNS = {
    "s": "seconds",
    "forward s": "forward",
    "residual": "residual",
    "missed": "missed",
    "value error": "value_error",
    "gradient error": "gradient_error",
    "extra MB": "extra_mb",
    "peak MB": "peak_mb",
    "set-up s": "setup",
    "first call s": "first_call",
    "iterations": "iterations",
    "columns of A": "columns",
    "columns of iK": "columns_iK",
    "trace": "trace",
    "failures": "failures",
}


def case_table(name: str, rows: dict, reference: str = "patched") -> str:
    """The peers of a case; columns that no peer has are left out."""
    columns = {title: m for title, m in _COLUMNS.items() if any(row.get(m) not in (None, 0.0) for row in rows.values())}
    base = rows.get(reference, {})
    lines = []
    for peer, row in rows.items():
        ratio = row["seconds"] / base["seconds"] if row.get("seconds") and base.get("seconds") else None
        remarks = (
            [f"median of {row['runs']}" + (f", {row['warm_up']}" if row["warm_up"] else "")] if row["runs"] else []
        )
        if row.get("spread", 0) > 0.3:
            remarks.append(f"spread {100 * row['spread']:.0f} %")
        if base is not row and larger_residual(row, base, name):
            remarks.append(f"residual {number(row['residual'] / base['residual'])} x {reference}'s")
        if row.get("missed"):
            remarks.append("missed pairs" if any("converge" in note for note in row["notes"]) else "missed in silence")
        remarks += [row["variant"]] if "variant" in row else []
        remarks += [f"error: {row['error']}"] if "error" in row else []
        remarks += row["notes"]
        lines.append([peer, number(ratio), *(number(row.get(m)) for m in columns.values()), "; ".join(remarks)])
    return table(["peer", f"time / {reference}", *columns, "remarks"], lines)


def publish(report: dict, readme: str) -> str:
    """The README with the table of times of this report between its marks."""
    start, end = "<!-- times -->\n", "<!-- /times -->"
    before, rest = readme.split(start)
    after = rest.split(end)[1]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if name != "python")
    conditions = f"{report['threads']} thread, {report['clock']} time, medians; {versions}."
    chosen = {name: report["results"][name] for name in PUBLISHED if name in report["results"]}
    return f"{before}{start}{conditions}\n\n{overview(chosen, PUBLISHED_PEERS)}\n{end}{after}"


def markdown(report: dict) -> str:
    """The whole report."""
    results = report["results"]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    parts = [
        "# torch.lobpcg and its peers",
        (
            f"{report['threads']} thread(s); {report['machine']}; {versions}; {report['clock']} time. Each row is a "
            f"process of its own; the peers of a case take turns, medians of up to {report['repeats']} turns after a "
            "warm-up. Compare ratios, not seconds; residuals and errors are the worst over the turns."
        ),
    ]
    parts += ["Time of torch.lobpcg, and over that of each peer:", overview(results)]
    judged = report["bars"]
    if judged:
        rows = [[v["case"], v["bar"], number(v["reached"]), word(v["met"]), v["reason"]] for v in judged]
        parts += ["## Bars", table(["case", "bar", "reached", "", "remark"], rows)]
    if report["studies"]:
        rows = [
            [
                s["name"],
                ", ".join(f"{number(x)}: {number(y)}" for x, y in s["points"]),
                number(s["exponent"]),
                number(s["limit"]),
                word(s["met"]),
            ]
            for s in report["studies"]
        ]
        parts += ["## Growth", table(["study", "points (seconds)", "exponent", "limit", ""], rows)]
    parts.append("## Cases")
    for name, rows in results.items():
        parts += [f"### {name}: {CASES[name].title}", case_table(name, rows)]
    used = {metric for rows in results.values() for row in rows.values() for metric in row if metric in METRICS}
    peers = {peer for rows in results.values() for peer in rows}
    meanings = [f"- {name}: {text}" for name, text in (PEERS | METRICS).items() if name in used | peers]
    return "\n\n".join([*parts, "## Meaning", "\n".join(meanings)]) + "\n"


def listing() -> str:
    """Cases, peers and metrics, for --list."""
    lines = ["cases:"]
    for name, case in CASES.items():
        more = f" (on request: {', '.join(case.more)})" if case.more else ""
        lines += [f"  {name:28} {case.title}", f"  {'':28}   peers: {', '.join(case.peers)}{more}"]
        lines += [f"  {'':28}   bar: {bar}" for bar in case.bars]
    lines += ["", "growth:"] + [f"  {s.name}: exponent <= {s.limit:g} over {', '.join(s.cases)}" for s in STUDIES]
    lines += ["", "peers:"] + [f"  {name:18} {text}" for name, text in PEERS.items()]
    lines += ["", "metrics:"] + [f"  {name:18} {text}" for name, text in METRICS.items()]
    return "\n".join(lines)
