#!/usr/bin/env python3
"""Try the patch on each PyTorch that is supported, and say per version what was done and what passed.

usage: python3 tools/dev.py versions [VERSION ...] [options]

RAN are the versions on which the whole suite runs, each in an environment made for it, patched there, and deleted
after it. PATCHED are those that are patched, verified and reverted, byte for byte, but not run: pip unpacks a wheel of
each into a folder, that for macOS, which has the same Python files in a tenth of the bytes. Without VERSION all of
both are done. A version that is done already, with the files that the repository holds now, is not done again, so a run
that was interrupted goes on where it was; what it found lies in build/versions/.

A word at least every ten seconds, the table at the end. The exit status is 1 if a version fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
SERIES = ROOT / "torch_patch" / "series.toml"
FOLDER = ROOT / "build" / "versions"
MARKS = ("<!-- versions -->\n", "<!-- /versions -->")

RAN = ("2.15.0", "2.14.1", "2.13.0")
PATCHED = ("2.12.1", "2.11.0", "2.10.0", "2.9.1", "2.8.0", "2.7.1", "2.6.0")
MACS = ("macosx_14_0_arm64", "macosx_11_0_arm64")
SILENCE = 8.0  # seconds

# pytest -v, with and without xdist
OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
PERCENT = re.compile(r"\[ *(\d+)%\]")
SUMMARY = re.compile(r"^=+ (.*) in [\d.]+s.*=+$", re.MULTILINE)
NAMED = re.compile(r"^(tested|patched) = .*\n", re.MULTILINE)
COUNT = re.compile(r"(\d+) (passed|failed|error|skipped|xfailed|xpassed)")


class Row(NamedTuple):
    """What was done with one version, and what came of it."""

    version: str
    build: str  # torch.__version__, or the wheel
    done: str
    right: bool
    minutes: float

    @property
    def line(self) -> str:
        return f"| {self.version} | {self.build} | {self.done} |"


def say(text: str) -> None:
    print(f"versions: {text}", flush=True)


# --- what was done already


def state() -> str:
    """A digest of the files that a result depends on."""
    digest = hashlib.sha256()
    for top in ("torch_patch", "docs_patch", "test", "tools/patchset", "tools/benchmark"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".toml", ".rst"):
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                # The words for what was done with a version follow from the results.
                data = NAMED.sub("", path.read_text(encoding="utf-8")) if path == SERIES else path.read_text("utf-8")
                digest.update(hashlib.sha256(data.encode()).digest())
    return digest.hexdigest()


def load(version: str) -> Row | None:
    """The row of a version that is right and was made with the files that are here now."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        fields = json.loads((FOLDER / f"{version}.json").read_text(encoding="utf-8"))
        if fields.pop("state") == state():
            row = Row(**fields)
            return row if row.right else None
    return None


def save(row: Row) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**row._asdict(), "state": state()}, indent=1)
    (FOLDER / f"{row.version}.json").write_text(text, encoding="utf-8")


# --- running the suite


def lines_of(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """What a process prints, line by line, and None after each SILENCE; ends with the process."""
    arrived: queue.Queue[str] = queue.Queue()  # a line is not empty; "" is the end

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            arrived.put(line)
        arrived.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=SILENCE)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield line


class Progress:
    """Counts outcomes as pytest prints them, and tells where it is every few seconds."""

    def __init__(self, version: str) -> None:
        self.version, self.begin, self.last = version, time.monotonic(), time.monotonic()
        self.counts: dict[str, int] = {}
        self.percent, self.what = "0", "setting up"

    def see(self, line: str | None) -> None:
        if line and (outcome := OUTCOME.search(line)) and (percent := PERCENT.search(line)):
            self.counts[outcome[1]] = self.counts.get(outcome[1], 0) + 1
            self.percent, self.what = percent[1], next((w for w in line.split() if "::" in w), self.what)
        elif line and line.startswith("dev.py: "):
            self.what = line.removeprefix("dev.py: ").strip()[:100]
        if line is None or time.monotonic() - self.last >= SILENCE:
            self.last = time.monotonic()
            bad = self.counts.get("FAILED", 0) + self.counts.get("ERROR", 0)
            counts = f"{self.percent} %, {self.counts.get('PASSED', 0)} passed, {bad} failed"
            say(f"{self.version}: {counts}, {self.last - self.begin:.0f} s; {self.what}")


def run_suite(version: str, options: argparse.Namespace) -> Row:
    """Set up, patch and test one version; its output goes to a log beside the results."""
    begin = time.monotonic()
    venv, log = FOLDER / version, FOLDER / f"{version}.log"
    python = dict(item.split("=", 1) for item in options.python).get(version)
    env = {**os.environ, "LOBPCG_TORCH": f"torch=={version}", "LOBPCG_VENV": str(venv), "PYTHONUNBUFFERED": "1"}
    env.pop("LOBPCG_PYTHON", None)
    if python:
        env["LOBPCG_PYTHON"] = python
        subprocess.run([python, str(ROOT / "tools" / "patch.py"), "apply"], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, str(ROOT / "tools" / "dev.py"), "test", "-v", "-p", "no:cacheprovider", *options.pytest]
    progress = Progress(version)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8", buffering=1) as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in lines_of(process):
                progress.see(line)
                if line is not None:
                    file.write(line)
        finally:
            if process.poll() is None:
                process.terminate()
            status = process.wait()
    text = log.read_text(encoding="utf-8")
    build = build_of(python or str(venv / "bin" / "python"))
    row = Row(version, build, summary(text, status), status == 0, (time.monotonic() - begin) / 60)
    if not row.right:
        say(f"{version}: {row.done}; the whole output is in {log}")
        for line in re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
            say(f"{version}: {line}")
    elif not python and not options.keep:
        shutil.rmtree(venv)
    return row


def build_of(python: str) -> str:
    probe = (
        "import importlib.metadata as m, sys; print('%s, Python %d.%d' % (m.version('torch'), *sys.version_info[:2]))"
    )
    done = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True)
    return done.stdout.strip() or "not installed"


def summary(text: str, status: int) -> str:
    """What pytest says on its last line, in the words of the table."""
    found = SUMMARY.findall(text)
    counts = [f"{number} {word}" for number, word in COUNT.findall(found[-1])] if found else []
    if not counts:
        return f"the set-up or the suite ended with status {status}"
    return "the whole suite ran: " + ", ".join(counts)


# --- patching files


def pip_wheel(version: str, folder: Path) -> Path:
    """The wheel of a version, as pip brings it."""
    platforms = [word for name in MACS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", "3.11", "--dest", str(folder), f"torch=={version}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in lines_of(process):
        if line is None:
            say(f"{version}: pip has {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.0f} MB")
        else:
            said.append(line)
    wheels = sorted(folder.glob("torch-*.whl"))
    if process.wait() or len(wheels) != 1:
        raise RuntimeError(f"pip brings no wheel: {''.join(said).strip()[-300:]}")
    return wheels[0]


def snapshot(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def patch_files(version: str, options: argparse.Namespace) -> Row:
    """Apply, verify and revert on the files of one version."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wheel").mkdir()
        say(f"{version}: fetching a wheel")
        wheel = Path(options.wheel[version]) if version in options.wheel else pip_wheel(version, folder / "wheel")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "site-packages")
        before = snapshot(folder / "site-packages")
        say(f"{version}: apply, verify, revert on {wheel.name}")
        for command in ("apply", "verify", "revert"):
            call = [sys.executable, str(ROOT / "tools" / "patch.py"), command, str(folder / "site-packages")]
            done = subprocess.run(call, check=False, capture_output=True, text=True)
            if done.returncode:
                said = (done.stdout + done.stderr).strip()
                return Row(version, wheel.name, f"{command} failed: {said}", False, (time.monotonic() - begin) / 60)
        same = snapshot(folder / "site-packages") == before
    words = "patched, verified, reverted" if same else "patched and verified, but not reverted byte for byte"
    return Row(version, wheel.name, words, same, (time.monotonic() - begin) / 60)


# --- the table


def table(rows: list[Row]) -> str:
    head = ["| PyTorch | build | done |", "| --- | --- | --- |"]
    return "\n".join([*head, *(row.line for row in rows)])


def publish(rows: list[Row]) -> None:
    """Put the table where CONTRIBUTING has it, and name its versions in series.toml; a test compares the two."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{head}{MARKS[0]}{table(rows)}\n{MARKS[1]}{tail}", encoding="utf-8")
    words = {"tested": RAN, "patched": PATCHED}
    named = {key: ", ".join(f'"{row.version}"' for row in rows if row.version in words[key]) for key in words}
    text = NAMED.sub(lambda line: f"{line[1]} = [{named[line[1]]}]\n", SERIES.read_text(encoding="utf-8"))
    SERIES.write_text(text, encoding="utf-8")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join((*RAN, *PATCHED))}")
    of_version = "the interpreter that runs the suite of a version; its torch is patched, nothing is installed"
    listed: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--python", metavar="VERSION=INTERPRETER", help=of_version, **listed)
    parser.add_argument("--wheel", metavar="VERSION=FILE", help="a wheel that is at hand", **listed)
    parser.add_argument("--again", action="store_true", help="do a version that is done already")
    parser.add_argument("--keep", action="store_true", help="keep the environments, in build/versions/")
    parser.add_argument("--publish", action="store_true", help="put the table into CONTRIBUTING.md and series.toml")
    parser.add_argument("--pytest", type=shlex.split, default=[], metavar="OPTIONS", help="for pytest: --pytest='-n 2'")
    options = parser.parse_args(arguments)
    unknown = [version for version in options.versions if version not in (*RAN, *PATCHED)]
    if unknown:
        parser.error(f"unknown versions: {', '.join(unknown)}; those that are supported: {', '.join((*RAN, *PATCHED))}")
    options.wheel = dict(item.split("=", 1) for item in options.wheel)
    return options


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    rows: dict[str, Row] = {}
    for version in options.versions or (*RAN, *PATCHED):
        row = None if options.again else load(version)
        if row is None:
            try:
                row = run_suite(version, options) if version in RAN else patch_files(version, options)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                row = Row(version, "", str(error), False, 0)
            save(row)
        else:
            say(f"{version}: done already")
        rows[version] = row
        say(f"{row.version}: {row.done}, {row.minutes:.0f} min")
    done = [row for version in (*RAN, *PATCHED) if (row := rows.get(version) or load(version))]
    print(table(done))
    missing = len((*RAN, *PATCHED)) - len(done)
    if missing:
        print(f"not done with these files: {missing} versions")
    if options.publish and not missing and all(row.right for row in done):
        publish(done)
    return 0 if all(row.right for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
