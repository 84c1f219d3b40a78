"""The engine's plan: fixed buffers in, fixed buffers out, the same numbers as the engine without them."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit4dit import Noise, Observation, Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import MAX_BATCH, Engine, Plan, RequestShape
from dit4dit.engine.action_ode.program import HeadChoice
from dit4dit.engine.fold import Modulation
from dit4dit.engine.packs import with_event
from dit4dit.engine.staging import Staging
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import preprocess, use_backend
from dit4dit.presets import preset

TINY = preset("tiny").model
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def shape(batch: int = 2, length: int = 9) -> RequestShape:
    return RequestShape(batch, ((40, 50), (30, 30)), (32, 32), "cv2_area", True, length)


def requests(plan: Plan, seed: int):
    generator = np.random.default_rng(seed)
    pictures = [
        [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in plan.shape.views]
        for _ in range(plan.shape.batch)
    ]
    state = generator.normal(size=(plan.shape.batch, 1, TINY.head.state_dim)).astype(np.float32)
    packs = [
        plan.engine.pack(torch.randn(1, plan.shape.text_length, TINY.dit.text_in).to(plan.engine.device))
        for _ in range(plan.shape.batch)
    ]
    return pictures, state, [Noise.from_seed(seed, i) for i in range(plan.shape.batch)], packs


def make(device: torch.device, head: HeadChoice = "auto", **kinds) -> Plan:
    torch.manual_seed(0)
    engine = Engine(random_model(TINY, 1, device=device, with_text=False, **kinds), head=head)
    table = torch.tensor([[torch.nan, -1, 1, 2, 0.5]] * 5, dtype=torch.float64).T.contiguous()
    return Plan(engine, shape(), table)


def test_the_plan_is_the_engine(device: torch.device) -> None:
    plan = make(device)
    pictures, state, noise, packs = requests(plan, 3)
    views = [torch.from_numpy(np.stack(view)).to(device) for view in zip(*pictures, strict=True)]
    frame = preprocess(views, (32, 32), "cv2_area", torch.float32)
    drawn = [one.draw(plan.draws) for one in noise]
    given = (torch.from_numpy(np.stack([d[name] for d in drawn])).to(device) for name in plan.draws)
    wanted = plan.engine.sample(frame, packs, torch.from_numpy(state).to(device), *given).cpu().numpy()
    normalized, actions = plan.run(pictures, state, noise, packs)
    limit = 0.0 if device.type == "cpu" else 1e-4  # a GPU draws the noise itself, and its cosine may round apart
    assert np.abs(normalized - wanted).max() <= limit * np.abs(wanted).max()
    assert actions is not None
    in_units = np.clip(normalized[..., :5].astype(np.float64), -1, 1) * 2 + 0.5
    assert np.array_equal(actions, in_units.astype(np.float32))


def test_what_was_there_before_leaves_no_trace(device: torch.device) -> None:
    """Same request, same bits, whatever ran in between: other pictures, states, noise, instructions, given noise."""
    plan = make(device)
    first, other = requests(plan, 0), requests(plan, 1)
    before, _ = plan.run(*first)
    given = [Noise(**{name: np.zeros(s, np.float32) for name, s in plan.draws.items()}) for _ in range(2)]
    changed = [plan.run(*other)[0], plan.run(*first[:2], given, first[3])[0]]
    swapped = plan.run(*first[:3], [first[3][1], first[3][0]])[0]
    after, _ = plan.run(*first)
    assert np.array_equal(before, after)
    assert all(not np.array_equal(before, x) for x in (*changed, swapped))


def test_results_are_the_callers_own(device: torch.device) -> None:
    plan = make(device)
    first, _ = plan.run(*requests(plan, 0))
    kept = first.copy()
    plan.run(*requests(plan, 1))
    assert np.array_equal(first, kept)


def test_an_instruction_is_moved_once_and_not_kept_alive() -> None:
    plan = make(torch.device("cpu"))
    pictures, state, noise, packs = requests(plan, 0)
    plan.run(pictures, state, noise, packs)
    keys = plan._pack.keys
    poison = keys.clone()
    keys.fill_(0.0)
    plan.run(pictures, state, noise, packs)
    assert not keys.any(), "the same packs were copied again"
    plan.run(pictures, state, noise, [replace(pack) for pack in packs])
    assert torch.equal(keys, poison)
    plan.run(pictures, state, noise, packs)
    alive = weakref.ref(packs[0])
    del packs
    gc.collect()
    assert alive() is None


class NoLookAtTheHost(TorchDispatchMode):
    """Fails where an operation needs a value on the host, or brings one from there: a GPU would wait for it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} inside a step"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()


@pytest.mark.parametrize("resize", ["cv2_area", "bilinear"])
@pytest.mark.parametrize("picture", [(40, 50), (20, 64), (64, 96)])
def test_a_step_never_looks_at_the_host(resize, picture) -> None:
    """By references: what a GPU records where no kernel of ours fits it."""
    engine = Engine(random_model(TINY, 1, with_text=False))
    plan = Plan(engine, replace(shape(), views=(picture, (30, 30)), resize=resize), None)
    with use_backend("torch"):
        plan.run(*requests(plan, 0))
    with torch.no_grad(), use_backend("torch"), NoLookAtTheHost() as watch:
        engine.branches = True  # as on a GPU
        plan.compute()
    assert {"convolution", "copy_"} <= watch.seen
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLookAtTheHost():
        torch.ones(1).item()


def test_staging_is_one_block_and_keeps_what_it_was_given(device: torch.device) -> None:
    staged = Staging({"a": ((3,), torch.uint8), "b": ((2, 5), torch.float32), "c": ((1,), torch.int64)}, device)
    staged.host["a"][:] = 1, 2, 3
    staged.host["b"][:] = 0.5
    staged.host["c"][:] = -7
    staged.upload()
    assert staged.device["a"].tolist() == [1, 2, 3]
    assert staged.device["c"].tolist() == [-7]
    assert (staged.device["b"] == 0.5).all()
    assert all(tensor.data_ptr() % 256 == staged.device["a"].data_ptr() % 256 for tensor in staged.device.values())
    staged.device["b"] *= 4
    staged.download()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert (staged.host["b"] == 2).all()


def test_a_policy_takes_mixed_sizes_and_more_than_one_pass(small_libero: Path, make_observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    seen = [make_observation(i) for i in range(MAX_BATCH + 3)]
    small = {name: np.ascontiguousarray(picture[:40, :44]) for name, picture in seen[1].images.items()}
    seen[1] = Observation(images=small, state=seen[1].state)
    words = ["open" if i % 2 else "close" for i in range(len(seen))]
    noise = [Noise.from_seed(2, i) for i in range(len(seen))]
    together = policy.infer_batch(seen, words, noise=noise)
    for i in (0, 1, MAX_BATCH + 2):
        alone = policy.infer(seen[i], words[i], noise=noise[i])
        scale = np.abs(alone.normalized).max()
        assert np.abs(together[i].normalized - alone.normalized).max() < 1e-5 * scale
        assert together[i].noise is noise[i]


def test_threads_share_a_policy(libero_policy: Policy, make_observation) -> None:
    seen = [make_observation(i) for i in range(4)]
    wanted = [libero_policy.infer(o, "open", seed=i).normalized for i, o in enumerate(seen)]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = libero_policy.infer(seen[i], "open", seed=i).normalized

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], wanted[i]) for i in range(4))


def test_warm_up_plans_for_the_pictures_to_come(small_libero: Path, make_observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    seen = make_observation(0)
    sizes = {name: picture.shape[:2] for name, picture in seen.images.items()}
    policy.warm_up(sizes)
    made = policy._runner.plans
    policy.infer(seen, "open", seed=0)
    assert made == policy._runner.plans == 1
    policy.warm_up(sizes, batch=2)
    assert policy._runner.plans == 2
    with pytest.raises(InputError, match=r"no view 'wrist'; did you mean 'wrist_image'\?"):
        policy.warm_up({"wrist": (32, 32)})
    with pytest.raises(InputError, match="batch: expected 1 to 16, got 17"):
        policy.warm_up(batch=17)


def test_folding_is_measured_and_a_wrong_table_is_found() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    assert max(engine.folding_error().values()) < 1e-5
    engine.check_folding()
    norm = engine.blocks[0].mlp_norm
    broken = replace(engine.blocks[0], mlp_norm=Modulation(norm.scale, norm.shift, norm.gate))
    engine.blocks = (broken, *engine.blocks[1:])
    with pytest.raises(BackendError, match=r"folded model differs from the plain one by .*features [1-9]"):
        engine.check_folding()


def test_an_encoder_that_is_folded_wrongly_is_found() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    last = engine.encoder._last
    assert last.bias is not None
    engine.encoder._last = replace(last, bias=last.bias + 0.5)
    with pytest.raises(BackendError, match=r"folded model differs from the plain one by moments .*, features"):
        engine.check_folding()


def test_folding_in_bfloat16_stays_within_its_limit() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False, dtype=torch.bfloat16, head_dtype=torch.bfloat16))
    assert max(engine.folding_error().values()) < 0.05
    engine.check_folding()


def test_plans_share_slots_and_find_their_packs_again() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    two, three = (Plan(engine, replace(shape(), batch=n), None) for n in (2, 3))
    assert two._slots is three._slots
    assert Plan(engine, replace(shape(), batch=1), None)._slots is not two._slots
    first, other = requests(two, 0), requests(three, 1)
    before, _ = two.run(*first)
    three.run(*other)
    again, _ = two.run(*first)
    assert np.array_equal(before, again)


@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)])
def test_given_noise_and_seeds_may_be_mixed(device: torch.device, given) -> None:
    """A seeded request has the same noise whatever its neighbour brings."""
    plan = make(device)
    pictures, state, noise, packs = requests(plan, 0)
    seeded, _ = plan.run(pictures, state, noise, packs)
    brought = [Noise(**one.draw(plan.draws)) if is_given else one for one, is_given in zip(noise, given, strict=True)]
    mixed, _ = plan.run(pictures, state, brought, packs)
    for i in range(2):
        if given[i]:
            assert np.abs(mixed[i] - seeded[i]).max() < 1e-4 * np.abs(seeded).max()
        else:
            assert np.array_equal(mixed[i], seeded[i])


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)])
def test_noise_drawn_inside_the_step_leaves_what_is_given(given) -> None:
    """As on a GPU, by references: the one function that is recorded serves seeds, given noise, and both in one batch."""
    plain, plan = make(torch.device("cpu")), make(torch.device("cpu"))
    plan.engine.branches = True
    pictures, state, noise, packs = requests(plan, 0)
    plan.run(pictures, state, noise, packs)
    drawn = {name: tensor.clone() for name, tensor in plan.noise.device.items()}
    other = [Noise(**Noise.from_seed(7, i).draw(plan.draws)) for i in range(2)]
    mixed = [other[i] if given[i] else noise[i] for i in range(2)]
    got, _ = plan.run(pictures, state, mixed, packs)
    for name, tensor in plan.noise.device.items():
        for i in range(2):
            brought = torch.from_numpy(getattr(other[i], name))
            assert torch.equal(tensor[i], brought if given[i] else drawn[name][i]), (name, i)
    wanted, _ = plain.run(pictures, state, mixed, packs)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    again, _ = plan.run(pictures, state, noise, packs)
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in plan.noise.device.items())
    assert given == (False, False) or not np.array_equal(again, got)


def test_inference_mode_of_the_caller_leaves_no_trace(small_libero: Path, make_observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    with torch.inference_mode():
        inside = policy.infer(make_observation(0), "new words", seed=3).normalized
    assert np.array_equal(policy.infer(make_observation(0), "new words", seed=3).normalized, inside)


@pytest.mark.parametrize("size", [(256, 256, 3), (0, 640), (-1, 640), 480, "480x640", (480.0, 640), (True, 640)])
def test_warm_up_takes_two_positive_whole_numbers(libero_policy: Policy, size) -> None:
    with pytest.raises(InputError, match=r"pictures\['primary_image'\]: expected \(height, width\) in pixels, got"):
        libero_policy.warm_up({"primary_image": size})


def test_warm_up_for_the_published_call_and_for_given_embeddings(small_libero: Path, make_observation) -> None:
    embeds = {"go": torch.randn(5, TINY.dit.text_in)}
    policy = Policy.from_pretrained(small_libero, device="cpu", prompt_embeds=embeds)
    width = policy.config.image_size[1] * 2
    policy.warm_up({name: list(p.shape[:2]) for name, p in make_observation(0).images.items()})
    policy.warm_up(joined=(policy.config.image_size[0], width))
    made = policy._runner.plans
    policy.infer(make_observation(0), "go", seed=0)
    picture = np.zeros((policy.config.image_size[0], width, 3), np.uint8)
    policy.predict_action({"image": picture, "lang": "go", "state": np.zeros((1, policy.config.head.state_dim))})
    assert policy._runner.plans == made == 2


@pytest.mark.gpu
def test_a_pack_still_being_written_is_waited_for() -> None:
    plan = make(torch.device("cuda"))
    pictures, state, noise, packs = requests(plan, 0)
    wanted, _ = plan.run(pictures, state, noise, packs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late = [with_event(pack.keys.clone(), pack.values.clone()) for pack in packs]
    got, _ = plan.run(pictures, state, noise, late)
    assert np.array_equal(got, wanted)


@pytest.mark.gpu
def test_a_step_on_a_gpu_allocates_nothing_and_waits_once() -> None:
    plan = make(torch.device("cuda"), dtype=torch.bfloat16)
    given = requests(plan, 0)
    plan.run(*given)
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            plan.run(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries"):
        assert before.get(name, 0) == after.get(name, 0), name


@pytest.mark.gpu
def test_a_graph_gives_the_bits_of_the_same_step_without_one() -> None:
    plan = make(torch.device("cuda"), dtype=torch.bfloat16)
    recorded, _ = plan.run(*requests(plan, 0))
    with torch.no_grad():
        plan._compute()
    assert np.array_equal(plan.outputs.device["normalized"].cpu().numpy(), recorded)


@pytest.mark.gpu
@pytest.mark.alone
def test_the_one_launch_head_in_a_graph() -> None:
    """As near to the loop over library calls as bfloat16 rounds, the same bits each time, no allocation, no lost wait."""
    kinds = {"dtype": torch.bfloat16, "head_dtype": torch.bfloat16}
    plan, library = (make(torch.device("cuda"), head=head, **kinds) for head in ("one_launch", "library"))
    assert plan.engine.one_launch is not None
    given = requests(plan, 0)
    first, _ = plan.run(*given)
    wanted, _ = library.run(*given)
    assert np.abs(first - wanted).max() < 0.1 * np.abs(wanted).max()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(100):
        assert np.array_equal(plan.run(*given)[0], first)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    plan.engine.one_launch.check()
