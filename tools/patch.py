"""Applies this patch set to a PyTorch: patch.py status|apply|verify|revert|export [TARGET]

TARGET is a PyTorch checkout, a virtual environment or a site-packages folder; without it, the torch that the running
interpreter would import. Nothing is written before everything has been planned and checked; a run that is killed is
rolled back by the next apply or revert. status and verify only look; status exits with 1 where files were edited, a
run was interrupted or the PyTorch cannot be patched.
"""

import argparse
import sys
from pathlib import Path


if sys.version_info < (3, 10):
    sys.exit(
        f"found Python {sys.version.split()[0]}; expected 3.10 or newer; run tools/patch.py with such an interpreter"
    )

from patchset.commands import patcher
from patchset.errors import explained, PatchError
from patchset.smoke import interpreter_of
from patchset.steps import check_steps


PROJECT = Path(__file__).resolve().parent.parent


COMMANDS = {
    "status": "say whether TARGET is patched",
    "apply": "patch TARGET (again: nothing changes)",
    "verify": "check that every patched byte is what the patch set produces",
    "revert": "restore every byte, permission and RECORD line",
    "export": "write the series as mails for git am, with a cover letter, for the commit that TARGET has checked out",
    "steps": "check the series: after each of its patches torch can be imported and the tests of that patch pass",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for name in ("status", "apply", "verify", "revert", "export"):
        parsers[name].add_argument("TARGET", nargs="?")
    parsers["apply"].add_argument("--commits", action="store_true", help="commit the series too, patch by patch")
    parsers["export"].add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder to be made")
    no_smoke = "do not try the patched PyTorch by one solve and one gradcheck; without it, a failure rolls back"
    parsers["apply"].add_argument("--no-smoke", action="store_true", help=no_smoke)
    keep = "restore edited files too, each edited one kept beside its original as FILE.edited"
    parsers["revert"].add_argument("--force", action="store_true", help=keep)
    parsers["steps"].add_argument("PYTEST", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except OSError as error:
        print(f"patch: {explained(error)}", file=sys.stderr)
        return 1
    except PatchError as error:
        for line in str(error).split("\n"):
            print("patch: " + line, file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    if options.command == "steps":
        return check_steps(PROJECT, options.PYTEST)
    with patcher(PROJECT, options.TARGET) as running:
        if options.command == "apply":
            interpreter = None if options.no_smoke else interpreter_of(options.TARGET)
            return running.apply(options.commits, interpreter)
        if options.command == "export":
            return running.export(options.output)
        if options.command == "revert":
            return running.revert(options.force)
        status: int = getattr(running, options.command)()
        return status


if __name__ == "__main__":
    sys.exit(main())
