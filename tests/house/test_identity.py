"""What files, caches and records are recognised by stays what it was before the files of the package were moved.

`golden/identity.json` and `golden/before_the_house/` were written by the old code (`golden/make_identity.py`), once. Where a test
here fails, checkpoints, prompt packs, caches and runs on people's disks are no longer found or no longer go on: change the code,
not those files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

import identity_facts as facts
import pytest
import torch

from dit4dit.config import (
    LATER,
    FlowConfig,
    HeadConfig,
    ModelConfig,
    TextConfig,
    VaeConfig,
    VideoDitConfig,
    hashed_text,
)
from dit4dit.data.samples import Window
from dit4dit.envs import tabletop_policy_dir
from dit4dit.evaluation.runs import Run, differences, other_worlds
from dit4dit.training.config import read_config
from dit4dit.training.loop import train

BEFORE = facts.GOLDEN / "before_the_house"
KNOWN = json.loads((facts.GOLDEN / "identity.json").read_text())


CONFIGS = (TextConfig, VaeConfig, VideoDitConfig, HeadConfig, FlowConfig, ModelConfig, Window)


@pytest.fixture(autouse=True)
def another_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations print otherwise than when the recorded hashes were made of their repr."""
    for config in CONFIGS:
        monkeypatch.setattr(config, "__repr__", lambda self: "another repr")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the recorded numbers were computed with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(node: Any, place: str = "") -> dict[str, Any]:
    """Every leaf of JSON data by its place, for `close`."""
    if not isinstance(node, (dict, list)):
        return {place: node}
    parts = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: leaf for name, part in parts for key, leaf in numbers(part, f"{place}/{name}").items()}


def close(wanted: Any, rel: float = 1e-5, absolute: float = 1e-6) -> dict[str, Any]:
    """`numbers` that allow floats a tolerance, and nothing else."""
    leaves = numbers(wanted).items()
    return {
        key: pytest.approx(leaf, rel=rel, abs=absolute) if isinstance(leaf, float) else leaf for key, leaf in leaves
    }


def same_bits(now: Any, then: Any) -> None:
    """Exactly equal, where this is the machine that the numbers were written on."""
    if facts.machine() == KNOWN["machine"]["machine"]:
        assert now == then


@pytest.mark.parametrize("name", list(facts.CHECKPOINTS))
def test_checkpoints_and_their_packs_keep_their_hashes(name: str) -> None:
    assert facts.checkpoint_facts(facts.CHECKPOINTS[name]) == KNOWN["checkpoints"][name]


def test_data_keeps_its_fingerprints(tmp_path: Path) -> None:
    known = KNOWN["data"]
    now = facts.data_facts(tmp_path, statistics=known["statistics"])
    assert numbers(now.pop("statistics")) == close(known["statistics"])
    assert now == {name: value for name, value in known.items() if name != "statistics"}


def test_caches_keep_their_keys(tmp_path: Path) -> None:
    assert facts.cache_facts(tmp_path) == KNOWN["caches"]


def test_random_streams_keep_their_first_draws() -> None:
    now, known = facts.stream_facts(), KNOWN["streams"]
    assert now["exact"] == known["exact"]
    assert numbers(now["close"]) == close(known["close"])
    same_bits(now["close"], known["close"])


def compare_runs(now: dict[str, Any], known: dict[str, Any]) -> None:
    """`facts.run_facts` of two runs: what is stored exactly, losses with a tolerance that four steps need."""
    for name in ("progress", "caches"):
        assert now[name] == known[name]
    assert numbers(now["log"]) == close(known["log"], rel=5e-3)
    same_bits((now["log"], now["weights"]), (known["log"], known["weights"]))


def test_a_training_run_is_the_same_run(tmp_path: Path) -> None:
    compare_runs(facts.training_facts(tmp_path), KNOWN["training"])


def without_bits(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "actions_hash"}


def test_an_evaluation_is_the_same_evaluation_and_compares_with_one_of_before(tmp_path: Path, main) -> None:
    now, known = facts.evaluation_facts(tmp_path / "now"), KNOWN["evaluation"]
    assert numbers(now["first_chunk"]) == close(known["first_chunk"], rel=1e-3, absolute=1e-4)
    assert list(map(without_bits, now["episodes"])) == list(map(without_bits, known["episodes"]))
    same_bits(now, known)
    first, second = Run.open(BEFORE / "evaluation"), Run.open(tmp_path / "now")
    assert differences(first.config, second.config) == other_worlds(first, second) == {}
    assert first.outcomes == second.outcomes
    code, told, _ = main("eval", "compare", first.folder, second.folder, "--json", tmp_path / "compared.json")
    assert code == 0, told
    assert json.loads((tmp_path / "compared.json").read_text())["difference"] == 0


def test_an_evaluation_of_before_goes_on(tmp_path: Path, main) -> None:
    """From its folder as it is nothing is left to run; with its last episode cut off that one is run again."""
    folder = Path(shutil.copytree(BEFORE / "evaluation", tmp_path / "evaluation"))
    words = ("eval", "tabletop", "--checkpoint", tabletop_policy_dir(), "--out", folder, "--episodes", 3)
    words = (*words, "--device", "cpu", "--videos", "none", "--resume")
    lines = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    assert main(*words)[0] == 0
    assert (folder / "episodes.jsonl").read_text() == "".join(lines)
    (folder / "episodes.jsonl").write_text("".join(lines[:2]))
    assert main(*words)[0] == 0
    *kept, again = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    assert kept == lines[:2]
    now, then = (facts.untimed(json.loads(line)) for line in (again, lines[2]))
    assert without_bits(now) == without_bits(then)
    same_bits(now, then)


def test_a_training_run_of_before_goes_on_as_the_whole_run_did(tmp_path: Path) -> None:
    run = Path(shutil.copytree(BEFORE / "run", tmp_path / "run"))
    config = read_config(run / "config.yaml")
    config = replace(config, run=replace(config.run, out=str(run), steps=4))
    cached = {file: file.stat().st_mtime_ns for file in (run / "cache").rglob("*.safetensors")}
    assert train(config, facts.least_data(config.model), resume=run / "checkpoints" / "step_00000002") == 0
    compare_runs(facts.run_facts(run), KNOWN["resumed"])
    assert {file: file.stat().st_mtime_ns for file in cached} == cached, "a cache was made again"


def test_a_configuration_is_hashed_by_its_fields() -> None:
    """Its class may have another name, and a field that was added later counts where it is used."""
    moved = dataclass(frozen=True)(type("Moved", (TextConfig,), {}))
    assert hashed_text("ModelConfig", ModelConfig(text=moved())) == hashed_text("ModelConfig", ModelConfig())
    added = [("extra", int, field(default=3, metadata={LATER: True}))]
    more = make_dataclass("More", added, bases=(TextConfig,), frozen=True)
    text = hashed_text("TextConfig", TextConfig())
    assert text.startswith("TextConfig(hidden_size=3584, num_layers=28, ")
    assert hashed_text("TextConfig", more()) == text
    assert hashed_text("TextConfig", more(extra=4)) == f"{text[:-1]}, extra=4)"
    assert hashed_text("TextConfig", more(max_length=511)) == text.replace("max_length=512", "max_length=511")
