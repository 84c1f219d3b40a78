"""action_ode: the reference against the model's head, and the kernel's own source, run on a CPU, against its twin.

tests/cuda_emulation compiles kernels/action_ode_worker.cuh with the host's compiler and runs all threads of several blocks in a
random order, without and with clusters. It shows wrong numbers, missing barriers, waits and fences of stores, and bad addresses.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
import torch
from emulator import Emulator, Result, State, built, changed_kernels, needs_compiler
from head_case import A100, DEAR, DEVICES, H200, SIZES, Case, planned, tiny
from torch import Tensor

from dit4dit import ops
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, Schedule, plan
from dit4dit.engine.action_ode import schedule as definition
from dit4dit.engine.action_ode.program import OneLaunchHead, Wanted
from dit4dit.engine.action_ode.schedule import EMPTY, OPERANDS, RECORD, Attend, Epilogue, Opcode, Product
from dit4dit.engine.action_ode.validate import validate
from dit4dit.engine.action_ode.weights import pack
from dit4dit.engine.fold import fold_head
from dit4dit.errors import BackendError, InputError, OutputError
from dit4dit.model.flow import GuidanceTensors, prefix_weights
from dit4dit.ops.action_ode import loop

KERNELS = Path(__file__).parents[2] / "kernels"
LIMIT = 4_000_000  # ns, of the emulation's clock


@pytest.fixture(scope="module", params=list(DEVICES))
def gpu(request: pytest.FixtureRequest) -> tuple[Emulator, Device]:
    """What runs the kernel for a device without clusters, and one with them."""
    return built(request.param), DEVICES[request.param]


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
        assert len(kind._fields) <= RECORD - 1
    assert [name for _, name in emulator.fields("Tile")] == ["opcode", "work[kRecord - 1]"]


def test_enumerations_and_sizes_are_the_same() -> None:
    text = "".join((KERNELS / f"action_ode_{part}.cuh").read_text() for part in ("tiles", "block", "attention"))
    text = re.sub(r"//.*", "", text)
    for enum, names in (("Opcode", Opcode), ("Epilogue", Epilogue), ("Wanted", Wanted)):
        found = re.findall(r"k(\w+)", re.search(rf"enum {enum} {{(.*?)}}", text, re.DOTALL)[1])
        wanted = [member.name.title().replace("_", "") for member in names]
        assert [name.replace("RoomForWeights", "WeightsRoom") for name in found] == wanted
    for name in (
        "RECORD",
        "WARPS",
        "STEP_COLUMNS",
        "WEIGHT_UNIT",
        "SLOT_BYTES",
        "MAX_TOKENS",
        "MAX_HEAD_DIM",
        "MAX_WIDTH",
    ):
        in_kernel = "k" + name.title().replace("_", "")
        assert re.search(rf"constexpr int {in_kernel} = {getattr(definition, name)};", text), name
    for in_kernel, value in (
        ("kMaxWarpTiles", definition.MAX_WARP_TILES),
        ("kSets", definition.SETS),
        ("kFixedBytes", definition.FIXED_SHARED),
    ):
        assert re.search(rf"constexpr int {in_kernel} = {value};", text), in_kernel
    assert f"case {definition.PADDED_TOKENS[-2]}:" in (KERNELS / "action_ode_product.cuh").read_text()


# -- the kernel, run on this CPU ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_is_its_twin(gpu: tuple[Emulator, Device], size: str, fp8: bool) -> None:
    """Every word within a few roundings of bf16, and the actions as near to the truth as PyTorch's."""
    run, device = gpu
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    schedule = planned(size, replace(case.shape, fp8=fp8), device)
    validate(schedule)
    twin = case.twin(schedule, torch.bfloat16)
    twin.run()
    result = run(schedule, pack(case.folded, schedule), *case.given(), seed=1)
    assert result.status == [0, 0, 0, 0]
    assert result.state.progress.tolist() == [case.steps % 3, 0]
    assert result.state.error(twin) < (2**-6,)
    with torch.no_grad():
        truth = case.want() if not fp8 else case.twin(schedule).run()
    assert case.error(result.actions, truth) < 2 * case.error(case.want_in_bf16(), case.want())


def test_the_sizes_reach_every_way_of_cutting() -> None:
    for device in DEVICES.values():
        schedules = [planned(name, Case(tiny(**c), **r).shape, device) for name, (c, r) in SIZES.items()]
        products = [t.work for s in schedules for t in s.decoded if isinstance(t.work, Product)]
        assert {s.padded_tokens for s in schedules} == set(definition.PADDED_TOKENS)
        assert {w.epilogue for w in products} == set(Epilogue)
        assert max(w.parts for w in products) > 1
        assert any(w.token for w in products), "several groups of samples"
        assert any(w.slice > w.panel_steps * definition.STEP_COLUMNS for w in products), "several panels"
        if device.clusters:
            assert {s.ranks for s in schedules} == {1, 2, 4, 8}
            assert {w.split for w in products} == {1, 2, 4, 8}
        else:
            assert any(
                w.slice > s.part for s in schedules for w in (t.work for t in s.decoded) if isinstance(w, Product)
            )


@needs_compiler
@pytest.mark.parametrize("size", ["9 tokens", "9 tokens, batch 4"])
def test_norms_of_slices_with_means_of_their_own(gpu: tuple[Emulator, Device], size: str) -> None:
    """Columns that rise from -4 to 4: what the ranks of a split say of their slices differs, and must be weighed right."""
    run, device = gpu
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    position = case.head.position_embedding
    assert position is not None
    with torch.no_grad():
        position.weight += torch.linspace(-4, 4, position.weight.shape[1])
        case.folded = fold_head(case.head, case.steps)
    schedule = planned(size, case.shape, device)
    normed = [t.work.split for t in schedule.decoded if isinstance(t.work, Product) and t.work.norm]
    assert (max(normed) > 1) == bool(device.clusters), "or nothing is merged"
    want = case.twin(schedule, torch.bfloat16).run()
    assert case.error(run(schedule, pack(case.folded, schedule), *case.given()).actions, want) < 2**-6


@needs_compiler
def test_a_team_with_many_heads(gpu: tuple[Emulator, Device]) -> None:
    """Attention after attention: a rank that is ahead must not fill an inbox that another one still reads."""
    run, device = gpu
    case = Case(tiny(num_layers=2, num_heads=8), batch=3, context=150, steps=1)
    schedule = plan(case.shape, device, ranks=8 if device.clusters else 1)
    packed, want = pack(case.folded, schedule), case.twin(schedule, torch.bfloat16).run()
    for seed in range(3):
        assert case.error(run(schedule, packed, *case.given(), seed=seed).actions, want) < 2**-5


@needs_compiler
def test_the_widest_norms(gpu: tuple[Emulator, Device]) -> None:
    """More than 1024 columns, as DiT-L has."""
    run, device = gpu
    case = Case(tiny(num_layers=1, num_heads=17, head_dim=64), steps=1)
    schedule = plan(case.shape, device, DEAR)
    result = run(schedule, pack(case.folded, schedule), *case.given())
    twin = case.twin(schedule, torch.bfloat16).run()
    assert case.error(result.actions, case.want()) < 2 * case.error(twin, case.want())


@needs_compiler
def test_guidance_in_the_kernel(gpu: tuple[Emulator, Device]) -> None:
    run, device = gpu
    case = Case(tiny(), batch=2, steps=4)
    guidance = guidance_of(case)
    schedule = plan(case.shape, device)
    packed = pack(case.folded, schedule)
    guided = run(schedule, packed, *case.given(), guidance=guidance).actions
    want = case.twin(schedule, torch.bfloat16, guidance=guidance).run()
    assert case.error(guided, want) < 2**-6
    assert case.error(run(schedule, packed, *case.given()).actions, want) > 2**-5


@needs_compiler
@pytest.mark.parametrize("steps", [1, 4])
def test_same_bits_in_any_order_and_again(gpu: tuple[Emulator, Device], steps: int) -> None:
    """Other orders of threads and blocks, and launches that follow each other on the same words, as in a CUDA graph."""
    run, device = gpu
    case = Case(tiny(num_layers=2), steps=steps, context=150)
    schedule = plan(case.shape, device, DEAR, ranks=4 if device.clusters else 1)
    packed = pack(case.folded, schedule)
    state = State(schedule)
    runs, progress = [], []
    for seed in range(4):
        runs.append(run(schedule, packed, *case.given(), seed=seed, state=state).actions)
        progress.append(state.progress.tolist())
    assert progress == [[1, 0], [2, 0], [0, 0], [1, 0]]
    assert not runs[0].isnan().any()
    assert all(torch.equal(actions, runs[0]) for actions in runs)
    given = (case.noise + 1, *case.given()[1:])
    other = run(schedule, packed, *given, state=state).actions
    assert torch.equal(other, run(schedule, packed, *given).actions), "nothing of the launch before is left"


# -- waits in vain -----------------------------------------------------------------------------------------------------


def fails(result: Result, schedule: Schedule, *wanted: Wanted) -> None:
    """The launch says which block waited where for what, and has left no action and no word."""
    block, tile, what, _ = result.status
    assert 1 <= block <= schedule.blocks
    assert what in wanted
    if tile != definition.NONE:
        team = (block - 1) // schedule.ranks
        assert schedule.first_tile[team] <= tile < schedule.first_tile[team + 1]
    assert result.actions.isnan().all()
    assert bool((result.state.words == EMPTY).all())
    assert result.state.progress.tolist() == [0, 0]


def without_a_row(schedule: Schedule) -> tuple[Schedule, int]:
    """The schedule with a tile that leaves its last token's words out, and where they would be in a set."""
    index, work = next((i, t.work) for i, t in enumerate(schedule.decoded) if isinstance(t.work, Attend))
    tiles = schedule.tiles.copy()
    tiles[index, 1 + Attend._fields.index("tokens")] -= 1
    return replace(schedule, tiles=tiles), work.out + (work.tokens - 1) * work.out_stride


@needs_compiler
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_wait_in_vain_for_words_ends_in_an_error(gpu: tuple[Emulator, Device], ranks: int) -> None:
    """Of words that never come: all blocks end, the flag says which, no action is left, and the next launch is sound."""
    run, device = gpu
    if not device.teams(ranks):
        pytest.skip("the device has no clusters")
    case = Case(tiny())
    sound = plan(case.shape, device, DEAR, ranks=ranks)
    packed = pack(case.folded, sound)
    broken, first = without_a_row(sound)
    state = State(sound)
    result = run(broken, packed, *case.given(), limit_ns=LIMIT, state=state)
    fails(result, sound, Wanted.WORDS, *([Wanted.SUMS] if ranks > 1 else []))
    if result.status[2] == Wanted.WORDS:
        assert result.status[3] >= first, "these words, or some that follow from them"
    state.status.zero_()
    again = run(sound, packed, *case.given(), state=state)
    assert again.status == [0, 0, 0, 0]
    assert torch.equal(again.actions, run(sound, packed, *case.given()).actions)


@needs_compiler
def test_a_launch_after_an_error_that_nobody_has_read(gpu: tuple[Emulator, Device]) -> None:
    """It gives up at once, with all that is still on its way into shared memory, and leaves no action and no word."""
    run, device = gpu
    case = Case(tiny(num_layers=1), steps=1)
    schedule = plan(case.shape, device, DEAR, ranks=4 if device.clusters else 1)
    packed = pack(case.folded, schedule)
    for seed in range(4):
        state = State(schedule)
        state.status[0] = 1
        result = run(schedule, packed, *case.given(), seed=seed, state=state)
        fails(result, schedule, Wanted.WORDS)


VAIN = {
    "sums that never come": (  # of a last tile: for others no team waits
        Wanted.SUMS,
        "block",
        "barrier_expect(sums_barrier(), bytes)",
        "barrier_expect(sums_barrier(), bytes + (bytes > 0 && block_index() == 2 && now_.step == block_.launch.steps - 1 &&"
        " now_.tile == block_.fixed.tiles[1] - 1 ? 8 : 0))",
    ),
    "an inbox that a rank never gives back": (
        Wanted.ROOM,
        "block",
        "if (block_.lane < ranks_of(block_.launch) && !",
        "if (block_.lane < ranks_of(block_.launch) - (block_index() == 1) && !",
    ),
    "a copy that never comes": (
        Wanted.WEIGHTS,
        "weights",
        "    if (block.lane != 0) return;\n    barrier_expect(full, bytes);",
        "    if (block.lane != 0) return;\n    barrier_expect(full, bytes + (ring.slot == 2 && block_index() == 2 ? 16 : 0));",
    ),
    "a key that never comes": (
        Wanted.WEIGHTS,
        "weights",
        "        arrive_on_copies(&block.fixed.full[ring.slot]);",
        "        if (block_index() == 10 && block.lane == 3) { commit_copies(); wait_copies<0>(); } else\n"
        "        arrive_on_copies(&block.fixed.full[ring.slot]);",
    ),
    "a warp that never gives a slot back": (
        Wanted.WEIGHTS,
        "weights",
        "if (block.lane == 0 && !block.failed()) barrier_arrive(&block.fixed.empty",
        "if (block.thread == 0 && !block.failed()) barrier_arrive(&block.fixed.empty",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", VAIN)
def test_a_wait_in_vain_for_a_barrier_ends_in_an_error(fault: str, tmp_path: Path) -> None:
    """In one block: all end, the flag says why, no action is left and the next launch is sound."""
    case, device = Case(tiny(num_layers=2)), DEVICES["bulk"]
    wanted, file, old, new = VAIN[fault]
    sound = plan(case.shape, device, DEAR, ranks=4)
    packed = pack(case.folded, sound)
    state = State(sound)
    broken = Emulator("bulk", tmp_path, changed_kernels(tmp_path, file, old, new))
    result = broken(sound, packed, *case.given(), limit_ns=LIMIT, state=state)
    # a rank without room gives the others no sums
    fails(result, sound, wanted, *([Wanted.SUMS] if wanted == Wanted.ROOM else []))
    state.status.zero_()
    run = built("bulk")
    again = run(sound, packed, *case.given(), state=state)
    assert again.status == [0, 0, 0, 0]
    assert torch.equal(again.actions, run(sound, packed, *case.given()).actions)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant,device", [("copies", A100), ("bulk", H200)], ids=["a100", "h200"])
def test_the_kernel_at_the_true_width(variant: str, device: Device, tmp_path: Path) -> None:
    """DiT-B, two of its blocks, 17 tokens and 588 features, on as many blocks of threads as the GPU has SMs."""
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
    tiles = ready.tensors["tiles"].clone()
    ready.tensors["tiles"].copy_(torch.from_numpy(without_a_row(ready.schedule)[0].tiles))
    broken = ops.action_ode(head, *given, backend="cuda")
    with pytest.raises(OutputError, match="waited more than"):
        head.check()
    assert broken.isnan().all()
    ready.tensors["tiles"].copy_(tiles)
    assert torch.equal(ops.action_ode(head, *given, backend="cuda"), want)
    head.check()
