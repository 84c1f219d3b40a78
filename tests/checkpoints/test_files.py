"""Folders of safetensors files as diffusers, transformers and the hub leave them: which files count, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import CONTENTS, GOLDEN, check_same, libero_state, pt, refusal, write_shards
from safetensors.torch import load_file, save_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import native, tensor_files
from dit4dit.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return libero_state()


@pytest.fixture(autouse=True)
def _say_again() -> None:
    tensor_files.say_once.cache_clear()


@pytest.fixture
def vae(tmp_path: Path, state) -> Path:
    """A vae folder as diffusers writes it, in one file."""
    folder = Path(shutil.copytree(GOLDEN / "libero_tiny" / "cosmos" / "vae", tmp_path / "vae"))
    save_file(vae_state(state), folder / "diffusion_pytorch_model.safetensors")
    return folder


def vae_state(state: dict) -> dict:
    return {n.removeprefix(ck.VAE): t.clone() for n, t in state.items() if n.startswith(ck.VAE)}


def read_vae(folder: Path) -> dict[str, torch.Tensor]:
    found = ck.cosmos_tensors(folder.parent, ("vae",))
    return {name.removeprefix(ck.VAE): found[name] for name in found}


def check_vae(folder: Path, state: dict) -> None:
    found, wanted = read_vae(folder), vae_state(state)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_the_plain_weights_are_used_beside_variants(variant: str, vae: Path, state, caplog) -> None:
    other = {name: value + 1 for name, value in vae_state(state).items()}
    plain = vae / "diffusion_pytorch_model.safetensors"
    save_file(other, vae / f"diffusion_pytorch_model.{variant}.safetensors")
    check_vae(vae, state)
    # shards of a variant, in the spelling of today and of before
    for stem in (
        f"diffusion_pytorch_model.{variant}-0000{{}}-of-00002",
        f"diffusion_pytorch_model-0000{{}}-of-00002.{variant}",
    ):
        for i in (1, 2):
            save_file(dict(list(other.items())[i - 1 :: 2]), vae / f"{stem.format(i)}.safetensors")
    (vae / f"diffusion_pytorch_model.safetensors.index.{variant}.json").write_text("{}")
    check_vae(vae, state)
    assert caplog.text == ""
    for file in vae.glob("*-of-*"):
        file.unlink()
    (vae / f"diffusion_pytorch_model.safetensors.index.{variant}.json").unlink()
    plain.unlink()
    assert torch.equal(read_vae(vae)["quant_conv.weight"], other["quant_conv.weight"])
    assert f"holds the variant {variant} alone, which is used" in caplog.text
    save_file(other, vae / "diffusion_pytorch_model.fp32.safetensors")
    with pytest.raises(CheckpointError, match="and no plain weights; keep one of them"):
        read_vae(vae)


def test_two_files_with_one_tensor_are_refused(vae: Path, state) -> None:
    save_file({"quant_conv.weight": torch.zeros(1)}, vae / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"diffusion_pytorch_model\.safetensors and model\.safetensors both hold the tensor"
    ):
        read_vae(vae)
    (vae / "model.safetensors").unlink()
    # an old single file beside newer shards
    write_shards(vae, vae_state(state), "diffusion_pytorch_model")
    with pytest.raises(CheckpointError, match="both hold the tensor"):
        read_vae(vae)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    check_vae(vae, state)
    shutil.copyfile(vae / "diffusion_pytorch_model.safetensors.index.json", vae / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="both list the weights; remove one"):
        read_vae(vae)


def test_a_file_that_the_index_does_not_name_is_not_read(vae: Path, state, caplog) -> None:
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    write_shards(vae, vae_state(state), "diffusion_pytorch_model")
    save_file({"lora.weight": torch.zeros(1)}, vae / "adapter.safetensors")
    check_vae(vae, state)
    assert "does not name them: adapter.safetensors" in caplog.text


def test_names_that_begin_with_a_dot_are_not_looked_at(vae: Path, state, tmp_path: Path) -> None:
    for name in ("._diffusion_pytorch_model.safetensors", ".diffusion_pytorch_model.safetensors.index.json"):
        (vae / name).write_bytes(b"\0\5\x16\7 Mac OS X")
    check_vae(vae, state)
    # nor copied
    run = Path(shutil.copytree(GOLDEN / "libero_tiny", tmp_path / "run"))
    for folder in ("vae", "tokenizer"):
        (run / "cosmos" / folder / "._config.json").write_bytes(b"\0\5\x16\7")
    native.to_own(run, tmp_path / "own")
    assert [f for f in (tmp_path / "own").rglob("*") if f.name.startswith(".")] == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.safetensors", "a/../../b", "..", "", "C:\\x.safetensors", "\\\\host\\x", "a\0b"]
)
def test_an_index_names_files_inside_its_folder(name: str, vae: Path) -> None:
    (vae.parent / "secret.safetensors").write_bytes((vae / "diffusion_pytorch_model.safetensors").read_bytes())
    index = vae / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"quant_conv.weight": name}}))
    with pytest.raises(CheckpointError, match=r"expected a name inside .*without '\.\.'") as caught:
        read_vae(vae)
    assert str(caught.value).startswith(str(index))


def test_an_index_is_held_against_its_files(vae: Path, state) -> None:
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    write_shards(vae, vae_state(state), "diffusion_pytorch_model")
    index = vae / "diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["gone.weight"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: has no tensor 'gone.weight', which"):
        read_vae(vae)
    name = next(n for n, file in data["weight_map"].items() if "00001-of" in file)
    del data["weight_map"]["gone.weight"]
    data["weight_map"][name] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"00002-of-00002.safetensors: has no tensor '{name}', which"):
        read_vae(vae)
    index.unlink()
    check_vae(vae, state)  # without an index, all files
    (vae / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: missing; copy it again"):
        read_vae(vae)


def test_links_are_followed_as_a_hub_cache_has_them(vae: Path, state, libero_run: Path) -> None:
    blobs = vae.parent / "blobs"
    blobs.mkdir()
    write_shards(vae, vae_state(state), "diffusion_pytorch_model")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    for i, file in enumerate(sorted(f for f in vae.iterdir() if f.is_file())):
        shutil.move(file, blobs / f"{i:064x}")
        file.symlink_to(f"../blobs/{i:064x}")
    check_vae(vae, state)
    first = vae / "diffusion_pytorch_model-00001-of-00002.safetensors"
    first.resolve().unlink()
    with pytest.raises(
        CheckpointError, match=r"00001.*is a link to \.\./blobs/.* which is not there; the download did not end"
    ):
        read_vae(vae)
    target = pt(libero_run).with_name("blob")
    shutil.move(pt(libero_run), target)
    pt(libero_run).symlink_to(target)
    check_same(ck.open_checkpoint(libero_run), state)
    target.unlink()
    assert "is a link to" in refusal(libero_run)


def test_a_folder_without_weights_says_why(vae: Path) -> None:
    file = vae / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    for body, wanted in ((CONTENTS[n][0], CONTENTS[n][1]) for n in ("pointer", "page", "empty")):
        file.write_bytes(body)
        with pytest.raises(CheckpointError) as caught:
            read_vae(vae)
        assert str(caught.value).startswith(f"{file}: {wanted}")
    file.write_bytes(content)
    file.rename(file.with_suffix(".SAFETENSORS"))
    assert len(read_vae(vae)) == 194
    file.with_suffix(".SAFETENSORS").rename(vae / "x.bin")
    with pytest.raises(CheckpointError, match="only weights in another format"):
        read_vae(vae)
    (vae / "x.bin").rename(vae / "x.safetensors.incomplete")
    with pytest.raises(CheckpointError, match=r"x\.safetensors\.incomplete is a download that did not end"):
        read_vae(vae)


def test_real_savers_write_what_is_read(tmp_path: Path, state) -> None:
    """The installed diffusers and transformers themselves, whole and in shards."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    cosmos = GOLDEN / "libero_tiny" / "cosmos"
    model = diffusers.AutoencoderKLWan.from_config(json.loads((cosmos / "vae" / "config.json").read_text()))
    model.load_state_dict(vae_state(state))
    for options in ({}, {"max_shard_size": "300KB"}, {"variant": "fp16"}):
        shutil.rmtree(tmp_path / "vae", ignore_errors=True)
        model.save_pretrained(tmp_path / "vae", **options)
        check_vae(tmp_path / "vae", state)
    dit = diffusers.CosmosTransformer3DModel.from_config(
        json.loads((cosmos / "transformer" / "config.json").read_text())
    )
    own = {n.removeprefix(ck.TRANSFORMER): t for n, t in state.items() if n.startswith(ck.TRANSFORMER)}
    dit.load_state_dict(own)
    dit.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    found = ck.cosmos_tensors(tmp_path, ("transformer",))
    assert len(found) == len(own)
    assert all(torch.equal(found[ck.TRANSFORMER + name], value) for name, value in own.items())
    config = transformers.AutoConfig.from_pretrained(cosmos / "text_encoder")
    text = transformers.Qwen2_5_VLForConditionalGeneration(config)
    own = {n.removeprefix(ck.TEXT): t for n, t in state.items() if n.startswith(ck.TEXT)}
    assert set(text.load_state_dict(own, strict=False).missing_keys) <= {"lm_head.weight"}
    for options in ({}, {"max_shard_size": "60KB"}):
        shutil.rmtree(tmp_path / "text_encoder", ignore_errors=True)
        text.save_pretrained(tmp_path / "text_encoder", **options)
        found = ck.cosmos_tensors(tmp_path, ("text_encoder",))
        assert len(found) >= 44
        assert all(torch.equal(found[name], state[name]) for name in found)


def test_frozen_parts_in_the_main_file_need_no_backbone(golden_dir: Path, tmp_path: Path, state, monkeypatch) -> None:
    own = tmp_path / "own"
    native.to_own(golden_dir / "libero_tiny", own)
    for part in ck.FROZEN:
        shutil.move(own / part / "model.safetensors", own / f"{part}.safetensors")
        (own / part).rmdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    check_same(ck.open_checkpoint(own), state)
    assert load_file(own / "vae.safetensors")
