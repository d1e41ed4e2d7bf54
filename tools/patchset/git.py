"""What the patch tool asks of git, and what it has git do; it never runs a hook, an editor or a pager."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import PatchError


def git(root: Path, *arguments: str, data: bytes | None = None, env: dict[str, str] | None = None) -> bytes:
    """What `git ARGUMENTS` prints in the working tree `root`. Raises PatchError with git's own words if it fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, input=data, env={**os.environ, **(env or {})}, capture_output=True, check=True)
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
    options = ("--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
    answer = git(root, "status", *options, "--", *paths)
    return [entry[3:] for entry in answer.decode("utf-8").split("\0") if entry]


def head(root: Path) -> str:
    """The commit checked out."""
    if not is_working_tree(root):
        raise PatchError(f"{root} is no git working tree", "one", "run git init, git add and git commit there first")
    return word(root, "rev-parse", "--verify", "HEAD^{commit}")


def ancestor(root: Path, generations: int) -> str:
    """The commit `generations` before the one checked out."""
    return word(root, "rev-parse", "--verify", f"HEAD~{generations}^{{commit}}")
