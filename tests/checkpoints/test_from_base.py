"""A published training file from a Cosmos folder, as transformers and diffusers save it, to a policy that is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4dit import Policy
from dit4dit.checkpoints import checkpoint as ck
from dit4dit.cli import main
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.model.text import tokenize
from dit4dit.training import checkpoint, published, setup

pytest.importorskip("pyarrow")
GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def words_of(out: Path, data: Path) -> list[object]:
    """A run of two steps on small images, in the words of the published file where it has them."""
    words = ["--run_root_dir", out.parent, "--run_id", out.name, "--trainer.max_train_steps", 2]
    words += ["--datasets.vla_data.data_root_dir", data, "--datasets.vla_data.image_size", "[32,32]"]
    words += [
        "--datasets.vla_data.per_device_batch_size",
        1,
        "--trainer.enable_mixed_precision_training",
        "false",
        "--trackers",
        "[]",
    ]
    return [*words, "--data.workers", 0, "--data.holdout", 0, "--run.device", "cpu", "--run.eval_every", 0]


@pytest.mark.slow
def test_train_from_the_base_and_use_the_policy(
    cosmos_folder: Path, write_libero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    first = write_libero(tmp_path / "data" / "first", lengths=(12, 9))
    for name in published_sets():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(first, tmp_path / "data" / name)
    file = shutil.copyfile(GOLDEN / "libero_tiny" / "config.yaml", tmp_path / "published.yaml")
    words = [*words_of(tmp_path / "run", tmp_path / "data"), "--framework.cosmos25.base_model", cosmos_folder]
    assert run("train", "--config", file, *words) == 0, capsys.readouterr().err
    folder = checkpoint.folder_of(tmp_path / "run", 2) / "policy"
    assert not (folder / "text_encoder").exists(), "16 GB that the base has"
    policy = Policy.from_pretrained(folder, backbone=cosmos_folder, device="cpu")
    assert policy.embodiment.name == "libero"
    # the text encoder is the base's, to the bit, and so are its embeddings
    base = load_file(GOLDEN / "libero_tiny" / "cosmos" / "text_encoder" / "model.safetensors")
    assert policy.model.text is not None
    for name, value in policy.model.text.language_model.state_dict().items():
        assert torch.equal(value, base[f"model.{name}"]), name
    capsys.readouterr()
    assert run("inspect", folder, "--backbone", cosmos_folder, "--verify") == 0
    assert "files are what checksums.json says" in capsys.readouterr().out
    options = ("--checkpoint", folder, "--backbone", cosmos_folder, "--device", "cpu", "--episodes", 0)
    assert run("eval", "openloop", first, *options, "--out", tmp_path / "openloop") == 0
    result = json.loads((tmp_path / "openloop" / "openloop.json").read_text())
    assert result["robot"] == "libero_franka"
    lean = ("--checkpoint", folder, "--device", "cpu", "--episodes", 0, "--backbone", GOLDEN / "libero_tiny" / "cosmos")
    assert run("eval", "openloop", first, *lean, "--out", tmp_path / "no") == 2
    assert "has no weights, download them too" in capsys.readouterr().err


# -- the text encoder's names on disk --------------------------------------------------------------------------------


def older(name: str) -> str:
    return name


def newer(name: str) -> str:
    """As the module has them, and a published .pt."""
    return f"model.{name}" if name.startswith("visual.") else f"model.language_model.{name.removeprefix('model.')}"


def without_lm_head(name: str) -> str:
    """As `Qwen2_5_VLModel` alone saves them."""
    return newer(name).removeprefix("model.")


def language_alone(name: str) -> str | None:
    """As the language model inside it saves itself."""
    return None if name.startswith("visual.") else name.removeprefix("model.")


def shards(state: dict, folder: Path) -> None:
    """As `save_pretrained(max_shard_size=...)` leaves them."""
    names = sorted(state)
    files = {f"model-0000{i}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def prompt_embeds(run_folder: Path, text_folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the text encoder in `text_folder`, the published code's) for the golden prompts."""
    model = ck.open_checkpoint(run_folder).model
    tensors = ck.cosmos_tensors(text_folder.parent, ("text_encoder",))
    encoder = setup._text_encoder(model, tensors, "here", CPU)
    from dit4dit.policy.prompts import load_tokenizer

    prompts = json.loads((run_folder / "golden.json").read_text())["prompts"]
    tokens = tokenize(load_tokenizer(run_folder / "cosmos" / "tokenizer"), prompts, model.text.max_length)
    with torch.no_grad():
        return encoder(tokens), load_file(run_folder / "golden.safetensors")["infer.prompt_embeds"]


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
@pytest.mark.parametrize(
    "layout, sharded",
    [(older, False), (older, True), (newer, True), (without_lm_head, False), (language_alone, False)],
)
def test_a_saved_text_encoder_gives_the_published_embeddings(name: str, layout, sharded: bool, tmp_path: Path) -> None:
    source = GOLDEN / name / "cosmos" / "text_encoder"
    state = {new: t for n, t in load_file(source / "model.safetensors").items() if (new := layout(n)) is not None}
    folder = Path(shutil.copytree(source, tmp_path / "text_encoder"))
    (folder / "model.safetensors").unlink()
    if sharded:
        shards(state, folder)
    else:
        save_file(state, folder / "model.safetensors")
    got, wanted = prompt_embeds(GOLDEN / name, folder)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_tied_weights_under_the_other_name(tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps the first of two names of one tensor, which is lm_head."""
    source = GOLDEN / "libero_tiny" / "cosmos" / "text_encoder"
    folder = Path(shutil.copytree(source, tmp_path / "text_encoder"))
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")
    got, wanted = prompt_embeds(GOLDEN / "libero_tiny", folder)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"1 of 26 tensors missing, first .*embed_tokens\.weight"):
        prompt_embeds(GOLDEN / "libero_tiny", folder)


def test_one_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "libero_tiny" / "cosmos" / "text_encoder", tmp_path / "text_encoder"))
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.language_model.norm.weight": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.language_model\.norm\.weight' and .* are the same tensor"):
        ck.cosmos_tensors(tmp_path, ("text_encoder",))


def test_a_pt_file_of_an_older_transformers_loads(libero_run: Path) -> None:
    file = libero_run / "checkpoints" / "steps_10_pytorch_model.pt"
    state = torch.load(file, weights_only=True)
    spelled = {n.replace("text_encoder.model.language_model.", "text_encoder.model."): t for n, t in state.items()}
    spelled = {n.replace("text_encoder.model.visual.", "text_encoder.visual."): t for n, t in spelled.items()}
    assert set(spelled) != set(state)
    torch.save(spelled, file)
    opened = ck.open_checkpoint(libero_run).tensors
    assert set(opened) == set(state)
    assert all(torch.equal(opened[n], t) for n, t in state.items())


# -- which base ------------------------------------------------------------------------------------------------------


def test_the_named_base_is_the_one_that_is_used(cosmos_folder: Path, tmp_path: Path, monkeypatch) -> None:
    file = GOLDEN / "libero_tiny" / "config.yaml"
    base = "framework.cosmos25.base_model"
    config, ignored = published.read(file, {base: str(cosmos_folder)}, None)
    assert config.weights.backbone == str(cosmos_folder)
    assert base not in ignored
    # a folder that is not there must not fall back to another base
    with pytest.raises(CheckpointError, match="backbone /not/there: no such folder"):
        published.read(file, {base: "/not/there"}, None)
    with pytest.raises(ConfigError, match="give one of them"):
        published.read(file, {base: str(cosmos_folder)}, str(cosmos_folder))
    # a hub id stays one: what is downloaded to read the sizes has no weights
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, allow_patterns))
        return str(cosmos_folder)

    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    alone = shutil.copyfile(file, tmp_path / "published.yaml")
    assert published.read(Path(alone), {}, None)[0].weights.backbone == ck.HUB_BACKBONE
    ck.find_backbone(ck.HUB_BACKBONE, None, weights=True)
    assert asked == [(ck.HUB_BACKBONE, ck.SMALL_FILES), (ck.HUB_BACKBONE, None)]


def published_sets() -> list[str]:
    """The folders of the published mixture that the golden run names."""
    from dit4dit.data.catalogue import catalogue

    return [entry.dataset for entry in catalogue().mixture("libero_all")]
