"""checksums.json of the native format, what `inspect` says of a damaged checkpoint, and frozen parts that checkpoints share."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import GOLDEN, flip, pt
from safetensors.torch import load_file, save_file

import dit4dit
from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import checksums
from dit4dit.checkpoints import native as native_format
from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.errors import CheckpointError
from dit4dit.model.text import byte_tokenizer
from dit4dit.presets import preset


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "libero"
    native_format.to_own(GOLDEN / "libero_tiny", folder)
    return folder


@pytest.fixture
def own(native: Path, tmp_path: Path) -> Path:
    """A folder in the native format that a test may spoil."""
    return Path(shutil.copytree(native, tmp_path / "own"))


def test_every_file_is_listed_with_its_hash(native: Path) -> None:
    entries = json.loads((native / "checksums.json").read_text())
    files = {f.relative_to(native).as_posix(): f.read_bytes() for f in native.rglob("*") if f.is_file()}
    del files["checksums.json"]
    assert {"config.json", "statistics.json", "model.safetensors", "text_encoder/model.safetensors"} <= set(files)
    assert entries == {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in files.items()}


def test_the_shipped_policy_is_what_its_list_says() -> None:
    shipped = Path(dit4dit.__file__).parent / "envs" / "tabletop_policy"
    assert checksums.verify(shipped / "checksums.json") == 10
    assert {*checksums.entries(shipped)} - {*checksums.read(shipped / "checksums.json")} == {"checksums.json"}


def test_names_that_begin_with_a_dot_are_not_listed(own: Path) -> None:
    """What a file browser or the hub's client leaves there, and may change."""
    listed = checksums.entries(own)
    (own / "vae" / ".DS_Store").touch()
    (own / ".cache" / "huggingface").mkdir(parents=True)
    (own / ".cache" / "huggingface" / "model.safetensors.metadata").touch()
    assert checksums.entries(own) == listed


def test_verify_by_the_command(own: Path, capsys) -> None:
    count = len(json.loads((own / "checksums.json").read_text()))
    assert run("inspect", own, "--verify") == 0
    assert f"{count} files are what checksums.json says" in capsys.readouterr().out
    for name in ("model.safetensors", "statistics.json", "tokenizer/tokenizer.json", "vae/model.safetensors"):
        flip(own / name)
        assert run("inspect", own, "--verify") == 2
        said = capsys.readouterr().err
        assert f"{own / name}: damaged: expected " in said
        assert "with SHA-256 " in said
        assert "; copy it again" in said
        flip(own / name)
    (own / "tokenizer").rename(own / "aside")  # it is no frozen part, which may be left out
    assert run("inspect", own, "--verify") == 2
    assert "missing, though checksums.json lists it" in capsys.readouterr().err
    (own / "aside").rename(own / "tokenizer")
    (own / "tokenizer" / "tokenizer.json").unlink()
    assert run("inspect", own, "--verify") == 2
    assert f"{own}/tokenizer/tokenizer.json: missing, though checksums.json lists it" in capsys.readouterr().err
    (own / "checksums.json").unlink()
    assert run("inspect", own, "--verify") == 1
    said = capsys.readouterr().out
    assert "there is no checksums.json, so no file was checked" in said
    assert "cannot be loaded: " in said
    assert run("inspect", GOLDEN / "libero_tiny", "--verify") == 0
    assert "there is no checksums.json, so no file was checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"../x": {"size": 1, "sha256": "0"}}, "names the file '../x'; expected a name inside"),
        ({"/etc/passwd": {"size": 1, "sha256": "0"}}, "names the file '/etc/passwd'"),
        ({"config.json": 3}, "'config.json': expected size and sha256, got 3"),
    ],
)
def test_a_damaged_list(own: Path, change: dict, wanted: str) -> None:
    file = own / "checksums.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        checksums.verify(file)
    assert wanted in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_upload_and_download_keep_them_valid(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The hub's cache is made of links, and the hub adds files of its own."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "main", tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)

    class Api:
        def create_repo(self, name, private, exist_ok):
            pass

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            for file in (f for f in Path(folder_path).rglob("*") if f.is_file()):
                link = snapshot / file.relative_to(folder_path)
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, blobs / checksums.sha256(file))
                link.symlink_to(blobs / checksums.sha256(file))
            (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            (snapshot / "README.md").write_text("mine\n")
            return "there"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision, allow_patterns: str(snapshot))
    assert run("push", own, "me/policy") == 0
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "me/policy", "--verify") == 0
    assert "files are what checksums.json says" in capsys.readouterr().out
    flip(own / "model.safetensors")
    assert run("push", own, "me/policy") == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err


# -- inspect approves only what build takes --------------------------------------------------------------------------


def without(part: str):
    def spoil(state: dict) -> dict:
        return {name: t for name, t in state.items() if not name.startswith(part)}

    return spoil


SPOILED = {
    "text encoder": (without(ck.TEXT + "model.language_model.layers.1."), "text encoder: 12 of 26 tensors missing"),
    "head": (without("action_model.action_decoder.layer2.bias"), "action head: 1 of "),
    "decoder": (without(ck.VAE + "decoder.conv_out."), "a policy does without this part, training does not"),
    "shape": (lambda s: s | {"action_model.position_embedding.weight": torch.zeros(3)}, "got [3]"),
    "kind": (
        lambda s: {n: t.long() if n.endswith("patch_embed.proj.weight") else t for n, t in s.items()},
        "expected floats",
    ),
    "sparse": (
        lambda s: {n: t.to_sparse() if n.endswith("proj_out_2.weight") else t for n, t in s.items()},
        "expected a dense tensor, got torch.sparse_coo; save its .to_dense()",
    ),
    "extra": (
        lambda s: s | {"action_model.more": torch.zeros(1)},
        "action head: 1 tensors that this model does not have",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_inspect_says_what_cannot_be_loaded(name: str, libero_run: Path, capsys) -> None:
    change, wanted = SPOILED[name]
    torch.save(change(torch.load(pt(libero_run), weights_only=True)), pt(libero_run))
    assert run("inspect", libero_run) == 1
    assert f"cannot be loaded: {pt(libero_run)}: " in (said := capsys.readouterr().out)
    assert wanted in said


def test_inspect_of_a_text_encoder_that_the_base_lacks(cosmos_folder: Path, tmp_path: Path, capsys) -> None:
    """The issue's own case: with the base's text encoder it is whole, without one layer it is not."""
    model = random_model(preset("tiny").model, 0)
    statistics = json.loads((GOLDEN / "libero_tiny" / "dataset_statistics.json").read_text())
    lean = tmp_path / "lean"
    arguments = {"embodiment": "libero", "statistics": statistics, "tokenizer": byte_tokenizer()}
    native_format.save_model(lean, model, **arguments, with_frozen=False)
    assert run("inspect", lean, "--backbone", cosmos_folder, "--verify") == 0
    assert "files are what checksums.json says" in capsys.readouterr().out
    broken = Path(shutil.copytree(cosmos_folder, tmp_path / "cosmos"))
    file = broken / "text_encoder" / "model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if "layers.1." not in n}, file)
    assert run("inspect", lean, "--backbone", broken) == 1
    assert "text encoder: 12 of 26 tensors missing" in capsys.readouterr().out


def test_inspect_of_statistics_that_do_not_fit(libero_run: Path, capsys) -> None:
    file = libero_run / "dataset_statistics.json"
    data = json.loads(file.read_text())
    data["franka"]["action"] = {name: values[:3] for name, values in data["franka"]["action"].items()}
    file.write_text(json.dumps(data))
    assert run("inspect", libero_run) == 1
    assert "cannot be loaded: " in capsys.readouterr().out
