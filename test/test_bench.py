"""tools/bench.py: selection, medians, bars, exponents, tables, lost rows, and the exact gradients it compares with."""

import contextlib
import io
import json
import math
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench  # noqa: E402
import fake_pytorch  # noqa: E402
from benchmark import cases, plot, report, upstream  # noqa: E402
from benchmark.cases import Bar, Case, CASES, PEERS, select, Study  # noqa: E402
from benchmark.process import Options, Row  # noqa: E402
from patchset.target import find_target  # noqa: E402


try:
    import scipy.linalg
    import scipy.sparse.linalg
    from benchmark import matrices, problems

    import torch

    problems.catalogue()
    HAS_PROBLEMS = True
except (ImportError, FileNotFoundError):
    HAS_PROBLEMS = False


def row(seconds=1.0, residual=1e-9, **more):
    return {
        "seconds": seconds,
        "residual": residual,
        "runs": 3,
        "warm_up": "",
        "notes": [],
        **more,
    }


class TestCases(unittest.TestCase):
    def test_names_in_cases_exist(self):
        for name, case in CASES.items():
            self.assertEqual(name, case.name)
            self.assertLessEqual(set(case.peers + case.more), set(PEERS))
            self.assertFalse(set(case.peers) & set(case.more))
            for bar in case.bars:
                with self.subTest(case=name, bar=str(bar)):
                    self.assertIn(bar.metric, cases.METRICS)
                    self.assertIn(bar.against_metric or "seconds", cases.METRICS)
                    other = CASES[bar.against_case or name]
                    if bar.against:
                        self.assertIn(bar.against, other.peers)
        for study in cases.STUDIES:
            self.assertLessEqual(set(study.cases), set(CASES))

    def test_cases_survive_the_way_to_the_child(self):
        import dataclasses

        for case in CASES.values():
            again = Case(**json.loads(json.dumps(dataclasses.asdict(case))))
            self.assertEqual((again.problem, again.k, again.kind), (case.problem, case.k, case.kind))

    def test_everything_by_default_but_peers_on_request(self):
        rows = select([], [])
        self.assertEqual(list(rows), list(CASES))
        for name, peers in rows.items():
            self.assertEqual(set(peers), set(CASES[name].peers))

    def test_globs(self):
        self.assertEqual(
            list(select(["goe-500-k5", "laplacian-50x50-k*"], [])),
            ["laplacian-50x50-k4", "laplacian-50x50-k20", "goe-500-k5"],
        )
        self.assertEqual(
            select(["laplacian-400x400-k4"], ["patched", "up*"]), {"laplacian-400x400-k4": ["patched", "upstream"]}
        )
        self.assertNotIn("batch-256x32", select([], ["scipy"]))

    def test_another_interpreter_runs_wherever_lobpcg_does(self):
        for name, peers in select([], [], beside=True).items():
            self.assertEqual("beside" in peers, "patched" in peers, name)
        self.assertNotIn("beside", select(["goe-500-k5"], ["eigh"], beside=True)["goe-500-k5"])

    def test_what_is_published_is_measured(self):
        self.assertLessEqual(set(report.PUBLISHED), set(CASES))
        self.assertLessEqual(set(report.PUBLISHED_PEERS), set(report.OVERVIEW))
        self.assertEqual({case.group for case in CASES.values()}, set(cases.GROUPS))

    def test_the_page_shows_what_was_published(self):
        """Rows of the README's table are cases of the benchmark, and the picture has the ratios of the same run."""
        import re

        table = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- times -->")[1].split("<!-- /times -->")[0]
        rows = re.findall(r"^\| `([\w-]+)` \| .*? \| .*? \| ([\d.]*) \|", table, re.MULTILINE)
        self.assertTrue(rows)
        self.assertLessEqual({name for name, _ in rows}, set(report.PUBLISHED))
        picture = bench.PICTURE.read_text(encoding="utf-8")
        for name, ratio in rows:
            with self.subTest(case=name):
                self.assertIn(f">{CASES[name].title}</text>", picture)
                self.assertIn(f">{float(ratio):.2g} × ", picture)

    def test_unknown_names(self):
        for arguments in ((["nothing*"], []), ([], ["nobody"]), (["batch-256x32"], ["scipy"])):
            with self.subTest(arguments=arguments), self.assertRaises(ValueError):
                select(*arguments)


class TestSummary(unittest.TestCase):
    def test_median_of_times_worst_of_errors(self):
        runs = [
            {"seconds": s, "residual": r, "warnings": [w]}
            for s, r, w in ((3.0, 1e-9, "b"), (1.0, 3e-9, "a"), (9.0, 2e-9, "a"))
        ]
        found = report.summarize({"nnz": 7, "versions": {}}, runs, {"variant": "a"}, None, "")
        self.assertEqual((found["seconds"], found["residual"], found["runs"]), (3.0, 3e-9, 3))
        self.assertEqual((found["nnz"], found["variant"], found["notes"]), (7, "a", ["a", "b"]))
        self.assertAlmostEqual(found["spread"], 8 / 3)

    def test_nan_is_the_worst(self):
        runs = [{"seconds": 1.0, "gradient_error": e} for e in (1e-9, math.nan, 1e-3)]
        self.assertTrue(math.isnan(report.summarize({}, runs, {}, None, "")["gradient_error"]))

    def test_lost_row(self):
        found = report.summarize({}, [], {}, "ValueError: no", "")
        self.assertEqual((found["error"], found["runs"]), ("ValueError: no", 0))
        self.assertNotIn("seconds", found)

    def test_plan_of_turns(self):
        options = Options("python", repeats=5, budget=10.0)
        self.assertEqual(bench.plan({"seconds": 0.1}, options, "time"), ([], 5, ""))
        kept, turns, remark = bench.plan({"seconds": 3.0}, options, "time")
        self.assertEqual((kept, turns), ([], 3))
        self.assertIn("budget", remark)
        first = {"seconds": 4.0, "forward": 3.0}  # both are run in a turn
        kept, turns, remark = bench.plan(first, options, "time")
        self.assertEqual((kept, turns), ([first], 0))
        self.assertIn("warm-up", remark)
        self.assertEqual(bench.plan({}, options, "time"), ([], 0, ""))


class TestVerdict(unittest.TestCase):
    case = "dense-2000"

    def judge(self, bar, **rows):
        return report.verdict(bar, self.case, {self.case: rows})

    def test_ratio(self):
        bar = Bar("seconds", 0.7, "scipy")
        for seconds, met in ((0.69, True), (0.71, False)):
            found = self.judge(bar, patched=row(seconds), scipy=row(1.0))
            self.assertEqual((found["met"], found["reached"]), (met, seconds))

    def test_absolute_limit(self):
        bar = Bar("gradient_error", 1e-6)
        self.assertTrue(self.judge(bar, patched=row(gradient_error=1e-6))["met"])
        self.assertFalse(self.judge(bar, patched=row(gradient_error=2e-6))["met"])
        self.assertFalse(self.judge(bar, patched=row(gradient_error=math.nan))["met"])

    def test_other_metric_of_the_same_peer(self):
        found = self.judge(Bar("seconds", 1.6, "patched", "forward"), patched=row(3.0, forward=2.0))
        self.assertEqual((found["met"], found["reached"]), (True, 1.5))

    def test_other_case(self):
        bar = Bar("seconds", 1 / 40, "patched", against_case="laplacian-400x400-k4")
        with_amg, without = "laplacian-400x400-k4-amg", "laplacian-400x400-k4"
        for seconds, met in ((79.0, False), (81.0, True)):
            results = {with_amg: {"patched": row(2.0)}, without: {"patched": row(seconds)}}
            self.assertIs(report.verdict(bar, with_amg, results)["met"], met)

    def test_fast_by_a_larger_residual_is_not_met(self):
        bar = Bar("seconds", 0.7, "scipy")
        loose = row(0.1, residual=1e-6)  # the case asks for a relative 1e-8
        found = self.judge(bar, patched=loose, scipy=row(1.0))
        self.assertIs(found["met"], False)
        self.assertIn("residual", found["reason"])
        self.assertTrue(self.judge(bar, patched=loose, scipy=row(1.0, residual=1e-5))["met"])
        within = row(0.1, residual=9e-9)
        self.assertTrue(self.judge(bar, patched=within, scipy=row(1.0, residual=1e-14))["met"])

    def test_missing_figures_are_not_met_nor_missed(self):
        bar = Bar("seconds", 0.7, "scipy")
        for rows in ({}, {"patched": row()}, {"patched": {"error": "E: x"}, "scipy": row()}):
            found = self.judge(bar, **rows)
            self.assertIsNone(found["met"])
            self.assertTrue(found["reason"])


class TestGrowth(unittest.TestCase):
    def test_exponent_of_a_power_law(self):
        x = [1e4, 1e5, 1e6]
        self.assertAlmostEqual(report.exponent(x, [3 * a**1.25 for a in x]), 1.25)
        self.assertTrue(math.isnan(report.exponent([2, 2], [1, 5])))

    def test_study_judges_only_when_complete(self):
        plan = Study("s", "nnz", ("grad-nnz-1e4", "grad-nnz-1e5", "grad-nnz-1e6"))
        results = {
            name: {"patched": row(s, nnz=n)} for name, s, n in (("grad-nnz-1e4", 1.0, 10), ("grad-nnz-1e5", 20.0, 100))
        }
        self.assertIsNone(report.study(plan, results)["met"])
        results["grad-nnz-1e6"] = {"patched": row(400.0, nnz=1000)}
        self.assertFalse(report.study(plan, results)["met"])
        self.assertIsNone(report.study(plan, {}))


class TestBestPeer(unittest.TestCase):
    name = "goe-500-k5"

    def best(self, **rows):
        return report.best_peer(rows, self.name)

    def test_the_fastest_of_those_that_are_right(self):
        slow = row(2.0)
        self.assertEqual(self.best(patched=row(1.0), eigh=slow, evr=row(4.0)), ("eigh", 0.5))
        for wrong in (row(0.1, missed=1), row(0.1, residual=2e-8), {"error": "E: x"}):
            self.assertEqual(self.best(patched=row(1.0), eigh=slow, evr=wrong), ("eigh", 0.5))
        self.assertIsNone(self.best(patched=row(1.0, missed=1), eigh=slow))
        self.assertIsNone(self.best(patched=row(1.0)))

    def test_other_versions_count_where_nobody_else_runs(self):
        self.assertEqual(self.best(patched=row(1.0), beside=row(0.5), eigh=row(4.0)), ("eigh", 0.25))
        self.assertEqual(self.best(patched=row(1.0), upstream=row(4.0)), ("upstream", 0.25))

    def test_bars_of_the_picture(self):
        """To the left of 1 where torch.lobpcg is faster, to the right where it is slower, an arrow beyond the ends."""
        import re
        from xml.etree import ElementTree

        results = {
            name: {"patched": row(seconds), "eigh": row(1.0)}
            for name, seconds in (("goe-500-k5", 0.5), ("goe-1000-k5", 4.0), ("batch-256x32", 100.0))
        }
        picture = plot.draw({"results": results})
        ElementTree.fromstring(picture)
        bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', picture)
        (left, faster), (middle, slower), (_, longest) = ((float(x), float(w)) for x, w in bars)
        self.assertAlmostEqual(left + faster, middle, delta=0.2)
        self.assertAlmostEqual(slower / faster, 2, delta=0.02)
        self.assertAlmostEqual(longest / faster, 5, delta=0.05)
        self.assertEqual(picture.count("<polygon"), 1)

    def test_circle_of_the_iterative_peers(self):
        rows = {"patched": row(1.0), "shift-invert": row(0.5), "primme": row(2.0), "scipy": row(1.5, missed=1)}
        picture = plot.draw({"results": {"graph-blobs": rows}})
        self.assertIn(f'<circle cx="{plot._x(0.5):.1f}"', picture)
        self.assertNotIn("<circle", plot.draw({"results": {"graph-blobs": rows | {"shift-invert": row(4.0)}}}))


class TestMarkdown(unittest.TestCase):
    def test_tables_are_rectangular_and_complete(self):
        results = {
            "goe-500-k5": {
                "patched": row(1.0, columns=12),
                "eigh": row(2.5, residual=1e-6, missed=1),
                "scipy": {"runs": 0, "warm_up": "", "notes": ["a | b"], "error": "ValueError: no"},
            }
        }
        text = report.markdown(
            {
                "results": results,
                "versions": {"torch": "2.13.0"},
                "threads": 1,
                "repeats": 3,
                "machine": "x",
                "clock": "wall",
                "bars": report.verdicts(results),
                "studies": [],
            }
        )
        for block in text.split("\n\n"):
            if block.startswith("|"):
                counts = {line.replace("\\|", "").count("|") for line in block.split("\n")}
                self.assertEqual(len(counts), 1, block)
        self.assertIn("| eigh | 2.5 |", text)
        self.assertIn("residual 1e+03 x patched's", text)
        self.assertIn("ValueError: no", text)
        self.assertIn("a \\| b", text)
        self.assertIn("missed in silence", text)

    def test_numbers(self):
        shown = [report.number(v) for v in (None, 0, 15, 0.12345, 1234.5, 1.2e-9, math.nan, math.inf)]
        self.assertEqual(shown, ["-", "0", "15", "0.123", "1.23e+03", "1.2e-09", "nan", "inf"])

    def test_listing_names_everything(self):
        text = report.listing()
        for name in (*CASES, *PEERS, *cases.METRICS):
            self.assertIn(name, text)


class TestCommand(unittest.TestCase):
    def call(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = bench.main(list(arguments))
        return status, out.getvalue(), err.getvalue()

    def test_unknown_case(self):
        status, _, err = self.call("--case", "nothing")
        self.assertEqual(status, 2)
        self.assertIn("nothing", err)

    def test_status_and_files(self):
        for seconds, expected in ((0.5, 0), (1.5, 1)):  # a bar: at most twice the forward
            results = {"patched": row(seconds, forward=0.4, gradient_error=1e-9)}
            with mock.patch.object(bench, "measure_case", return_value=(results, {"torch": "2.13.0"})):
                with self.subTest(seconds=seconds), self.temporary() as folder:
                    status, out, _ = self.call("--case", "grad-100x101", "--output", str(folder / "new"))
                    self.assertEqual(status, expected)
                    self.assertEqual((folder / "new" / "bench.md").read_text(), out.removesuffix("\n"))
                    found = json.loads((folder / "new" / "bench.json").read_text())["results"]
                    self.assertEqual(found, {"grad-100x101": results})
                    self.call("--case", "goe-500-k5", "--output", str(folder / "new"))
                    found = json.loads((folder / "new" / "bench.json").read_text())["results"]
                    self.assertEqual(set(found), {"grad-100x101", "goe-500-k5"})

    def test_publish_writes_table_and_picture_alone(self):
        before = "text\n<!-- times -->\nold\n<!-- /times -->\nmore\n"
        results = {"goe-500-k5": {"patched": row(1.0), "evr": row(0.25), "eigsh": row(0.125, missed=2)}}
        with self.temporary() as folder:
            (folder / "README.md").write_text(before)
            made = bench.compile_report(results, {"torch": "2.13.0"}, Options("python"))
            (folder / "bench.json").write_text(json.dumps(made))
            with mock.patch.object(bench, "ROOT", folder), mock.patch.object(bench, "PICTURE", folder / "times.svg"):
                self.assertEqual(self.call("--publish", str(folder))[0], 0)
            text = (folder / "README.md").read_text()
            self.assertTrue(text.startswith("text\n<!-- times -->\n1 thread, wall time"))
            self.assertTrue(text.endswith("|\n<!-- /times -->\nmore\n"))
            self.assertIn("| 1 | 4 |  |  | 4 |  | 8 missed |  |  |  |", text)
            self.assertIn("4 × evr", (folder / "times.svg").read_text())

    def test_a_row_that_dies_is_reported(self):
        real = subprocess.Popen
        for code, expected in (
            ("raise SystemExit('out of luck')", "out of luck"),
            ('print(\'{"error": "E: x"}\')', "E: x"),
        ):

            def child(_, code=code, **keywords):
                return real([sys.executable, "-c", code], **keywords)

            with self.subTest(code=code), mock.patch("subprocess.Popen", child):
                lost = Row(CASES["goe-500-k5"], "patched", Options(sys.executable))
                lost.ready()
                self.assertIn(expected, lost.error)
                lost.close()
                for stream in (lost.process.stdin, lost.process.stdout, lost.process.stderr):
                    stream.close()

    @contextlib.contextmanager
    def temporary(self):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def test_what_goes_on_is_told(self):
        said = []
        with mock.patch("benchmark.process.SILENCE", 0.05), mock.patch("subprocess.Popen", self._sleeper):
            slow = Row(CASES["goe-500-k5"], "patched", Options(sys.executable, timeout=0.2), said.append)
            slow.ready()
            for stream in (slow.process.stdin, slow.process.stdout, slow.process.stderr):
                stream.close()
        self.assertIn("no answer", slow.error)
        self.assertGreaterEqual(len(said), 2)

    @staticmethod
    def _sleeper(_, popen=subprocess.Popen, **keywords):
        return popen([sys.executable, "-c", "import time; time.sleep(60)"], **keywords)


class TestUpstream(TestCommand):
    def test_installed_file_backup_or_refusal(self):
        with self.temporary() as folder:
            wheel = fake_pytorch.make_wheel(folder / "site-packages")
            project = fake_pytorch.write_files(folder / "project", fake_pytorch.PROJECT)
            with mock.patch.object(upstream, "find_target", return_value=find_target(str(wheel))):
                self.assertEqual(upstream.load().lobpcg(None), "upstream")
                fake_pytorch.run("apply", project, wheel)
                self.assertEqual(upstream.load().lobpcg(None), "upstream")
                fake_pytorch.run("revert", project, wheel)
                (wheel / upstream.MEMBER).write_bytes(b"patched = 1\n")
                with self.assertRaisesRegex(FileNotFoundError, "--upstream"):
                    upstream.load()

    def test_wheel_and_file(self):
        import zipfile

        with self.temporary() as folder:
            with zipfile.ZipFile(folder / "torch-9.whl", "w") as wheel:
                wheel.writestr(upstream.MEMBER, "pristine = 3\n")
            (folder / "plain.py").write_text("pristine = 4\n")
            self.assertEqual(upstream.load(str(folder / "torch-9.whl")).pristine, 3)
            self.assertEqual(upstream.load(str(folder / "plain.py")).pristine, 4)


@unittest.skipUnless(HAS_PROBLEMS, "needs PyTorch, SciPy and the catalogue of problems")
class TestExactAnswers(unittest.TestCase):
    """The gradients that rows are compared with, against the gradient of a dense eigendecomposition."""

    def check(self, problem, k=4):
        from benchmark import peers

        case = Case("x", "x", problem, k, backward=True)
        instance = problems.Instance(case)
        A, B = (None if M is None else M.clone().requires_grad_() for M in (instance.A, instance.B))
        E, X = peers.Eigh(instance, {}).solve(A, B, 0, 1e-8)
        self.assertLess(float((E.detach() - instance.exact).abs().max()), 1e-12)
        instance.loss(E, X).backward()
        errors = instance.gradient_errors(A.grad, None if B is None else B.grad)
        self.assertLess(max(errors), 1e-10)  # eps * condition / gap, with room; a wrong term gives 1e-2 and more
        # the same gradient on the pattern of a sparse A
        sparse = problems.Instance(Case("x", "x", problem, k, layout="sparse_csr", backward=True))
        dense = (A.grad + A.grad.mT).numpy() / 2
        r, c = sparse.matrices[0].tocoo().coords
        self.assertLess(abs(dense[r, c] - sparse.exact_gradient[0]).max(), 1e-10 * abs(dense).max())
        return instance

    def test_laplacians(self):
        for mass in ("", "diagonal", "7-point"):
            with self.subTest(mass=mass):
                self.check({"kind": "laplacian", "sizes": [9, 7], "mass": mass})

    def test_repeated_eigenvalue_in_the_block(self):
        """No autograd there: a central difference of the loss, which is smooth though single pairs are not."""
        from benchmark import peers

        for mass in ("", "diagonal", "7-point"):
            problem = {"kind": "laplacian", "sizes": [7, 7], "mass": mass}
            instance = problems.Instance(Case("x", "x", problem, 4, backward=True))
            self.assertLess(float(instance.exact[2] - instance.exact[1]), 1e-12)
            generator = torch.Generator().manual_seed(0)
            for which, gradient in enumerate(instance.exact_gradient):
                if gradient is None:
                    continue
                D = torch.randn(49, 49, dtype=torch.float64, generator=generator)
                D, h = (D + D.mT) / 2, 1e-4
                pencils = [[instance.A, instance.B] for _ in range(2)]
                for pencil, step in zip(pencils, (h, -h)):
                    pencil[which] = pencil[which] + step * D
                loss = [instance.loss(*peers.Eigh(instance, {}).solve(*pencil, 0, 0)) for pencil in pencils]
                expected = float((D.numpy() * gradient).sum())
                with self.subTest(mass=mass, which="AB"[which]):
                    self.assertAlmostEqual(float(loss[0] - loss[1]) / (2 * h) / expected, 1, delta=1e-4)

    def test_adjoint_equations_by_hand(self):
        """The gradient of the peer that needs no differentiable solver, dense and on the entries."""
        from benchmark import peers

        for layout in ("strided", "sparse_csr"):
            problem = {"kind": "laplacian", "sizes": [9, 7], "mass": ""}
            instance = problems.Instance(Case("x", "x", problem, 4, layout=layout, backward=True))
            A = instance.A.clone().requires_grad_()
            instance.loss(*peers.Adjoint(instance, {}).solve(A, None, 0, 1e-12)).backward()
            with self.subTest(layout=layout):
                self.assertLess(max(instance.gradient_errors(A.grad, None)), 1e-7)  # CG stops at 1e-8

    def test_prescribed_spectra(self):
        self.check({"kind": "gapped", "m": 40, "wanted": 4})
        self.check({"kind": "gapped", "m": 40, "wanted": 4, "condition": 10.0})

    def test_residuals_see_a_perturbation(self):
        instance = self.check({"kind": "laplacian", "sizes": [9, 7], "mass": "7-point"})
        X = instance.problem.eigenvectors(4)
        self.assertLess(instance.residual(instance.exact, X), 1e-13)
        X[:, 1] += 1e-3 * X[:, 0]
        expected = 1e-3 * float((instance.exact[1] - instance.exact[0]) / instance.scale(instance.exact)[1])
        self.assertAlmostEqual(instance.residual(instance.exact, X) / expected, 1, delta=0.5)  # times about |B x|
        self.assertEqual(torch.tensor(instance.target()).isfinite(), True)

    def test_a_pair_passed_over_is_counted(self):
        instance = problems.Instance(Case("x", "x", {"kind": "laplacian", "sizes": [9, 7], "mass": "7-point"}, 4))
        spectrum = instance.problem.spectrum
        self.assertEqual(instance.missed(spectrum[:4] + 1e-9), 0)
        self.assertEqual(instance.missed(spectrum[[0, 1, 3, 4]]), 2)


@unittest.skipUnless(HAS_PROBLEMS, "needs PyTorch, SciPy and the catalogue of problems")
class TestMatrices(unittest.TestCase):
    """Matrices whose lowest pairs are found by a factorisation: against dense eigenvalues, and what checks them."""

    def test_lowest_pairs_and_their_check(self):
        import numpy

        for matrices_of in (
            lambda: (matrices.laplacian(matrices.blobs(600, 3)), None),
            lambda: matrices.elements(2, 400),
        ):
            A, B = matrices_of()
            dense = scipy.linalg.eigvalsh(A.toarray(), None if B is None else B.toarray())
            E = matrices.lowest(A, B, 5, -1e-6)
            self.assertLess(abs(E - dense[:5]).max(), 1e-9 * dense[-1])
            right = scipy.sparse.linalg.eigsh

            def blind(*arguments, right=right, **options):
                return numpy.delete(numpy.sort(right(*arguments, **options)), 2)

            with mock.patch.object(scipy.sparse.linalg, "eigsh", blind), self.assertRaises(AssertionError):
                matrices.lowest(A, B, 5, -1e-6)

    def test_elements(self):
        """Linear functions have no energy beyond their slope's, and the eigenvalues of the interval are (pi j)^2."""
        for dimension, exact in ((1, [1, 4, 9]), (2, [2, 5, 5])):
            K, M = matrices.elements(dimension, 900)
            E = scipy.linalg.eigh(K.toarray(), M.toarray(), eigvals_only=True)[:3] / math.pi**2
            for value, limit in zip(E, exact):
                self.assertGreater(value, limit)  # of a subspace: from above
                self.assertLess(value, 1.03 * limit)

    def test_ten_blobs_have_ten_small_eigenvalues(self):
        E = scipy.linalg.eigvalsh(matrices.laplacian(matrices.blobs(2000)).toarray())[:11]
        self.assertLess(abs(E[0]), 1e-12)
        self.assertLess(5 * E[9], E[10])


@unittest.skipUnless(HAS_PROBLEMS, "needs PyTorch, SciPy and the catalogue of problems")
class TestRow(unittest.TestCase):
    """One peer on one problem, in this process."""

    def made(self, peer, problem, k=3, **more):
        from benchmark.row import Row as Child

        case = Case("x", "x", problem, k, **more)
        request = {"case": vars(case), "peer": peer, "upstream": "", "threads": torch.get_num_threads()}
        return Child(request | {"clock": "cpu", "budget": 60.0})

    def test_peers_agree_and_count(self):
        grid = {"kind": "laplacian", "sizes": [13, 11], "mass": "7-point"}
        for peer in ("patched", "scipy", "eigsh", "shift-invert"):
            with self.subTest(peer=peer):
                answer = self.made(peer, grid, layout="sparse_csr").run(0)
                self.assertLessEqual(answer["residual"], 1e-8)
                self.assertEqual(answer["missed"], 0)
                self.assertGreater(answer.get("columns", answer.get("columns_iK")), 5)
        for peer in ("eigh", "evr"):
            for problem in ({"kind": "goe", "m": 40}, {"kind": "batch", "count": 3, "m": 12}):
                with self.subTest(peer=peer, problem=problem):
                    self.assertEqual(self.made(peer, problem).run(0)["missed"], 0)

    def test_counts_are_those_of_the_run_itself(self):
        """Columns against a count in the multiplication, iterations against a tracker's calls."""
        from torch._lobpcg_impl.operand import Dense

        row, columns, steps = self.made("patched", {"kind": "goe", "m": 60}, method="ortho"), [], []
        multiply = Dense._multiply

        def counted(operand, V):
            columns.append(V.shape[-1])
            return multiply(operand, V)

        with mock.patch.object(Dense, "_multiply", counted):
            row.peer.solve(row.instance.A, None, 0, 1e-8)
        counts = dict(row.peer.counts)
        row.peer.solve(row.instance.A, None, 0, 1e-8, tracker=lambda worker: steps.append(worker.ivars["istep"]))
        self.assertEqual(counts["iterations"], steps[-1])
        self.assertEqual(counts["columns"], sum(columns))

    def test_tolerance_moves_both_ways(self):
        """To the loosest with which the residual is within a factor of ten of what is asked for."""
        row = self.made("eigh", {"kind": "goe", "m": 30})
        row.peer.direct = False
        for factor in (1e-5, 1e-1, 1.0, 50.0):

            def measure(seed, factor=factor):
                return {"residual": factor * row.tol, "missed": 0, "tol": row.tol, "seconds": 0.0}

            row.tol = 1e-8
            with self.subTest(factor=factor), mock.patch.object(row, "_measure", measure):
                residual = row._settle(0, measure(0))["residual"]
                self.assertLessEqual(residual, 1e-8)
                self.assertGreater(residual, 1e-9)

    def test_missed_pairs_are_not_traded_for_time(self):
        row = self.made("eigh", {"kind": "goe", "m": 30})
        row.peer.direct = False

        def measure(seed):
            return {"residual": 1e-3 * row.tol, "missed": int(row.tol > 1e-7), "tol": row.tol, "seconds": 0.0}

        row.tol = 1e-8
        with mock.patch.object(row, "_measure", measure):
            self.assertEqual(row._settle(0, measure(0))["missed"], 0)


if __name__ == "__main__":
    unittest.main()
