"""Which implementation runs: automatic choice, verdicts, wishes, the one warning, explain and trace."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dit4dit.engine  # noqa: F401  makes the example of `action_ode`
from dit4dit import ops
from dit4dit.errors import BackendError
from dit4dit.ops import dispatch, native
from dit4dit.ops.dispatch import Choices, Implementation, Op, listing, names, register, trace, use_backend
from dit4dit.ops.explanation import explain
from dit4dit.ops.native import unsupported


@pytest.fixture
def op(monkeypatch):
    """An op with a CPU implementation that takes only float32, one for CUDA, and a reference."""
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    monkeypatch.setattr(dispatch, "_said", set())
    return Op(
        "double",
        [
            Implementation("cuda", lambda x: None if x.is_cuda else f"x is on {x.device}", lambda x: x * 2, "cuda"),
            Implementation(
                "cpp", lambda x: None if x.dtype == torch.float32 else f"x is {x.dtype}", lambda x: x + x, "cpu"
            ),
            Implementation("torch", lambda x: None, lambda x: 2 * x),
        ],
        example=lambda device: (torch.zeros(2, device=device),),
    )


FLOAT, INT = torch.ones(2), torch.ones(2, dtype=torch.int32)


def test_takes_the_first_that_does_not_refuse(op):
    with trace() as ran:
        assert op(FLOAT).tolist() == [2, 2]
    assert ran == {"double": {"cpp"}}


def test_steps_down_and_says_why_once(op, caplog):
    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"), trace() as ran:
        op(INT)
        op(INT)
    assert ran == {"double": {"torch"}}
    assert [record.getMessage() for record in caplog.records] == [
        "double: running 'torch' because 'cpp' refused: x is torch.int32"
    ]


def test_says_nothing_where_nothing_better_exists_for_the_device(op, caplog):
    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"):
        op(FLOAT)  # 'cuda' refuses, but is not meant for the CPU
    assert not caplog.records


@pytest.mark.parametrize("how", ["argument", "all", "one"])
def test_a_wish_is_met_or_raises(op, how):
    def run(x, wish):
        if how == "argument":
            return op(x, backend=wish)
        with use_backend(wish) if how == "all" else use_backend(double=wish):
            return op(x)

    with trace() as ran:
        run(FLOAT, "torch")
    assert ran == {"double": {"torch"}}
    with pytest.raises(BackendError, match="double: 'cuda' refused: x is on cpu"):
        run(FLOAT, "cuda")
    with pytest.raises(BackendError, match=r"double: 'cpp' refused: x is torch\.int32"):
        run(INT, "cpp")


def test_the_inner_wish_goes_before_the_outer_and_the_argument_before_both(op):
    def ran(**kwargs):
        with trace() as seen:
            op(FLOAT, **kwargs)
        return seen["double"]

    with use_backend("torch"):
        assert ran() == {"torch"}
        with use_backend(double="cpp"):
            assert ran() == {"cpp"}
            assert ran(backend="torch") == {"torch"}
            with use_backend("torch"):
                assert ran() == {"torch"}
            with use_backend(preprocess="torch"):
                assert ran() == {"cpp"}
        assert ran() == {"torch"}
    assert ran() == {"cpp"}


def test_a_wish_ends_with_its_context_also_after_an_error(op):
    with pytest.raises(BackendError, match="double: 'cuda' refused: x is on cpu"), use_backend("cuda"):
        op(FLOAT)
    assert op(FLOAT).tolist() == [2, 2]


def test_unknown_names_are_refused_at_once(op):
    with (
        pytest.raises(BackendError, match=r"implementation called 'troch'; did you mean 'torch'"),
        use_backend("troch"),
    ):
        pytest.fail("entered")
    with pytest.raises(BackendError, match=r"no op is called 'preproces'; did you mean 'preprocess'"):
        use_backend(preproces="torch").__enter__()
    with pytest.raises(BackendError, match=r"double: no implementation is called 'cp'; did you mean 'cpp'"):
        use_backend(double="cp").__enter__()
    with pytest.raises(
        BackendError, match=r"double: no implementation is called 'triton'.*there are: cuda, cpp, torch"
    ):
        op(FLOAT, backend="triton")
    with pytest.raises(BackendError, match="no op is called 'nothing'"):
        explain("nothing")


def test_nothing_left_is_an_error_with_every_reason(op, monkeypatch):
    del op.implementations["torch"]
    with pytest.raises(
        BackendError, match=r"every implementation refused: 'cuda': x is on cpu; 'cpp': x is torch\.int32"
    ):
        op(INT)


@pytest.fixture
def fast(monkeypatch):
    """An op whose first implementation runs by itself only where it was measured."""
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    monkeypatch.setattr(dispatch, "_said", set())
    return Op(
        "triple",
        [
            Implementation("kernel", lambda x: None, lambda x: 3 * x, "cpu", measured_only=True),
            Implementation("torch", lambda x: None, lambda x: x + x + x),
            Implementation("library", lambda x: "x is odd" if x.numel() % 2 else None, lambda x: x * 3, "cpu"),
        ],
        example=lambda device: (torch.zeros(2, device=device),),
    )


def test_what_was_not_measured_runs_only_on_a_wish(fast, caplog):
    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"), trace() as ran:
        fast(FLOAT)
    assert ran == {"triple": {"torch"}}
    assert not caplog.records, "nothing better is known, so nobody stepped down"
    (found,) = explain("triple")
    assert found.chosen == "torch"
    assert found.refused["kernel"].startswith("no measurement here chooses it: run dit4dit tune")
    with use_backend(triple="kernel"), trace() as ran:
        fast(FLOAT)
    assert ran == {"triple": {"kernel"}}


class Named:
    """Verdicts that name one implementation for every call of an op."""

    def __init__(self, **named: str) -> None:
        self.named, self.asked = named, 0

    def choice(self, op, args, files):
        self.asked += 1
        return self.named.get(op)


@pytest.mark.parametrize("name", ["kernel", "library"])
def test_what_a_verdict_names_goes_first(fast, name, caplog):
    def run(x):
        with Choices(Named(triple=name)) as choices:
            assert fast(x).tolist() == [3.0] * len(x)
        return choices.ran

    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"):
        assert run(FLOAT) == {"triple": {name: 1}}
        assert not caplog.records
        with use_backend(triple="torch"):
            assert run(FLOAT) == {"triple": {"torch": 1}}
        steps_down = name == "library"
        assert run(torch.ones(3)) == {"triple": {"torch" if steps_down else name: 1}}
    said = ["triple: running 'torch' because 'library' refused: x is odd"] if steps_down else []
    assert [record.getMessage() for record in caplog.records] == said


def test_what_a_verdict_names_and_refuses_is_warned_about(fast, caplog):
    fast.implementations["kernel"] = replace(fast.implementations["kernel"], refuse=lambda x: "x is odd")
    with caplog.at_level(logging.WARNING, logger="dit4dit.ops"), Choices(Named(triple="kernel")):
        fast(FLOAT)
    assert [record.getMessage() for record in caplog.records] == [
        "triple: running 'torch' because 'kernel' refused: x is odd"
    ]


def counting(op, name):
    """The calls of `refuse` of an implementation, from now on."""
    asked, before = [], op.implementations[name]
    op.implementations[name] = replace(before, refuse=lambda x: asked.append(x) or before.refuse(x))
    return asked


def test_choices_are_made_in_the_first_run_alone(op, fast):
    verdicts, asked = Named(triple="kernel"), counting(fast, "kernel")
    choices = Choices(verdicts)

    def step():
        return fast(op(FLOAT)) + fast(INT)

    for run in range(3):
        with choices, trace() as ran:
            assert step().tolist() == [9, 9]
        assert ran == {"double": {"cpp"}, "triple": {"kernel"}}
        assert (verdicts.asked, len(asked)) == (3, 2), run
    assert choices.ran == {"double": {"cpp": 1}, "triple": {"kernel": 2}}


def test_a_first_run_that_failed_chooses_nothing(op):
    choices = Choices(None)
    with pytest.raises(BackendError, match="no implementation is called 'none'"), choices:
        op(op(FLOAT), backend="none")
    with choices:
        op(INT)
        op(FLOAT)
    assert choices.ran == {"double": {"torch": 1, "cpp": 1}}


def test_other_calls_than_in_the_first_run_are_chosen_for_themselves(op, fast):
    """Never what was chosen for another call; and the run after chooses anew."""
    verdicts = Named(triple="kernel")
    choices = Choices(verdicts)

    def run(*calls):
        with choices, trace() as ran:
            for call in calls:
                call(INT)
        return ran

    run(op, fast)
    assert run(fast, op) == {"triple": {"torch"}, "double": {"torch"}}, "not the kernel: this is no call of the plan"
    assert run(fast, op) == {"triple": {"kernel"}, "double": {"torch"}}
    assert run(fast) == {"triple": {"kernel"}}, "too few"
    assert run(fast, op, fast) == {"triple": {"kernel"}, "double": {"torch"}}
    assert run(fast, op, fast, fast) == {"triple": {"kernel", "torch"}, "double": {"torch"}}, "too many"


def test_a_wish_is_no_choice_and_ends_with_its_context(op, fast):
    verdicts = Named(triple="kernel")
    choices = Choices(verdicts)
    with use_backend("torch"), choices:
        fast(op(FLOAT))
    assert choices.ran == {"double": {"torch": 1}, "triple": {"torch": 1}}
    for _ in range(2):
        with choices, trace() as ran:
            fast(op(FLOAT))
        assert ran == {"double": {"cpp"}, "triple": {"kernel"}}
        assert choices.ran == {"double": {"cpp": 1}, "triple": {"kernel": 1}}
        with choices, trace() as ran, use_backend(double="torch"):
            fast(op(FLOAT))
        assert ran == {"double": {"torch"}, "triple": {"kernel"}}
    assert verdicts.asked == 2, "each call once, and not while a wish decides it"
    with pytest.raises(BackendError, match="no implementation is called 'none'"), choices:
        fast(op(FLOAT), backend="none")
    assert choices.ran == {"double": {"torch": 1}, "triple": {"kernel": 1}}, "of the last run that ended well"


def test_prepared_where_chosen_for_good_and_nowhere_else(fast):
    ready = []
    fast.implementations["kernel"] = replace(
        fast.implementations["kernel"],
        measured_only=False,
        prepare=lambda x: ready.append(x),
        refuse=lambda x: None if ready else "not ready",
    )
    with trace() as ran:
        fast(FLOAT)
    assert ran == {"triple": {"torch"}}
    with Choices(Named(triple="torch")) as choices:
        fast(FLOAT)
    assert not ready, "what is not chosen is not prepared"
    with Choices(None) as choices:
        fast(FLOAT)
    assert choices.ran == {"triple": {"kernel": 1}}


def test_a_wish_is_prepared_too(fast):
    ready = []
    fast.implementations["kernel"] = replace(
        fast.implementations["kernel"],
        prepare=lambda x: ready.append(x),
        refuse=lambda x: None if ready else "not ready",
    )
    with use_backend(triple="kernel"):
        with pytest.raises(BackendError, match="triple: 'kernel' refused: not ready"):
            fast(FLOAT)
        with Choices(None) as choices:
            fast(FLOAT)
        assert explain("triple")[0].chosen == "kernel"
    assert choices.ran == {"triple": {"kernel": 1}}


def test_one_of_ones_own_runs_where_a_verdict_or_a_wish_names_it(fast):
    register("triple", Implementation("mine", lambda x: None, lambda x: 3 * x))
    assert ops.implementations("triple")[-1] == "mine"
    with trace() as ran:
        fast(FLOAT)
    assert ran == {"triple": {"torch"}}
    with Choices(Named(triple="mine")) as choices:
        fast(FLOAT)
    assert choices.ran == {"triple": {"mine": 1}}
    assert dispatch.foreign(fast.implementations["mine"]) == __file__
    assert dispatch.foreign(dispatch.find("linear").implementations["onednn"]) is None
    register("triple", Implementation("mine", lambda x: None, lambda x: 3 * x))  # a module that is imported again
    with pytest.raises(BackendError, match="linear: an implementation is called 'torch' already"):
        register("linear", Implementation("torch", lambda *_: None, lambda *_: None))
    with pytest.raises(BackendError, match="no op is called 'linaer'; did you mean 'linear'"):
        register("linaer", Implementation("mine", lambda *_: None, lambda *_: None))


def test_calls_are_listed_with_their_arguments(op, fast):
    with listing() as calls:
        fast(op(FLOAT), backend="torch")
    op(INT)
    assert [name for name, _ in calls] == ["double", "triple"]
    assert calls[0][1][0] is FLOAT


def test_the_device_is_that_of_the_first_tensor_also_inside_lists():
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    for args, device in (
        ((1, cpu, meta), "cpu"),
        ((1, meta, cpu), "meta"),
        (([cpu], "a word"), "cpu"),
        (([1, (2, [cpu])],), "cpu"),
        (([], cpu), "cpu"),
        ((1, [2]), "meta"),
    ):
        assert dispatch._device(args) == torch.device(device), args


def test_explain(op):
    (found,) = explain("double")
    assert (found.op, found.chosen, found.refused) == ("double", "cpp", {"cuda": "x is on cpu"})
    with use_backend(double="torch"):
        assert explain("double")[0].chosen == "torch"
    with use_backend("cuda"):
        (found,) = explain("double")
    assert (found.chosen, found.refused) == (None, {"cuda": "x is on cpu"})
    assert [e.op for e in explain()] == names()


def test_explain_where_nobody_has_made_an_example(op, monkeypatch):
    monkeypatch.setattr(op, "example", None)
    (found,) = explain("double")
    assert (found.chosen, set(found.refused)) == (None, {"cuda", "cpp", "torch"})
    assert "import dit4dit.engine first" in found.refused["torch"]


def test_explain_for_a_device_that_is_not_there():
    (found,) = explain("preprocess", device=f"cuda:{torch.cuda.device_count()}")
    assert found.chosen is None
    assert "torch sees" in found.refused["cuda"]


def test_every_real_op_runs_on_a_cpu_and_by_its_reference():
    for found in explain(device="cpu"):
        assert found.chosen is not None
    with use_backend("torch"):
        assert {found.chosen for found in explain(device="cpu")} == {"torch"}


def test_the_automatic_choice_for_preprocess_on_a_cpu_is_compiled():
    with trace() as ran:
        ops.preprocess([torch.zeros(1, 4, 4, 3, dtype=torch.uint8)], (2, 2), "bilinear", torch.float32)
    assert ran == {"preprocess": {"cpp"}}


def test_names_are_the_public_ops():
    assert len(names()) > 5
    assert set(names()) <= set(ops.__all__)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (10, 0), False),
        (("sm_80",), (8, 6), True),
        (("sm_89",), (8, 6), False),
        (("sm_80", "compute_80"), (11, 0), True),
        (("compute_120",), (10, 0), False),
        (("sm_100",), (10, 3), True),
    ],
)
def test_which_gpus_a_build_serves(built, capability, runs):
    assert (unsupported(built, capability) is None) == runs


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(native, "compiled", lambda: SimpleNamespace(cuda_architectures=()))
    reason = native.no_cuda_kernels(torch.device("cuda"))
    assert reason is not None
    assert "this build of dit4dit has no CUDA kernels" in reason
    build = SimpleNamespace(cuda_architectures=("sm_80", "compute_80"))
    monkeypatch.setattr(native, "compiled", lambda: build)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        native.no_cuda_kernels(torch.device("cuda")) == "no kernel for sm_75 in this build, which has sm_80, compute_80"
    )


@pytest.fixture
def halves(monkeypatch):
    """An op of two results: "into" writes them where it is told, "plain" cannot."""
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))

    def into(x, out=None):
        places = [torch.empty_like(x) if place is None else place for place in out or (None, None)]
        return tuple(place.copy_(x / 2) for place in places)

    plain = Implementation("plain", lambda x: None, lambda x: (x / 2, x / 2))
    return Op("halves", [Implementation("into", lambda x: None, into, into=True), plain], example=None)


@pytest.mark.parametrize("backend", ["into", "plain"])
@pytest.mark.parametrize("layout", ["dense", "every second"])
def test_a_result_goes_where_the_caller_wants_it(halves, backend, layout):
    """Whatever runs, and wherever that is; the call is listed as the same one."""
    memory = torch.full((4,), 7.0)
    place = memory[:2] if layout == "dense" else memory[::2]
    with listing() as calls:
        first, second = halves(FLOAT, backend=backend, out=(place, None))
    assert first.data_ptr() == place.data_ptr()
    assert memory.tolist() == ([0.5, 0.5, 7, 7] if layout == "dense" else [0.5, 7, 0.5, 7])
    assert second.tolist() == [0.5, 0.5]
    assert second.data_ptr() != place.data_ptr()
    assert [(name, len(args)) for name, args in calls] == [("halves", 1)]


def test_the_only_result_too(op):
    place = torch.zeros(2)
    assert op(FLOAT, out=place) is place
    assert place.tolist() == [2, 2]
