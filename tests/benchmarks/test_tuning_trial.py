"""One call with real arguments: what they are, and what an implementation is held to."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import process_state, tuning_child
from dit4dit.benchmarks.ops.bench_action_ode import in_fp8
from dit4dit.benchmarks.tuning_trial import Case, Wrong, Yardstick, bits_of, mapped, same, tensors
from torch import Tensor
from tuning_calls import head_call

from dit4dit.engine import RequestShape
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.listing import calls, distinct, engine_without_data
from dit4dit.ops import verdicts
from dit4dit.ops.action_ode import reference
from dit4dit.ops.dispatch import Implementation, find, listing, trace
from dit4dit.ops.verdicts import Verdict, call_text
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS

CPU = torch.device("cpu")


def never(*_: object) -> None:
    return None


def trial(case: Case, run: Any, **options: Any) -> str | None:
    return case.trial("mine", Implementation("mine", never, run, **options)).reason


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    with torch.no_grad():
        yield


def plan(guidance: float | None, **options: Any) -> dict[str, tuple[tuple[str, tuple[Any, ...]], int]]:
    """Every distinct call of the smallest model's step."""
    engine = engine_without_data(preset("tiny").model, **options)
    size, robot = engine.config.image_size, EMBODIMENTS[preset("tiny").embodiment]
    views = ((size[0], size[1]),) * len(robot.views)
    shape = RequestShape(1, views, None, robot.resize, True, engine.config.text.max_length, guidance)
    return distinct(calls(engine, shape, robot.action_dim))


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"head_dtype": torch.bfloat16}, {"head_dtype": torch.bfloat16, "fp8": True}],
    ids=["float32", "bfloat16", "fp8"],
)
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_the_reference_is_right_on_every_call_of_a_plan(options: dict[str, Any], guidance: float | None) -> None:
    """So are arguments of each kind filled, kept, and changed for the last call."""
    for key, ((op, args), _) in plan(guidance, **options).items():
        case = Case(op, args, CPU, 0)
        meta, real = tensors(args), tensors(case.args)
        assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in meta]
        assert call_text(case.args) == call_text(args), key
        case.measure()
        before = bits_of(case.args)
        for name in ("torch", "loop"):
            if name in find(op).implementations:
                assert case.trial(name, find(op).implementations[name]).reason is None, (key, name)
                assert same(bits_of(case.args), before)


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [
        ((2, 9, 32), torch.contiguous_format, r"its result has strides \(32, 64, 1\), where the reference's has"),
        ((1, 8, 4, 4), torch.channels_last, r"its result has strides \(200, 25, 5, 1\), where the reference's has"),
    ],
)
def test_a_result_lies_in_memory_as_the_references_does(shape: Any, layout: Any, reason: str) -> None:
    """What comes behind takes views of it, and has a verdict for its strides."""
    x = torch.empty(shape, device="meta").contiguous(memory_format=layout)
    if layout is torch.channels_last:
        case = Case("add_pad", (x, None, None), CPU, 0)
    else:
        case = Case("linear", (x, torch.empty(32, 32, device="meta"), None), CPU, 0)
    case.measure()
    right = find(case.op).implementations["torch"].run
    assert trial(case, right) is None

    def elsewhere(*args: Any) -> Tensor:
        got = right(*args)
        return got.contiguous() if got.ndim == 4 else got.transpose(0, 1).contiguous().transpose(0, 1)

    assert re.match(reason, trial(case, elsewhere) or "")


def test_a_seed_is_its_arguments() -> None:
    one, again, other = (tensors(Case("action_ode", head_call(), CPU, seed).args) for seed in (0, 0, 1))
    assert same(bits_of(one), bits_of(again))
    assert len(one) > 30
    different = [not torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    assert sum(different) > len(one) / 2


def test_a_head_is_held_to_the_house_rule() -> None:
    case = Case("action_ode", head_call(), CPU, 0)
    case.measure()
    reason = trial(case, lambda *args: reference(*args) * 1.05)
    assert reason is not None
    assert reason.startswith("disagrees with the reference: result 0: expected at most")

    def spoils(head: OneLaunchHead, *args: Any) -> Tensor:
        out = reference(head, *args)
        head.folded.blocks[1].mlp_out.weight[3, 3] += 1
        return out

    weight = case.args[0].folded.blocks[1].mlp_out.weight.clone()
    assert (trial(case, spoils) or "").startswith("call 1 changed argument 0 (bfloat16 [64, 256])")
    assert torch.equal(case.args[0].folded.blocks[1].mlp_out.weight, weight), "the next one has them as they were"
    assert trial(case, reference) is None


def test_a_head_in_fp8_is_held_to_its_own_weights() -> None:
    """As the kernel rounds them; what keeps them is right as well, and what is off by as much elsewhere is not."""
    case = Case("action_ode", head_call(fp8=True), CPU, 0)
    case.measure()

    def narrow(head: OneLaunchHead, *args: Any) -> Tensor:
        small = mapped(in_fp8(head.folded), Tensor.bfloat16)
        return reference(OneLaunchHead(small, head.config, head.steps), *args)

    assert trial(case, narrow) is None
    assert trial(case, reference) is None
    plain = Case("action_ode", head_call(), CPU, 0)
    plain.measure()
    assert "disagrees" in (trial(plain, narrow) or ""), "e4m3 changes the result of a head that is not in fp8"
    assert len(Yardstick.of(reference, case.args).pairs) == 2


def test_calls_inside_of_a_call_are_chosen_as_in_a_plan() -> None:
    """Prepared, and by the verdicts that were found before."""
    case = Case("action_ode", head_call(dtype=torch.float32), CPU, 0)
    case.measure()
    loop = find("action_ode").implementations["loop"]
    assert case.trial("loop", loop).reason is None
    before = case._choices["loop"].ran["linear"]
    assert set(before) == {"onednn"}
    with listing() as found:
        loop.run(*case.args)
    texts = [call_text(args) for op, args in found if op == "linear"]
    verdict = Verdict("linear", texts[0], verdicts.place(CPU), "onednn", "torch", {"torch": 1.0})
    verdicts.write(verdict, verdicts.folder(CPU))
    again = Case("action_ode", head_call(dtype=torch.float32), CPU, 0)
    again.measure()
    assert again.trial("loop", loop).reason is None
    count = texts.count(texts[0])
    assert again._choices["loop"].ran["linear"] == {"torch": count, "onednn": before["onednn"] - count}


@pytest.mark.parametrize("op", ["patch_tokens", "norm_linear"])
def test_parts_are_timed_with_the_matrix_that_a_plan_packs(op: str) -> None:
    found = [args for (name, args), _ in plan(None, dtype=torch.float32, gpu=False).values() if name == op]
    case = Case(op, found[0], CPU, 0)
    case.measure()
    parts = find(op).implementations["parts"]
    assert case.trial("parts", parts).reason is None
    with trace() as ran:
        case.run("parts", parts)
    assert ran["linear"] == {"onednn"}


@pytest.mark.parametrize("gpu", [True, False])
def test_a_head_is_timed_as_the_graph_that_it_is_in_a_plan(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first result is judged anew, and the bits of those after it are held to its."""
    captured: list[Any] = []

    def graph_of(fn: Any) -> Any:
        captured.append(fn)
        return lambda: fn() * factor[0]

    monkeypatch.setattr(tuning_child, "graph_of", graph_of)
    head = Case("action_ode", head_call(), CPU, 0)
    head.measure()
    assert head.trial("torch", find("action_ode").implementations["torch"]).reason is None
    before, factor, results = head.first["torch"], [1 + 2.0**-20], dict[str, Any]()
    call = tuning_child._call(head, "torch", results, gpu)
    for _ in range(2):
        call()
        assert same(bits_of(results["torch"]), head.first["torch"])
    assert (len(captured), same(before, head.first["torch"])) == ((1, False) if gpu else (0, True))
    factor[0] = 1.05
    again = tuning_child._call(head, "torch", results, True)
    with pytest.raises(Wrong, match="disagrees"):
        again()


def test_a_result_may_not_be_an_argument_where_the_references_is_not() -> None:
    x = torch.empty(1, 4, 8, device="meta")
    weight = torch.empty(8, 8, device="meta")
    case = Case("linear", (x, weight, None), CPU, 0)
    case.measure()
    with_room = case.args[0]

    def in_place(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x

    case._yardstick = Yardstick(((with_room.clone(), with_room.double()),))  # of an op that returns what it is given
    assert trial(case, in_place) == "its result is memory of an argument, where the reference's is not"
    norm = Case("adaln", (x[None], None, None, None, None, 1e-6, torch.float32), CPU, 0)
    norm.measure()
    assert norm.trial("torch", find("adaln").implementations["torch"]).reason is None, "which returns x"


def inferred(out: Tensor) -> Tensor:
    with torch.inference_mode():
        return out.clone()


def shifted(out: Tensor) -> Tensor:
    return torch.empty(out.numel() + 1)[1:].view(out.shape).copy_(out)


def one_product() -> Case:
    case = Case("linear", (torch.empty(2, 8, device="meta"), torch.empty(4, 8, device="meta"), None), CPU, 0)
    case.measure()
    return case


KINDS: dict[str, tuple[Any, str]] = {
    "tuple": (lambda out: (out,), "a tuple, the reference's a Tensor"),
    "list": (lambda out: [out], "a list, the reference's a Tensor"),
    "nothing": (lambda _: None, "a NoneType, the reference's a Tensor"),
    "parameter": (torch.nn.Parameter, "Parameter, cpu, strided, with a gradient, the reference's"),
    "gradient": (Tensor.requires_grad_, "Tensor, cpu, strided, with a gradient, the reference's"),
    "negated": (lambda out: torch._neg_view(-out), "Tensor, cpu, strided, negated, the reference's"),
    "inference": (inferred, "Tensor, cpu, strided, of inference mode, the reference's"),
    "shifted": (shifted, "Tensor, cpu, strided, at an address that is no multiple of 16, the reference's"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_of_the_references_kind(kind: str) -> None:
    """What comes behind would raise, or read its address as it is."""
    change, reason = KINDS[kind]
    case, run = one_product(), find("linear").implementations["torch"].run
    assert (trial(case, lambda *args: change(run(*args))) or "").startswith(f"its result is {reason}")
    assert trial(case, run) is None


def test_a_result_is_its_owners_for_good() -> None:
    case, run, out = one_product(), find("linear").implementations["torch"].run, torch.empty(2, 4)
    assert trial(case, lambda *args: out.copy_(run(*args))) == "its result changed with a later call"


def test_a_result_is_there_in_the_order_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only after a wait for the whole GPU, which a plan does not make. What another stream does late is made up."""
    case, run, late = one_product(), find("linear").implementations["torch"].run, list[Any]()

    def settle() -> None:
        while late:
            late.pop()()

    def elsewhere(*args: Any) -> Tensor:
        out, right = torch.empty(2, 4), run(*args)
        late.append(lambda: out.copy_(right))
        return out

    monkeypatch.setattr(tuning_child.failures, "settle", settle)
    assert trial(case, elsewhere) == "call 2 gave other bits than the first"
    assert trial(case, run) is None


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "the number of threads": (torch.set_num_threads, torch.get_num_threads(), torch.get_num_threads() + 1),
    "the default dtype": (torch.set_default_dtype, torch.float32, torch.float64),
    "the mode of gradients": (torch.set_grad_enabled, False, True),
    "autocast": (lambda on: torch.set_autocast_enabled("cpu", on), False, True),
    "the modes that are entered": (torch.set_default_device, None, "cpu"),
    "deterministic algorithms": (torch.set_deterministic_debug_mode, "default", "warn"),
    "float32's precision": (torch.set_float32_matmul_precision, "highest", "medium"),
    "what attention may use": (torch.backends.cuda.enable_math_sdp, True, False),
    "the rounding of small numbers to zero": (torch.set_flush_denormal, False, True),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_what_is_left_behind_in_the_process_is_charged(setting: str) -> None:
    """Others would run with it; so the process in which it was done is used no more."""
    change, before, other = CHANGES[setting]
    case, run = one_product(), find("linear").implementations["torch"].run

    def changes(*args: Any) -> Tensor:
        out = run(*args)
        change(other)
        return out

    try:
        outcome = case.trial("mine", Implementation("mine", never, changes))
        timed, out = dict[str, Any](mine=run(*case.args)), dict[str, str]()
        case.first["mine"] = bits_of(timed["mine"])
        change(before)
        settings = process_state.settings()
        change(other)
        with pytest.raises(tuning_child.Aborted):
            tuning_child._sound(case, settings, timed, out, "mine", None)
    finally:
        change(before)
    assert outcome.unsound
    assert f"changed {setting}" in (outcome.reason or "")
    assert out == {"mine": f"changed {setting}, while it was timed"}
    assert trial(case, run) is None


def test_a_copy_of_the_process_says_nothing() -> None:
    """An implementation forks and lets both go on: only one of them answers."""
    given = tuning_child.Tasks((), CPU, 0, (), 1, 1.0, 1, 1)
    read, write = os.pipe()
    with os.fdopen(write, "w") as answers, open(os.devnull) as commands, os.fdopen(read) as said:
        child = tuning_child.Child(given, commands, answers)
        copy = os.fork()
        if copy == 0:
            try:
                child.say({"answer": {}})
            finally:
                os._exit(9)
        assert os.waitpid(copy, 0)[1] == 0
        child.say({"lost": "mine"})
        assert '"lost": "mine"' in said.readline()


def test_what_prepare_and_refuse_do_is_charged() -> None:
    case = Case("linear", (torch.empty(2, 8, device="meta"), torch.empty(4, 8, device="meta"), None), CPU, 0)
    case.measure()
    run = find("linear").implementations["torch"].run

    def breaks(*_: object) -> None:
        raise ValueError("no room to pack")

    assert trial(case, run, prepare=breaks) == "raised ValueError: no room to pack"
    outcome = case.trial("mine", Implementation("mine", lambda *_: "not today", run))
    assert (outcome.reason, outcome.refused) == ("not today", True)
    broken = case.trial("mine", Implementation("mine", breaks, run))
    assert (broken.reason, broken.refused) == ("raised ValueError: no room to pack", False)

    def spoils(x: Tensor, *_: object) -> str:
        x.view(-1)[0] += 1
        return "not today"

    outcome = case.trial("mine", Implementation("mine", spoils, run))
    assert (outcome.reason, outcome.refused) == ("getting ready changed argument 0 (float32 [2, 8])", False)
    packed = find("linear").implementations["onednn"]
    assert case.trial("onednn", packed).reason is None, "it is prepared"
    assert trial(case, lambda x, w, b: run(x.t_().t_()[:2], w, b)) is None

    def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = run(x, weight, bias)
        x.resize_(1, 8)
        return out

    assert trial(case, turned) == "call 1 changed argument 0 (float32 [2, 8])"
    assert case.args[0].shape == (2, 8)


def test_a_residual_that_is_one_row_for_many_tokens() -> None:
    """It can be filled, and written anew with other values, as what it is."""
    x = torch.empty(2, 1, 64, device="meta")[:, :, None].expand(2, 2, 8, 64)
    y, table = torch.empty(2, 2, 8, 64, device="meta"), torch.empty(2, 64, device="meta")
    case = Case("adaln", (x, y, None, table, table, 1e-6, torch.float32), CPU, 0)
    case.measure()
    assert case.args[0].stride() == x.stride()
    assert case.trial("torch", find("adaln").implementations["torch"]).reason is None
    plain = find("adaln").implementations["torch"].run
    swapped = Implementation("swapped", lambda *_: None, lambda x, *rest: plain(x.flip(0), *rest))
    assert case.trial("swapped", swapped).reason is not None


def test_noise_that_is_compared_is_drawn() -> None:
    case = Case(
        "philox_normal", (torch.empty(4, 3, dtype=torch.int64, device="meta"), ((1, (3, 4)), (0, (5,)))), CPU, 0
    )
    case.measure()
    assert case.args[0][:, 2].tolist() == [0, 0, 0, 0]
    assert case.trial("torch", find("philox_normal").implementations["torch"]).reason is None
    drawn = find("philox_normal").implementations["torch"].run(*case.args)
    assert len(drawn) == 2
    assert all((x != 0).all() for x in drawn)
