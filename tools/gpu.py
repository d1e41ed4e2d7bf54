#!/usr/bin/env python3
"""Test and time torch.lobpcg on a GPU: one command, under ten minutes, no network, nothing changed on the machine.

usage: python3 tools/gpu.py [--python INTERPRETER] [--device cuda] [--minutes 9] [--output FILE]
       python3 tools/gpu.py --device cpu --tiny        what the tests of this script run

INTERPRETER is one that has PyTorch 2.11 or newer; CuPy is compared with if it is there. Its torch is not
touched: the patch goes into a copy of it in a temporary folder, which shares all but the Python files by links. Prints
the checks, then one table. The exit status is 1 where a check fails or a timing raises, 2 where nothing could be run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


TOOLS = Path(__file__).resolve().parent
# copied with the patch's store, if there is one; everything else of site-packages is reached by a link
COPIED = ("torch", "torchgen", "functorch", ".torch_lobpcg_patch")


def mirror(site: Path, folder: Path) -> None:
    """A copy of a site-packages folder whose torch can be patched: its text is copied, its libraries are links.

    Everything keeps its place relative to torch, since that is how torch's libraries find CUDA's.
    """
    for entry in site.iterdir():
        if entry.name in COPIED or entry.name.startswith("torch-"):
            shutil.copytree(entry, folder / entry.name, copy_function=_copy)
        else:
            (folder / entry.name).symlink_to(entry)


def _copy(source: str, destination: str) -> None:
    """A library, or whatever else is large, becomes a link; no patch writes to one."""
    path = Path(source).resolve()
    if path.suffix in (".so", ".a", ".bin", ".h", ".cuh") or ".so." in path.name or path.stat().st_size > 2**22:
        Path(destination).symlink_to(path)
    else:
        shutil.copy2(path, destination)


def site_of(python: str) -> Path:
    """The site-packages folder from which the interpreter imports torch. Raises CalledProcessError without one."""
    code = "import importlib.util; print(importlib.util.find_spec('torch').origin)"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return Path(found.stdout.strip()).parent.parent


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter whose torch is measured (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not timed by then is left out")
    parser.add_argument("--tiny", action="store_true", help="small matrices: a test of the script, not a measurement")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write checks and table there, too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--child"]:
        from benchmark import device  # in the patched copy

        return device.run(argv[1], float(argv[2]), argv[3] == "tiny")
    options = arguments(argv)
    try:
        site = site_of(options.python)
    except (OSError, subprocess.CalledProcessError):
        print(f"gpu.py: {options.python} has no torch; name an interpreter that has, with --python", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lobpcg-gpu-") as name:
        folder = Path(name)
        mirror(site, folder)
        # this interpreter, since the tool needs 3.10 and the one that is measured may be older
        patched = subprocess.run([sys.executable, str(TOOLS / "patch.py"), "apply", name], check=False)
        if patched.returncode:
            return 2
        size = "tiny" if options.tiny else "full"
        command = [options.python, str(TOOLS / "gpu.py"), "--child", options.device, str(options.minutes), size]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": name})
        lines = []
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status = child.wait()
    if options.output:
        options.output.write_text("".join(lines), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
