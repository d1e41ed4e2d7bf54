#!/usr/bin/env python3
"""Ask torch.lobpcg and its peers for each feature, and print a table of what came back.

A cell is measured, not looked up: "yes" where the answer agrees with one found another way, else how far off it is, or
"no": the interface has no such thing, or raises (the error goes to stderr). Needs PyTorch, patched, and NumPy; SciPy
and xitorch where they are to be asked; a peer that is missing has "not installed". The exit status is 1 when a cell
of torch.lobpcg is not "yes".
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", metavar="NAME", help="of these features (default: all)")
    parser.add_argument("--peer", action="append", metavar="NAME", help="these peers (default: all)")
    parser.add_argument("--list", action="store_true", help="names and meanings of the rows")
    options = parser.parse_args(arguments)
    from benchmark.features import ask, PEERS, ROWS  # needs PyTorch, which --help does not

    rows, peers = options.row or list(ROWS), options.peer or list(PEERS)
    for name, known in [(row, ROWS) for row in rows] + [(peer, PEERS) for peer in peers]:
        if name not in known:
            parser.error(f"expected one of {', '.join(known)}, got {name!r}")
    if options.list:
        print("\n".join(f"{name:16} {ROWS[name].__doc__}" for name in rows))
        return 0
    print("| --row | feature | " + " | ".join(peers) + " |")
    print("| --- " * (len(peers) + 2) + "|")
    failed = False
    for row in rows:
        cells = [ask(row, peer) for peer in peers]
        failed |= any(cell != "yes" for peer, cell in zip(peers, cells) if peer == "lobpcg")
        print(f"| {row} | {ROWS[row].__doc__} | " + " | ".join(cells) + " |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
