"""What a machine's verdicts do to a policy: other implementations, the same actions, the same bits after a restart."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import Policy, ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.action_ode.program import OneLaunchHead, choose_head
from dit4dit.engine.fold import fold_head
from dit4dit.engine.listing import calls, engine_without_data
from dit4dit.errors import ConfigError
from dit4dit.evaluation import parity
from dit4dit.ops import onednn, verdicts
from dit4dit.ops.action_ode import loop
from dit4dit.ops.dispatch import find
from dit4dit.ops.verdicts import Verdict, call_text
from dit4dit.presets import preset

TINY = preset("tiny").model
CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    return verdicts.folder(CPU)


def write(cache: Path, made: Iterable[ops.Call], **chosen: str) -> int:
    """Verdicts for the calls of these ops, as if they had been measured here; how many."""
    count = 0
    for op, args in made:
        if op in chosen:
            ms = {chosen[op]: 1.0}
            verdicts.write(Verdict(op, call_text(args), verdicts.place(CPU), "torch", chosen[op], ms), cache)
            count += 1
    return count


def listed(policy: Policy, observation) -> list[ops.Call]:
    """The op calls of one chunk."""
    with ops.listing() as made:
        policy.infer(observation, "go", seed=0)
    return made


@needs_onednn
def test_a_plan_runs_what_verdicts_name_and_off_runs_the_defaults(
    cache: Path, small_libero: Path, observation, caplog: pytest.LogCaptureFixture
) -> None:
    first = Policy.from_pretrained(small_libero, device="cpu", tune="off")
    made = listed(first, observation)
    plain = first.infer(observation, "go", seed=1)
    assert write(cache, made, linear="torch", preprocess="torch")

    tuned, off, again = (
        Policy.from_pretrained(small_libero, device="cpu", tune=tune) for tune in ("cached", "off", "cached")
    )
    ran = {}
    for name, policy in (("tuned", tuned), ("off", off)):
        with ops.trace() as seen:
            policy.infer(observation, "go", seed=1)
        ran[name] = seen
    assert (ran["tuned"]["linear"], ran["tuned"]["preprocess"]) == ({"torch"}, {"torch"})
    assert (ran["off"]["linear"], ran["off"]["preprocess"]) == ({"onednn"}, {"cpp"})
    assert ran["tuned"]["linear_gelu"] == ran["off"]["linear_gelu"] == {"onednn"}, "has no verdict"
    assert not onednn.is_packed(tuned.engine.blocks[0].qkv.weight), "a copy that nothing reads"
    assert onednn.is_packed(off.engine.blocks[0].qkv.weight)

    a, b, c = (policy.infer(observation, "go", seed=1).normalized for policy in (tuned, off, again))
    assert np.array_equal(a, c), "the same bits after a restart"
    assert np.array_equal(b, plain.normalized)
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
    assert not caplog.records


@needs_onednn
def test_a_plan_that_first_ran_inside_of_use_backend_runs_as_others_behind_it(
    cache: Path, small_libero: Path, observation
) -> None:
    write(cache, listed(Policy.from_pretrained(small_libero, device="cpu"), observation), preprocess="torch")
    usual, requested = (Policy.from_pretrained(small_libero, device="cpu") for _ in range(2))
    with ops.use_backend("torch"):
        requested.infer(observation, "go", seed=1)
    with ops.trace() as ran:
        after = requested.infer(observation, "go", seed=1)
    assert (ran["preprocess"], ran["linear"]) == ({"torch"}, {"onednn"}), "the verdict, and the default"
    assert np.array_equal(after.normalized, usual.infer(observation, "go", seed=1).normalized)


@needs_onednn
@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_a_tuned_engine_agrees_with_the_published_code(cache: Path, golden_dir: Path, name: str) -> None:
    def check() -> list[parity.Stage]:
        return parity.check(golden_dir / name, device=CPU, dtype=torch.float32, backend=None, engine=True)

    with ops.listing() as made:
        plain = check()
    assert all("linear: onednn" in s.implementations for s in plain if s.name == "infer.features")
    write(cache, made, linear="torch", linear_gelu="torch")
    tuned = check()
    assert all(s.ok and s.limit == 1e-5 for s in tuned), parity.show(tuned)
    assert all("linear: torch" in s.implementations for s in tuned if s.name == "infer.features")


def plan_shape(batch: int) -> RequestShape:
    return RequestShape(batch, ((32, 32),), (32, 32), "cv2_area", True, 9)


def plan(engine: Engine, batch: int = 1) -> Plan:
    return Plan(engine, plan_shape(batch), None)


def test_the_head_follows_the_verdict_of_the_plans_own_shape(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch stands in for the kernel, which needs a GPU."""
    monkeypatch.setattr(OneLaunchHead, "unsuitable", lambda *_: None)
    monkeypatch.setattr(OneLaunchHead, "refuse", lambda *_: None)
    monkeypatch.setattr(OneLaunchHead, "launch", lambda self, *args: loop(self.folded, *args))
    known = find("action_ode").implementations
    monkeypatch.setitem(known, "cuda", replace(known["cuda"], device="cpu"))
    model = random_model(TINY, 0, head_dtype=torch.bfloat16, with_text=False)

    def head(batch: int, **options) -> str:
        made = plan(Engine(model, **options), batch)
        with torch.no_grad():
            made.compute()
        return made.head

    assert head(1) == head(2) == "library", "nothing has been measured"
    with ops.listing() as found:
        assert head(1) == "library"
    assert write(cache, found, action_ode="cuda") == 1
    assert head(1) == "one_launch"
    assert head(2) == "library", "another shape, of which nothing is known"
    assert head(1, head="library") == "library"
    assert head(1, tune="off") == "library"
    with ops.use_backend("torch"):
        assert head(1) == "library", "no launch is one of the reference's"
    monkeypatch.setattr(OneLaunchHead, "refuse", lambda *_: "no room for all blocks")
    assert head(1) == "library"


def test_a_verdict_for_norm_and_product_decides_for_its_call_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stands in for the kernel, which needs a GPU."""
    known = find("norm_linear").implementations
    stand_in = replace(known["triton"], refuse=lambda *_: None, run=known["torch"].run, device="cpu")
    monkeypatch.setitem(known, "triton", stand_in)
    engine = Engine(random_model(TINY, 0, with_text=False))

    def ran(made: Plan) -> list[dict[str, dict[str, int]]]:
        found = []
        with torch.no_grad():
            for _ in range(3):
                made.compute()
                found.append({op: made.ran[op] for op in ("norm_linear", "adaln", "linear_gelu")})
        return found

    with ops.listing() as calls_made:
        first, *later = ran(plan(engine))
    count = (2 * TINY.head.num_layers + 1) * TINY.head.num_inference_timesteps
    assert first["norm_linear"] == {"parts": count}, "nothing has been measured"
    assert later == [first, first], "the ops inside of it are chosen once as well"

    gelus = [(op, args) for op, args in calls_made if op == "norm_linear" and args[-1] == "gelu_tanh"]
    assert write(cache, gelus, norm_linear="triton") == 3 * TINY.head.num_layers * TINY.head.num_inference_timesteps
    number = len(gelus) // 3
    (tuned, *later) = ran(plan(engine))
    assert tuned["norm_linear"] == {"parts": count - number, "triton": number}
    assert later == [tuned, tuned]
    assert sum(tuned["adaln"].values()) == sum(first["adaln"].values()) - number
    assert sum(tuned["linear_gelu"].values()) == sum(first["linear_gelu"].values()) - number
    assert ran(plan(Engine(random_model(TINY, 0, with_text=False), tune="off")))[0] == first


def test_heads_of_other_sizes_are_other_calls(cache: Path) -> None:
    """Each size that the kernel's work depends on is in the head's text, or in its arguments'."""

    def text(**changed: int) -> str:
        config = replace(TINY, head=replace(TINY.head, **changed))
        found = calls(engine_without_data(config, head_dtype=torch.bfloat16), plan_shape(1), None)
        (one,) = (call_text(args) for op, args in found if op == "action_ode")
        return one

    sizes = ("num_layers", "num_heads", "head_dim", "hidden_size", "action_dim", "action_horizon")
    texts = [text(), *(text(**{size: 2 * getattr(TINY.head, size)}) for size in sizes)]
    assert len(set(texts)) == len(texts), texts
    steps = text(num_inference_timesteps=8)
    assert steps not in texts


def test_what_was_measured_never_makes_a_head_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """That changes the result: only who asks for the kernel gets it."""
    found = calls(engine_without_data(TINY, head_dtype=torch.bfloat16, fp8=True), plan_shape(1), None)
    (head,) = (args[0] for op, args in found if op == "action_ode")
    assert not head.fp8, "of a policy in fp8 the same head is measured as of others"
    monkeypatch.setattr(OneLaunchHead, "unsuitable", lambda *_: None)
    monkeypatch.setattr(OneLaunchHead, "refuse_any", lambda _: None)
    folded = fold_head(random_model(TINY, 0, head_dtype=torch.bfloat16, with_text=False).head, 1)
    made = [choose_head(choice, folded, TINY.head, 1, fp8=True) for choice in ("auto", "one_launch")]
    assert [(head.fp8, head.backend) for head in made if head] == [(False, None), (True, "cuda")]


@needs_onednn
def test_what_a_plan_is_asked_to_run_by_ends_with_the_context(cache: Path, small_libero: Path, observation) -> None:
    """A first chunk that was wished to be PyTorch's, as to compare, leaves later ones as fast as ever."""
    policy = Policy.from_pretrained(small_libero, device="cpu")

    def ran(backend: str | None = None, **by_op: str) -> set[str]:
        with ops.use_backend(backend, **by_op), ops.trace() as seen:
            policy.infer(observation, "go", seed=0)
        return seen["linear"] | seen["linear_gelu"]

    assert ran("torch") == {"torch"}
    assert not onednn.is_packed(policy.engine.blocks[0].qkv.weight)
    assert ran() == ran(linear="onednn") == {"onednn"}
    fresh = Policy.from_pretrained(small_libero, device="cpu")
    with ops.use_backend(linear="onednn", linear_gelu="onednn"):
        fresh.infer(observation, "go", seed=0)


def test_an_engine_that_was_pickled_takes_verdicts_too(cache: Path) -> None:
    engine = Engine(random_model(TINY, 0, with_text=False))
    made = plan(engine)
    with torch.no_grad(), ops.listing() as found:
        made.compute()
    write(cache, found, preprocess="torch")
    assert made.ran["preprocess"] == {"cpp": 1}
    copy = plan(pickle.loads(pickle.dumps(engine)))
    with torch.no_grad():
        copy.compute()
    assert copy.ran["preprocess"] == {"torch": 1}


def test_a_word_that_is_none(small_libero: Path) -> None:
    with pytest.raises(ConfigError, match="tune: expected 'cached' or 'off', got 'always'; dit4dit tune measures"):
        Policy.from_pretrained(small_libero, device="cpu", tune="always")
