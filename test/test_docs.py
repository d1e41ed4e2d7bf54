"""The pages at the top: examples print what they say, bounds are kept, named files exist, imports follow the map."""

import ast
import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

import torch


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs_patch" / "source" / "scripts" / "lobpcg" / "demo.py"
PAGES = ("README.md", "CONTRIBUTING.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# paths below a top-level folder of the repository, in code spans and code blocks; a pattern or a placeholder is none
PATH = re.compile(r"(?<![\w/.])(?:\.ci|docs_patch|test|tools|torch_patch)/[\w./-]*\w(?![\w*<{])")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("lobpcg_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {*PATH.findall(text), *LINK.findall(text)}
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def imported_siblings(file):
    """The _lobpcg modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("torch._lobpcg")}
    return found


def test_imports_follow_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, *parts = text.split("|-- ")
    differentiation, solution = (re.findall(r"^    [ |]   (_lobpcg_\w+)", part, re.MULTILINE) for part in parts)
    files = {file.stem: file for file in (ROOT / "torch_patch").glob("_lobpcg*.py")}
    assert sorted(files) == sorted(["_lobpcg", *differentiation, *solution])
    for part in (differentiation, solution):
        for position, name in enumerate(part):
            assert imported_siblings(files[name]) <= set(part[position + 1 :]), name


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
