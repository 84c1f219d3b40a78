"""The C++ reader of an action stream against its reference, and what is not seen from outside."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from stream_cases import Streams, random_streams, same_bits
from stream_reference import Commands, Status

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def reader(cpp: Build) -> Path:
    return cpp("reader_streams")


@pytest.fixture(scope="module")
def hostile() -> tuple[Streams, Commands]:
    """200 lanes at random, and what the reference commands."""
    streams = random_streams(1, lanes=200)
    return streams, streams.reference()


# -- the reference is the definition -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reader_is_its_reference_bit_for_bit(reader: Path) -> None:
    streams = random_streams(0, lanes=1000)
    commands = streams.run(reader)
    for status in set(Status) - {Status.CONTENDED}:  # or the streams are no test
        assert (commands.status == status).mean() > 0.01
    assert (commands.row >= 0).mean() > 0.2
    assert same_bits(commands, streams.reference())


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_reader_is_its_reference_bit_for_bit_over_100000_streams(reader: Path) -> None:
    for seed in range(50):
        streams = random_streams(100 + seed, lanes=2000)
        assert same_bits(streams.run(reader), streams.reference()), f"seed {100 + seed}"


FAULTS = {
    "row that has begun": ("interpolation.h", "std::floor(at.u + kRowTolerance)", "std::floor(at.u)"),
    "nearest row": ("interpolation.h", "std::floor(at.u + 0.5 + kRowTolerance)", "std::floor(at.u + kRowTolerance)"),
    "short way": ("interpolation.h", "kind == Kind::angle ? wrap(to - from)", "kind == Kind::angle ? (to - from)"),
    "knot before": ("interpolation.h", "k > 0 ? difference(kind, row(k), row(k - 1)) : here", "here"),
    "path's knots": ("interpolation.h", "k > 0 ? row(k - 1) : here", "here"),
    "late chunk": (
        "chain.h",
        "chunk.published_at > chunk.starts_at ? chunk.published_at : chunk.starts_at",
        "chunk.starts_at",
    ),
    "overtaken": ("chain.h", "if (order_[i]->begins_at >= order_[i + 1]->begins_at) drop(i);", ";"),
    "depth": ("chain.h", "++deep >= depth_", "++deep"),
    "before the e-stop": ("chain.h", "chunk.observed_at < forgotten_ || ", ""),
    "history": ("seams.h", "n < seam_.history", "n < seam_.history + 1"),
    "ended member": ("seams.h", "if (n > 0 && moment((*chain_)[n].chunk, now_).over) continue;", ""),
    "vote": ("seams.h", "away > 0.5", "away > 0.4"),
    "per row": ("seams.h", "columns_[i].path < 0 ? 1 : per_row", "1"),
    "level ramp": ("seams.h", "s * s * (3 - 2 * s)", "s"),
    "frozen base": (
        "seams.h",
        "if (n == kMostHistory - 1) freeze(group, base, (*chain_)[n].begins_at, out, seconds);",
        "",
    ),
    "made up": (
        "seams.h",
        "const bool alone = (*chain_)[n + 1].ends_at <= (*chain_)[n].begins_at;",
        "const bool alone = false;",
    ),
    "ended chunk goes on": ("seams.h", "displacement(link, c, own_, known_ > 0)", "displacement(link, c, own_, false)"),
    "pruned too early": ("seams.h", "== 1) kept = n + 1", "> 0.9) kept = n + 1"),
    "part of older chunks": ("seams.h", "if (!on || own_.from == whole_.from) return own_;", "return own_;"),
    "rest of a chunk": ("reader_inl.h", "if (ends) seams_.finish(group, follows_.data());", ""),
    "age": ("reader_inl.h", "now - newest_observed_at_ > most", "now - newest_observed_at_ >= most + 1000000"),
    "finish": ("reader_inl.h", "seen.dead && rules.on_dead != Rule::finish", "seen.dead"),
    "decay": ("reader_inl.h", "fades ? state.fades_from * left : 0", "fades ? state.fades_from : 0"),
    "brake": (
        "reader_inl.h",
        "if (!brakes) return state.limiter.tick(target, dt);",
        "return state.limiter.tick(target, dt);",
    ),
    "path forgets": ("reader_inl.h", "state.path = state.limiter.brake(dt);", "state.limiter.brake(dt); return 0;"),
    "unwrapped": ("reader_inl.h", "target = sent + wrap(target - sent);", ""),
    "too soon": ("reader_inl.h", "now - last_ >= kShortestTick", "now > last_"),
    "time": ("reader_inl.h", "ticked_ ? now - last_ : period", "period"),
    "late tick": ("reader_inl.h", "passed < longest ? passed : longest", "passed"),
    "left alone": ("reader_inl.h", "passed > kAtRest &&", "false &&"),
    "velocity's limits": ("reader_inl.h", "limits.velocity = given.acceleration;", "limits.velocity = given.velocity;"),
    "pose": ("reader_inl.h", "state.limiter.reset(values[i]);", ""),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_differs_from_the_reference(
    fault: str, cpp: Build, faulty_include: Callable[[str, str, str], Path], hostile: tuple[Streams, Commands]
) -> None:
    program = cpp("reader_streams", "-O0", "-Wno-error", include=faulty_include(*FAULTS[fault]))
    streams, wanted = hostile
    assert not same_bits(streams.run(program), wanted)


@pytest.mark.parametrize("flags", [("-O3", "-march=native", "-ffp-contract=fast"), ("-O0",)])
def test_other_compiler_flags_give_the_same_bits(flags: tuple[str, ...], cpp: Build, reader: Path) -> None:
    streams = random_streams(2, lanes=1000)
    assert same_bits(streams.run(cpp("reader_streams", *flags)), streams.run(reader))


# -- what is not seen from outside -------------------------------------------------------------------------------------------

CHECKS = [
    "no_allocation",
    "no_system_call",
    "dead",
    "estop",
    "strange_times",
    "contended",
    "feedback",
    "ahead",
    "opening",
]


@pytest.mark.parametrize("check", CHECKS)
def test_reader_checks(check: str, cpp: Build, segment_name: str) -> None:
    done = subprocess.run([cpp("reader_checks"), check, segment_name], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no seccomp here")
    assert done.returncode == 0, f"{check}: {done.stdout}{done.stderr}"


@pytest.mark.slow
def test_strange_times_overflow_nothing(cpp: Build) -> None:
    program = cpp("reader_checks", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([program, "strange_times"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-fsanitize=thread", "-fsanitize=address,undefined"])
def test_reader_beside_a_producer_under_a_sanitizer(flag: str, cpp: Build, segment_name: str) -> None:
    done = subprocess.run([cpp("reader_live", flag, "-g"), segment_name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_hostile_streams_under_a_sanitizer(cpp: Build, hostile: tuple[Streams, Commands]) -> None:
    program = cpp("reader_streams", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    streams, wanted = hostile
    assert same_bits(streams.run(program), wanted)


CHECKED_FAULTS = {
    "no_allocation": (
        "chain.h",
        "Link& link = *order_[kMostHeld];",
        "std::vector<int> spare(9); Link& link = *order_[kMostHeld];",
    ),
    "no_system_call": ("reader_inl.h", "const std::int64_t now = now_ns", "getppid(); const std::int64_t now = now_ns"),
    "dead": ("ring.h", "<= now_ns - after;", "< now_ns - after;"),
    "estop": ("reader_inl.h", "if (seen.estop) chain_.forget_before(now);", ""),
    "strange_times": ("reader_inl.h", "    last_ = 0;\n", ""),
    "contended": (
        "chain.h",
        "if (!take_down_from(segment, newest, covered)) continue;",
        "take_down_from(segment, newest, covered);",
    ),
    "feedback": ("reader_inl.h", "feedback_.values[columns_[i].column] = out[i]", "feedback_.values[i] = out[i]"),
    "ahead": ("chain.h", "order_[1]->begins_at <= order_[kMostHeld]->chunk.published_at ? 0 : 1", "0"),
    "opening": ("reader_inl.h", "if (options.driver && !memory->lock(Role::driver))", "if (false)"),
}


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
def test_reader_checks_notice(
    check: str, cpp: Build, faulty_include: Callable[[str, str, str], Path], segment_name: str
) -> None:
    program = cpp("reader_checks", "-O0", "-Wno-error", include=faulty_include(*CHECKED_FAULTS[check]))
    done = subprocess.run([program, check, segment_name], capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2), done.stdout
