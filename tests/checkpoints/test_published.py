"""Published run folders with other files of weights than one .pt file: safetensors, shards, DeepSpeed's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import check_same, libero_state, pt, refusal, write_shards
from safetensors.torch import save_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import native, tensor_files
from dit4dit.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return libero_state()


@pytest.fixture(autouse=True)
def _say_again() -> None:
    tensor_files.say_once.cache_clear()


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
    if not prefix or name != "final_model/model":
        return
    native.to_own(libero_run, libero_run.parent / "own")
    check_same(ck.open_checkpoint(libero_run.parent / "own"), state)
    native.to_published(libero_run.parent / "own", libero_run.parent / "back")
    check_same(ck.open_checkpoint(libero_run.parent / "back"), state)


def test_safetensors_beside_the_pt_file(libero_run: Path, state, caplog) -> None:
    """The .pt is what the published code reads; the other can be named."""
    other = {name: value + 1 for name, value in state.items()}
    file = pt(libero_run).with_name("steps_10_model.safetensors")  # sorted by name it would be first
    save_file(other, file)
    check_same(ck.open_checkpoint(libero_run), state)
    assert f"is read, not what lies beside it: {file.name}; name one in full" in caplog.text
    check_same(ck.open_checkpoint(file), other)
    final = libero_run / "final_model"
    final.mkdir()
    (final / "pytorch_model.pt").hardlink_to(pt(libero_run))
    (final / "model.safetensors").hardlink_to(file)
    check_same(ck.open_checkpoint(final), state)
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


ZERO_2 = ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
ZERO_3 = ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize(
    "where, files", [("checkpoints/steps_10/pytorch_model", ZERO_3), ("checkpoints/global_step10", ZERO_2)]
)
def test_deepspeed_shards_name_their_script(where: str, files: tuple[str, ...], libero_run: Path) -> None:
    pt(libero_run).unlink()
    folder = libero_run / where
    folder.mkdir(parents=True)
    for name in files:
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
    native.to_own(golden_dir / "libero_tiny", policy)
    assert f"give {policy}" in refusal(policy.parent)
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    assert f"it is a run of dit4dit train, give {policy}" in refusal(tmp_path / "run")
    assert f"give the folder {policy}" in refusal(policy / "model.safetensors")


@pytest.mark.parametrize("name", ["final_model/pytorch_model.bin", "checkpoints/steps_7_model.pth", "mine.pt"])
def test_other_names_of_a_pt_file(name: str, libero_run: Path, state, tmp_path: Path) -> None:
    """What `zero_to_fp32.py` and accelerate leave, and what users call theirs; converted, and back."""
    file = libero_run / name
    file.parent.mkdir(exist_ok=True)
    shutil.move(pt(libero_run), file)
    source = file if name == "mine.pt" else libero_run
    opened = ck.open_checkpoint(source)
    assert opened.path == file
    check_same(opened, state)
    native.to_own(source, tmp_path / "own")
    native.to_published(tmp_path / "own", tmp_path / "back")
    back = ck.open_checkpoint(tmp_path / "back" / "mine.pt" if name == "mine.pt" else tmp_path / "back")
    check_same(back, state)
    assert back.path.name == {"mine.pt": "mine.pt", "pytorch_model.bin": "pytorch_model.pt"}.get(
        file.name, "steps_7_pytorch_model.pt"
    )


def test_shards_of_pt_files_are_named(libero_run: Path, state) -> None:
    """As transformers and accelerate save them without safetensors; half of the weights must not be taken for all."""
    pt(libero_run).unlink()
    folder = libero_run / "final_model"
    folder.mkdir()
    for i in (1, 2):
        torch.save(dict(list(state.items())[i - 1 :: 2]), folder / f"pytorch_model-{i:05d}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    first = folder / "pytorch_model-00001-of-00002.bin"
    for path in (libero_run, folder, first):
        assert refusal(path).startswith(f"{first}: one of several files of weights; save them again as safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        ck.open_checkpoint(f"nowhere/model.{ending}")
