"""Finding what was compiled ahead of time, launching it through a driver that records, and saying why where there is none."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit4dit import doctor, ops
from dit4dit.errors import BackendError, CudaError
from dit4dit.ops import explanation, launch, native, programmatic
from dit4dit.ops.aot import loader
from dit4dit.ops.aot import manifest as manifests
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.dispatch import find


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU: an address, and no memory. Operations on it make others."""

    addresses = 0x7000_0000_0000

    @staticmethod
    def __new__(cls, like: torch.Tensor, device: str = "cuda:0") -> OnGpu:
        x = torch.Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=torch.device(device)
        )
        x.address = OnGpu.addresses
        OnGpu.addresses += 1 << 32
        x.meta = like.to("meta")
        return x

    def data_ptr(self) -> int:
        return self.address + self.meta.storage_offset() * self.element_size()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(x: Any) -> Any:
            return x.meta if isinstance(x, OnGpu) else x

        given = {k: torch.device("meta") if k == "device" else bare(v) for k, v in (kwargs or {}).items()}
        out = func(*map(bare, args), **given)
        return torch.utils._pytree.tree_map_only(torch.Tensor, OnGpu, out)


@pytest.fixture
def machine(small_build, fake, monkeypatch):
    """A GPU of capability 9.0 with the small build installed; Triton must not be asked."""
    loader._loaded.clear()
    launch._said.clear()
    native.driver.cache_clear()
    driver = fake.open()
    monkeypatch.setattr(native, "driver", lambda: driver)
    monkeypatch.setattr(loader, "installed", lambda: small_build)
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x57))
    compiled: list[Launch] = []
    early: list[bool] = []

    def compile_now(step: Launch, programmatic: bool = False) -> None:
        compiled.append(step)
        early.append(programmatic)

    monkeypatch.setattr(Launch, "__call__", compile_now)
    programmatic.driver_can.cache_clear()
    yield SimpleNamespace(fake=fake, compiled=compiled, early=early, build=small_build)
    programmatic.driver_can.cache_clear()
    loader._loaded.clear()


def on_gpu(step: Launch, device: str = "cuda:0") -> Launch:
    return replace(
        step,
        arguments={k: OnGpu(v, device) if isinstance(v, torch.Tensor) else v for k, v in step.arguments.items()},
    )


def decoded(call: dict[str, Any], row: manifests.Compiled) -> dict[str, int]:
    return {
        name: int.from_bytes(bytes.fromhex(text), "little")
        for (name, _), text in zip(row.arguments, call["parameters"], strict=False)
    }


def test_each_launch_of_an_op_reaches_the_driver(machine, samples):
    assert len(samples) >= 5
    for step in map(on_gpu, samples):
        row = loader.find(step, "90")
        assert isinstance(row, manifests.Compiled)
        sizes = ["8" if kind[0] == "*" else "4" for _, kind in row.arguments]
        machine.fake.set("PARAMETERS", " ".join([*sizes, "8", "8"]))
        assert loader.start(step, 0, 0x57, "90") is None
        call = machine.fake.calls("cuLaunchKernel")[-1]
        grid = [*step.grid, 1, 1][:3]
        assert (call["grid"], call["block"][0], call["stream"]) == (grid, 32 * step.tile["num_warps"], 0x57)
        got = decoded(call, row)
        for name, value in step.arguments.items():
            if isinstance(value, torch.Tensor):
                assert got[name] == value.data_ptr()
            elif isinstance(value, int) and name in got:
                assert got[name] == value
        assert set(got) == set(Specialization.of(step).arguments)


def test_a_kernel_is_loaded_once_a_device(machine, samples):
    for device in (0, 0, 1, 0, 1):
        assert loader.start(on_gpu(samples[0], f"cuda:{device}"), device, 0, "90") is None
    assert len(machine.fake.calls("cuModuleLoadData")) == 2
    assert len(machine.fake.calls("cuLaunchKernel")) == 5


def test_an_ops_triton_implementation_takes_it(machine):
    """The whole way: op -> launches -> lookup -> driver, with the results' memory as the kernel's output."""
    meta = dict(device="meta")
    x, y = torch.empty(1, 1, 9, 64, **meta), torch.empty(1, 1, 9, 64, dtype=torch.bfloat16, **meta)
    row = torch.empty(1, 64, **meta)
    x, y, shift, scale = map(OnGpu, (x, y, row, row))
    with torch.no_grad(), ops.trace() as ran:
        x_new, h = ops.adaln(x, y, None, shift, scale, 1e-6, torch.bfloat16)
    assert ran == {"adaln": {"triton"}}
    assert not machine.compiled
    found = next(r for r in machine.build.kernels["sm_90"].values() if r.kernel == "adaln")
    machine.fake.set("PARAMETERS", " ".join("8" if kind[0] == "*" else "4" for _, kind in found.arguments))
    with torch.no_grad():
        x_new, h = ops.adaln(x, y, None, shift, scale, 1e-6, torch.bfloat16)
    got = decoded(machine.fake.calls("cuLaunchKernel")[-1], found)
    want = {"x": x, "y": y, "shift": shift, "scale": scale, "x_new": x_new, "h": h}
    assert {name: got[name] for name in want} == {name: tensor.data_ptr() for name, tensor in want.items()}
    assert len(machine.fake.calls("cuLaunchKernel")) == 2


def test_a_tensor_elsewhere_is_refused(machine, samples):
    with pytest.raises(ValueError, match="adaln: x: expected device cuda:1, got cuda:0"):
        loader.start(on_gpu(samples[0]), 1, 0, "90")


def run_adaln(width: int = 48) -> None:
    x = OnGpu(torch.empty(1, 1, 9, width, device="meta"))
    with torch.no_grad():
        ops.adaln(x, None, None, None, None, 1e-6, torch.bfloat16, backend="triton")


@pytest.mark.parametrize("chip", [80, 90])
def test_the_driver_sees_the_attribute_where_it_is_on_and_the_code_waits(machine, launches_for, monkeypatch, chip):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(chip, 10))
    for step in map(on_gpu, launches_for(chip)):
        for on in (False, True):
            before = len(machine.fake.calls("cuLaunchKernelEx"))
            with programmatic.launches(on):
                launch._start(step, torch.device("cuda", 0), str(chip))
            assert len(machine.fake.calls("cuLaunchKernelEx")) - before == (on and chip >= 90)
    assert all(call["programmatic"] for call in machine.fake.calls("cuLaunchKernelEx"))
    assert not machine.compiled


def test_just_in_time_too_unless_triton_compiles_for_another_gpu(machine, monkeypatch):
    for on, elsewhere in ((False, False), (True, False), (True, True)):
        if elsewhere:
            monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
        with programmatic.launches(on):
            run_adaln()
    assert machine.early == [False, True, False]


def test_an_old_driver_launches_plainly_and_that_is_said_once(machine, samples, old_library, monkeypatch, caplog):
    old = native.compiled().Driver(str(old_library))
    monkeypatch.setattr(native, "driver", lambda: old)
    for step in map(on_gpu, samples):
        with programmatic.launches(True):
            assert loader.start(step, 0, 0, "90", programmatic.triton_kernels("90")) is None
    assert len(machine.fake.calls("cuLaunchKernel")) == len(samples)
    assert [record.getMessage() for record in caplog.records] == [
        "programmatic launches: this CUDA driver has no cuLaunchKernelEx: kernels are launched without; update it"
    ]


def test_other_sizes_are_compiled_just_in_time_and_that_is_said_once(machine, caplog):
    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"):
        run_adaln()
        run_adaln()
    assert [step.kernel for step in machine.compiled] == ["adaln", "adaln"]
    (record,) = caplog.records
    assert "adaln: compiled just in time: no kernel was compiled ahead of time for adaln | " in record.getMessage()
    assert "WIDTH=48" in record.getMessage()


def test_without_a_compiler_other_sizes_step_down_to_torch(machine, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match=r"WIDTH=48.*, and Triton cannot compile it: no C compiler is on PATH"):
        run_adaln()
    op = ops.dispatch._ops["adaln"]
    args = (OnGpu(torch.empty(1, 1, 9, 48, device="meta")), None, None, None, None, 1e-6, torch.bfloat16)
    chosen, refused = op.choose(args)
    assert chosen.name == "torch"
    assert "no C compiler" in refused["triton"]
    y = OnGpu(torch.empty(1, 1, 9, 64, dtype=torch.bfloat16, device="meta"))
    x, row = (OnGpu(torch.empty(shape, device="meta")) for shape in ((1, 1, 9, 64), (1, 64)))
    assert op.choose((x, y, None, row, row, 1e-6, torch.bfloat16))[0].name == "triton"
    assert not machine.compiled


def test_without_a_compiler_an_old_driver_steps_down_to_torch(machine, monkeypatch):
    """Before anything is launched: in the middle of a request it would be too late."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    machine.fake.set("VERSION", "11080")
    old = machine.fake.open()
    monkeypatch.setattr(native, "driver", lambda: old)
    y = OnGpu(torch.empty(1, 1, 9, 64, dtype=torch.bfloat16, device="meta"))
    x, row = (OnGpu(torch.empty(shape, device="meta")) for shape in ((1, 1, 9, 64), (1, 64)))
    chosen, refused = ops.dispatch._ops["adaln"].choose((x, y, None, row, row, 1e-6, torch.bfloat16))
    assert chosen.name == "torch"
    assert re.search(r"the driver is for 11.8, and Triton cannot compile: no C compiler is on PATH", refused["triton"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("off", "DIT4DIT_CUBINS=off"),
        ("chip", "kernels are compiled ahead of time for sm_80, sm_90, not for sm_103"),
        ("none", "this build of dit4dit has no kernels compiled ahead of time"),
        ("driver", r"kernels were compiled ahead of time with CUDA \d+\.\d+, the driver is for 11.8"),
    ],
)
def test_every_reason_is_said(machine, samples, monkeypatch, change, reason):
    chip = "90"
    if change == "off":
        monkeypatch.setenv(loader.VARIABLE, "off")
    elif change == "chip":
        chip = "103"
    elif change == "none":
        monkeypatch.setattr(loader, "installed", lambda: manifests.installed(machine.build.folder / "sm_90"))
    else:
        machine.fake.set("VERSION", "11080")
        old = machine.fake.open()
        monkeypatch.setattr(native, "driver", lambda: old)
    found = loader.start(on_gpu(samples[0]), 0, 0, chip)
    assert found is not None
    assert re.fullmatch(reason, found)
    assert loader.explain(chip) == f"just in time: {found}"
    assert not machine.fake.calls("cuLaunchKernel")


def test_explain_and_doctor_say_where_kernels_come_from(machine, monkeypatch):
    text = loader.explain("90")
    assert text.startswith(f"{len(machine.build.kernels['sm_90'])} ahead of time for sm_90 (Triton ")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert explanation._origin(find("adaln"), "triton", torch.device("cuda", 0))[1] == text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    finding = doctor._kernels()
    assert (finding.level, finding.detail) == ("ok", text)
    monkeypatch.setenv(loader.VARIABLE, "off")
    finding = doctor._kernels()
    assert (finding.level, finding.detail) == ("note", "just in time: DIT4DIT_CUBINS=off")


def test_no_error_of_the_driver_is_swallowed(machine, samples):
    machine.fake.set("FAIL", "cuModuleLoadData=1")
    with pytest.raises(CudaError, match="adaln: cuModuleLoadData"):
        loader.start(on_gpu(samples[0]), 0, 0, "90")
    machine.fake.set("FAIL", "")
    assert loader.start(on_gpu(samples[0]), 0, 0, "90") is None, "a kernel that did not load is tried again"


@pytest.fixture
def copy(small_build, tmp_path):
    """A build that a test may spoil."""
    return manifests.Manifest.read(shutil.copytree(small_build.folder, tmp_path / "cubins"))


def test_a_changed_cubin_is_refused(copy):
    row = next(iter(copy.kernels["sm_90"].values()))
    assert copy.image(row)
    (copy.folder / row.file).write_bytes(copy.image(row) + b"x")
    with pytest.raises(ValueError, match=r"expected sha256 .*; reinstall dit4dit"):
        copy.image(row)


def test_kernels_that_have_changed_since_are_not_launched(copy):
    assert manifests.installed(copy.folder) == copy
    manifests.installed.cache_clear()
    replace(copy, sources={**copy.sources, "adaln.py": "0" * 64, "old.py": "1" * 64}).write()
    assert manifests.installed(copy.folder) == (
        "the kernels have changed since they were compiled ahead of time (adaln.py, old.py)"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "kernels": {"sm_90": [{}]}}'])
def test_a_broken_manifest_says_so(tmp_path, text):
    (tmp_path / manifests.FILE).write_text(text)
    assert "cannot be read" in str(manifests.installed(tmp_path))


def test_rows_survive_the_file(copy):
    """Keys are made again from what JSON keeps: booleans, None and numbers must come back as they were."""
    data = json.loads((copy.folder / manifests.FILE).read_text())
    constants = {json.dumps(value) for row in data["kernels"]["sm_90"] for value in row["constants"].values()}
    assert {"false", "null", "64"} <= constants


@pytest.mark.parametrize(
    ("driver", "build", "capability", "reason"),
    [
        (13000, "13.0.88", (9, 0), None),
        (13010, "13.0.88", (8, 7), None),
        (
            12080,
            "13.0.88",
            (9, 0),
            "this build is for CUDA 13.0, the driver for 12.8: update the driver, or install dit4dit-cu12",
        ),
        (12040, "12.8.93", (9, 0), None),
        (12040, "12.8.93", (11, 0), "this build is for CUDA 12.8, the driver for 12.4: update the driver"),
    ],
)
def test_drivers_that_are_too_old_for_the_build(fake, monkeypatch, driver, build, capability, reason):
    """Machine code runs on every driver of its major version; PTX (here for 11.0) wants its own or a later one."""
    fake.set("VERSION", str(driver))
    found = fake.open()
    monkeypatch.setattr(native, "driver", lambda: found)
    info = SimpleNamespace(cuda_architectures=("sm_80", "sm_90a", "compute_80"), build_info=lambda: {"cuda": build})
    monkeypatch.setattr(native, "compiled", lambda: info)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native.no_cuda_kernels(torch.device("cuda", 0)) == reason


def test_importing_and_finding_needs_no_triton(small_build, tmp_path):
    """In a process where importing Triton fails, as it would without a compiler at hand."""
    script = f"""
import sys
sys.modules["triton"] = None
from pathlib import Path
import torch
from dit4dit.ops.aot import loader, manifest
from dit4dit.ops.adaln import launches
found = manifest.Manifest.read(Path({str(small_build.folder)!r}))
loader.installed = lambda: found
e = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
args = (e(1, 1, 9, 64), e(1, 1, 9, 64, dtype=torch.bfloat16), None, e(1, 64), e(1, 64), 1e-6, torch.bfloat16)
(step,), _ = launches(args, "90")
print(loader.find(step, "90").entry)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "adaln\n", done.stderr
