"""What is refused at the producer's door, and with which words: chunks and layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cpp_checks import lines_of

Build = Callable[..., Path]
Plant = Callable[[str, str, str], Path]

CLOCK = "is it CLOCK_MONOTONIC of this machine"
REFUSED = {
    "nan": "channel 'joint.7', row 2 is nan, wanted a finite number",
    "inf": "channel 'joint.22', row 3 is inf, wanted a finite number",
    "minus inf": "channel 'joint.0', row 0 is -inf, wanted a finite number",
    "binary": "channel 'hand.closed', row 1 is 0.25, wanted exactly 0 or 1",
    "binary nan": "channel 'hand.closed', row 1 is nan, wanted a finite number",
    "no values": "values is a null pointer",
    "no rows": "0 rows, wanted 1 to 64",
    "many rows": "65 rows, wanted 1 to 64",
    "stride": "22 values a row, wanted at least 23",
    "negative stride": "-23 values a row, wanted at least 23",
    "rate 0": "control_hz is 0, wanted the rate of the rows, 0.01 to 100000",
    "rate nan": "control_hz is nan",
    "rate inf": "control_hz is inf",
    "rate below": "control_hz is -20",
    "never": f"observed_at_ns is 0, wanted when the observation was taken; {CLOCK}",
    "backwards": "observed_at_ns 7199999999999 is before the last chunk's, 7200000000000",
    "computed before": f"computed_at_ns 7199999999999 is before observed_at_ns, 7200000000000; {CLOCK}",
    "future": f"computed_at_ns 7200000000011 is in the future, now is 7200000000010; {CLOCK}",
    "observed in the future": "observed_at_ns 7200000000011 is in the future",
    "starts early": f"starts_at_ns 3599999999999 is more than an hour from observed_at_ns, 7200000000000; {CLOCK}",
    "starts late": "starts_at_ns 10800000000001 is more than an hour from observed_at_ns",
    "starts at the end of time": "starts_at_ns 9223372036854775807 is more than an hour",
    "starts at its beginning": "starts_at_ns -9223372036854775808 is more than an hour",
    "closed": "the stream is closed; open a new one",
}


def test_a_refused_chunk_says_which_and_changes_nothing(cpp: Build) -> None:
    said = lines_of(cpp("ring_checks"), "refusals")
    assert said.keys() == REFUSED.keys()
    assert {name: text for name, text in said.items() if not text.startswith(REFUSED[name])} == {}


@pytest.mark.long
@pytest.mark.parametrize(
    "right, fault",
    [
        ("chunk.observed_at_ns < last_observed_at", "chunk.observed_at_ns + 1 < last_observed_at"),
        ("k < layout.channels; ++k", "k + 1 < layout.channels; ++k"),
        ("i < chunk.rows; ++i", "i + 1 < chunk.rows; ++i"),
        ("chunk.computed_at_ns > now_ns", "chunk.computed_at_ns > now_ns + 1"),
        ("!(chunk.control_hz >= kLeastControlHz && chunk.control_hz <= kMostControlHz)", "chunk.control_hz <= 0"),
    ],
)
def test_refusals_see(cpp: Build, faulty_include: Plant, right: str, fault: str) -> None:
    with pytest.raises(AssertionError):
        test_a_refused_chunk_says_which_and_changes_nothing(
            lambda name: cpp(name, include=faulty_include("refusal.h", right, fault))
        )


def test_a_layout_that_cannot_be_is_refused_with_why(cpp: Build) -> None:
    said = lines_of(cpp("ring_checks"), "layouts")
    assert len(said) == 35
    assert all(said.values()), said
    for case, text in (
        ("65 channels", "65 channels, wanted 1 to 64"),
        ("name twice", "channel 'joint.0': the name is there twice"),
        ("name without end", "channel 2 has no name of 1 to 46 bytes"),
        (
            "angle with end stops",
            "channel 'joint.1': low and high of a channel of kind angle are unsupported: it wraps at pi",
        ),
        ("velocity without 0", "channel 'joint.1': low 1 and high 2 of a velocity must include 0"),
        ("finish when dry", "group 'arms': on_dry is finish, wanted hold or decay"),
    ):
        assert said[case].startswith(text)


def test_every_field_in_which_two_layouts_can_differ_is_named(cpp: Build) -> None:
    lines_of(cpp("ring_checks"), "differences")
