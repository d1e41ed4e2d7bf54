"""The series as commits: built in the object database alone, then exported as mails or put below HEAD.

A commit's bytes depend on the base, on the series and on who is configured as its author: dates are the base's, so that
two exports of the same series are the same files.
"""

import functools
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .disk import FileState
from .errors import PatchError
from .git import git, without_filters, word
from .plan import Original, Stage
from .series import Cover, Patch
from .text import sha256


_MAIL = ("--cover-letter", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-signature", "--no-attach")
_NO_SETTINGS = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def originals_at(root: Path, commit: str) -> Original:
    """The files of `commit`, whatever the working tree holds."""

    entries = _entries(root, commit)

    def original(path: str) -> tuple[FileState | None, bytes | None]:
        if path not in entries:
            return None, None
        mode, name = entries[path]
        if not mode.startswith("100"):
            raise PatchError(
                f"{path} is no regular file in {commit}", "one", "this version of PyTorch is not supported"
            )
        data = git(root, "cat-file", "blob", name)
        return FileState(sha256(data), int(mode, 8) & 0o777), data

    return functools.cache(original)


def _entries(root: Path, commit: str) -> dict[str, tuple[str, str]]:
    """Mode and object of each file of a commit."""
    rows = git(root, "ls-tree", "-r", "-z", commit).decode("utf-8", "surrogateescape").split("\0")
    splits = [row.split("\t", 1) for row in rows if row]
    return {path: (facts.split()[0], facts.split()[2]) for facts, path in splits}


def message(patch: Patch) -> str:
    """Subject, reason, what is resolved and how to test it, in the form of PyTorch's commits."""
    parts = [patch.subject, wrapped(patch.why)]
    if patch.resolves:
        parts.append("\n".join(f"Fixes #{number}" for number in patch.resolves))
    files: dict[str, list[str]] = {}
    for entry in patch.classes:
        path, name = entry.split("::")
        files.setdefault(path, []).append(name)
    runs = []
    for path, names in files.items():  # -k takes every class whose name contains the word
        words = [name for name in names if not any(other in name for other in names if other != name)]
        runs.append(f"python {path} -k " + " -k ".join(words))
    return "\n\n".join([*parts, "Test Plan:\n" + "\n".join([*runs, *patch.plan])]) + "\n"


def wrapped(text: str) -> str:
    """The paragraphs of `text` in lines of mails; what is indented, commands for example, stays as it is."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(p if p.startswith("    ") else textwrap.fill(p, 72) for p in paragraphs)


def build(root: Path, base: str, stages: Sequence[Stage], env: dict[str, str] | None = None) -> list[str]:
    """One commit for each stage, on top of `base`; returns them. Neither index, files nor references change."""
    date, entries = _date(root, base), _entries(root, base)
    commits: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        index = {**(env or {}), "GIT_INDEX_FILE": os.path.join(folder, "index")}
        git(root, "read-tree", base, env=index)
        for stage in stages:
            lines = []
            for path, data in stage.files.items():
                name = word(root, "hash-object", "-w", "--no-filters", "--stdin", data=data, env=env)
                lines.append(f"{entries[path][0] if path in entries else '100644'} {name}\t{path}\n")
            git(root, "update-index", "--index-info", data="".join(lines).encode(), env=index)
            tree = word(root, "write-tree", env=index)
            dates = {**(env or {}), "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
            parent = commits[-1] if commits else base
            text = message(stage.patch).encode()
            commits.append(word(root, "commit-tree", tree, "-p", parent, data=text, env=dates))
    return commits


def _date(root: Path, base: str) -> str:
    return word(root, "show", "-s", "--format=%ct +0000", base)


def export(root: Path, base: str, stages: Sequence[Stage], cover: Cover, output: Path) -> list[str]:
    """Write the series as mails for `git am` into the folder `output`, which must not exist or be empty; their names.

    The objects go to a database that lasts as long as this call: the repository in `root` is only read.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PatchError(f"{output} is there and not an empty folder", "a folder to be made", "name another one")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        folder = Path(name)
        (folder / "objects").mkdir()
        theirs = root / word(root, "rev-parse", "--git-path", "objects")
        env = {"GIT_OBJECT_DIRECTORY": str(folder / "objects"), "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(theirs)}
        tip = build(root, base, stages, env)[-1]
        mails = folder / "mails"
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/", "--subject-prefix=PATCH")
        options = (*_MAIL, *prefixes, f"--base={base}", "--output-directory", str(mails), f"{base}..{tip}")
        sender = {**_identity(root), "GIT_COMMITTER_DATE": _date(root, base)}
        git(root, "format-patch", "-q", *options, env={**env, **sender, **_NO_SETTINGS})
        names = sorted(path.name for path in mails.iterdir())
        letter = mails / names[0]
        letter.write_bytes(_filled(letter.read_bytes(), cover))
        if output.exists():
            output.rmdir()
        shutil.move(mails, output)
    return names


def _filled(letter: bytes, cover: Cover) -> bytes:
    """A cover letter with the subject and the text in the places that git marks by three asterisks."""
    for mark, text in ((b"SUBJECT HERE", cover.subject), (b"BLURB HERE", wrapped(cover.text))):
        if letter.count(mark) != 1:
            raise PatchError(f"a cover letter without {mark.decode()}", "git's placeholder", "use git 2.17 or newer")
        letter = letter.replace(b"*** " + mark + b" ***", text.encode())
    return letter


def _identity(root: Path) -> dict[str, str]:
    """Who is configured, as variables that hold where the settings are not read."""
    match = re.fullmatch(r"(.*) <(.*)> \d+ [+-]\d+", word(root, "var", "GIT_COMMITTER_IDENT"))
    return {"GIT_COMMITTER_NAME": match[1], "GIT_COMMITTER_EMAIL": match[2]} if match else {}


def move_head(root: Path, to: str, expected: str, paths: Sequence[str]) -> None:
    """Let HEAD, which is `expected` or `to`, be `to`, and the index agree with it on `paths`; no file is touched."""
    if word(root, "rev-parse", "HEAD") != to:
        git(root, "update-ref", "-m", "patch.py", "HEAD", to, expected)
    git(root, *without_filters(root), "reset", "-q", "--", *paths)
