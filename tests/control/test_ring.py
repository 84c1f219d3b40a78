"""The ring of an action stream: no torn read and none older than the head, whatever the producer does.

Three ways to look: threads and processes on this machine; ring.h on a memory model that shows what any machine could; and the
sanitizers. This machine orders stores by itself, so that only the model sees a wrong memory order.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Build = Callable[..., Path]
Plant = Callable[[str, str, str], Path]

# bounds-strict: of a struct's last array too, which bounds takes for one of any length
SANITIZE = "-fsanitize=address,undefined,bounds-strict"
CASES = (
    "contended",
    "overwritten",
    "uncounted",
    "odd_mark",
    "some_rows",
    "every_size",
    "spoilt",
    "dead",
    "latch",
    "feedback",
    "moves",
)


def run(program: Path, *arguments: object, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def stress(program: Path, name: str, **settings: float) -> dict[str, int]:
    """What ring_stress counted."""
    arguments = [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", value)]
    return json.loads(run(program, "--name", name, *arguments))


def assert_clean(counts: dict[str, int]) -> None:
    """No read was torn, older than the head on entry, or without a chunk, and none took more than four tries."""
    assert {key: counts[key] for key in ("torn", "older", "none", "beyond")} == dict.fromkeys(
        ("torn", "older", "none", "beyond"), 0
    ), counts
    assert sum(counts["tries"]) == counts["reads"]
    assert len(counts["tries"]) == 4


@pytest.mark.parametrize("case", CASES)
def test_one_thread(cpp: Build, case: str) -> None:
    run(cpp("ring_checks"), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_thread_sanitized(cpp: Build, case: str) -> None:
    run(cpp("ring_checks", "-g", SANITIZE, "-fno-sanitize-recover=all"), case)


@pytest.mark.slow
def test_a_hundred_million_reads(cpp: Build, segment_name: str) -> None:
    """Four readers, each with a mapping of its own, against a producer at 1 kHz."""
    counts = stress(cpp("ring_stress", "-O3"), segment_name, reads=1e8, readers=4, hz=1000, published=200)
    assert_clean(counts)
    assert counts["reads"] >= 10**8
    assert counts["contended"] == 0  # one chunk a millisecond: sixteen of them never pass while one is read four times


@pytest.mark.slow
@pytest.mark.parametrize("rows, channels", [(2, 23), (64, 64)])
def test_a_producer_that_writes_all_the_time(cpp: Build, segment_name: str, rows: int, channels: int) -> None:
    counts = stress(
        cpp("ring_stress", "-O3"),
        segment_name,
        reads=4e7 if rows == 2 else 2e6,
        hz=0,
        rows=rows,
        channels=channels,
        published=2000,
    )
    assert_clean(counts)
    assert counts["contended"] < 1e-3 * counts["reads"]


@pytest.mark.slow
def test_chunks_that_are_about_to_be_overwritten(cpp: Build, segment_name: str) -> None:
    counts = stress(cpp("ring_stress", "-O3"), segment_name, reads=4e7, hz=0, behind=15, published=2000)
    assert_clean(counts)
    assert 0 < counts["gone"] < counts["reads"]


@pytest.mark.slow
def test_readers_in_other_processes(cpp: Build, segment_name: str) -> None:
    counts = stress(cpp("ring_stress", "-O3"), segment_name, reads=2e7, hz=0, processes=1, published=2000)
    assert_clean(counts)
    assert counts["ids"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("hz", [0, 1000])
def test_thread_sanitizer(cpp: Build, segment_name: str, hz: int) -> None:
    """It follows addresses: the readers look at the producer's own mapping."""
    counts = stress(
        cpp("ring_stress", "-g", "-fsanitize=thread"),
        segment_name,
        reads=1e6,
        hz=hz,
        rows=2,
        channels=23,
        one_mapping=1,
    )
    assert_clean(counts)


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizer(cpp: Build, segment_name: str) -> None:
    program = cpp("ring_stress", "-g", SANITIZE, "-fno-sanitize-recover=all")
    for hz in (0, 1000):
        assert_clean(stress(program, segment_name, reads=1e6, hz=hz, rows=2, channels=23))


@pytest.mark.slow
def test_a_hundred_kills(cpp: Build, segment_name: str) -> None:
    """At random moments, many inside a write. The next producer goes on with the ids; a second live one is refused."""
    counts = json.loads(run(cpp("ring_kill"), segment_name, 100, 1))
    wrong = ("torn", "older", "beyond", "not_refused", "lost", "not_dead", "idle_failed")
    assert {key: counts[key] for key in wrong} == dict.fromkeys(wrong, 0), counts
    assert counts["inside"] >= 15, counts
    assert counts["reads"] > 10_000
    assert counts["published"] > 10_000


@pytest.mark.long
@pytest.mark.parametrize(
    "right, fault, seen",
    [
        (
            "return fcntl(file_.get(), F_OFD_SETLK, &range) == 0;",
            "fcntl(file_.get(), F_OFD_SETLK, &range); return true;",
            "not_refused",
        ),
        ("stamps.producers.fetch_add(1,", "stamps.head.store(0); stamps.producers.fetch_add(1,", "older"),
    ],
)
def test_the_kills_see(cpp: Build, segment_name: str, faulty_include: Plant, right: str, fault: str, seen: str) -> None:
    program = cpp("ring_kill", include=faulty_include("segment.h", right, fault))
    assert json.loads(run(program, segment_name, 10, 1))[seen] > 0


# -- any machine -----------------------------------------------------------------------------------


def model(program: Path, **settings: float) -> dict[str, int]:
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    return json.loads(run(program, *arguments))


def faults(counts: dict[str, int]) -> list[str]:
    """What ring_model has seen that must not be."""
    found = [key for key in ("torn", "older", "beyond", "missed", "ids_lost", "feedback_torn") if counts[key]]
    # a chunk is overwritten while it is read four times in a row: rarely, if the head is looked up for each try
    return found + ["contended"] * (counts["contended"] > 0.01 * counts["reads"])


@pytest.mark.parametrize("seed", [1, 2])
def test_memory_model(cpp: Build, seed: int) -> None:
    """Every read that C++ allows, of one writer, and of one that dies between any two of its stores and its successor."""
    counts = model(cpp("ring_model"), seed=seed)
    assert not faults(counts), counts
    assert counts["whole"] > 10_000
    assert counts["gone"] > 10_000
    assert counts["feedback"] > 1000
    assert counts["deaths"] == 15  # one more than stores of a chunk


@pytest.mark.long
def test_memory_model_for_long(cpp: Build) -> None:
    program = cpp("ring_model", "-O3")
    for seed in range(100, 140):
        counts = model(program, seed=seed, reads=2e6)
        assert not faults(counts), (seed, counts)


RELAXED = "std::memory_order_relaxed"
ROW_STORE = "words[i].store(word, std::memory_order_release);"
ROW_LOAD = "words[i].load(std::memory_order_acquire);"
ODD = f"slot.sequence.store(2 * id - 1, {RELAXED});"
TRIES = "for (int tries = 1; tries <= kMostTries; ++tries) {\n        const std::uint64_t id = head(segment);"
WRONG = {
    "no odd mark": (ODD, "", "torn"),
    "a row is stored relaxed": (ROW_STORE, ROW_STORE.replace("std::memory_order_release", RELAXED), "torn"),
    "a row is loaded relaxed": (ROW_LOAD, ROW_LOAD.replace("std::memory_order_acquire", RELAXED), "torn"),
    "an odd column is stored relaxed": (
        "words[count / 2].store(word, std::memory_order_release);",
        f"words[count / 2].store(word, {RELAXED});",
        "torn",
    ),
    "an odd column is loaded relaxed": (
        "words[count / 2].load(std::memory_order_acquire);",
        f"words[count / 2].load({RELAXED});",
        "torn",
    ),
    "a stamp is stored relaxed": (
        "slot.starts_at.store(chunk.starts_at_ns, release);",
        f"slot.starts_at.store(chunk.starts_at_ns, {RELAXED});",
        "torn",
    ),
    "a stamp is loaded relaxed": ("slot.published_at.load(acquire)", f"slot.published_at.load({RELAXED})", "torn"),
    "the even mark is stored relaxed": (
        "slot.sequence.store(2 * id, release);",
        f"slot.sequence.store(2 * id, {RELAXED});",
        "torn",
    ),
    "the even mark before the rows": (
        "    const int channels = static_cast<int>(segment.header.layout.channels);\n    for (int i = 0; i < chunk",
        "    slot.sequence.store(2 * id, release);\n"
        "    const int channels = static_cast<int>(segment.header.layout.channels);\n    for (int i = 0; i < chunk",
        "torn",
    ),
    "the first look is relaxed": (
        "slot.sequence.load(acquire) != 2 * id",
        f"slot.sequence.load({RELAXED}) != 2 * id",
        "torn",
    ),
    "any even mark will do": ("slot.sequence.load(acquire) != 2 * id)", "slot.sequence.load(acquire) % 2)", "torn"),
    "no last look": (f"if (slot.sequence.load({RELAXED}) != 2 * id) return false;", "", "torn"),
    "the head is stored relaxed": ("stamps.head.store(id, release);", f"stamps.head.store(id, {RELAXED});", "missed"),
    "the head is loaded relaxed": (
        "return segment.header.stamps.head.load(std::memory_order_acquire);",
        f"return segment.header.stamps.head.load({RELAXED});",
        "missed",
    ),
    "the head is first": (ODD, f"stamps.head.store(id, release);\n    {ODD}", "missed"),
    "the chunk before the head": (
        "copy_rows(segment, id, first, count, held)",
        "copy_rows(segment, id > 1 ? id - 1 : id, first, count, held)",
        "older",
    ),
    "five tries": ("constexpr int kMostTries = 4;", "constexpr int kMostTries = 5;", "beyond"),
    "each try for the same chunk": (
        TRIES,
        TRIES.replace("head(segment)", "asked").replace("for", "const auto asked = head(segment);\n    for"),
        "contended",
    ),
    "feedback without odd mark": (f"slot.sequence.store(odd, {RELAXED});", "", "feedback_torn"),
    "feedback's even mark is relaxed": (
        "slot.sequence.store(odd + 1, release);",
        f"slot.sequence.store(odd + 1, {RELAXED});",
        "feedback_torn",
    ),
    "feedback without a last look": (
        f"if (slot.sequence.load({RELAXED}) == begun) return true;",
        "return true;",
        "feedback_torn",
    ),
    "a dead driver's mark is taken for none": (
        f"(slot.sequence.load({RELAXED}) + 1) | 1",
        f"(slot.sequence.load({RELAXED}) + 1)",
        "feedback_torn",
    ),
    "feedback's values are relaxed": (
        "detail::as_word(sent.values[i]), release)",
        f"detail::as_word(sent.values[i]), {RELAXED})",
        "feedback_torn",
    ),
    "feedback's row is relaxed": ("slot.row.load(acquire)", f"slot.row.load({RELAXED})", "feedback_torn"),
    "feedback's first look is relaxed": (
        "begun = slot.sequence.load(acquire)",
        f"begun = slot.sequence.load({RELAXED})",
        "feedback_torn",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("wrong", WRONG)
def test_the_memory_model_sees(cpp: Build, faulty_include: Plant, wrong: str) -> None:
    right, fault, seen = WRONG[wrong]
    assert seen in faults(model(cpp("ring_model", include=faulty_include("ring.h", right, fault))))


# -- what this machine sees ------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("wrong", ["no odd mark", "no last look"])
def test_overwritten_chunks_show_a_fault(cpp: Build, segment_name: str, faulty_include: Plant, wrong: str) -> None:
    right, fault, _ = WRONG[wrong]
    program = cpp("ring_stress", "-O3", include=faulty_include("ring.h", right, fault))
    assert any(stress(program, segment_name, reads=4e7, hz=0, behind=15, published=2000)["torn"] for _ in range(5))


@pytest.mark.long
def test_newest_chunks_show_an_old_one(cpp: Build, segment_name: str, faulty_include: Plant) -> None:
    right, fault, _ = WRONG["the chunk before the head"]
    program = cpp("ring_stress", "-O3", include=faulty_include("ring.h", right, fault))
    assert stress(program, segment_name, reads=1e6, hz=1000, published=50)["older"] > 0


@pytest.mark.long
def test_thread_sanitizer_sees_plain_loads(cpp: Build, segment_name: str, faulty_include: Plant) -> None:
    include = faulty_include("ring.h", ROW_LOAD, "*reinterpret_cast<const std::uint64_t*>(&words[i]);")
    program = cpp("ring_stress", "-g", "-fsanitize=thread", include=include)
    with pytest.raises(AssertionError, match="data race"):
        stress(program, segment_name, reads=1e6, hz=0, one_mapping=1)


@pytest.mark.long
def test_undefined_behaviour_sanitizer_sees_a_slot_too_many(
    cpp: Build, segment_name: str, faulty_include: Plant
) -> None:
    include = faulty_include("ring.h", "(id - 1) % kSlots", "(id - 1) % (kSlots + 2)")
    program = cpp("ring_stress", "-g", SANITIZE, "-fno-sanitize-recover=all", include=include)
    with pytest.raises(AssertionError, match="out of bounds"):
        stress(program, segment_name, reads=1e5, hz=0)


@pytest.mark.long
@pytest.mark.parametrize(
    "case, right, fault",
    [
        ("uncounted", "if (id <= head(segment)) return", "if (id > 0) return"),
        ("contended", "constexpr int kMostTries = 4;", "constexpr int kMostTries = 3;"),
        (
            "odd_mark",
            "stamps.head.load(std::memory_order_relaxed) + 1;",
            "stamps.head.load(std::memory_order_relaxed) + 2;",
        ),
        ("some_rows", "first + count < held.rows ?", "first + count <= held.rows + 1 ?"),
        ("every_size", "if (count % 2) {\n        std::uint64_t", "if (count % 4 == 1) {\n        std::uint64_t"),
        ("dead", "<= now_ns - after;", "< now_ns - after;"),
        ("dead", "last ? last : header.created_at", "last"),
        ("latch", "std::int64_t none = 0;", "std::int64_t none = stamps.estop_at.load();"),
        ("feedback", "if (begun == 0) return false;", ""),
    ],
)
def test_one_thread_sees(cpp: Build, faulty_include: Plant, case: str, right: str, fault: str) -> None:
    program = cpp("ring_checks", "-O0", include=faulty_include("ring.h", right, fault))
    with pytest.raises(AssertionError, match="not so"):
        run(program, case)
