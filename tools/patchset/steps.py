"""Every patch of the series leaves a PyTorch that works: each one's test plan, on the installed torch patched so far.

The torch of each step is a tree of links to the installed one, with files of its own where the series changes
something; the installed one is only read, patched or not.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .classes import part_of
from .plan import Original, Stage, unpatched_stages
from .series import check_classes, load_series, Patch, Series
from .target import find_target


def check_steps(project: Path, pytest: Sequence[str] = (), say: Callable[[str], object] = print) -> int:
    """Import torch and run the tests of each patch in turn with this interpreter; 1 if a step fails."""
    series, target = load_series(project), find_target(None)
    check_classes(series)
    stages, original = unpatched_stages(series, target)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for number, stage in enumerate(stages, 1):
            folder = Path(name) / str(number)
            make_overlay(folder, target.root, contents_after(stages, number, original))
            tests = _write_tests(folder, series, number)
            status = _run(folder, stage.patch, tests, pytest)
            failed += status != 0
            outcome = (
                f"failed ({status})" if status else "passes" if tests or _calls(stage.patch) else "torch is imported"
            )
            say(f"{number}/{len(stages)} {outcome}: {stage.patch.subject}")
    return 1 if failed else 0


def contents_after(stages: Sequence[Stage], number: int, original: Original) -> dict[str, bytes | None]:
    """What each file of the whole series holds after the first `number` patches; None where there is none yet."""
    found = {path: original(path)[1] for stage in stages for path in stage.files}
    for stage in stages[:number]:
        found.update(stage.files)
    return found


def make_overlay(folder: Path, root: Path, contents: dict[str, bytes | None]) -> None:
    """The torch of `root` in `folder`, as links, but for the files that `contents` names."""
    own = {parent for path in contents for parent in list(Path(path).parents)[:-1]}
    for place in sorted(own):
        (folder / place).mkdir(parents=True)
        for entry in _entries(root / place):
            relative = place / entry.name
            if relative not in own and relative.as_posix() not in contents and entry.name != "__pycache__":
                os.symlink(entry.path, folder / relative, target_is_directory=entry.is_dir())
    for path, data in contents.items():
        if data is not None:
            (folder / path).write_bytes(data)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from entries


def _write_tests(folder: Path, series: Series, number: int) -> list[str]:
    """The test classes named so far, in files of their own; returns those files in which patch `number` names some."""
    named: dict[str, list[str]] = {}
    for entry in [entry for patch in series.patches[:number] for entry in patch.classes]:
        path, name = entry.split("::")
        named.setdefault(path, []).append(name)
    for path, names in named.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(part_of(series.source(path).read_bytes(), names, path))
    last = series.patches[number - 1].classes
    return list(dict.fromkeys(entry.split("::")[0] for entry in last))


def _run(folder: Path, patch: Patch, tests: list[str], options: Sequence[str]) -> int:
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    python = [sys.executable, "-W", "ignore"]
    place = f"import torch, sys; sys.exit(not torch.__file__.startswith({str(folder)!r}))"
    status = 0
    for call in [place, *_calls(patch)]:
        status = status or subprocess.run([*python, "-c", call], env=env, cwd=folder, check=False).returncode
    for path in tests if status == 0 else []:
        names = [entry.split("::")[1] for entry in patch.classes if entry.startswith(path + "::")]
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", path]
        command += ["-k", " or ".join(names), *options]
        status = status or subprocess.run(command, env=env, cwd=folder, check=False).returncode
    return status


def _calls(patch: Patch) -> list[str]:
    """What follows python -c in the test plan of a patch."""
    words = [shlex.split(line) for line in patch.plan if line.startswith("python -c ")]
    return [call for _, _, call in words]
