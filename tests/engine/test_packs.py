"""Prompt packs: what replaces the text encoder, made by one policy and read by another, and what is refused."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit4dit import Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.engine import Engine
from dit4dit.engine.packs import PackFolder, PromptPack, packs_key, text_fingerprint
from dit4dit.errors import CheckpointError, InputError
from dit4dit.presets import preset

CPU = torch.device("cpu")
TINY = preset("tiny").model


@pytest.fixture
def packs(small_libero: Path, tmp_path: Path) -> Path:
    file, out = tmp_path / "words.txt", tmp_path / "packs"
    file.write_text("open the drawer\n\n  close it \nopen the drawer\n")
    words = ["--checkpoint", str(small_libero), "--instructions", str(file), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main(["pack", *words])
    assert end.value.code == 0
    assert len(list(out.iterdir())) == 2
    return out


def test_packs_replace_the_text_encoder(packs: Path, small_libero: Path, libero_policy: Policy, observation) -> None:
    lean = Policy.from_pretrained(small_libero, device="cpu", packs=packs, text_encoder=False)
    assert lean.model.text is None
    want = libero_policy.infer(observation, "open the drawer", seed=3).normalized
    assert np.array_equal(lean.infer(observation, "open the drawer", seed=3).normalized, want)
    with pytest.raises(InputError, match="make it with dit4dit pack"):
        lean.infer(observation, "a third one", seed=3)


def test_packs_of_other_weights_are_not_found(packs: Path, small_libero: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_libero, tmp_path / "other"))
    file = run / "checkpoints" / "steps_10_pytorch_model.pt"
    state = torch.load(file)
    key = "backbone_interface.extractor.transformer.crossattn_proj.0.weight"
    state[key] = state[key] + 1e-3
    torch.save(state, file)
    lean = Policy.from_pretrained(run, device="cpu", packs=packs, text_encoder=False)
    with pytest.raises(InputError, match="no pack of it in"):
        lean.prepare("open the drawer").result()
    same = Policy.from_pretrained(small_libero, device="cpu", dtype=torch.bfloat16, packs=packs, text_encoder=False)
    with pytest.raises(InputError, match="no pack of it in"):
        same.prepare("open the drawer").result()


def test_a_broken_pack_says_so(packs: Path, small_libero: Path, observation) -> None:
    for file in packs.iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    lean = Policy.from_pretrained(small_libero, device="cpu", packs=packs, text_encoder=False)
    with pytest.raises(CheckpointError, match="not a readable prompt pack"):
        lean.infer(observation, "open the drawer", seed=0)


def folder_of(path: Path, model, **changes) -> PackFolder:
    """As a policy makes it, for packs of 9 text tokens."""
    shape = (TINY.extract_layer + 1, TINY.dit.num_heads, 9, TINY.dit.head_dim)
    facts = dict(shape=shape, dtype=torch.float32, device=CPU, text=text_fingerprint(model.text))
    return PackFolder(path, packs_key(model), **{**facts, **changes})


def test_a_pack_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    model = random_model(TINY, 0, with_text=False)
    folder = folder_of(tmp_path, model)
    folder.store("go", Engine(model).pack(torch.randn(1, 9, TINY.dit.text_in)))
    path = folder.path("go")
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its content is not what was written; delete it"):
        folder.load("go")
    with pytest.raises(
        CheckpointError, match=r"expected keys and values torch.float32 \[4, 2, 5, 32\], got .* \[4, 2, 9, 32\]"
    ):
        folder_of(tmp_path, model, shape=(4, 2, 5, 32)).load("go")
    keys = torch.zeros(4, 2, 9, 32)
    for tensors in ((keys.half(), keys), (keys, keys.half())):
        folder.store("go", PromptPack(*tensors))
        with pytest.raises(CheckpointError, match=r"expected keys and values torch.float32 .*, got torch.float16"):
            folder.load("go")


def test_a_folder_that_cannot_be_written_stops_no_robot(
    small_libero: Path, tmp_path: Path, observation, caplog
) -> None:
    file = tmp_path / "file"
    policy = Policy.from_pretrained(small_libero, device="cpu", packs=file / "packs")
    file.write_text("")  # since then
    assert np.isfinite(policy.infer(observation, "go", seed=0).actions).all()
    assert "not written" in caplog.text
    words = tmp_path / "words.txt"
    words.write_text("go\n")
    with pytest.raises(SystemExit) as end:
        main(
            [
                "pack",
                "--checkpoint",
                str(small_libero),
                "--instructions",
                str(words),
                "--out",
                str(file),
                "--device",
                "cpu",
            ]
        )
    assert end.value.code == 2


def test_policies_that_store_the_same_packs_at_once(tmp_path: Path) -> None:
    model = random_model(TINY, 0, with_text=False)
    pack = Engine(model).pack(torch.randn(1, 9, TINY.dit.text_in))
    folders = [folder_of(tmp_path, model) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda folder: [folder.store(f"go {i}", pack) for i in range(30)], folders))
    assert len(list(tmp_path.iterdir())) == 30


def test_pack_files(tmp_path: Path) -> None:
    model = random_model(TINY, 0, with_text=False)
    engine, folder = Engine(model), folder_of(tmp_path, model)
    pack = engine.pack(torch.randn(1, 9, TINY.dit.text_in))
    assert folder.load("go") is None
    folder.store("go", pack)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    kept = folder.load("go")
    assert torch.equal(kept.keys, pack.keys)
    assert torch.equal(kept.values, pack.values)
    assert pack.bytes == 2 * 4 * (TINY.extract_layer + 1) * 9 * TINY.dit.width
    assert load_file(folder.path("go"))["keys"].shape == (4, 2, 9, 32)


def test_a_pack_of_another_text_encoder_is_made_again(tmp_path: Path) -> None:
    model = random_model(TINY, 0)
    pack = Engine(model).pack(torch.randn(1, 9, TINY.dit.text_in))
    before = text_fingerprint(model.text)
    folder_of(tmp_path, model).store("go", pack)
    assert folder_of(tmp_path, model).load("go") is not None
    assert folder_of(tmp_path, model, text=None).load("go") is not None, (
        "a robot without a text encoder trusts the folder"
    )
    with torch.no_grad():
        next(model.text.parameters()).mul_(1.001)
    after = text_fingerprint(model.text)
    assert after != before
    assert folder_of(tmp_path, model).load("go") is None
    assert text_fingerprint(None) is None


def test_pack_command_errors(small_libero: Path, tmp_path: Path, capsys) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for file, message in ((empty, "empty; expected one instruction a line"), (tmp_path / "gone", "no such file")):
        with pytest.raises(SystemExit) as end:
            main(["pack", "--checkpoint", str(small_libero), "--instructions", str(file), "--out", str(tmp_path / "o")])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
