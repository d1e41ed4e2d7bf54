"""The pages: examples print what they say, bounds and plots are kept, named files exist, imports follow the map.

The displayed formulas are evaluated in test_note_formulas.py.
"""

import ast
import contextlib
import doctest
import importlib.util
import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch


ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs_patch" / "source"
NOTES = sorted((SOURCE / "notes").glob("*.rst"))
PAGES = ("README.md", "CONTRIBUTING.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# paths below a top-level folder of the repository, in code spans and code blocks; a pattern or a placeholder is none
PATH = re.compile(r"(?<![\w/.])(?:\.ci|docs_patch|test|tools|torch_patch)/[\w./-]*\w(?![\w*<{])")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def script(name):
    """The module docs_patch/source/scripts/lobpcg/NAME.py."""
    path = SOURCE / "scripts" / "lobpcg" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"lobpcg_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return script("demo")


@pytest.fixture(scope="module")
def plots():
    return script("plots")


def silent(*words):
    """Takes the place of print."""


def broken_bounds(figures):
    assert figures
    return [str(figure) for figure in figures if not figure.kept]


def test_readme_examples():
    examples = EXAMPLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert examples
    names = {}
    for code, expected in examples:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "README.md", "exec"), names)
        assert output.getvalue() == expected


def failures(text, name):
    """What a doctest of the text reports, and how many examples it has."""
    report = io.StringIO()
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch}, name, name, 0)
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.write)
    return report.getvalue(), result.attempted


@pytest.mark.parametrize("page", NOTES, ids=[page.stem for page in NOTES])
def test_examples_of_a_note(page):
    report, count = failures(page.read_text(encoding="utf-8"), page.name)
    assert count
    assert report == ""


def names_of(note):
    """What the examples of a note have defined."""
    text = (SOURCE / "notes" / f"{note}.rst").read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch}, note, note, 0)
    doctest.DocTestRunner(verbose=False).run(test, out=silent, clear_globs=False)
    return test.globs


@pytest.mark.parametrize("name", ["sharpness", "ground_energy", "frequencies"])
def test_gradients_of_the_examples_with_callables(name):
    """Against central differences, in a direction, at a point without symmetry."""
    names = names_of("lobpcg_callable")
    size = {"sharpness": (48,), "ground_energy": (8,), "frequencies": (14, 10)}[name]
    t = torch.arange(1.0, math.prod(size) + 1, dtype=torch.float64).reshape(size)
    point, direction = 1 + t.square().sin() / 4, t.square().cos()
    value = lambda s: names[name](point + s * direction).sum()
    step = 1e-5
    exact = (value(step) - value(-step)) / (2 * step)
    (g,) = torch.autograd.grad(names[name](point.requires_grad_()).sum(), point)
    assert abs((g * direction).sum() / exact - 1) < 1e-7


def test_examples_of_the_reference():
    text = torch.lobpcg.__doc__
    report, count = failures(text, "lobpcg")
    assert count
    assert report == ""
    arguments = text[text.index("Args:") : text.index("Returns:")]
    code = torch.lobpcg.__code__
    for parameter in code.co_varnames[: code.co_argcount]:
        assert re.search(rf"^ +(\w+, )*{parameter}\b.*\(", arguments, re.MULTILINE), parameter


def test_pictures_of_the_notes_exist():
    for page in NOTES:
        for name in re.findall(r"^\.\. (?:figure|image):: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert (page.parent / name).is_file(), name


@pytest.mark.slow
@pytest.mark.parametrize("markup", ["rst", "md"])
def test_pages_build_without_warnings(tmp_path, markup):
    """The notes and the reference in a tree whose other pages have either markup, as PyTorch's versions do."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
    (source / "conf.py").write_text(f"extensions = {extensions}\n", encoding="utf-8")
    if markup == "rst":
        text = "Pages\n=====\n\n.. toctree::\n   :glob:\n\n   notes/*\n\n.. autofunction:: torch.lobpcg\n"
    else:
        text = "# Pages\n\n```{toctree}\n:glob:\n\nnotes/*\n```\n\n```{eval-rst}\n.. autofunction:: torch.lobpcg\n```\n"
    (source / f"index.{markup}").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", source, tmp_path / "build"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_features_are_there(monkeypatch, capsys):
    """The column of torch.lobpcg in the table of features, measured."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    features = importlib.import_module("features")
    assert features.main(["--peer", "lobpcg"]) == 0
    rows = re.findall(r"^\| (\w[\w-]*) \| (.*?) \| ", capsys.readouterr().out, re.MULTILINE)
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Features beside others")[1]
    shown = re.findall(r"^\| `(\w[\w-]*)` \| (.*?) \| ", table, re.MULTILINE)
    names = {name for name, _ in rows}
    assert [row for row in shown if row[0] in names] == rows


def test_a_feature_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    features = importlib.import_module("features")
    right = torch.lobpcg
    monkeypatch.setattr(torch, "lobpcg", lambda A, **options: [1.001 * M for M in right(A, **options)])
    assert features.main(["--peer", "lobpcg", "--row", "sparse"]) == 1
    assert " off |" in capsys.readouterr().out


def test_plot_of_the_tolerance(plots):
    """One order per order of tol without the Newton step, and more than two with it, down to rounding."""
    without, newton = (plots.tolerance_curve(m, tolerances=(1e-3, 1e-7)) for m in (300, 200))
    assert 0.8 < math.log10(without[0] / without[1]) / 4 < 1.2
    assert newton[0] < without[0] ** 2
    assert newton[1] < 1e-13


def test_plot_of_the_gap(plots):
    """eps / gap through eigh, nothing through lobpcg."""
    gaps = (1e-2, 1e-6, 1e-12)
    eigh, lobpcg = plots.gap_curve(plots.by_eigh, gaps=gaps), plots.gap_curve(plots.by_lobpcg, gaps=gaps)
    assert eigh[2] > 1e3 * eigh[1] > 1e3 * eigh[0]
    assert max(lobpcg) < 1e-13


def test_gradient_in_closed_form(plots):
    """The reference of the plots, against finite differences of the projector."""
    e, Q, W = torch.linspace(0, 1, 12, dtype=torch.float64), plots.orthogonal(12, 0), plots.weights(12, 1)
    A, direction, h = (Q * e) @ Q.mT, plots.weights(12, 5), 1e-5
    values = []
    for t in (h, -h):
        X = torch.linalg.eigh(A + t * direction).eigenvectors[:, :3]
        values.append(((W @ X) * X).sum())
    assert torch.isclose((values[0] - values[1]) / (2 * h), (plots.exact_gradient(e, Q, W, 3) * direction).sum())


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {*PATH.findall(text), *LINK.findall(text)}
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_table_of_transforms():
    """The cells are the tests that are there, and those that expect a result."""
    from test_lobpcg_transforms import TestLobpcgTransformTable as Table

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Transforms")[1].split("\n## ")[0]
    head, _, *rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert [row[0].strip("`") for row in rows] == list(Table.transforms)
    for name, *cells in rows:
        for column, cell in zip(head[1:], cells):
            refused = column.startswith("sparse") and name.strip("`") in Table.refused
            assert cell == ("–" if refused else "A, B, both")
            for wanted in ("A", "B", "both"):
                assert hasattr(Table, f"test_{name.strip('`')}_{column}_{wanted}")


def imported_siblings(file):
    """The modules of _lobpcg_impl that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[2] for name in names if name.startswith("torch._lobpcg_impl.")}
    return found


def test_imports_follow_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^        (\w+)  ", text.split("    _lobpcg_impl/\n")[1].split("    _dynamo/")[0], re.MULTILINE
    )
    files = {
        file.stem: file for file in (ROOT / "torch_patch" / "_lobpcg_impl").glob("*.py") if file.stem != "__init__"
    }
    assert sorted(files) == sorted(listed)
    for position, name in enumerate(listed):
        assert imported_siblings(files[name]) & set(files) <= set(listed[position + 1 :]), name


@pytest.mark.parametrize("options", [{}, {"method": "ortho", "tol": 1e-11}], ids=["default", "ortho"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_issue_38948(demo, seed, options):
    assert broken_bounds(demo.issue_38948(seed=seed, **options)) == []


def test_karate_club(demo):
    assert broken_bounds(demo.karate_club(report=silent)) == []


@pytest.mark.parametrize("options", [{"size": 6}, {"fast_mode": True, "method": "ortho"}], ids=["slow", "fast"])
def test_symmetric_gradcheck(demo, options):
    assert broken_bounds(demo.symmetric_gradcheck(**options)) == []


def test_four_cases(demo):
    assert broken_bounds(demo.four_cases(size=60, orders=(1, 5))) == []


def test_demo_notices_a_wrong_gradient(demo, monkeypatch):
    """With every gradient in A and B one per cent too large, every bound that is on a gradient is broken."""
    right = torch.lobpcg

    def enlarge(matrix):
        if matrix is None or not matrix.requires_grad:
            return matrix
        matrix = matrix.clone()
        matrix.register_hook(lambda g: 1.01 * g)
        return matrix

    def wrong(A, k=None, B=None, **options):
        return right(enlarge(A), k, enlarge(B), **options)

    monkeypatch.setattr(torch, "lobpcg", wrong)
    figures = [
        *demo.issue_38948(),
        *demo.karate_club(report=silent),
        *demo.symmetric_gradcheck(fast_mode=True),
        *demo.four_cases(size=20, orders=(1,)),
    ]
    kept = [figure.name for figure in figures if figure.kept]
    assert kept == ["karate club, eigenvalues: largest error"]
