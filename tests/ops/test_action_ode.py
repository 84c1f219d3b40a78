"""action_ode: the reference against the model's head, and the kernel's own source, run on a CPU, against its twin.

tests/cuda_emulation compiles kernels/action_ode_worker.cuh with the host's compiler and runs all threads of several blocks in a
random order, for three kinds of chips. It shows wrong numbers, missing barriers and waits, and bad addresses; not missing fences.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
import torch
from emulator import ROOT, Emulator, needs_compiler
from head_case import A100, DEVICES, H200, SIZES, Case, tiny
from torch import Tensor

from dit4dit import ops
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, Schedule, plan
from dit4dit.engine.action_ode.plan import COPY_SLOTS, FIXED_SHARED, MOST_BULK_SLOTS
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.action_ode.schedule import COUNTER_STRIDE, NONE, OPERANDS, RECORD, THREADS, Epilogue, Opcode, Space
from dit4dit.engine.action_ode.validate import validate
from dit4dit.engine.action_ode.weights import pack
from dit4dit.engine.fold import fold_head
from dit4dit.errors import BackendError, InputError, OutputError
from dit4dit.model.flow import GuidanceTensors, prefix_weights
from dit4dit.ops.action_ode import loop, reference

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="module", params=list(DEVICES))
def chip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Emulator, Device]:
    return Emulator(request.param, tmp_path_factory.mktemp("emulated")), DEVICES[request.param]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def in_bf16(case: Case) -> OneLaunchHead:
    """The op's head, rounded to bfloat16 as a bf16 model is."""
    half = copy.deepcopy(case.head).bfloat16()
    return OneLaunchHead(fold_head(half, case.steps), case.config, case.steps)


# -- the reference and the op ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_is_the_head(size: str) -> None:
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    head = OneLaunchHead(case.folded, case.config, case.steps)
    with torch.no_grad():
        assert case.error(ops.action_ode(head, *case.given()), case.want()) < 1e-5


def test_the_norms_of_a_small_stream_are_the_heads() -> None:
    """Where the variance is about 1e-6, as small as what is added to it, another epsilon is another velocity."""
    case = Case(tiny())
    head = case.head
    assert head.state_encoder is not None
    assert head.position_embedding is not None
    last = [head.action_encoder.layer3, head.state_encoder.layer2, head.position_embedding]
    for block in head.model.blocks:
        last += [block.attn1.out, block.ff.linears[1]]
    with torch.no_grad():
        for layer in last:
            for parameter in layer.parameters():
                parameter.mul_(1e-3)
        case.folded = fold_head(head, case.steps)
        got = loop(case.folded, *case.given(), None)
    assert case.error(got, case.want()) < 1e-5


def test_guidance_in_the_reference() -> None:
    case = Case(tiny(), batch=2)
    head = OneLaunchHead(case.folded, case.config, case.steps)
    guidance = guidance_of(case)
    with torch.no_grad():
        got = ops.action_ode(head, *case.given(), guidance=guidance)
    assert case.error(got, case.want(guidance)) < 1e-5


def guidance_of(case: Case) -> GuidanceTensors:
    k = case.config.action_horizon
    return GuidanceTensors(torch.randn_like(case.noise), prefix_weights("exp", 2, k - 2, k), 5.0)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(tiny(), batch=2)
    head = OneLaunchHead(case.folded, case.config, case.steps)
    noise, context, prefix = case.given()
    with pytest.raises(InputError, match=r"noise: expected \[B, K, A\] = \[2, 8, 7\], got \[2, 9, 7\]"):
        ops.action_ode(head, noise.new_zeros(2, 9, 7), context, prefix)
    with pytest.raises(InputError, match=r"context: expected \[B, S, 256\], got \[2, 40, 128\]"):
        ops.action_ode(head, noise, context[..., :128], prefix)
    with pytest.raises(InputError, match=r"prefix"):
        ops.action_ode(head, noise, context, prefix[:1])
    with pytest.raises(BackendError, match="'cuda' refused: it is on cpu"):
        ops.action_ode(head, noise, context, prefix, backend="cuda")


def test_it_is_never_chosen_by_itself() -> None:
    (found,) = ops.explain("action_ode")
    wanted = {"cuda": "it is on cpu: load with device='cuda', or take head='library'"}
    assert (found.chosen, found.refused) == ("loop", wanted)


def test_a_head_can_be_copied_and_sent() -> None:
    case = Case(tiny())
    head = OneLaunchHead(case.folded, case.config, case.steps)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        with torch.no_grad():
            assert torch.equal(ops.action_ode(twin, *case.given()), ops.action_ode(head, *case.given()))


# -- one definition for Python and the kernel --------------------------------------------------------------------------


def test_records_have_the_same_fields() -> None:
    for opcode, kind in OPERANDS.items():
        assert emulator.fields(kind.__name__) == [("int", name) for name in kind._fields], opcode
        assert len(kind._fields) <= RECORD - 4
    assert [name for _, name in emulator.fields("Tile")] == ["opcode", "wait", "target", "signal", "work[kRecord - 4]"]


def test_enumerations_and_sizes_are_the_same() -> None:
    text = re.sub(r"//.*", "", (KERNELS / "action_ode_tiles.cuh").read_text())
    for enum, names in (("Opcode", Opcode), ("Epilogue", Epilogue), ("Space", Space)):
        found = re.findall(r"k(\w+)", re.search(rf"enum {enum} {{(.*?)}}", text, re.DOTALL)[1])
        wanted = [member.name.title().replace("_", "") for member in names]
        if enum == "Space":
            wanted = [*wanted, "Spaces"]
        assert found == wanted
    block = (KERNELS / "action_ode_block.cuh").read_text()
    for name, value in (
        ("kRecord", RECORD),
        ("kThreads", THREADS),
        ("kCounterStride", COUNTER_STRIDE),
        ("kCopySlots", COPY_SLOTS),
        ("kMostSlots", MOST_BULK_SLOTS),
        ("kFixedBytes", FIXED_SHARED),
    ):
        assert re.search(rf"constexpr int {name} = {value};", text + block), name


# -- the kernel, run on this CPU ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_its_twin(chip: tuple[Emulator, Device], size: str, fp8: bool) -> None:
    """Every buffer of activations within a few roundings of bf16, and the actions as near to the truth as PyTorch's."""
    run, device = chip
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    schedule = plan(replace(case.shape, fp8=fp8), device)
    validate(schedule)
    twin = case.twin(schedule, torch.bfloat16)
    twin.run()
    result = run(schedule, pack(case.folded, schedule), *case.given())
    assert result.status == [0, 0, 0, 0]
    assert not result.counters.any(), "the last block leaves zeros"
    for space in Space:
        if space not in (Space.OUT, Space.STATS, Space.NOISY):
            got, want = buffer_of(result.workspace, schedule, space), twin.buffers[space].float()
            assert torch.equal(got.isnan(), want.isnan()), space
            assert relative(got.nan_to_num(), want.nan_to_num()) < 2**-6, space
    with torch.no_grad():
        truth = case.want() if not fp8 else case.twin(schedule).run()
        noise, context, prefix = case.given()
        half = None if prefix is None else prefix.bfloat16()
        plain = reference(in_bf16(case), noise, context.bfloat16(), half, None)
    allowed = 2 * case.error(plain, case.want())
    assert case.error(result.actions, truth) < allowed


def buffer_of(workspace: Tensor, schedule: Schedule, space: Space) -> Tensor:
    b = schedule.buffers[space]
    part = workspace[b.offset : b.offset + b.bytes].view(torch.float32 if b.wide else torch.bfloat16)
    return part.view(b.planes, b.rows, b.columns).float()


@needs_compiler
def test_the_sizes_reach_every_way_of_cutting(chip: tuple[Emulator, Device]) -> None:
    """All heights of tiles, ranges of keys, several groups and several parts of the columns, also of normed ones."""
    _, device = chip
    schedules = [plan(Case(tiny(**config), **request).shape, device) for config, request in SIZES.values()]
    matrices = [m for schedule in schedules for m in schedule.matrices.values()]
    assert {m.tile_rows for m in matrices} == {16, 32, 64}
    products = [t.work for s in schedules for t in s.decoded if t.opcode == Opcode.PRODUCT]
    assert {w.epilogue for w in products} == set(Epilogue)
    assert max(w.planes for w in products) > 1
    assert any(w.token for w in products)
    assert any(s.part < m.columns for s in schedules for m in s.matrices.values())
    if device.shared_memory < 100 << 10:
        assert any(s.part < s.shape.width for s in schedules), "a norm in several parts"


@needs_compiler
def test_the_widest_norms(tmp_path: Path) -> None:
    """More than 1024 columns, as DiT-L has, take another path through the kernel."""
    case = Case(tiny(num_layers=1, num_heads=17, head_dim=64), steps=1)
    schedule = plan(case.shape, replace(DEVICES["bulk"], workers=34))
    result = Emulator("bulk", tmp_path)(schedule, pack(case.folded, schedule), *case.given())
    twin = case.twin(schedule, torch.bfloat16).run()
    assert case.error(result.actions, case.want()) < 2 * case.error(twin, case.want())


@needs_compiler
def test_guidance_in_the_kernel(chip: tuple[Emulator, Device]) -> None:
    run, device = chip
    case = Case(tiny(), batch=2, steps=4)
    guidance = guidance_of(case)
    schedule = plan(case.shape, device)
    packed = pack(case.folded, schedule)
    guided = run(schedule, packed, *case.given(), guidance=guidance).actions
    want = case.twin(schedule, torch.bfloat16, guidance=guidance).run()
    assert case.error(guided, want) < 2**-6
    assert case.error(run(schedule, packed, *case.given()).actions, want) > 2**-5


@needs_compiler
def test_same_bits_in_any_order_and_again(chip: tuple[Emulator, Device]) -> None:
    """Other orders of threads and blocks, and launches that follow each other on the same counters, as in a CUDA graph."""
    run, device = chip
    config, request = SIZES["9 tokens, batch 4"]
    case = Case(tiny(**config), **request)
    schedule = plan(case.shape, device)
    packed = pack(case.folded, schedule)
    counters = torch.zeros(schedule.counters + 1, COUNTER_STRIDE, dtype=torch.int32)
    runs = [run(schedule, packed, *case.given(), seed=seed, counters=counters).actions for seed in range(3)]
    assert not runs[0].isnan().any()
    assert all(torch.equal(actions, runs[0]) for actions in runs)


@needs_compiler
def test_a_wait_in_vain_ends_in_an_error(chip: tuple[Emulator, Device]) -> None:
    """A signal that never comes: all blocks end, the flag says which, no action is left, and the next launch is sound."""
    run, device = chip
    case = Case(tiny())
    sound = plan(case.shape, device)
    packed = pack(case.folded, sound)
    lost = next(i for i, t in enumerate(sound.decoded) if t.opcode == Opcode.ATTEND)
    tiles = sound.tiles.copy()
    tiles[lost, 3] = NONE
    counters = torch.zeros(sound.counters + 1, COUNTER_STRIDE, dtype=torch.int32)
    broken = replace(sound, tiles=tiles)
    result = run(broken, packed, *case.given(), limit_ns=10**7, counters=counters)
    worker, tile, counter, had = result.status
    first = sound.first_tile
    assert first[worker - 1] <= tile < first[worker]
    # its own counter, or one that hangs on it
    assert counter >= sound.decoded[lost].signal
    assert counter == sound.decoded[tile].wait
    assert had < sound.decoded[tile].target
    assert result.actions.isnan().all()
    assert not counters.any()
    again = run(sound, packed, *case.given(), counters=counters)
    assert again.status == [0, 0, 0, 0]
    assert torch.equal(again.actions, run(sound, packed, *case.given()).actions)


BARRIERS = {
    "a copy that never comes": (
        "barrier_expect(&block_.fixed.full[slot], bytes)",
        "barrier_expect(&block_.fixed.full[slot], bytes + (fetched_ == 7 && block_index() == 2 ? 16 : 0))",
        0,
    ),
    "a warp that never arrives": (
        "if (thread_index() % 32 == 0) barrier_arrive",
        "if (thread_index() == 0) barrier_arrive",
        16,
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", BARRIERS)
def test_a_wait_in_vain_for_weights_ends_in_an_error(fault: str, tmp_path: Path) -> None:
    """In one block: it ends, the flag says why, the others end too, no action is left and the counters are as before."""
    case, device = Case(tiny()), replace(DEVICES["bulk"], workers=5)
    sound = plan(case.shape, device)
    packed = pack(case.folded, sound)
    old, new, first = BARRIERS[fault]
    kernels = Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels"))
    block = kernels / "action_ode_block.cuh"
    assert block.read_text().count(old) == 1, "the kernel no longer says this"
    block.write_text(block.read_text().replace(old, new))
    counters = torch.zeros(sound.counters + 1, COUNTER_STRIDE, dtype=torch.int32)
    result = Emulator("bulk", tmp_path, kernels)(sound, packed, *case.given(), limit_ns=10**7, counters=counters)
    worker, tile, barrier, _ = result.status
    assert worker == 3 if first == 0 else 1 <= worker <= 5
    assert tile == NONE
    assert first <= barrier < first + sound.slots
    assert result.actions.isnan().all()
    assert not counters.any()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant,device", [("copies", A100), ("warpgroups", H200)], ids=["a100", "h200"])
def test_the_kernel_at_the_true_width(variant: str, device: Device, tmp_path: Path) -> None:
    """DiT-B, two of its blocks, 17 tokens and 588 features, on as many blocks of threads as the chip has multiprocessors."""
    case = Case(HeadConfig.dit_b(action_horizon=16, num_layers=2), context=588, steps=1)
    schedule = plan(case.shape, device)
    result = Emulator(variant, tmp_path)(schedule, pack(case.folded, schedule), *case.given())
    assert result.status == [0, 0, 0, 0]
    twin = case.twin(schedule, torch.bfloat16).run()
    assert case.error(result.actions, case.want()) < 2 * case.error(twin, case.want())


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> tuple[Case, OneLaunchHead, tuple[Tensor, ...]]:
    case = Case(HeadConfig.dit_b(num_layers=4), batch=1, context=588, steps=4)
    half = copy.deepcopy(case.head).cuda().bfloat16()
    on_gpu = OneLaunchHead(fold_head(half, case.steps), case.config, case.steps)
    noise, context, prefix = case.given()
    return case, on_gpu, (noise.cuda(), context.cuda().bfloat16(), prefix.cuda().bfloat16())


@pytest.mark.gpu
@pytest.mark.alone
def test_on_a_gpu(released) -> None:
    case, head, given = released
    with torch.no_grad():
        plain = ops.action_ode(head, *given, backend="torch").cpu()
        got = ops.action_ode(head, *given, backend="cuda")
        head.check()
    assert case.error(got.cpu(), case.want()) <= 2 * case.error(plain, case.want())


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.capture
def test_replays_on_a_gpu_give_the_same_bits(released) -> None:
    _, head, given = released
    want = ops.action_ode(head, *given, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.action_ode(head, *given, backend="cuda")
    for _ in range(1000):
        graph.replay()
        assert torch.equal(out, want)
    head.check()


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("replayed", [pytest.param(True, marks=pytest.mark.capture), False])
def test_many_launches_on_a_gpu_end(released, replayed: bool) -> None:
    """100 000 of them, or DIT4DIT_LAUNCHES: all end, none gives up a wait, and the last one has the bits of the first.

    Without a graph, as under a sanitizer, a hundredth of them, but no fewer than 20.
    """
    _, head, given = released
    want = ops.action_ode(head, *given, backend="cuda")
    head.check()
    left = int(os.environ.get("DIT4DIT_LAUNCHES", "100000"))
    if not replayed:
        for _ in range(max(left // 100, 20)):
            assert torch.equal(ops.action_ode(head, *given, backend="cuda"), want)
        head.check()
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.action_ode(head, *given, backend="cuda")
    while left > 0:
        for _ in range(min(left, 1000)):
            graph.replay()
        left -= 1000
        head.check()
        assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.alone
def test_a_wait_in_vain_on_a_gpu(released) -> None:
    _, head, given = released
    want = ops.action_ode(head, *given, backend="cuda")
    ready = head.prepare(given[0].device, 1, given[1].shape[1], True)
    ready.tensors["counters"][0] = -1  # one signal more than there will be
    broken = ops.action_ode(head, *given, backend="cuda")
    with pytest.raises(OutputError, match="waited more than"):
        head.check()
    assert broken.isnan().all()
    assert torch.equal(ops.action_ode(head, *given, backend="cuda"), want)
    head.check()
