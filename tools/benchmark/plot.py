"""The report as one picture: the time of torch.lobpcg over that of its fastest peer, ordered by kind of problem."""

from __future__ import annotations

import math
from html import escape

from benchmark.cases import CASES, GROUPS
from benchmark.report import best_peer, ITERATIVE, number


WIDTH, LEFT, RIGHT, ROW, TOP = 880, 330, 670, 17, 80
REACH = 32.0  # ratios from 1/32 to 32; what is beyond ends in an arrow
FASTER, SLOWER, INK, FAINT = "#1a7f5a", "#c4622d", "#222222", "#d8d8d8"


def draw(report: dict) -> str:
    """The SVG. Bars to the left: torch.lobpcg is faster than every peer that finds the pairs; to the right: slower.

    A circle, where sparse matrices are solved, is the ratio to the fastest peer that factorises nothing.
    """
    parts, y = [], TOP
    for group, title in GROUPS.items():
        rows = [(name, found) for name, found in _ratios(report["results"]) if CASES[name].group == group]
        if not rows or group == "check":
            continue
        y += ROW * 1.5
        parts.append(_text(12, y - 5, title, weight="bold"))
        for name, (peer, ratio, seconds) in rows:
            parts += _bar(y, CASES[name].title, peer, ratio, seconds)
            iterative = best_peer(report["results"][name], name, ITERATIVE)
            if iterative and CASES[name].layout != "strided" and peer not in ITERATIVE:
                circle = f'cx="{_x(iterative[1]):.1f}" cy="{y + 4.5:.1f}" r="4"'
                parts.append(f'<circle {circle} fill="white" stroke="{INK}" stroke-width="1.5"/>')
            y += ROW
    return _page(parts, y + 12)


def _ratios(results: dict) -> list:
    found = []
    for name, rows in results.items():
        best = best_peer(rows, name) if CASES[name].kind == "time" else None
        if best:
            found.append((name, (*best, rows["patched"]["seconds"])))
    return found


def _x(ratio: float) -> float:
    place = math.log(min(max(ratio, 1 / REACH), REACH), REACH)  # -1 to 1
    return LEFT + (RIGHT - LEFT) * (1 + place) / 2


def _bar(y: float, title: str, peer: str, ratio: float, seconds: float) -> list[str]:
    colour, start, end = FASTER if ratio < 1 else SLOWER, _x(1.0), _x(ratio)
    x, width = min(start, end), max(abs(end - start), 1.5)
    parts = [
        _text(24, y + 8, title),
        f'<rect x="{x:.1f}" y="{y - 1:.1f}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}"/>',
        _text(RIGHT + 14, y + 8, f"{ratio:.2g} × {peer}"),
        _text(WIDTH - 10, y + 8, f"{number(float(f'{seconds:.2g}'))} s", anchor="end"),
    ]
    if not 1 / REACH <= ratio <= REACH:
        tip, back = (end - 7, end) if ratio < 1 else (end + 7, end)
        points = f"{tip:.1f},{y + 4.5:.1f} {back:.1f},{y - 3:.1f} {back:.1f},{y + 12:.1f}"
        parts.append(f'<polygon points="{points}" fill="{colour}"/>')
    return parts


def _page(parts: list[str], height: float) -> str:
    lines = []
    for exponent in range(-5, 6):
        x, width = _x(2.0**exponent), 1.6 if exponent == 0 else 0.7
        colour = INK if exponent == 0 else FAINT
        lines.append(f'<path d="M{x:.1f} {TOP}V{height - 8:.0f}" stroke="{colour}" stroke-width="{width}"/>')
        label = str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"
        lines.append(_text(x, TOP - 6, label, anchor="middle"))
    head = [
        _text(
            12, 20, "Time of torch.lobpcg over that of the fastest peer that finds the pairs", weight="bold", size=14
        ),
        _text(
            12,
            38,
            "○ over that of the fastest one without a factorisation, where another one is faster",
            colour="#555555",
        ),
        _text(_x(1.0) - 8, TOP - 24, "◀ torch.lobpcg is faster", colour=FASTER, anchor="end"),
        _text(_x(1.0) + 8, TOP - 24, "slower ▶", colour=SLOWER),
        _text(RIGHT + 14, TOP - 6, "ratio, fastest peer"),
        _text(WIDTH - 10, TOP - 6, "time", anchor="end"),
    ]
    shape = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="11"'
    body = "\n".join([*lines, *head, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {shape} {font}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, weight: str = "", anchor: str = "", size: int = 0, colour: str = INK) -> str:
    more = "".join(
        f' {name}="{value}"'
        for name, value in (("font-weight", weight), ("text-anchor", anchor), ("font-size", size))
        if value
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{escape(text)}</text>'
