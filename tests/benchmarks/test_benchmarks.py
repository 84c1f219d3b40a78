"""The harness: it refuses what is wrong before it times, and its quantiles are samples."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import failures, isolation, op_bench
from dit4dit.benchmarks.ops import bench_action_ode
from dit4dit.benchmarks.recording import TERMINATED, Recording
from head_case import small_head

from dit4dit import ops
from dit4dit.cli import main


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "ops", "--device", "cpu", *words])
    return int(end.value.code or 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two smallest calls of each op."""
    real = op_bench.cases(ops.names())

    def size(case: op_bench.Case) -> int:
        return sum(x.numel() for x in op_bench._tensors(case[2]))

    def smallest(names, **_):
        return [c for op in names for c in sorted((c for c in real if c[0] == op), key=size)[:2]]

    monkeypatch.setattr(op_bench, "cases", smallest)
    monkeypatch.setattr(bench_action_ode, "config", small_head)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_every_op_is_timed_and_the_numbers_are_written(tmp_path: Path, capsys) -> None:
    path = tmp_path / "ops.json"
    assert run("--samples", "3", "--no-compile", "--json", str(path)) == 0
    data = json.loads(path.read_text())
    assert data["complete"]
    assert data["machine"]["torch"] == torch.__version__
    timed = [row for row in data["rows"] if "ms" in row]
    assert {row["op"] for row in timed} == set(ops.names())
    for row in timed:
        assert 0 < row["ms"]["p50"] <= row["ms"]["max"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["p50"] / 1e6)
        assert row["gflop_per_s"] == pytest.approx(row["flops"] / row["ms"]["p50"] / 1e6)
        assert row["implementation"] != "eager" or row["ratio"] == 1
    assert {r["op"] for r in timed if r["flops"]} == {
        "conv2d",
        "self_attention",
        "cross_attention",
        "linear",
        "linear_gelu",
        "linear_fp8",
        "norm_linear",
        "patch_tokens",
        "state_token",
        "action_ode",
    }
    wanted = {("preprocess", "cpp"), ("linear", "onednn"), ("linear_gelu", "onednn"), ("action_ode", "loop")}
    wanted |= {("norm_linear", "parts"), ("patch_tokens", "parts")}
    assert {(r["op"], r["implementation"]) for r in timed} >= wanted
    shown = capsys.readouterr().out
    assert "GFLOP/s" in shown
    assert re.search(r"triton: x is on cpu, where Triton runs only with TRITON_INTERPRET=1 \(.*adaln", shown)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_compile_is_timed_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "ops.json"
    words = ["--ops", "euler_step", "--samples", "2", "--json", str(path)]
    assert run(*words) == 0
    (plain, _) = [row for row in json.loads(path.read_text())["rows"] if row["implementation"] == "compile"]
    assert plain["ratio"] > 0 if shutil.which("g++") else plain["left_out"]

    def broken(model, inputs):
        raise RuntimeError("no compiler here")

    real = torch.compile
    monkeypatch.setattr(op_bench.torch, "compile", lambda fn, **options: real(fn, backend=broken, **options))
    assert run(*words) == 0
    rows = [row for row in json.loads(path.read_text())["rows"] if row["implementation"] == "compile"]
    assert ["no compiler here" in row["left_out"] for row in rows] == [True, True]
    assert "no compiler here (euler_step)" in capsys.readouterr().out


def test_contenders_are_timed_in_turns() -> None:
    calls: list[str] = []
    todo = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = op_bench.alternating(todo, (torch.zeros(1),), samples=7, rounds=3)
    assert set(found) == {"a", "b"}
    order = [name for i, name in enumerate(calls) if i == 0 or name != calls[i - 1]]
    assert order == ["a", "b"] * 3
    assert calls.count("a") == 7 + 3 * 2  # and two calls before each turn


def test_a_call_without_new_memory_counts_what_it_reads() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(8, 2)
    assert op_bench.work(lambda x, y: x @ y, (x, y)) == {"flops": 2 * 4 * 8 * 2, "bytes": 4 * (32 + 16 + 8)}
    assert op_bench.work(lambda x: x[:1], (x,)) == {"flops": 0, "bytes": 4 * 32}


@pytest.mark.usefixtures("small")
def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = op_bench.positional
    monkeypatch.setattr(op_bench, "positional", lambda *args: lambda *given: real(*args)(*given) + 0.5)
    path = tmp_path / "ops.json"
    assert run("--ops", "preprocess", "--samples", "2", "--no-compile", "--json", str(path)) == 1
    (row, *_) = [row for row in json.loads(path.read_text())["rows"] if row["implementation"] == "cpp"]
    assert row["disagrees"]
    assert "ms" not in row
    assert "from the truth" in capsys.readouterr().out


def test_an_end_by_a_time_limit_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the second case of three: the first is in the file, and what was cut is named."""

    def measure(case, args, samples, compiling, record):
        if record.result["rows"]:
            os.kill(os.getpid(), signal.SIGTERM)
        op_bench.Rows(record, *case[:2]).add("eager", {"left_out": "nothing"})

    monkeypatch.setattr(op_bench, "measure", measure)
    path = tmp_path / "ops.json"
    assert run("--ops", "euler_step", "unnormalize", "--sizes", "all", "--json", str(path)) == TERMINATED
    data = json.loads(path.read_text())
    assert [(row["op"], row["case"]) for row in data["rows"]] == [("euler_step", "plain")]
    assert not data["complete"]
    assert data["cut"]["by"] == "SIGTERM"
    assert data["cut"]["left"] == ["euler_step guided", "unnormalize gr1", "unnormalize libero"]


def test_ops_are_timed_in_the_order_given_until_the_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    assert run("--ops", "unnormalize", "euler_step", "--no-compile", "--samples", "2", "--json", str(path)) == 0
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["unnormalize"] * 2 + ["euler_step"] * 4
    assert run("--ops", "euler_step", "--seconds", "0.000001", "--json", str(path)) == 0
    data = json.loads(path.read_text())
    assert (data["complete"], data["rows"]) == (False, [])
    assert (data["cut"]["by"], data["cut"]["left"]) == ("seconds", ["euler_step plain", "euler_step guided"])


def test_time_that_ends_within_a_case_leaves_the_other_contenders_out() -> None:
    recording = Recording(None, 1e-9)
    recording.result["rows"] = []
    case = ("unnormalize", "small", (torch.zeros(2, 3, 5), torch.zeros(5, 5, dtype=torch.float64)))
    op_bench.measure(case, case[2], samples=2, compiling=True, record=recording)
    rows = {row["implementation"]: row for row in recording.result["rows"]}
    assert rows["eager"]["cut"]
    assert rows["compile"]["cut"]
    calls: list[str] = []
    todo = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = op_bench.alternating(todo, (torch.zeros(1),), samples=10, over=lambda: len(calls) > 3)
    assert [len(found[name]) for name in ("a", "b")] == [2, 0]


@pytest.mark.parametrize("when", ["tried", "compared", "timed"])
@pytest.mark.usefixtures("small")
def test_a_contender_that_raises_costs_its_own_row(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real, calls = op_bench.positional, [0]
    first = {"tried": 1, "compared": 2, "timed": 3}[when]

    def positional(op, backend):
        def fn(*args):
            calls[0] += 1
            if calls[0] >= first:
                raise RuntimeError("out of registers\nand more")
            return real(op, backend)(*args)

        return fn

    monkeypatch.setattr(op_bench, "positional", positional)
    path = tmp_path / "ops.json"
    assert run("--ops", "preprocess", "--samples", "2", "--no-compile", "--json", str(path)) == 1
    data = json.loads(path.read_text())
    assert data["complete"]
    rows = [row for row in data["rows"] if row["implementation"] == "cpp"]
    assert [row["left_out"] for row in rows] == ["RuntimeError: out of registers and more"] * 2
    assert all(row["failed"] for row in rows)
    assert len([row for row in data["rows"] if row["implementation"] == "eager" and "ms" in row]) == 2
    assert "out of registers and more" in capsys.readouterr().out


def test_a_case_that_raises_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_bench, "work", lambda *_: [].pop())
    path = tmp_path / "ops.json"
    assert run("--ops", "euler_step", "--samples", "2", "--no-compile", "--json", str(path)) == 1
    data = json.loads(path.read_text())
    failed = [row for row in data["rows"] if row.get("failed")]
    assert [(row["case"], row["implementation"]) for row in failed] == [("plain", "all"), ("guided", "all")]


def test_a_gpu_that_is_lost_ends_the_process_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code):
        raise SystemExit(code)

    def broken(*_):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("first")

    monkeypatch.setattr(op_bench, "work", broken)
    monkeypatch.setattr(op_bench, "leave", leave)
    path = tmp_path / "ops.json"
    assert run("--ops", "euler_step", "--samples", "2", "--no-compile", "--json", str(path)) == failures.GPU_LOST == 3
    data = json.loads(path.read_text())
    assert data["cut"]["left"] == ["euler_step plain", "euler_step guided"]
    assert [row["implementation"] for row in data["rows"] if row.get("failed")] == ["all"]
    message = "euler_step plain all: RuntimeError: first; then the GPU was lost: RuntimeError: CUDA error: an illegal"
    assert message in capsys.readouterr().err


CHILD = """
import json, os, pathlib, signal, sys, time
op, file, seconds = sys.argv[1:]
row = {{"op": op, "case": "first", "implementation": "eager", "left_out": seconds}}
here = {{"gpu": None, "cpu": "x", "torch": "y", "torch_threads": 1}}
data = {{"machine": here, "dtype": "float32", "device": "cpu", "rows": [row]}}
data |= {{"heads": {{"17": 5}}}} if op == "a" else {{}}
data["cut"] = None if op == "a" else {{"by": "killed", "during": "ops", "left": [op + " second", op + " third"]}}
pathlib.Path(file).write_text(json.dumps(data))
{end}
"""


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "a time limit of 3 s"),
    ],
    ids=["dies", "killed", "hangs"],
)
def test_a_process_that_dies_or_hangs_costs_one_op(
    end: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def child(op, words, file, seconds):
        return [sys.executable, "-c", CHILD.format(end=end if op == "b" else ""), op, str(file), str(seconds)]

    monkeypatch.setattr(isolation, "child", child)
    monkeypatch.setattr(isolation, "GRACE", 0.5)
    monkeypatch.setattr(isolation, "STOPPING", 0.1)
    path = tmp_path / "ops.json"
    assert isolation.command(["a", "b", "a", "c"], [], path, 6.0) == 1
    data = json.loads(path.read_text())
    assert [(row["op"], row["case"], row["implementation"]) for row in data["rows"]] == [
        ("a", "first", "eager"),
        ("b", "first", "eager"),
        ("b", "second", "process"),
        ("c", "first", "eager"),
    ]
    assert data["rows"][2]["left_out"] == f"its process was ended by {how}; not measured: b second, b third"
    assert data["machine"]["cpu"] == "x"
    assert data["heads"] == {"17": 5}
    shares = [float(row["left_out"]) for row in data["rows"] if row["implementation"] == "eager"]
    assert shares[0] == pytest.approx(2, abs=0.1)
    assert f"b: its process was ended by {how}" in capsys.readouterr().err


def test_sigterm_ends_the_process_of_an_op_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent as soon as the second op's rows are there, while its process sleeps."""
    path = tmp_path / "ops.json"

    def child(op, words, file, seconds):
        return [sys.executable, "-c", CHILD.format(end="time.sleep(60)" if op == "b" else ""), op, str(file), "1"]

    def merged(*args):
        real(*args)
        if [row["op"] for row in args[-1].result["rows"]] == ["a", "b"] and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    real, sent = isolation._merge, []
    monkeypatch.setattr(isolation, "child", child)
    monkeypatch.setattr(isolation, "_merge", merged)
    with pytest.raises(SystemExit) as end:
        isolation.command(["a", "b", "c"], [], path, None)
    assert end.value.code == TERMINATED
    data = json.loads(path.read_text())
    assert [row["op"] for row in data["rows"]] == ["a", "b"]
    assert (data["cut"]["by"], data["cut"]["left"]) == ("SIGTERM", ["b", "c"])
    assert [entry["exit_code"] for entry in data["processes"]] == [0, -signal.SIGTERM]


@pytest.mark.slow
def test_each_op_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    words = ["--isolate", "--ops", "unnormalize", "euler_step", "--no-compile", "--samples", "2", "--json", str(path)]
    assert run(*words, "--seconds", "100") == 0
    data = json.loads(path.read_text())
    assert data["complete"]
    assert [row["op"] for row in data["rows"]] == ["unnormalize"] * 2 + ["euler_step"] * 4
    assert [entry["exit_code"] for entry in data["processes"]] == [0, 0]
    assert (data["unfinished"], data["samples"], data["dtype"]) == ([], 2, "float32")


def test_the_truth_is_made_without_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        seen = op_bench.exact(lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))()
        assert seen == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_ops_are_timed_however_the_precision_was_set(tmp_path: Path) -> None:
    """By the new names alone, beside which PyTorch cannot read the old ones."""
    path, cudnn, cuda = tmp_path / "ops.json", torch.backends.cudnn, torch.backends.cuda
    before = cudnn.conv.fp32_precision, cuda.matmul.fp32_precision
    cudnn.conv.fp32_precision, cuda.matmul.fp32_precision = "ieee", "tf32"
    try:
        words = ["--ops", "euler_step", "unnormalize", "--no-compile", "--samples", "2", "--json", str(path)]
        assert run(*words) == 0
        assert (cudnn.conv.fp32_precision, cuda.matmul.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.conv.fp32_precision, cuda.matmul.fp32_precision = before
    assert all("ms" in row for row in json.loads(path.read_text())["rows"] if row["implementation"] == "eager")


def test_a_cpu_is_asked_for_one_model_only() -> None:
    names = [op for op in ops.names() if op != "action_ode"]  # its arguments are no tensors alone
    every, some = op_bench.cases(names), op_bench.cases(names, gr1_only=True)
    assert {op for op, _, _ in some} == set(names)
    assert {case.split()[0] for _, case, _ in some} == set(op_bench.GR1)
    assert len(some) < 0.6 * len(every)


def test_mistakes(capsys) -> None:
    assert run("--ops", "adalm") == 2
    assert "did you mean 'adaln'" in capsys.readouterr().err
    assert run("--samples", "0") == 2
    assert "--samples: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("op", [op for op in ops.names() if op != "action_ode"])
def test_an_op_is_benchmarked_by_itself(op: str, tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--samples", "2", "--json", str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"dit4dit.benchmarks.ops.bench_{op}", run_name="__main__")
    assert end.value.code == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows} == {op}
    assert [row["implementation"] for row in rows].count("eager") == 2
