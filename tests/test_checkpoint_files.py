"""Checkpoints as other tools leave them: what is loaded, and said; what is refused, and what to do then."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.model import checkpoint as ck
from dit4dit.model import own_format, tensor_files, weights

GOLDEN = Path(__file__).parent / "golden"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4501563\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


def pt(run: Path) -> Path:
    return run / "checkpoints" / "steps_10_pytorch_model.pt"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return torch.load(pt(GOLDEN / "libero_tiny"), weights_only=True)


@pytest.fixture(autouse=True)
def _say_again() -> None:
    tensor_files.say_once.cache_clear()


def check_same(opened: ck.Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert set(opened.tensors) == set(state)
    assert all(torch.equal(opened.tensors[name], value) for name, value in state.items())


def refusal(run: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        ck.open_checkpoint(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- .pt files -------------------------------------------------------------------------------------------------------


def prefixed(state: dict, *prefixes: str) -> dict:
    return {"".join(prefixes) + name: value for name, value in state.items()}


READABLE = {
    "DataParallel": (lambda s: prefixed(s, "module."), "without a prefix: 'module."),
    "torch.compile": (lambda s: prefixed(s, "_orig_mod."), "without a prefix: '_orig_mod."),
    "both": (lambda s: prefixed(s, "module.", "_orig_mod."), "without a prefix: 'module._orig_mod."),
    "both, the other way": (lambda s: prefixed(s, "_orig_mod.", "module."), "'_orig_mod.module."),
    "a compiled part": (
        lambda s: {n.replace("action_model.", "action_model._orig_mod."): t for n, t in s.items()},
        "'action_model._orig_mod.",
    ),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, "below 'state_dict' are used; left out: epoch"),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "left out: optimizer"),
    "module": (lambda s: {"module": prefixed(s, "module.")}, "below 'module' are used"),
    "a counter beside": (lambda s: {**s, "step": 10}, "at the top level are used; left out: step"),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_trainers_put_around_a_state_dict(name: str, libero_run: Path, state, caplog) -> None:
    wrap, said = READABLE[name]
    torch.save(wrap(state), pt(libero_run))
    check_same(ck.open_checkpoint(libero_run), state)
    assert said in caplog.text
    before = len(caplog.records)
    ck.open_checkpoint(libero_run)
    assert len(caplog.records) == before, "it is said once"


def test_a_plain_file_says_nothing(libero_run: Path, state, caplog) -> None:
    check_same(ck.open_checkpoint(libero_run), state)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_the_old_format_of_torch(libero_run: Path, state, caplog) -> None:
    torch.save(state, pt(libero_run), _use_new_zipfile_serialization=False)
    check_same(ck.open_checkpoint(libero_run), state)
    assert "PyTorch's old format" in caplog.text
    whole = pt(libero_run).read_bytes()
    pt(libero_run).write_bytes(whole[: len(whole) // 2])
    assert "truncated, or not written by torch.save? copy it again" in refusal(libero_run)


class Trap:
    def __reduce__(self):
        return os.system, ("touch /tmp/dit4dit-trap",)


def ambiguous(state: dict) -> dict:
    return {"model": state, "ema": {name: value + 1 for name, value in state.items()}, "optimizer": {}}


REFUSED = {
    "moving average beside": (ambiguous, "holds 2 sets of weights, under 'model' and 'ema'"),
    "moments alone": (
        lambda s: {"exp_avg": s},
        "tensors under our names only below 'exp_avg', expected at the top level",
    ),
    "flat and below": (lambda s: {**s, "state_dict": s}, "2 sets of weights, under the top level and 'state_dict'"),
    "two levels": (lambda s: {"state_dict": {"model": s}}, "expected a flat state dict of tensors"),
    "half of the names": (
        lambda s: {("" if i % 2 else "module.") + n: t for i, (n, t) in enumerate(s.items())},
        None,  # opens; `build` misses the other half
    ),
    "twice under two names": (
        lambda s: (
            {"module." + n: t for n, t in s.items()}
            | {"module._orig_mod." + n: t for n, t in s.items()}
            | {"module.action_model._orig_mod.position_embedding.weight": s["action_model.position_embedding.weight"]}
        ),
        "are the same tensor; keep one of them",
    ),
    "nothing of ours": (lambda s: {"conv.weight": torch.zeros(1)}, "this is not a DiT4DiT checkpoint"),
    "a list": (lambda s: list(s.values()), "expected a flat state dict of tensors, got list"),
    "code": (lambda s: {**s, "x": Trap()}, "could run code); save the state dict alone where it came from"),
    "settings of a trainer": (lambda s: {"model": s, "args": Path("x")}, "it holds objects of pathlib.PosixPath"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_a_pt_file(name: str, libero_run: Path, state) -> None:
    make, wanted = REFUSED[name]
    torch.save(make(state), pt(libero_run))
    if wanted is None:
        opened = ck.open_checkpoint(libero_run)
        assert set(opened.tensors) == set(make(state)), "a prefix of some names is no prefix"
        problems = weights.check(opened.model, opened.tensors, "here")
        assert len(problems) == 5
        assert all("tensors missing" in problem for problem in problems)
        return
    assert wanted in refusal(libero_run)
    assert not Path("/tmp/dit4dit-trap").exists()


CONTENTS = {
    "pointer": (POINTER.encode(), "is a git-lfs pointer, not the file itself; run `git lfs pull` in "),
    "page": (PAGE.encode(), "is an HTML page saved under this name"),
    "empty": (b"", "is empty (0 bytes)"),
    "pickle": (pickle.dumps({"a": 1}), "truncated, or not written by torch.save?"),
    "cut zip": (b"PK\x03\x04" + bytes(100), "truncated, or not written by torch.save?"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_not_weights_at_all(name: str, libero_run: Path) -> None:
    content, wanted = CONTENTS[name]
    pt(libero_run).write_bytes(content)
    said = refusal(libero_run)
    assert wanted in said
    assert str(pt(libero_run)) in said


@pytest.mark.parametrize(
    "file", ["config.yaml", "dataset_statistics.json", "cosmos/vae/config.json", "cosmos/tokenizer/tokenizer.json"]
)
def test_small_files_that_are_not_what_they_are_called(file: str, libero_run: Path) -> None:
    from dit4dit.instructions import load_tokenizer

    for name in ("pointer", "page", "empty"):
        (libero_run / file).write_bytes(CONTENTS[name][0])
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            load_tokenizer(ck.open_checkpoint(libero_run).tokenizer)
        assert str(libero_run / file) in str(caught.value)
        assert CONTENTS[name][1] in str(caught.value)


def test_a_safetensors_file_under_the_wrong_name(libero_run: Path, state) -> None:
    save_file({n: t.clone() for n, t in state.items()}, pt(libero_run))
    assert "it is a safetensors file); rename it to steps_10_pytorch_model.safetensors" in refusal(libero_run)


# -- safetensors in the published layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoints/steps_10_pytorch_model", "final_model/model", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_instead_of_the_pt_file(name: str, prefix: str, libero_run: Path, state, caplog) -> None:
    pt(libero_run).unlink()
    file = libero_run / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file({prefix + n: t.clone() for n, t in state.items()}, file)
    opened = ck.open_checkpoint(libero_run)
    check_same(opened, state)
    assert opened.path == file
    assert ("names are read without what was put in front" in caplog.text) == bool(prefix)
    check_same(ck.open_checkpoint(file), state)
    if not prefix:
        return
    own_format.to_own(libero_run, libero_run.parent / "own")
    check_same(ck.open_checkpoint(libero_run.parent / "own"), state)
    own_format.to_published(libero_run.parent / "own", libero_run.parent / "back")
    check_same(ck.open_checkpoint(libero_run.parent / "back"), state)


def test_safetensors_beside_the_pt_file(libero_run: Path, state, caplog) -> None:
    """The .pt is what the published code reads; the other can be named."""
    other = {name: value + 1 for name, value in state.items()}
    file = pt(libero_run).with_suffix(".safetensors")
    save_file(other, file)
    check_same(ck.open_checkpoint(libero_run), state)
    assert f"is read, not what lies beside it: {file.name}; name one in full" in caplog.text
    check_same(ck.open_checkpoint(file), other)
    # a higher step wins, whatever its kind; a file of macOS is none
    shutil.move(file, file.with_name("steps_11_pytorch_model.safetensors"))
    file.with_name("._steps_12_pytorch_model.pt").write_bytes(b"\0")
    file.with_name("steps_9_pytorch_model.PT").write_bytes(b"\0")
    check_same(ck.open_checkpoint(libero_run), other)


def test_shards_in_final_model(libero_run: Path, state) -> None:
    """What zero_to_fp32.py --safe_serialization writes."""
    pt(libero_run).unlink()
    folder = libero_run / "final_model"
    write_shards(folder, state)
    check_same(ck.open_checkpoint(libero_run), state)
    check_same(ck.open_checkpoint(folder), state)
    with pytest.raises(CheckpointError, match=f"one of several files of weights; give the folder {folder}"):
        ck.open_checkpoint(folder / "model-00001-of-00002.safetensors")


def test_final_model_by_name_is_final_model(libero_run: Path, state) -> None:
    other = {name: value + 1 for name, value in state.items()}
    (libero_run / "final_model").mkdir()
    torch.save(other, libero_run / "final_model" / "pytorch_model.pt")
    check_same(ck.open_checkpoint(libero_run / "final_model"), other)
    check_same(ck.open_checkpoint(libero_run), state)


def write_shards(folder: Path, state: dict, stem: str = "model", count: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    names, listed = sorted(state), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name].clone() for name in names[i::count]}
        save_file(part, folder / file)
        listed |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize("where", ["checkpoints/steps_10/pytorch_model", "checkpoints/global_step10"])
def test_deepspeed_shards_name_their_script(where: str, libero_run: Path) -> None:
    pt(libero_run).unlink()
    folder = libero_run / where
    folder.mkdir(parents=True)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": {}}, folder / name)
    top = folder.parent
    (top / "latest").write_text(folder.name)
    (top / "zero_to_fp32.py").touch()
    command = f"python {top}/zero_to_fp32.py {top} {libero_run}/final_model --safe_serialization"
    for path in (libero_run, folder, top, next(folder.glob("*model_states.pt"))):
        said = refusal(path)
        assert command in said
        assert "truncated" not in said
        assert "not a DiT4DiT" not in said
    (top / "latest").unlink()
    assert f"{command} --tag {folder.name}" in refusal(folder)


def test_what_zero_3_leaves_without_gathering(libero_run: Path, state) -> None:
    from dit4dit import Policy

    name = "action_model.action_decoder.layer2.weight"
    torch.save(state | {name: torch.empty(0)}, pt(libero_run))
    with pytest.raises(CheckpointError, match=r"got \[0\]; an empty tensor .* zero_to_fp32\.py"):
        Policy.from_pretrained(libero_run, device="cpu")


def test_folders_that_are_one_too_high(golden_dir: Path, tmp_path: Path) -> None:
    policy = tmp_path / "run" / "checkpoints" / "step_00000010" / "policy"
    policy.parent.mkdir(parents=True)
    own_format.to_own(golden_dir / "libero_tiny", policy)
    assert f"give {policy}" in refusal(policy.parent)
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    assert f"it is a run of dit4dit train, give {policy}" in refusal(tmp_path / "run")
    assert f"give the folder {policy}" in refusal(policy / "model.safetensors")


# -- safetensors folders ---------------------------------------------------------------------------------------------


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
    own_format.to_own(run, tmp_path / "own")
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
    own_format.to_own(golden_dir / "libero_tiny", own)
    for part in ck.FROZEN:
        shutil.move(own / part / "model.safetensors", own / f"{part}.safetensors")
        (own / part).rmdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    check_same(ck.open_checkpoint(own), state)
    assert load_file(own / "vae.safetensors")
