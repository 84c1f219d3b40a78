"""Frozen parts that the checkpoints of a run share by links: written once, hashed once; what to do when they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_samples import GOLDEN, flip
from safetensors.torch import load_file
from training_worker import small_config

from dit4dit import Policy
from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import checksums, native
from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.errors import CheckpointError
from dit4dit.model.text import byte_tokenizer
from dit4dit.presets import preset
from dit4dit.training import checkpoint, setup
from dit4dit.training.checkpoint import Inference, Progress
from dit4dit.training.config import TrainConfig
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData

FROZEN = [f"{part}/model.safetensors" for part in ck.FROZEN]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


@pytest.fixture
def shared_run(tmp_path: Path) -> Path:
    """A run with two checkpoints whose frozen parts are links to one copy."""
    model = random_model(preset("tiny").model, 0)
    text, model.text = model.text, None
    assert text is not None
    path = tmp_path / "run"
    setup.save_frozen(path / "frozen", model, text)
    statistics = json.loads((GOLDEN / "libero_tiny" / "dataset_statistics.json").read_text())
    weights = {n: t for n, t in native.named_tensors(model).items() if not n.startswith(tuple(ck.FROZEN.values()))}
    inference = Inference(model.config, "libero", weights, statistics, byte_tokenizer(), path / "frozen")
    for step in (1, 2):
        checkpoint.write(
            path, Progress(step, 0, 1, "", ""), inference, {"weights.x": torch.ones(1)}, {"0.x": torch.ones(1)}
        )
    return path


def test_linked_parts_are_hashed_once(shared_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = checkpoint.folder_of(shared_run, 1) / "policy"
    part = policy / "text_encoder" / "model.safetensors"
    assert part.samefile(shared_run / "frozen" / "text_encoder" / "model.safetensors")
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    manifest = json.loads((policy.parent / "manifest.json").read_text())
    assert manifest["policy/text_encoder/model.safetensors"]["sha256"] == digest
    assert json.loads((policy / "checksums.json").read_text())["text_encoder/model.safetensors"]["sha256"] == digest
    # another process, which goes on with the run: what is linked is not read again
    checksums._known.clear()
    read: list[str] = []
    once = checksums._read
    monkeypatch.setattr(checksums, "_read", lambda file: read.append(file.name) or once(file))
    linked = checksums.carried(shared_run / "frozen")
    assert checksums.entries(policy, linked)["text_encoder/model.safetensors"]["sha256"] == digest
    assert read.count("model.safetensors") == 1, "the trained weights alone"


def test_a_later_checkpoint_does_not_read_the_linked_parts(shared_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint.folder_of(shared_run, 2)
    opened = ck.open_checkpoint(saved / "policy")
    weights = {n: t for n, t in opened.tensors.items() if not n.startswith(tuple(ck.FROZEN.values()))}
    inference = Inference(opened.model, "libero", weights, opened.statistics, byte_tokenizer(), shared_run / "frozen")
    checksums._known.clear()
    once, read = checksums._read, []
    monkeypatch.setattr(checksums, "_read", lambda file: read.append(file) or once(file))
    last = checkpoint.write(shared_run, Progress(3, 0, 1, "", ""), inference, {"weights.x": torch.ones(1)}, {})
    assert [file for file in read if file.parent.name in ck.FROZEN] == []
    assert len(read) == len(set(read)), "each other file once, for both lists"
    names = [f"policy/{name}" for name in FROZEN]
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (saved, last))
    assert [after[name] for name in names] == [before[name] for name in names]
    checksums._known.clear()
    read.clear()
    assert checkpoint.read(last).progress.step == 3
    # the manifest's files, and the list of the linked ones; no 16 GB twice
    assert sorted(file.relative_to(shared_run).as_posix() for file in read if file.name == "model.safetensors") == [
        f"checkpoints/step_00000003/{name}" for name in ("policy/model.safetensors", *names, "state/model.safetensors")
    ]


def test_a_damaged_shared_part_says_how_to_go_on(shared_run: Path, cosmos_folder: Path, capsys) -> None:
    folders = [checkpoint.folder_of(shared_run, step) for step in (1, 2)]
    policy = folders[1] / "policy"
    assert run("inspect", policy, "--verify") == 0
    flip(shared_run / "frozen" / "text_encoder" / "model.safetensors")
    part = policy / "text_encoder"
    assert run("inspect", policy, "--verify") == 2
    said = capsys.readouterr().err
    assert f"{part / 'model.safetensors'}: damaged" in said
    assert "all 3 checkpoints and folders of the run that link to this file share the damage" in said
    assert f"remove {part} and load with --backbone FOLDER" in said
    for folder in folders:
        with pytest.raises(
            CheckpointError, match=rf"share the damage: remove that file's folder and {shared_run}/frozen, and --resume"
        ):
            checkpoint.read(folder)
    # a file that cannot even be opened says the same
    os.truncate(shared_run / "frozen" / "text_encoder" / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"share the damage: remove .* and load with --backbone FOLDER"):
        ck.open_checkpoint(policy)
    # and the way back works
    shutil.rmtree(part)
    assert run("inspect", policy, "--verify", "--backbone", cosmos_folder) == 0
    loaded = Policy.from_pretrained(policy, backbone=cosmos_folder, device="cpu")
    base = load_file(cosmos_folder / "text_encoder" / "model.safetensors")
    assert loaded.model.text is not None
    assert torch.equal(loaded.model.text.language_model.norm.weight, base["model.norm.weight"])
    with pytest.raises(
        CheckpointError, match=rf"{shared_run}/frozen/text_encoder/model.safetensors: damaged.* --resume"
    ):
        checkpoint.read(folders[1])  # or the next checkpoint would link to it
    shutil.rmtree(shared_run / "frozen")
    checkpoint.read(folders[1])
    # a part that nobody shares is copied again
    flip(folders[0] / "policy" / "model.safetensors")
    shutil.rmtree(folders[0] / "policy" / "text_encoder")
    with pytest.raises(CheckpointError, match="the checkpoint is damaged, resume an older one"):
        checkpoint.read(folders[0])


# -- what a run does with them ---------------------------------------------------------------------------------------


def config_of(out: Path, steps: int, seed: int = 0) -> TrainConfig:
    """A run of one-sample steps that saves after each."""
    small = small_config(out)
    return replace(
        small,
        data=replace(small.data, batch_size=1),
        run=replace(small.run, steps=steps, save_every=1, keep=9, seed=seed),
    )


def go(config: TrainConfig, resume: Path | None = None) -> None:
    assert train(config, RandomData(config.model, config.embodiment), resume=resume) == 0


def frozen_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FROZEN}


def test_resume_writes_frozen_parts_again(tmp_path: Path) -> None:
    """The way back that the error names, for each way to go it by halves too."""
    out, config = tmp_path / "run", config_of(tmp_path / "run", 2)
    go(config_of(out, 1))
    first, second = checkpoint.folder_of(out, 1), checkpoint.folder_of(out, 2)
    written, listed = frozen_of(out / "frozen"), (out / "frozen" / "checksums.json").read_text()
    assert all((first / "policy" / name).samefile(out / "frozen" / name) for name in FROZEN)
    flip(out / "frozen" / FROZEN[0])
    part = first / "policy" / "text_encoder"
    with pytest.raises(
        CheckpointError, match=rf"{part}/model.safetensors: damaged.*remove that file's folder and {out}/f"
    ):
        go(config, first)
    shutil.rmtree(part)
    with pytest.raises(
        CheckpointError, match=rf"{out}/frozen/text_encoder/model\.safetensors: damaged.*remove {out}/frozen"
    ):
        go(config, first)
    shutil.rmtree(out / "frozen" / "text_encoder")
    with pytest.raises(
        CheckpointError, match=rf"{out}/frozen/text_encoder: missing; remove {out}/frozen, and --resume"
    ):
        go(config, first)
    assert not second.exists()
    shutil.rmtree(out / "frozen")
    go(config, first)
    assert frozen_of(out / "frozen") == frozen_of(second / "policy") == written
    assert (out / "frozen" / "checksums.json").read_text() == listed
    assert all((second / "policy" / name).samefile(out / "frozen" / name) for name in FROZEN)
    assert checksums.verify(second / "policy" / "checksums.json") == len(
        json.loads((second / "policy" / "checksums.json").read_text())
    )


def test_a_start_does_not_take_the_frozen_parts_of_an_earlier_one(tmp_path: Path) -> None:
    """One that came to no checkpoint, and had other weights: they are the new start's, as its prompts are."""
    out = tmp_path / "run"
    go(config_of(out, 1, seed=7))
    old = frozen_of(out / "frozen")
    shutil.rmtree(out / "checkpoints")
    (out / ".frozen.abcd" / "vae").mkdir(parents=True)  # of a process that was killed in the middle
    go(config_of(out, 1))
    new = frozen_of(out / "frozen")
    assert new[FROZEN[0]] != old[FROZEN[0]]
    assert frozen_of(checkpoint.folder_of(out, 1) / "policy") == new
    assert not (out / ".frozen.abcd").exists()


def test_a_full_disk_while_the_frozen_parts_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    write = native.write_shards

    def full(folder: Path, *rest) -> None:
        write(folder, *rest)
        if folder.name == "vae":
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = random_model(preset("tiny").model, 0)
    text, model.text = model.text, None
    monkeypatch.setattr(native, "write_shards", full)
    with pytest.raises(CheckpointError, match=r"frozen: not written \(I/O error: No space left .*nothing of it stays"):
        setup.save_frozen(tmp_path / "frozen", model, text)
    assert list(tmp_path.iterdir()) == []
