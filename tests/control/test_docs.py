"""docs/action-stream.md says what the code does, and its drawing is what its script makes of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from dit4dit.control import ActionStream, Limits
from dit4dit.control.stream import Status
from dit4dit.robots import G1
from dit4dit.robots.channels import RULES
from dit4dit.robots.embodiment import KINDS

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "action-stream.md").read_text()


def rows(heading: str) -> list[str]:
    """First cells of the tables of a chapter."""
    chapter = re.split(r"^## ", TEXT.split(f"## {heading}\n")[1], flags=re.M)[0]
    return re.findall(r"^\| `?(\w+)[`(, ]", chapter, flags=re.M)


def test_every_status_kind_and_rule_is_explained() -> None:
    assert rows("When there is nothing to follow")[1:] == [status.name for status in Status]
    assert rows("Kinds of channels")[1:] == list(KINDS)
    for rule in RULES:
        assert f"*{rule}*" in TEXT


def test_its_yaml_is_a_file_of_limits(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.M | re.S)
    file = tmp_path / "my_limits.yaml"
    file.write_text(text)
    limits = Limits.of(G1).override(file)
    for name, bounds in yaml.safe_load(text)["limits"].items():
        channel = name if name in G1.action_names else f"{name}.0"
        for field, value in bounds.items():
            if channel != "left_arm.3" or field in ("low", "high"):
                assert getattr(limits[channel], field) == value
    assert limits["left_arm.3"].velocity == limits["left_arm.0"].velocity == 2.0


def test_its_size_of_a_segment(segment_name: str) -> None:
    (said,) = re.findall(r"a segment of (\d+) KiB", TEXT)
    with ActionStream(G1, shared=segment_name):
        assert round((Path("/dev/shm") / segment_name.lstrip("/")).stat().st_size / 1024) == int(said)


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (DOCS / link).exists(), link


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_action_stream", DOCS / "draw_action_stream.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest(sent: NDArray[np.float64], order: int, hz: float) -> float:
    return float(np.abs(np.diff(sent, order)).max() * hz**order)


@pytest.mark.slow
def test_the_drawing(tmp_path: Path) -> None:
    """What it shows is so: the limited line keeps the bounds that are drawn, the others do not, all end at the same place."""
    module = script()
    chunks, followed = module.play(1_000_003)
    assert len(chunks) == 7
    sent = {one.name: np.array(one.sent) for one in followed}
    limited = sent["Blend(rows=2), limited"]
    for order, name in enumerate(("velocity", "acceleration", "jerk"), 1):
        bound = module.BOUNDS[name]
        assert largest(limited, order, module.COMMAND_HZ) <= bound * (1 + 1e-9)
        assert largest(sent["Switch()"], order, module.COMMAND_HZ) > 2 * bound
    assert largest(sent["Switch()"], 1, module.COMMAND_HZ) > 2 * largest(sent["Blend(rows=2)"], 1, module.COMMAND_HZ)
    assert np.ptp([line[-1] for line in sent.values()]) < 0.02
    module.draw(tmp_path / "drawing.png", chunks, followed)
    with Image.open(tmp_path / "drawing.png") as new, Image.open(DOCS / "action-stream.png") as kept:
        assert new.size == kept.size
