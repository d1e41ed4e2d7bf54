"""The report as a picture: times of all peers per case, and the growth studies. Needs matplotlib."""

from __future__ import annotations

from benchmark.cases import PEERS


def draw(report: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {name: rows for name, rows in report["results"].items() if any("seconds" in row for row in rows.values())}
    studies = report["studies"]
    width = 8 + 4 * bool(studies)
    figure = pyplot.figure(figsize=(width, 1.5 + 0.45 * max(len(results), 8)), layout="constrained")
    grid = figure.add_gridspec(max(len(studies), 1), 2 if studies else 1, width_ratios=[2, 1] if studies else None)
    _times(figure.add_subplot(grid[:, 0]), results)
    for i, study in enumerate(studies):
        _growth(figure.add_subplot(grid[i, 1]), study)
    figure.savefig(path, dpi=130)


def _times(axes, results: dict) -> None:
    names = list(results)
    for i, peer in enumerate(PEERS):
        points = [
            (rows[peer]["seconds"], y) for y, rows in enumerate(results.values()) if "seconds" in rows.get(peer, {})
        ]
        if points:
            axes.scatter(
                *zip(*points), label=peer, marker="DosPX^v<"[i], s=60 if i == 0 else 36, zorder=3 if i == 0 else 2
            )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel("seconds (median)")
    axes.legend(fontsize="small")


def _growth(axes, study: dict) -> None:
    x, y = zip(*study["points"])
    axes.loglog(x, y, "D-")
    axes.loglog(
        x, [y[0] * (a / x[0]) ** study["limit"] for a in x], ":", color="gray", label=f"exponent {study['limit']:g}"
    )
    axes.set_title(f"{study['name']}:\nexponent {study['exponent']:.2f}", fontsize="medium")
    axes.set_xticks(x, [f"{a:.3g}" for a in x])
    axes.minorticks_off()
    axes.set_xlabel(study["axis"])
    axes.set_ylabel(study["metric"])
    axes.legend(fontsize="small")
