"""tools/bench.py: selection, medians, bars, exponents, tables, lost rows, and the exact gradients it compares with."""

import contextlib
import io
import json
import math
import sys
import unittest
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench  # noqa: E402
import fake_pytorch  # noqa: E402
from benchmark import cases, report, upstream  # noqa: E402
from benchmark.cases import Bar, Case, CASES, PEERS, select, Study  # noqa: E402
from benchmark.process import Options, Row  # noqa: E402
from patchset.target import find_target  # noqa: E402


try:
    import scipy  # noqa: F401
    from benchmark import problems

    import torch

    problems.catalogue()
    HAS_PROBLEMS = True
except (ImportError, FileNotFoundError):
    HAS_PROBLEMS = False


def row(seconds=1.0, absolute=1e-9, residual=1e-9, **more):
    return {
        "seconds": seconds,
        "absolute": absolute,
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
            list(select(["dense-500", "laplacian-50x50-c*"], [])),
            ["laplacian-50x50-csr", "laplacian-50x50-coo", "dense-500"],
        )
        self.assertEqual(
            select(["laplacian-400x400"], ["patched", "up*"]), {"laplacian-400x400": ["patched", "upstream"]}
        )
        self.assertNotIn("batch-256x32", select([], ["scipy"]))

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
        found = report.summarize({"nnz": 7, "versions": {}}, runs, {"columns": 12}, None, "")
        self.assertEqual((found["seconds"], found["residual"], found["runs"]), (3.0, 3e-9, 3))
        self.assertEqual((found["nnz"], found["columns"], found["notes"]), (7, 12, ["a", "b"]))
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
        bar = CASES["laplacian-400x400-amg"].bars[1]
        results = {"laplacian-400x400-amg": {"patched": row(2.0)}, "laplacian-400x400": {"patched": row(79.0)}}
        self.assertFalse(report.verdict(bar, "laplacian-400x400-amg", results)["met"])
        results["laplacian-400x400"]["patched"]["seconds"] = 81.0
        self.assertTrue(report.verdict(bar, "laplacian-400x400-amg", results)["met"])

    def test_fast_by_a_larger_residual_is_not_met(self):
        bar = Bar("seconds", 0.7, "scipy")
        loose = row(0.1, absolute=1e-4, residual=1e-6)  # the case asks for a relative 1e-8
        found = self.judge(bar, patched=loose, scipy=row(1.0))
        self.assertIs(found["met"], False)
        self.assertIn("residual", found["reason"])
        self.assertTrue(self.judge(bar, patched=loose, scipy=row(1.0, absolute=1e-3))["met"])
        within = row(0.1, absolute=1e-8, residual=9e-9)
        self.assertTrue(self.judge(bar, patched=within, scipy=row(1.0, absolute=1e-14))["met"])

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


class TestMarkdown(unittest.TestCase):
    def test_tables_are_rectangular_and_complete(self):
        results = {
            "dense-500": {
                "patched": row(1.0, columns=12),
                "eigh": row(2.5, absolute=1e-6, residual=1e-6),
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
        self.assertIn("| dense-500 | seconds <= 1 x eigh | 0.4 | met |", text)

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
        for seconds, expected in ((0.5, 0), (1.5, 1)):
            results = {"patched": row(seconds), "eigh": row(1.0)}
            with mock.patch.object(bench, "measure_case", return_value=(results, {"torch": "2.13.0"})):
                with self.subTest(seconds=seconds), self.temporary() as folder:
                    with mock.patch.object(bench.subprocess, "run") as plot:
                        plot.return_value.returncode = 0
                        status, out, _ = self.call("--case", "dense-500", "--output", str(folder / "new"))
                    self.assertEqual(status, expected)
                    self.assertEqual((folder / "new" / "bench.md").read_text(), out.removesuffix("\n"))
                    self.assertEqual(
                        json.loads((folder / "new" / "bench.json").read_text())["results"]["dense-500"], results
                    )

    def test_a_row_that_dies_is_reported(self):
        import subprocess

        real = subprocess.Popen
        for code, expected in (
            ("raise SystemExit('out of luck')", "out of luck"),
            ('print(\'{"error": "E: x"}\')', "E: x"),
        ):

            def child(_, code=code, **keywords):
                return real([sys.executable, "-c", code], **keywords)

            with self.subTest(code=code), mock.patch("subprocess.Popen", child):
                lost = Row(CASES["dense-500"], "patched", Options(sys.executable))
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

    def test_prescribed_spectra(self):
        self.check({"kind": "gapped", "m": 40, "wanted": 4})
        self.check({"kind": "gapped", "m": 40, "wanted": 4, "condition": 10.0})

    def test_residuals_see_a_perturbation(self):
        instance = self.check({"kind": "laplacian", "sizes": [9, 7], "mass": "7-point"})
        X = instance.problem.eigenvectors(4)
        self.assertLess(instance.residuals(instance.exact, X)[1], 1e-13)
        X[:, 1] += 1e-3 * X[:, 0]
        expected = 1e-3 * float(instance.exact[1] - instance.exact[0])  # times about ||B x||
        self.assertAlmostEqual(instance.residuals(instance.exact, X)[1] / expected, 1, delta=0.5)
        self.assertEqual(torch.tensor(instance.target()).isfinite(), True)


if __name__ == "__main__":
    unittest.main()
