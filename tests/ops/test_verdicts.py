"""Files that say which implementation was the fastest: whatever is in one, the right kernel runs, and one line says why not."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit4dit import ops
from dit4dit.errors import InputError
from dit4dit.files.cache import cache_root
from dit4dit.ops import dispatch, sources, verdicts
from dit4dit.ops.dispatch import Choices, Implementation
from dit4dit.ops.explanation import measured, survey
from dit4dit.ops.verdicts import Verdict, Verdicts, call_text

CPU = torch.device("cpu")
VIEW = torch.arange(2 * 6 * 6 * 3, dtype=torch.uint8).view(2, 6, 6, 3)
ARGS = ([VIEW], (3, 3), "bilinear", torch.float32)
CALL = call_text((*ARGS, None))
"""As the op gives its arguments on: no `out`."""
DEFAULT, OTHER = "cpp", "torch"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this CPU's verdicts, which is not there yet."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_said", set())
    return verdicts.folder(CPU)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the logger of the ops has said."""
    caplog.set_level(logging.WARNING, logger="dit4dit.ops")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dit4dit.ops"]


def verdict(**changes: Any) -> Verdict:
    """That OTHER, which is not the default, is the fastest for `ARGS` here."""
    found = Verdict(
        "preprocess",
        CALL,
        verdicts.place(CPU),
        DEFAULT,
        OTHER,
        {OTHER: 1.0, DEFAULT: 2.0},
        made="2026-01-01",
    )
    return replace(found, **changes)


def ran(device_verdicts: Verdicts | None = None) -> str:
    """What a plan runs `ARGS` by; right whatever it is."""
    with Choices(device_verdicts or Verdicts(CPU)) as choices:
        out = ops.preprocess(*ARGS)
    torch.testing.assert_close(out, ops.preprocess(*ARGS, backend="torch"))
    (name,) = choices.ran["preprocess"]
    return name


def put(cache: Path, content: str | bytes | None = None, **changes: Any) -> Path:
    """A file at the place of the call's verdict: this content, or a verdict with changes in its JSON."""
    path = cache / verdict().file
    cache.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = json.dumps({**verdict().data(), **changes})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_verdict_that_counts_decides_and_says_nothing(cache: Path, lines) -> None:
    assert ran() == DEFAULT
    path = verdicts.write(verdict(), cache)
    assert verdicts.read(path) == verdict()
    assert ran() == OTHER
    assert not lines()
    found = survey(CPU, dispatch.files())
    assert (found.counting, found.ignored, found.folder) == ((verdict(),), {}, str(cache))


WHOLE = json.dumps(verdict().data())
LARGE = json.dumps({**verdict().data(), "refused": {"cuda": "x" * verdicts.LARGEST}})
BROKEN: dict[str, Any] = {
    "empty": "",
    "cut": WHOLE[:-5],
    "binary": bytes(range(256)),
    "another encoding": WHOLE.encode("utf-16"),
    "deep": "[" * 100_000,
    "large": LARGE,
    "a list": "[]",
    "a number": "1",
    "a number of a million digits": "1" * 1_000_000,
    "nothing in it": "{}",
    "another format": {"format": 2},
    "op": {"op": 1},
    "call": {"call": None},
    "place": {"place": []},
    "place of a kind": {"place": {"device": {}}},
    "ms": {"ms": [1]},
    "ms of words": {"ms": {OTHER: "1"}},
    "ms of a bool": {"ms": {OTHER: True}},
    "ms not a number": {"ms": {OTHER: math.nan}},
    "ms without end": {"ms": {OTHER: math.inf}},
    "ms below 0": {"ms": {OTHER: -1}},
    "ms beyond a float": {"ms": {OTHER: 10**400}},
    "no ms of the chosen": {"ms": {DEFAULT: 1}},
    "chosen": {"chosen": [OTHER]},
    "refused": {"refused": {"cuda": 1}},
    "foreign": {"foreign": 3},
    "made": {"made": 2026},
    "escapes": {"default": "\x1b[2J"},
    "half a character": {"call": "\ud800"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_verdict_is_ignored_in_one_line(cache: Path, lines, what: str) -> None:
    content = BROKEN[what]
    path = put(cache, **content) if isinstance(content, dict) else put(cache, content)
    assert ran() == DEFAULT
    assert ran() == DEFAULT
    (line,) = lines()
    assert str(cache) in line
    assert line.endswith("run dit4dit tune")
    assert len(line) < len(str(cache)) + 400
    if what != "place of a kind":
        assert f"a file is not a verdict ({path.name}: " in line
    (count,) = survey(CPU, dispatch.files()).ignored.values()
    assert count == 1


def test_a_large_file_is_not_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse one of a terabyte: reading it would take all memory."""
    path = put(cache, "")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert "at most 1048576 bytes" in verdicts.read(path).detail


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder_there(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


def device_there(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, loop, folder_there, device_there])
def test_what_is_no_file_is_ignored_and_not_waited_for(cache: Path, lines, make: Callable[[Path], None]) -> None:
    cache.mkdir(parents=True)
    make(cache / verdict().file)
    assert ran() == DEFAULT
    assert len(lines()) == 1
    assert sum(survey(CPU, dispatch.files()).ignored.values()) == 1


def test_a_pipe_with_a_verdict_in_it_is_none(cache: Path, lines) -> None:
    path = put(cache)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    try:
        os.write(held, content)
        assert ran() == DEFAULT
    finally:
        os.close(held)
    assert "expected a file" in lines()[0]


def test_a_link_to_a_verdict_counts_and_one_to_nothing_is_nothing(cache: Path, tmp_path: Path, lines) -> None:
    path = put(cache)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert ran() == OTHER
    (tmp_path / "elsewhere.json").unlink()
    assert ran() == DEFAULT
    assert not lines()
    assert not survey(CPU, dispatch.files()).ignored


@pytest.mark.parametrize("where", ["file", "folder"])
def test_without_permission(cache: Path, lines, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Said by the system for root, too."""
    path = put(cache)
    name = "open" if where == "file" else "stat"
    real = getattr(os, name)

    def refused(at: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(str(at)) == (path if where == "file" else cache):
            raise PermissionError(13, "Permission denied", str(at))
        return real(at, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refused)
        assert ran() == DEFAULT
        assert ran() == DEFAULT
    (line,) = lines()
    assert "cannot be read" in line
    assert "Permission denied" in line
    assert ran() == OTHER


@pytest.mark.parametrize("level", ["folder", "verdicts", "cache"])
def test_a_file_in_the_place_of_a_folder(cache: Path, level: str) -> None:
    place = {"folder": cache, "verdicts": cache.parent, "cache": cache_root()}[level]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")
    assert ran() == DEFAULT
    assert sum(survey(CPU, dispatch.files()).ignored.values()) == 1
    with pytest.raises(InputError, match="set DIT4DIT_CACHE to a folder that can be written"):
        verdicts.write(verdict(), cache)


def test_no_place_for_a_cache(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a mere number."""

    def nowhere(cls: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIT4DIT_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    assert ran() == DEFAULT
    assert not lines()
    assert survey(CPU, dispatch.files()).folder == ""
    with pytest.raises(InputError, match="no home folder; set DIT4DIT_CACHE"):
        verdicts.folder(CPU)


def test_without_the_variable_verdicts_are_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT4DIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ran() == DEFAULT
    assert verdicts.write(verdict(), verdicts.folder(CPU)).is_relative_to(tmp_path / "home" / ".cache")
    assert ran() == OTHER


ELSEWHERE = {
    "device": ("NVIDIA H200", "made with device 'NVIDIA H200'"),
    "torch": ("2.9.0", "made with torch '2.9.0'"),
    "capability": ("NEON", "made with capability 'NEON'"),
    "kernels": ("0" * 32, "made by other kernels or tiles"),
    "driver": ("580.82.07", "made with driver '580.82.07', which is not here"),
    "interpreted": (0, "made with interpreted 0"),
}


@pytest.mark.parametrize("fact", ELSEWHERE)
def test_made_elsewhere(cache: Path, lines, fact: str) -> None:
    value, words = ELSEWHERE[fact]
    put(cache, place={**verdicts.place(CPU), fact: value})
    assert ran() == DEFAULT
    (line,) = lines()
    assert words in line
    assert list(survey(CPU, dispatch.files()).ignored.values()) == [1]


def test_another_fact_of_the_place_is_missing(cache: Path, lines) -> None:
    put(cache, place={name: value for name, value in verdicts.place(CPU).items() if name != "torch"})
    assert ran() == DEFAULT
    assert "made with torch None" in lines()[0]


@pytest.mark.parametrize("field", ["op", "call"])
def test_of_another_call_than_its_name_says(cache: Path, lines, field: str) -> None:
    put(cache, **{field: "linear"})
    assert ran() == DEFAULT
    assert "a file is of another call than its name says" in lines()[0]


def test_one_line_for_a_reason_however_many_files(cache: Path, lines) -> None:
    verdicts.write(verdict(place={"device": "another"}), cache)
    again = torch.float16
    other = verdict(place={"device": "another"}, call=call_text((*ARGS[:3], again, None)))
    verdicts.write(other, cache)
    with Choices(Verdicts(CPU)):
        ops.preprocess(*ARGS)
        ops.preprocess(*ARGS[:3], again)
    assert len(lines()) == 1


def test_what_a_verdict_names_and_is_not_here(cache: Path, lines) -> None:
    verdicts.write(verdict(chosen="gone", ms={"gone": 1.0}), cache)
    assert ran() == DEFAULT
    assert "there is no implementation 'gone' of preprocess here" in lines()[0]


def test_what_a_verdict_names_and_refuses(cache: Path, lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    verdicts.write(verdict(chosen="cuda", ms={"cuda": 1.0}), cache)
    assert ran() == DEFAULT
    assert lines() == ["preprocess: running 'cpp' because 'cuda' refused: views[0] is on cpu"]


PLUGIN = """
from dit4dit.ops import Implementation, register
from dit4dit.ops.preprocess import reference

def run(views, size, resize, dtype, out):
    return reference(views, size, resize, dtype)

register("preprocess", Implementation("mine", lambda *_: None, run))
"""


def imported(file: Path) -> None:
    """The module of a user who registers an implementation of their own."""
    spec = importlib.util.spec_from_file_location("plugin_of_a_test", file)
    module = sys.modules["plugin_of_a_test"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    imported(file)
    yield file
    del dispatch.find("preprocess").implementations["mine"], sys.modules["plugin_of_a_test"]


def test_an_implementation_of_others_counts_while_its_source_is_the_same(cache: Path, plugin: Path, lines) -> None:
    foreign = dispatch.foreign(dispatch.find("preprocess").implementations["mine"])
    assert foreign == str(plugin)
    mine = verdict(chosen="mine", ms={"mine": 1.0}, foreign=verdicts.file_hash(foreign))
    verdicts.write(mine, cache)
    assert ran() == "mine"
    assert survey(CPU, dispatch.files()).counting == (mine,)
    plugin.write_text(PLUGIN + "# changed")
    imported(plugin)
    assert ran() == DEFAULT
    (line,) = lines()
    assert "the source of 'mine' of preprocess has changed" in line
    assert "plugin.py" in line
    assert not survey(CPU, dispatch.files()).counting
    plugin.unlink()
    assert ran() == DEFAULT
    verdicts.write(replace(mine, foreign=verdicts.file_hash(foreign)), cache)
    assert ran() == DEFAULT, "what cannot be read may be anything"


def test_one_of_others_under_a_name_of_ours_and_one_of_ours_that_was_of_others(
    cache: Path, plugin: Path, lines
) -> None:
    verdicts.write(verdict(chosen="mine", ms={"mine": 1.0}), cache)
    assert ran() == DEFAULT
    verdicts.write(verdict(foreign=verdicts.file_hash(str(plugin))), cache)
    assert ran() == DEFAULT
    assert "'torch' of preprocess was not dit4dit's own" in lines()[1]


def test_two_processes_that_write_one_verdict_at_once(cache: Path) -> None:
    """Whatever is read meanwhile is one or the other, whole."""
    script = f"""
import sys
from dataclasses import replace
from pathlib import Path
from dit4dit.ops import verdicts
path = Path({str(cache / verdict().file)!r})
found = verdicts.read(path)
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    verdicts.write(replace(found, made="theirs " * (1 + 1000 * (i % 2))), path.parent)
"""
    path = verdicts.write(verdict(made="first"), cache)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        seen = set()
        while other.poll() is None:
            verdicts.write(verdict(made="ours"), cache)
            found = verdicts.read(path)
            assert isinstance(found, Verdict), found
            seen.add(found.made.split()[0])
    assert other.returncode == 0
    assert seen <= {"ours", "theirs"}
    assert "ours" in seen
    assert [one.name for one in cache.iterdir()] == [path.name], "no half of one is left"
    assert ran() == OTHER


def test_one_that_is_replaced_while_it_is_read_is_read_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = verdicts.write(verdict(), cache)
    real = os.fstat

    def replaced(descriptor: int) -> os.stat_result:
        verdicts.write(verdict(made="later"), cache)
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", replaced)
        assert verdicts.read(path) == verdict()
    assert verdicts.read(path) == verdict(made="later")


def test_a_folder_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    path = verdicts.write(verdict(), cache)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(InputError, match=r"not written \(Read-only file system\); set DIT4DIT_CACHE"):
        verdicts.write(verdict(made="later"), cache)
    assert [one.name for one in cache.iterdir()] == [path.name]
    assert ran() == OTHER, "what was there is still used"


def test_a_long_reason_is_cut(cache: Path) -> None:
    path = verdicts.write(verdict(refused={"cuda": "x" * 10 * verdicts.LARGEST}), cache)
    assert len(verdicts.read(path).refused["cuda"]) == verdicts.LONGEST_REASON


def test_another_number_of_threads_is_another_device(cache: Path) -> None:
    verdicts.write(verdict(), cache)
    one = Verdicts(CPU)
    assert ran(one) == OTHER
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert f"{threads + 1} threads" in verdicts.place(CPU)["device"]
        assert verdicts.folder(CPU) != cache
        assert ran(one) == DEFAULT
        shutil.copytree(cache, verdicts.folder(CPU))
        assert ran() == DEFAULT, "copied there by hand"
    finally:
        torch.set_num_threads(threads)
    assert ran(one) == OTHER


def test_without_a_folder_next_to_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("asked")

    for module, names in (
        (verdicts, ("place", "read", "call_text")),
        (sources, ("kernels_hash", "driver", "versions")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, asked)
    assert ran() == DEFAULT


def test_the_place_is_asked_for_only_where_there_is_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)

    def asked(*_: Any) -> None:
        raise AssertionError("asked")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_package", asked)
        assert ran() == DEFAULT
    verdicts.write(verdict(), cache)
    assert ran() == OTHER


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if str(self).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *args, **kwargs)

    def started() -> str:
        raise AssertionError("platform.processor starts a process")

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", started)
    monkeypatch.setattr(verdicts, "_cpu", verdicts._cpu.__wrapped__)
    assert ran() == DEFAULT
    assert verdicts.place(CPU)["device"].endswith(("thread", "threads"))
    monkeypatch.setattr(verdicts.sources.native, "driver", lambda: SimpleNamespace(version=13000))
    assert sources.driver.__wrapped__() == "CUDA 13000"

    def none() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(verdicts.sources.native, "driver", none)
    assert sources.driver.__wrapped__() == "unknown"


# GPUs, by a stub of what torch says of them ---------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Two GPUs of a machine, of which the first is a slice of one."""
    two = [
        SimpleNamespace(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, multi_processor_count=16),
        SimpleNamespace(name="NVIDIA GeForce RTX 5090", major=12, minor=0, multi_processor_count=170),
    ]
    current = [0]

    def properties(device: torch.device) -> SimpleNamespace:
        return two[current[0] if device.index is None else device.index]

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", properties)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: properties(device).name)
    monkeypatch.setattr(cuda, "get_device_capability", lambda d: (properties(d).major, properties(d).minor))
    monkeypatch.setattr(cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(sources, "driver", lambda: "580.82.07")
    return two


def gpu(index: int | None) -> torch.device:
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def test_each_gpu_of_a_machine_has_its_own_verdicts(gpus: list[SimpleNamespace], lines) -> None:
    args = tuple(torch.zeros(2, device="meta") for _ in range(2))
    for i in range(2):
        found = Verdict("linear", call_text(args), verdicts.place(gpu(i)), "torch", f"of {i}", {f"of {i}": 1.0})
        verdicts.write(found, verdicts.folder(gpu(i)))
    assert verdicts.folder(gpu(0)).name == "nvidia-h100-80gb-hbm3-mig-1g-10gb"
    assert [Verdicts(gpu(i)).choice("linear", args) for i in range(2)] == ["of 0", "of 1"]
    unnamed = Verdicts(gpu(None))
    assert unnamed.choice("linear", args) == "of 0"
    torch.cuda.set_device(1)
    assert unnamed.choice("linear", args) == "of 1"
    assert not lines()
    gpus[1].multi_processor_count = 168  # the same name
    assert Verdicts(gpu(1)).choice("linear", args) is None
    assert "made with sms 170, here it is 168" in lines()[0]


def test_what_a_place_on_a_gpu_says(gpus: list[SimpleNamespace]) -> None:
    place = verdicts.place(gpu(1))
    facts = {"device", "capability", "sms", "driver", "cuda", "cudnn", "torch", "kernels"}
    assert facts <= set(place) <= facts | set(sources.PACKAGES)
    assert (place["capability"], place["sms"], place["driver"]) == ("12.0", 170, "580.82.07")
    assert json.loads(json.dumps(place)) == place


@pytest.mark.gpu
def test_a_verdict_on_a_gpu(lines) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    here = verdicts.place(device)
    assert json.loads(json.dumps(here)) == here == verdicts.place(torch.device("cuda"))
    x, weight = torch.randn(4, 8, device=device), torch.randn(16, 8, device=device)
    names = ops.implementations("linear")
    found = Verdict("linear", call_text((x, weight, None)), here, names[0], "torch", {"torch": 1.0})
    verdicts.write(found, verdicts.folder(device))
    on_gpu = Verdicts(torch.device("cuda"))
    assert on_gpu.choice("linear", (x, weight, None), dispatch.find("linear").files) == "torch"
    with Choices(on_gpu) as choices:
        ops.linear(x, weight, None)
    assert choices.ran == {"linear": {"torch": 1}}
    assert not lines()


# Call texts -----------------------------------------------------------------------------------------------------------------


def test_what_tells_one_call_from_another() -> None:
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    texts = [
        call_text(args)
        for args in (
            (x,),
            (x.float(),),
            (x.transpose(1, 2).contiguous(),),
            (x.transpose(1, 2),),
            (x, None),
            (x, x),
            ([x, x],),
            (x, "none"),
            (x, "tanh"),
            (x, 1),
            (x, True),
            (x, torch.float32),
        )
    ]
    assert len(set(texts)) == len(texts)
    assert call_text((x, 1e-5)) == call_text((x, 1e-6)) == "bfloat16[2x3x4], float"
    assert call_text((torch.zeros(10, 4)[2:],)) == call_text((torch.zeros(8, 4),)), "not offsets"
    assert call_text((torch.zeros(4, 4, device="meta"),)) == call_text((torch.zeros(4, 4),))


def test_the_stride_of_a_dimension_of_one_is_no_layout() -> None:
    wide = torch.zeros(1, 3, 8)[:, :, :4]
    odd = wide.as_strided((1, 3, 4), (7, 8, 1))
    assert call_text((wide,)) == call_text((odd,)) == "float32[1x3x4] strides *x8x1"


# In an engine ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Files that are opened while `counting` has a list in it."""
    files: list[list[str]] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and files and files[0] is not None:
            files[0].append(str(args[0]))

    sys.addaudithook(hook)  # stays as long as the process
    found: list[str] = []
    files.append(found)
    yield found
    files.clear()


def test_after_a_plans_first_run_no_file_is_opened_and_nothing_looked_up(
    cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit4dit.checkpoints.weights import random_model
    from dit4dit.engine import Engine, Plan, RequestShape
    from dit4dit.presets import preset

    engine = Engine(random_model(preset("tiny").model, 0))
    plan = Plan(engine, RequestShape(1, ((40, 40),), (32, 32), "cv2_area", True, 9), None)
    with ops.listing() as calls, torch.no_grad():
        plan.compute()
    op, args = next(call for call in calls if call[0] == "preprocess")
    put(cache, op=op, call=call_text(args)).rename(cache / verdicts.file_name(op, call_text(args)))

    plan = Plan(engine, RequestShape(1, ((40, 40),), (32, 32), "cv2_area", True, 9), None)
    opened.clear()
    with torch.no_grad():
        plan.rehearse()
    read = [name for name in opened if name.startswith(str(cache))]
    assert len(read) == len({(op, call_text(args)) for op, args in calls if op != "philox_normal"}), (
        "once for each call"
    )
    assert plan.ran["preprocess"] == {OTHER: 1}
    opened.clear()
    for name in ("choice", "_look", "_folder"):
        monkeypatch.setattr(Verdicts, name, None)
    monkeypatch.setattr(verdicts, "call_text", None)
    with torch.no_grad():
        for _ in range(3):
            plan.rehearse()
    assert opened == []


# Shown ----------------------------------------------------------------------------------------------------------------------


def test_explain_shows_what_was_measured_or_that_nothing_was(cache: Path) -> None:
    (found,) = ops.explain("preprocess")
    assert (found.measured, found.note) == ((), "not yet measured here: run dit4dit tune")
    (found,) = ops.explain("philox_normal")
    assert found.note is None, "one implementation can run here"
    verdicts.write(verdict(), cache)
    (cache / "linear-0.json").write_text("{}")
    (found,) = ops.explain("preprocess")
    (row,) = found.measured
    assert found.note is None
    assert (row.call, row.chosen, row.runner_up) == (CALL, OTHER, DEFAULT)
    assert (row.ms, row.made, row.shipped) == ({OTHER: 1.0, DEFAULT: 2.0}, "2026-01-01", None)
    (found,) = ops.explain("linear")
    assert found.measured == ()


def test_implementations_of_ones_own_are_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dispatch.find("philox_normal").implementations
    monkeypatch.setitem(known, "mine", Implementation("mine", lambda *_: None, lambda *_: None, measured_only=True))
    assert ops.explain("philox_normal")[0].note == verdicts.NOT_YET


def test_verdicts_go_before_the_shipped_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        f"preprocess: {CALL}": {"chosen": OTHER, "ms": {OTHER: 0.5}},
        "linear: x": {"chosen": "torch", "ms": {}},
    }
    monkeypatch.setattr(verdicts, "shipped_for", lambda device: {"source": "a.json", "calls": rows})
    assert ran() == OTHER
    (found,) = ops.explain("preprocess")
    assert (found.measured[0].shipped, found.measured[0].runner_up, found.note) == ("a.json", None, verdicts.NOT_YET)
    verdicts.write(verdict(chosen=DEFAULT), cache)
    assert ran() == DEFAULT
    assert {
        op: [row.shipped for row in found] for op, found in measured(CPU, survey(CPU, dispatch.files())).items()
    } == {
        "preprocess": [None],
        "linear": ["a.json"],
    }
    put(cache, "broken")
    assert ran() == OTHER, "the table is what is left"
