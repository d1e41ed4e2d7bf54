"""What the patch tool asks of git, and what it has git do; it never runs a hook, a monitor, an editor or a pager."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import PatchError


# A checkout brings settings of its own, which may name programs; a question must not write an index either.
_SETTINGS = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "log.showSignature=false")
_QUIET = ("--no-optional-locks", "--no-pager", *(word for setting in _SETTINGS for word in ("-c", setting)))
# variables of a hook that calls this tool, which would mean another repository
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")


def git(root: Path, *arguments: str, data: bytes | None = None, env: dict[str, str] | None = None) -> bytes:
    """What `git ARGUMENTS` prints in the working tree `root`. Raises PatchError with git's own words if it fails."""
    command = ["git", *_QUIET, "-C", str(root), *arguments]
    ours = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    try:
        done = subprocess.run(command, input=data, env={**ours, **(env or {})}, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        found = f"git {arguments[0]} in {root} failed: {detail.decode('utf-8', 'replace').strip()}"
        raise PatchError(found, "an answer", "do as git says, and run this again") from None
    return done.stdout


def word(root: Path, *arguments: str, data: bytes | None = None, env: dict[str, str] | None = None) -> str:
    return git(root, *arguments, data=data, env=env).decode("utf-8").strip()


def is_working_tree(root: Path) -> bool:
    return (root / ".git").exists()


def changed_in_git(root: Path, paths: Sequence[str]) -> list[str] | None:
    """Those of `paths` that differ from the commit checked out; None where `root` is no git working tree."""
    if not is_working_tree(root):
        return None
    options = ("--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--ignore-submodules=all")
    answer = git(root, *without_filters(root), "status", *options, "--", *paths)
    return [entry[3:] for entry in answer.decode("utf-8").split("\0") if entry]


def without_filters(root: Path) -> list[str]:
    """Options that turn off the programs through which a checkout's settings pass its files."""
    settings = git(root, "config", "--null", "--name-only", "--list").decode("utf-8", "replace").split("\0")
    drivers = {name.rsplit(".", 1)[0] for name in settings if name.startswith("filter.")}
    off = (("clean", ""), ("process", ""), ("required", "false"))
    return [word for driver in sorted(drivers) for key, value in off for word in ("-c", f"{driver}.{key}={value}")]


def head(root: Path) -> str:
    """The commit checked out."""
    if not is_working_tree(root):
        raise PatchError(f"{root} is no git working tree", "one", "run git init, git add and git commit there first")
    return word(root, "rev-parse", "--verify", "HEAD^{commit}")


def ancestor(root: Path, generations: int) -> str:
    """The commit `generations` before the one checked out."""
    return word(root, "rev-parse", "--verify", f"HEAD~{generations}^{{commit}}")
