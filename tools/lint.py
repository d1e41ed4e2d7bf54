"""Style and types: ruff, its formatter, mypy on the tools, and mypy on what goes into torch, with torch around it.

What goes into PyTorch is stored as PyTorch's own pinned formatter leaves it, a release of its own in build/.
`tools/dev.py lint` runs this with what it needs installed. All five run; the exit status is 1 if one finds something.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from patchset.plan import unpatched_stages
from patchset.series import load_series
from patchset.steps import contents_after, make_overlay
from patchset.target import find_target


ROOT = Path(__file__).resolve().parent.parent
FORMATTER = "ruff==0.7.4"  # as PyTorch 2.6.0 pins it for its imports, formats and checks
TYPED = ROOT / "build" / "typed"  # a torch of links with torch_patch/ in it, where mypy takes it for sources

# strict, as far as torch is annotated: it is called without annotations, and its operators return Any
TYPES = """[mypy]
python_version = 3.10
strict = True
disallow_untyped_calls = False
disallow_subclassing_any = False
warn_return_any = False
implicit_reexport = True
warn_unused_ignores = False
follow_imports = silent

[mypy-torch.*]
ignore_errors = True
"""


def patched_torch() -> list[str]:
    """Make TYPED anew of the torch that this interpreter imports; the modules that the series puts there."""
    series, target = load_series(ROOT), find_target(None)
    stages, original = unpatched_stages(series, target)
    shutil.rmtree(TYPED, ignore_errors=True)
    make_overlay(TYPED, target.root, contents_after(stages, len(stages), original))
    whole = [path for patch in series.patches for path in patch.new + patch.replace]
    return [path for path in whole if path.startswith("torch/") and path.endswith(".py")]


def typed(files: list[str]) -> int:
    modules = ",".join(file.removesuffix(".py").replace("/", ".") for file in files)
    settings = TYPED / "mypy.ini"
    settings.write_text(f"{TYPES}\n[mypy-{modules}]\nignore_errors = False\n", encoding="utf-8")
    options = ["--config-file", str(settings), "--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {**os.environ, "MYPYPATH": str(TYPED)}
    return subprocess.call([sys.executable, "-m", "mypy", *options, *files], cwd=TYPED, env=environment)


def formatted() -> int:
    """Whether the files that go into PyTorch, tests and scripts included, are formatted as it formats them."""
    folder = ROOT / "build" / FORMATTER
    if not folder.exists():
        install = ["pip", "install", "--quiet", "--no-deps", "--target", str(folder), FORMATTER]
        if status := subprocess.call([sys.executable, "-m", *install]):
            return status
    tests = {name.split("::")[0] for patch in load_series(ROOT).patches for name in patch.classes}
    command = [str(folder / "bin" / "ruff"), "format", "--isolated", "--line-length", "88", "--check"]
    return subprocess.call([*command, "torch_patch", "docs_patch", *sorted(tests)], cwd=ROOT)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    commands = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])
    statuses = [subprocess.call([sys.executable, "-m", *command], cwd=ROOT) for command in commands]
    statuses.append(formatted())
    statuses.append(typed(patched_torch()))
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
