"""Applies this patch set to a PyTorch: patch.py status|apply|verify|revert [TARGET]

TARGET is a PyTorch checkout, a virtual environment or a site-packages folder; without it, the torch that the running
interpreter would import. Nothing is written before everything has been planned and checked, and a run that is killed is
rolled back by the next command.
"""

import argparse
import sys
from pathlib import Path


if sys.version_info < (3, 10):
    sys.exit(
        f"found Python {sys.version.split()[0]}; expected 3.10 or newer; run tools/patch.py with such an interpreter"
    )

from patchset.commands import patcher
from patchset.errors import PatchError


COMMANDS = {
    "status": "say whether TARGET is patched",
    "apply": "patch TARGET (again: nothing changes)",
    "verify": "check that every patched byte is what the patch set produces",
    "revert": "restore every byte, permission and RECORD line",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, description=purpose).add_argument("TARGET", nargs="?")
    options = parser.parse_args(arguments)
    try:
        with patcher(Path(__file__).resolve().parent.parent, options.TARGET) as running:
            status: int = getattr(running, options.command)()
            return status
    except (PatchError, OSError) as error:
        for line in str(error).split("\n"):
            print("patch: " + line, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
