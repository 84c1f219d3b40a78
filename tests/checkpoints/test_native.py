"""Conversion to the native format and back, and the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import pt, same_tensors
from safetensors.torch import load_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import native
from dit4dit.checkpoints.weights import build, from_cosmos, random_model
from dit4dit.cli import main
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.model.text import byte_tokenizer
from dit4dit.presets import preset

CPU = torch.device("cpu")
F32 = {"device": CPU, "dtype": torch.float32, "head_dtype": torch.float32}


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_conversion_both_ways_is_bit_exact(golden_dir: Path, tmp_path: Path, name: str) -> None:
    source = golden_dir / name
    own, back = tmp_path / "own", tmp_path / "back"
    native.to_own(source, own)
    native.to_published(own, back)
    original = torch.load(pt(source), weights_only=True)
    assert same_tensors(original, torch.load(pt(back), weights_only=True))
    assert (back / "config.yaml").read_bytes() == (source / "config.yaml").read_bytes()
    assert (back / "dataset_statistics.json").read_bytes() == (source / "dataset_statistics.json").read_bytes()
    for file in (source / "cosmos").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert (back / "cosmos" / file.relative_to(source / "cosmos")).read_bytes() == file.read_bytes()
    assert ck.open_checkpoint(own).model == ck.open_checkpoint(source).model
    plain = tmp_path / "plain"
    plain.touch()
    assert {f.stat().st_mode for f in own.rglob("*") if f.is_file()} == {plain.stat().st_mode}
    trained = load_file(own / "model.safetensors")
    assert all(n.startswith((ck.TRANSFORMER, ck.HEAD)) for n in trained)
    assert (own / "text_encoder" / "model.safetensors").is_file()


def test_shards(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SHARD_SIZE", "300KB")
    own, back = tmp_path / "own", tmp_path / "back"
    native.to_own(golden_dir / "libero_tiny", own)
    assert len(list(own.glob("*.safetensors"))) > 3
    native.to_published(own, back)
    original = torch.load(pt(golden_dir / "libero_tiny"), weights_only=True)
    assert same_tensors(original, torch.load(pt(back), weights_only=True))
    next(iter(own.glob("model-00002*"))).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*missing or not readable"):
        ck.open_checkpoint(own)


def test_dtypes_survive_conversion(libero_run: Path, tmp_path: Path) -> None:
    state = torch.load(pt(libero_run), weights_only=True)
    state = {n: t.bfloat16() if n.startswith(ck.TEXT) else t for n, t in state.items()}
    torch.save(state, pt(libero_run))
    native.to_own(libero_run, tmp_path / "own")
    native.to_published(tmp_path / "own", tmp_path / "back")
    assert same_tensors(state, torch.load(pt(tmp_path / "back"), weights_only=True))


def test_an_existing_folder_is_never_overwritten(golden_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "own"
    target.mkdir()
    (target / "precious").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already"):
        native.to_own(golden_dir / "libero_tiny", target)
    assert [p.name for p in tmp_path.iterdir()] == ["own"]
    assert (target / "precious").read_text() == "kept"


def test_an_interrupted_conversion_leaves_nothing(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CheckpointError, match=r"own: not written \(disk full\); nothing of it stays; free space"):
        native.to_own(golden_dir / "libero_tiny", tmp_path / "own")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    native.to_own(golden_dir / "libero_tiny", tmp_path / "own")

    def full(_state, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 64")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(
        CheckpointError, match=r"back: not written \(checkpoints/steps_10_pytorch_model.pt: \[enforce fail"
    ):
        native.to_published(tmp_path / "own", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_conversion_names_what_it_could_not_copy(libero_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(libero_run / "cosmos" / "tokenizer")
    with pytest.raises(CheckpointError, match=r"own: not written \(.*cosmos/tokenizer: No such file or directory\)"):
        native.to_own(libero_run, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_conversion_from_a_place_that_cannot_be_written(libero_run: Path, tmp_path: Path) -> None:
    """What is made from it can be: a folder whose rights went along could not even be removed."""
    (libero_run / "cosmos" / "tokenizer").chmod(0o555)
    native.to_own(libero_run, tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer").stat().st_mode == (tmp_path / "own").stat().st_mode


def test_own_format_without_frozen_parts_takes_them_from_the_backbone(
    cosmos_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    model = from_cosmos(cosmos_folder, preset("tiny").model, seed=5)
    statistics = json.loads((Path(__file__).parents[1] / "golden/libero_tiny/dataset_statistics.json").read_text())
    lean, whole = tmp_path / "lean", tmp_path / "whole"
    arguments = {"embodiment": "libero", "statistics": statistics, "tokenizer": byte_tokenizer()}
    native.save_model(lean, model, **arguments, with_frozen=False)
    native.save_model(whole, model, **arguments)
    assert not (lean / "text_encoder").exists()
    a = ck.open_checkpoint(lean, backbone=cosmos_folder)
    b = ck.open_checkpoint(whole)
    for name in b.tensors:
        assert torch.equal(a.tensors[name], b.tensors[name]), name
    shutil.rmtree(whole / "vae")
    with pytest.raises(CheckpointError, match="has no weights"):
        ck.open_checkpoint(whole, backbone=Path(__file__).parents[1] / "golden/libero_tiny/cosmos")


def test_a_model_of_ours_goes_to_the_published_layout_and_back(tmp_path: Path) -> None:
    base = preset("tiny").model
    model = random_model(base, 3)
    statistics = json.loads((Path(__file__).parents[1] / "golden/libero_tiny/dataset_statistics.json").read_text())
    native.save_model(tmp_path / "own", model, embodiment="libero", statistics=statistics, tokenizer=byte_tokenizer())
    native.to_published(tmp_path / "own", tmp_path / "run")
    opened = ck.open_checkpoint(tmp_path / "run")
    assert opened.model == base
    assert opened.embodiment == "libero"
    # what the published code wants in its file and this package does not read
    assert set(opened.ignored) == {
        "framework.name",
        "framework.cosmos25.base_model",
        "framework.cosmos25.vl_hidden_dim",
        "framework.action_model.past_action_window_size",
        "datasets.vla_data.max_state_dim",
        "datasets.vla_data.max_action_dim",
    }
    built = build(opened.model, opened.tensors, "x", **F32, with_video_vae=True)
    assert same_tensors(built.state_dict(), model.state_dict())


def test_own_configuration_refuses_unknown_keys_and_versions(golden_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    native.to_own(golden_dir / "libero_tiny", own)
    config = json.loads((own / "config.json").read_text())
    config["model"]["head"]["num_layer"] = 3
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unknown key 'num_layer'; did you mean 'num_layers'"):
        ck.open_checkpoint(own)
    config["format_version"] = 99
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected format_version 1, got 99"):
        ck.open_checkpoint(own)


def test_hub_push_and_pull(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, hub = tmp_path / "own", tmp_path / "hub"
    native.to_own(golden_dir / "libero_tiny", own)

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert (name, private, exist_ok) == ("me/policy", True, True)

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            assert delete_patterns == ["*.safetensors", "*.safetensors.index.json"]
            shutil.copytree(folder_path, hub / repo_id)
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision, allow_patterns: str(hub / name))
    with pytest.raises(SystemExit) as end:
        main(["push", str(own), "me/policy"])
    assert end.value.code == 0
    monkeypatch.chdir(tmp_path)
    assert ck.open_checkpoint("me/policy").model == ck.open_checkpoint(own).model
    with pytest.raises(CheckpointError, match="convert it first"):
        native.push_to_hub(golden_dir / "libero_tiny", "me/policy")
    monkeypatch.setattr(Api, "create_repo", lambda *_a, **_k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(CheckpointError, match="not uploaded \\(no network\\)"):
        native.push_to_hub(own, "me/policy")


def test_a_failed_download_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_kwargs):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        ck.open_checkpoint("me/policy")
    assert str(caught.value).startswith("hub me/policy: could not be downloaded (no network); give a run folder")
    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    with pytest.raises(CheckpointError, match=r"--backbone or DIT4DIT_BACKBONE"):
        ck.find_backbone(None, None, weights=False)
