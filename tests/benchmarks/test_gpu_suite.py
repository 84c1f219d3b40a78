"""gpu_suite.py: each part by itself, one result whatever fails, hangs or is killed. Here its parts run on the CPU."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from gpu_modules import gpu_results, gpu_runner, gpu_suite
from waiting import eventually

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.sh"


def environment(**given: str) -> dict[str, str]:
    here = {"PYTHON": sys.executable, "DEVICE": "cpu", "BUILD": "0", "PRESETS": "tiny", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **here, **given}


def suite(out: Path, *options: str, **given: str) -> subprocess.CompletedProcess[str]:
    """The script, as a user calls it."""
    command = ["bash", str(SCRIPT), str(out), *options]
    return subprocess.run(command, env=environment(**given), capture_output=True, text=True, check=False)


def start(tmp_path: Path, parts: dict[str, str], options: str = "", **given: str) -> subprocess.Popen[str]:
    """The suite with other parts: name -> "least most beside? code" of Python."""
    places = "'{json}', '{seconds}', '{xml}', '{result}'"
    made = ", ".join(
        f"Part({name!r}, (settings.python, '-c', {code!r}, {places}), {options or '1, 60'})"
        for name, code in parts.items()
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nfrom pathlib import Path\n"
        f"from gpu_suite import run\nfrom gpu_runner import Part\nimport signal\n"
        f"before = Path(sys.argv[2]) if len(sys.argv) > 2 else None\n"
        f"sys.exit(run(Path(sys.argv[1]), before, (), lambda settings: [{made}]))\n"
    )
    before = [given.pop("before")] if "before" in given else []
    command = [sys.executable, str(driver), str(tmp_path / "out"), *before]
    return subprocess.Popen(
        command, env=environment(**given), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str], timeout: float = 100) -> tuple[int, str]:
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


def result(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*.json")
    data: dict[str, Any] = json.loads(file.read_text())
    return data


BLOCKS = (
    "import json, os, sys, time\n"
    "def write(n):\n"
    "    aside = sys.argv[1] + '.aside'\n"
    "    open(aside, 'w').write(json.dumps({'blocks': n, 'cut': {'by': 'killed'} if n < 400 else None}))\n"
    "    os.replace(aside, sys.argv[1])\n"
)


def test_a_part_can_read_what_those_before_it_have_written(tmp_path: Path) -> None:
    first = "import json, sys\njson.dump({'ms': 7}, open(sys.argv[1], 'w'))\n"
    second = "import json, sys\nseen = json.load(open(sys.argv[4]))['first']\njson.dump({'seen': seen}, open(sys.argv[1], 'w'))\n"
    code, text = ended(start(tmp_path, {"first": first, "second": second}))
    assert code == 0, text
    assert result(tmp_path / "out")["second"] == {"seen": {"ms": 7}}


def test_it_is_a_shell_script() -> None:
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("bundle", [None, ROOT / "dist" / "gpu-bundle"])
def test_the_parts_of_most_value_fit_into_one_short_call(bundle: Path | None, tmp_path: Path) -> None:
    settings = gpu_runner.Settings(out=tmp_path, scratch=tmp_path, bundle=bundle)
    parts = gpu_suite.parts(settings)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert all(0 < part.least <= part.most for part in parts)
    needed = 0
    for group in gpu_runner.side_by_side(parts):
        needed += max(part.most for part in group)
        if group[-1].name == "latency_tuned_robocasa_gr1":
            break
    else:
        pytest.fail("no latency with verdicts")
    if bundle is not None:  # a build takes longer, and what is after it less
        assert needed <= settings.limit - gpu_runner.RESERVE
    order = ("install", "doctor", "parity_gr1", "latency_robocasa_gr1", "latency_library_robocasa_gr1")
    order += ("tune_robocasa_gr1", "latency_tuned_robocasa_gr1", "ratio_robocasa_gr1", "latency_libero")
    order += ("profile_robocasa_gr1", "latency_one_launch_robocasa_gr1", "ops")
    order += ("ops_self_attention", "ops_action_ode", "gpu_tests", "gpu_tests_alone", "latency_fp8_robocasa_gr1")
    order += ("ratio_libero", "spaced_robocasa_gr1", "tiles", "sanitizer")
    assert sorted(order, key=names.index) == list(order)


def test_verdicts_are_those_of_this_call_and_decide_one_latency_alone(tmp_path: Path) -> None:
    parts = gpu_suite.parts(gpu_runner.Settings(out=tmp_path, scratch=tmp_path / "scratch"))
    known = {part.name: part for part in parts}
    tune, tuned = known["tune_robocasa_gr1"], known["latency_tuned_robocasa_gr1"]
    assert (tune.least, tune.most) == (30, 75)
    assert tuned.needs == tune.name
    assert tuned.environment == tune.environment == {"DIT4DIT_CACHE": str(tmp_path / "scratch" / "cache")}
    assert not [part.name for part in parts if part.needs and part is not tuned]
    timed = {part.name: part.command for part in parts if "latency" in part.command}
    modes = {name: command[command.index("--tune") + 1] for name, command in timed.items()}
    assert [name for name, mode in modes.items() if mode == "cached"] == [tuned.name]
    assert set(modes.values()) == {"cached", "off"}
    # what is compared is the same but for the verdicts, which "auto" follows for the head too
    both = [[*command] for command in (timed["latency_library_robocasa_gr1"], tuned.command)]
    for command in both:
        for option in ("--head", "--tune"):
            at = command.index(option)
            del command[at : at + 2]
    assert sorted(both[0]) == sorted(both[1])


def test_a_part_that_needs_another_runs_in_the_same_call_as_that(tmp_path: Path) -> None:
    """What the other leaves is in the scratch folder, which a call does not keep."""
    counts, ready = tmp_path / "counts", tmp_path / "ready"
    leaves = BLOCKS + f"open('left', 'w')\nopen({str(counts)!r}, 'a').write('x')\nwrite(400)"
    needs = BLOCKS + f"open('left'); open({str(ready)!r}); write(400)"

    def call(name: str, earlier: dict[str, Any] | None = None, least: int = 1) -> dict[str, Any]:
        scratch = tmp_path / name
        scratch.mkdir()
        settings = gpu_runner.Settings(out=tmp_path / f"{name}-out", scratch=scratch, device="cpu", limit=60)
        command = {code: (sys.executable, "-c", code, "{json}") for code in (leaves, needs)}
        todo = [
            gpu_runner.Part("tune", command[leaves], least, least + 30),
            gpu_runner.Part("tuned", command[needs], 1, 30, needs="tune"),
        ]
        done: dict[str, Any] = gpu_runner.Suite(settings, earlier).run(todo)["suite"]
        return done

    def whole(name: str) -> dict[str, Any]:
        return result(tmp_path / f"{name}-out")

    assert call("first")["failed"] == ["tuned"]
    ready.touch()
    assert call("second", whole("first"))["failed"] == []
    assert counts.read_text() == "xx"
    call("third", whole("second"))
    assert counts.read_text() == "xx"
    late = call("late", least=100)
    assert late["left_out"] == ["tune", "tuned"]
    assert late["parts"]["tuned"]["left_out"] == "it needs tune, which did not run in this call"


def test_only_a_part_runs_what_it_needs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DEVICE": "cpu", "BUILD": "0", "PRESETS": "tiny"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu_suite, "Suite", Listed)
    assert gpu_suite.main(["run", str(tmp_path / "out"), "--only", "latency_tuned_tiny"]) == 0
    assert Listed.names == ["tune_tiny", "latency_tuned_tiny"]


class Listed(gpu_runner.Suite):  # type: ignore[name-defined,misc]
    """A suite that runs nothing and keeps the names of what it was to run."""

    names: list[str]

    def run(self, todo: Any) -> dict[str, Any]:
        Listed.names = [part.name for part in todo]
        return {"suite": {"failed": [], "left_out": []}}


def test_every_program_is_called_by_its_path_and_every_op_is_timed(tmp_path: Path) -> None:
    from dit4dit import ops

    settings = gpu_runner.Settings(out=tmp_path, scratch=tmp_path, python="/x/python")
    parts = gpu_suite.parts(settings)
    assert {part.command[0] for part in parts} == {"/x/python", "bash"}
    assert {part.grace for part in parts if part.stop == signal.SIGINT} == {14}  # xdist waits for 10 s
    marks = [part.command[part.command.index("-m", 3) + 1] for part in parts if part.name.startswith("gpu_tests")]
    assert marks == ["gpu and not alone", "gpu and alone"]
    timed = [word for part in parts if part.name.startswith("ops") for word in part.command]
    assert set(ops.names()) <= set(timed)


def test_a_part_that_fails_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    lines = "[print('line', i) for i in range(99)]; sys.exit(3)"
    parts = {"fails": "import sys\n" + lines, "dies": "import os; os.abort()", "ends": BLOCKS + "write(400)"}
    code, text = ended(start(tmp_path, parts))
    assert code == 1, text
    data = result(tmp_path / "out")
    assert data["suite"]["failed"] == ["fails", "dies"]
    known = data["suite"]["parts"]
    assert known["fails"]["exit_code"] == 3
    assert known["fails"]["log"][-1] == "line 98"
    assert known["dies"]["exit_code"] == -signal.SIGABRT
    assert known["ends"]["exit_code"] == 0
    assert data["ends"] == {"blocks": 400, "cut": None}
    assert str(tmp_path) not in json.dumps(data["suite"])
    (log,) = (tmp_path / "out").glob("*.log")
    assert "line 0" in log.read_text()  # the whole of it


@pytest.mark.slow
def test_parts_that_never_end_are_ended_and_what_they_had_is_kept(tmp_path: Path) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BLOCKS
    deaf += "n = 0\nwhile True:\n    n += 1; write(n); time.sleep(0.05)\n"
    begin = time.monotonic()
    code, text = ended(start(tmp_path, {f"part{i}": deaf for i in range(9)}, options="2, 5", LIMIT="16"))
    assert time.monotonic() - begin < 16 + 4, text
    assert code == 1
    data = result(tmp_path / "out")
    known = data["suite"]["parts"]
    assert known["part0"]["timed_out"]
    assert known["part0"]["cut"]
    assert data["part0"]["blocks"] > 9
    left = [name for name, part in known.items() if "left_out" in part]
    assert left == data["suite"]["left_out"]
    assert left == [f"part{i}" for i in range(9 - len(left), 9)]
    assert len(left) >= 6
    assert "no time was left" in known["part8"]["left_out"]


@pytest.mark.long
def test_with_the_longest_limit_parts_that_never_end_are_ended(tmp_path: Path) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    begin = time.monotonic()
    code, _ = ended(start(tmp_path, {f"part{i}": deaf for i in range(30)}, options="10, 45", LIMIT="480"), 500)
    assert time.monotonic() - begin < 495
    assert code == 1
    assert len(result(tmp_path / "out")["suite"]["parts"]) == 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_suite_that_is_killed_leaves_its_result_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    slow = BLOCKS + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    slow += "for n in range(1, 400): write(n); time.sleep(0.05)\n"
    process = start(tmp_path, {"first": BLOCKS + "write(400)", "slow": slow, "last": "pass"})
    out = tmp_path / "out"

    def running() -> bool:
        found = list(out.glob("*.json"))
        return bool(found) and (number != signal.SIGKILL or "slow" in json.loads(found[0].read_text()))

    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "" and running())
    child = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    code, _ = ended(process)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    eventually(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
    data = result(out)
    assert data["suite"]["parts"]["first"]["exit_code"] == 0
    assert data["suite"]["parts"]["slow"]["exit_code"] != 0
    assert data["suite"]["parts"]["slow"]["cut"]
    assert data["slow"]["blocks"] >= 1


def test_a_second_call_goes_on_where_the_first_was_cut(tmp_path: Path) -> None:
    count = "open({!r}, 'a').write('x')\n"
    ran = {name: tmp_path / name for name in ("whole", "cut", "fails")}
    parts = {
        "whole": BLOCKS + count.format(str(ran["whole"])) + "write(400)",
        "cut": BLOCKS + count.format(str(ran["cut"])) + "write(7)",
        "fails": count.format(str(ran["fails"])) + "1 / 0",
    }
    assert ended(start(tmp_path, parts))[0] == 1
    (first,) = (tmp_path / "out").glob("*.json")
    before = tmp_path / "first.json"
    first.rename(before)
    assert ended(start(tmp_path, parts, before=str(before)))[0] == 1
    assert {name: file.read_text() for name, file in ran.items()} == {"whole": "x", "cut": "xx", "fails": "xx"}
    assert result(tmp_path / "out")["whole"]["blocks"] == 400


@pytest.mark.slow
def test_tests_that_run_out_of_time_are_in_the_xml_and_end_no_suite(tmp_path: Path) -> None:
    """Real pytest with real workers: SIGINT, though the suite is in the background, where it is ignored."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\ndef test_other(): time.sleep(60)\n"
    )
    words = ["-m", "pytest", "-n", "2", "-p", "no:cacheprovider", str(tests), "--junitxml"]
    code = f"import os, sys\nos.execv(sys.executable, [sys.executable, *{words}, sys.argv[3]])"
    half = "import sys; open(sys.argv[3], 'w').write('<testsuites><testsu')"
    parts = {"tests": code, "half": half, "last": BLOCKS + "write(400)"}
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(tmp_path, parts, options="1, 8, stop=signal.SIGINT, grace=14", LIMIT="60")
    finally:
        signal.signal(signal.SIGINT, ignoring)
    assert ended(process)[0] == 1
    data = result(tmp_path / "out")
    assert data["suite"]["parts"]["tests"]["timed_out"]
    assert data["tests"]["tests"]["tests"] >= 1
    assert "unreadable" in data["tests"]["half"]
    assert data["last"]["blocks"] == 400
    (xml,) = (tmp_path / "out").glob("*.xml")
    assert any(case.get("name") == "test_quick" for case in ElementTree.parse(xml).iter("testcase"))


@pytest.mark.parametrize(
    "variable, value",
    [
        *(("LIMIT", value) for value in ("481", "0", "-1", "many", "nan", "")),
        *(("MEASURE", value) for value in ("0", "nan", "-1", "abc")),
        ("DEVICE", ""),
        ("BUILD", "yes"),
        ("PRESETS", ""),
        ("PRESETS", "tiny tiny"),
        ("PRESETS", "a b c d e f"),
        ("BUNDLE", "/nonexistent"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(
    tmp_path: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv(variable, value)
    before = [signal.getsignal(number) for number in gpu_suite.ENDING]
    assert gpu_suite.main(["run", str(tmp_path / "out")]) == 2
    assert [signal.getsignal(number) for number in gpu_suite.ENDING] == before
    assert f"error: {variable}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    done = suite(tmp_path / "out", DEVICE="cuda", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nvidia-smi names no GPU" in done.stderr


def test_a_result_is_not_overwritten(tmp_path: Path) -> None:
    assert suite(tmp_path, "--only", "doctor", LIMIT="7").returncode == 0  # no time for anything
    before = result(tmp_path)
    done = suite(tmp_path, "--only", "doctor")
    assert done.returncode == 2
    assert "is there already; give another folder, or --continue" in done.stderr
    assert result(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"machine": {"gpu": null}, "suite": {}}', '{"machine": ', None])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    done = suite(tmp_path / "out", "--continue", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {file}: expected a result of gpu_suite.sh" in done.stderr
    assert gpu_suite.main(["merge", str(tmp_path / "new"), str(file)]) == 2


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = suite(tmp_path, "--only", "latency")
    assert done.returncode == 2
    assert re.search(r"no part latency; known: doctor, parity_gr1, ", done.stderr)


@pytest.mark.parametrize(
    "only",
    [
        pytest.param(("doctor", "parity_gr1", "latency_tiny", "sanitizer"), marks=pytest.mark.slow),
        pytest.param((), marks=pytest.mark.long),  # all of it, as `make gpu-rehearsal` does
    ],
)
def test_the_suite_without_a_gpu(tmp_path: Path, only: tuple[str, ...]) -> None:
    begin = time.monotonic()
    words = [word for name in only for word in ("--only", name)]
    done = suite(tmp_path, *words, LIMIT="450", **({"MEASURE": "2"} if only else {}))
    assert time.monotonic() - begin < 460
    assert done.returncode == 0, done.stdout + done.stderr
    data = result(tmp_path)
    on_a_gpu = {"parity_one_launch", "latency_one_launch_tiny", "gpu_tests", "gpu_tests_alone", "tiles", "sanitizer"}
    assert set(data["suite"]["left_out"]) == (on_a_gpu & set(only) if only else on_a_gpu)
    ran = {name for name, part in data["suite"]["parts"].items() if part.get("exit_code") == 0}
    assert ran == set(data["suite"]["parts"]) - on_a_gpu
    assert ran <= set(data)  # each of them wrote its JSON
    assert only or len(ran) > 10
    assert data["machine"]["torch"]
    assert data["doctor"]["healthy"]
    assert all(stage["ok"] for stage in data["parity_gr1"]["stages"])
    assert data["latency_tiny"]["engine"]["p50"] > 0
    assert only or data["profile_tiny"]["launches"] > 0
    assert only or data["ratio_tiny"]["ratio"]["total"] > 0
    if not only:  # the verdicts came home, and decided the latency behind them alone
        chosen: dict[str, set[str]] = {}
        for call in data["tune_tiny"]["calls"]:
            chosen.setdefault(call["op"], set()).add(call["chosen"])
        assert len(data["tune_tiny"]["calls"]) > 10
        tuned = data["latency_tuned_tiny"]
        assert (tuned["tune"], data["latency_library_tiny"]["tune"]) == ("cached", "off")
        assert all(set(ran) <= chosen[op] for op, ran in tuned["implementations"].items() if op in chosen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert {path.suffix for path in files} == {".json", ".log", ".html"}
    assert all(path.stat().st_size < 16 << 20 for path in files)


def children(pid: int) -> dict[int, str]:
    """Processes of parts, whose parent is this one, and which still run: the part's name, from where its JSON goes."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            words = (stat.parent / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z" and "--json" in words:
            found[int(stat.parent.name)] = Path(words[words.index("--json") + 1]).stem
    return found


def blocks(data: Any) -> int:
    """How much has been measured of a part."""
    return sum(len((data or {}).get(key) or ()) for key in ("rows", "engine_alone_ms", "subjects", "setup_seconds"))


KILLED = ("latency_tiny", "ops", "profile_tiny", "options", "ratio_tiny", "latency_fp8_tiny", "spaced_tiny")


@pytest.mark.parametrize(
    "rounds, names",
    [
        # the second takes 15 s, so that it is killed while it measures
        pytest.param(1, ("latency_tiny", "spaced_tiny"), marks=pytest.mark.slow),
        pytest.param(3, KILLED, marks=pytest.mark.long),  # 21 kills
    ],
)
def test_parts_that_are_killed_at_random_moments(tmp_path: Path, rounds: int, names: tuple[str, ...]) -> None:
    chance = random.Random(0)
    numbers, cut = (signal.SIGTERM, signal.SIGKILL), 0
    begin = time.monotonic()
    for n in range(rounds):
        out = tmp_path / str(n)
        command = ["bash", str(SCRIPT), str(out), *(word for name in names for word in ("--only", name))]
        process = subprocess.Popen(command, env=environment(MEASURE="30", LIMIT="300"), stdout=subprocess.DEVNULL)
        sent: dict[str, signal.Signals] = {}
        due, seen = 0.0, dict.fromkeys(names, 0)
        while process.poll() is None:
            for file in out.glob("*.json"):
                data = json.loads(file.read_text())  # whole at any moment
                for name in names:
                    assert blocks(data.get(name)) >= seen[name], name  # what has been written stays
                    seen[name] = blocks(data.get(name))
            for child, name in children(process.pid).items():
                if name not in sent and due == 0.0:
                    due = time.monotonic() + chance.uniform(4, 12)
                if name not in sent and time.monotonic() >= due:
                    sent[name] = numbers[(len(sent) + n) % 2]
                    os.kill(child, sent[name])
                    due = 0.0
            time.sleep(0.05)
        data = result(out)
        known = data["suite"]["parts"]
        assert set(known) == set(names)  # those after a killed one ran
        for name, part in known.items():
            assert blocks(data.get(name)) >= seen[name]
            if part["exit_code"] == 0 or data.get(name, {}).get("complete"):  # it had ended by then, or all but
                continue
            number = sent[name]
            assert part["exit_code"] in (-number, 128 + number), name
            if name in data:  # else it was killed before it had anything
                assert data[name]["cut"]["by"] == ("SIGTERM" if number == signal.SIGTERM else "killed")
                assert data[name]["cut"]["during"]
                cut += 1
    assert cut >= rounds
    assert time.monotonic() - begin < 240


@pytest.mark.long
def test_the_whole_suite_killed_twice_and_gone_on_with(tmp_path: Path) -> None:
    chance, before = random.Random(1), []
    for n, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
        out = tmp_path / str(n)
        command = ["bash", str(SCRIPT), str(out), *before]
        process = subprocess.Popen(command, env=environment(MEASURE="3", LIMIT="300"), stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(20, 40))
        os.kill(process.pid, number)
        process.wait(20)
        known = result(out)["suite"]["parts"]
        assert len(known) > n
        (file,) = out.glob("*.json")
        before = ["--continue", str(file)]
    finished = {name for name, part in known.items() if gpu_results.rank(part) == gpu_results.FINISHED}
    done = suite(tmp_path / "last", *before, MEASURE="3", LIMIT="300")
    parts = result(tmp_path / "last")["suite"]["parts"]
    assert done.returncode == 0, done.stdout
    assert {name: parts[name] for name in finished} == {name: known[name] for name in finished}  # not run again
    assert all("left_out" in part or part["exit_code"] == 0 for part in parts.values())
