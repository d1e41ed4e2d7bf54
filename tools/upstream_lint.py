#!/usr/bin/env python3
"""Run PyTorch's own linters, in the releases that it pins, on what the series changes.

The series is committed on a copy of the source tree of a release (--tree; without it, Debian's source package is
downloaded once), and lintrunner looks at the files that differ from the base, as it does in PyTorch's pull requests.
lintrunner and the linters go into an environment in build/. Left out are what needs a built tree (MYPY), what asks
for lintrunner's own release (LINTRUNNER_VERSION) and what asks the network (TESTOWNERS). Exit status 1 if there is a
finding.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patchset.series import parsed
from upstream.source import fetched, FetchError


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "upstream-lint"
LEFT_OUT = "MYPY,MYPYSTRICT,LINTRUNNER_VERSION,TESTOWNERS"
LINTRUNNER = "lintrunner==0.12.7"
IDENTITY = {f"GIT_{role}_{what}": f"lint@{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def pins(tree: Path) -> list[str]:
    """What the linters that look at Python files are installed from, as the tree says."""
    linters = parsed(tree / ".lintrunner.toml")["linter"]
    taken = [linter for linter in linters if linter["code"] in ("FLAKE8", "PYFMT", "RUFF")]
    words = [word for linter in taken for word in linter["init_command"] if "==" in word]
    return list(dict.fromkeys([LINTRUNNER, *words]))


def install(packages: list[str]) -> Path:
    """The folder of the programs; made anew where other releases are asked for."""
    stamp, folder = ENVIRONMENT / "packages", ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != "\n".join(packages):
        print("installing " + " ".join(packages), flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(folder / "python"), "-m", "pip", "install", "--no-input", "setuptools<81", *packages]
        subprocess.run(pip, check=True)
        stamp.write_text("\n".join(packages), encoding="utf-8")
    return folder


def commit(tree: Path, folder: Path, env: dict[str, str]) -> str:
    """The tree with the series on top, in `folder`; the commit below it."""
    print("committing the series on a copy of the tree", flush=True)
    shutil.copytree(tree, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    for words in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "base"]):
        subprocess.run(["git", *words], cwd=folder, env=env, check=True)
    base = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    patch = [sys.executable, str(ROOT / "tools" / "patch.py"), "apply", "--commits", str(folder)]
    subprocess.run(patch, env=env, check=True)
    return base.stdout.strip()


def run(words: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Status and output of a command, with a word while it is silent."""
    begin = time.monotonic()
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    while True:
        try:
            text, _ = process.communicate(timeout=8)
        except subprocess.TimeoutExpired:
            print(f"{words[0]} at work since {time.monotonic() - begin:.0f} s", flush=True)
            continue
        return process.returncode, text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="source tree of a PyTorch release")
    options = parser.parse_args(arguments)
    try:
        tree = options.tree or fetched(ROOT / "build" / "pytorch-source")
        programs = install(pins(tree))
    except (FetchError, OSError, subprocess.CalledProcessError) as error:
        print(f"upstream_lint: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        env = {**os.environ, **IDENTITY, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        folder = Path(name) / "pytorch"
        base = commit(tree, folder, env)
        words = ["lintrunner", "--revision", base, "--skip", LEFT_OUT, "--output", "json", f"--data-path={name}/data"]
        status, text = run(words, folder, env)
    findings = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for found in findings:
        print(f"{found['path']}:{found['line']}: {found['code']} {found['name']}: {found['description']}")
    print(f"{len(findings)} findings")
    return 1 if findings or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
