"""The published code's results, stage by stage, and the command that compares with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.cli import main
from dit4dit.errors import CheckpointError
from dit4dit.evaluation import parity

CPU = torch.device("cpu")
STAGES = {
    "infer.prompt_embeds",
    "infer.condition_latent",
    "infer.features",
    "infer.normalized_actions",
    "train.action_loss",
    "train.video_loss",
    "train.grad.action_decoder",
    "train.grad.block0_to_q",
    "train.grad_norm.action_model",
    "train.grad_norm.transformer",
}


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_float32_agrees_with_the_published_code(golden_dir: Path, name: str, backend: str | None) -> None:
    stages = parity.check(golden_dir / name, device=CPU, dtype=torch.float32, backend=backend)
    assert {s.name for s in stages} == STAGES
    for stage in stages:
        assert stage.limit == (1e-4 if ".grad" in stage.name else 1e-5)
        assert stage.ok, stage
    ran = {s.name: s.implementations for s in stages}["infer.condition_latent"]
    assert ran == f"torch; preprocess: {backend or 'cpp'}"


@pytest.mark.parametrize(
    "words,message",
    [
        (["--head", "library"], "--head library: it is an option of the engine; add --engine"),
        (["--head", "one_launch", "--engine"], "--head one_launch: the kernel runs in bfloat16"),
        (["--head", "one_launch", "--engine", "--dtype", "bfloat16"], "'one_launch' refused: it is on cpu"),
    ],
)
def test_a_head_that_cannot_be_compared_is_refused(golden_dir: Path, words: list[str], message: str, capsys) -> None:
    assert run("parity", str(golden_dir / "libero_tiny"), "--device", "cpu", *words) == 2
    assert message in capsys.readouterr().err


def test_the_library_head_is_compared(golden_dir: Path) -> None:
    words = ["--device", "cpu", "--engine", "--head", "library"]
    assert run("parity", str(golden_dir / "libero_tiny"), *words) == 0


def test_bfloat16_stays_near(golden_dir: Path) -> None:
    stages = parity.check(golden_dir / "gr1_tiny", device=CPU, dtype=torch.bfloat16, backend=None)
    assert {s.name for s in stages} == STAGES
    for stage in stages:
        assert 0 < stage.error <= stage.limit, stage


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_float32_agrees_on_a_gpu(golden_dir: Path, name: str) -> None:
    stages = parity.check(golden_dir / name, device=torch.device("cuda"), dtype=torch.float32, backend=None)
    assert all(s.ok for s in stages), parity.show(stages)


@pytest.fixture(scope="module")
def executed(golden_dir: Path) -> parity.Run:
    folder = golden_dir / "libero_tiny"
    opened = open_checkpoint(folder)
    model = parity.golden_model(opened, CPU, torch.float32)
    prompts = json.loads((folder / "golden.json").read_text())["prompts"]
    return parity.execute(model, opened, load_file(folder / "golden.safetensors"), prompts)


@pytest.mark.parametrize("spoiled", sorted(STAGES))
def test_every_stage_can_breach(executed: parity.Run, spoiled: str) -> None:
    golden = {**executed.golden, spoiled: executed.golden[spoiled] * 1.001}
    stages = parity.compare(replace(executed, golden=golden), torch.float32, parity.STAGE_ORDER)
    assert [s.name for s in stages if not s.ok] == [spoiled]
    unproduced = {name: value for name, value in executed.results.items() if name != spoiled}
    stages = parity.compare(replace(executed, results=unproduced), torch.float32, parity.STAGE_ORDER)
    assert [s.name for s in stages if not s.ok] == [spoiled]
    unknown = {name: value for name, value in executed.golden.items() if name != spoiled}
    stages = parity.compare(replace(executed, golden=unknown), torch.float32, parity.STAGE_ORDER)
    assert [s.name for s in stages if not s.ok] == [spoiled]


def test_command_writes_json_and_exits_with_the_verdict(golden_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "parity.json"
    assert run("parity", str(golden_dir / "gr1_tiny"), "--device", "cpu", "--json", str(out)) == 0
    table = capsys.readouterr().out
    assert "BREACH" not in table
    assert "infer.features" in table
    data = json.loads(out.read_text())
    assert data["ok"] is True
    assert {s["stage"] for s in data["stages"]} == STAGES

    folder = tmp_path / "golden"
    shutil.copytree(golden_dir / "gr1_tiny", folder)
    golden = load_file(folder / "golden.safetensors")
    golden["infer.features"][0, 0, 0] += 1
    save_file(golden, folder / "golden.safetensors")
    assert run("parity", str(folder), "--device", "cpu") == 1
    assert "BREACH" in capsys.readouterr().out


def test_nan_is_a_breach() -> None:
    want = torch.ones(3)
    assert parity.relative_error(torch.full((3,), float("nan")), want) == float("inf")
    assert parity.relative_error(torch.ones(2), want) == float("inf")


@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_recorded_folder_passes_and_names_its_checkpoint(golden_dir: Path, tmp_path: Path, name: str) -> None:
    checkpoint, folder = tmp_path / "run", tmp_path / "recorded"
    shutil.copytree(golden_dir / name, checkpoint)
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("    image_size:\n    - 224\n    - 224", "    image_size: [32, 48]"))
    assert run("parity", str(folder), "--record", str(checkpoint), "--device", "cpu", "--seed", "3") == 0
    stages = parity.check(folder, device=CPU, dtype=torch.float32, backend=None)
    assert load_file(folder / "golden.safetensors")["in.images"].shape[2] == 32
    assert {s.name for s in stages} == STAGES
    assert all(s.ok for s in stages)
    other = "gr1_tiny" if name == "libero_tiny" else "libero_tiny"
    with pytest.raises(CheckpointError, match=r"for this checkpoint|another checkpoint's"):
        parity.check(folder, device=CPU, dtype=torch.float32, backend=None, checkpoint=golden_dir / other)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(folder, moved / "recorded")
    shutil.move(checkpoint, moved / "run")
    stages = parity.check(moved / "recorded", device=CPU, dtype=torch.float32, backend=None)
    assert all(s.ok for s in stages)
    shutil.rmtree(moved / "run")
    with pytest.raises(CheckpointError, match="name it with --checkpoint"):
        parity.check(moved / "recorded", device=CPU, dtype=torch.float32, backend=None)


@pytest.mark.parametrize("mode", ["action", "video"])
def test_recording_other_training_modes(small_libero: Path, tmp_path: Path, mode: str) -> None:
    run_folder, folder = tmp_path / "run", tmp_path / "recorded"
    shutil.copytree(small_libero, run_folder)
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("training: joint", f"training: {mode}"))
    if mode == "video":
        config.write_text(config.read_text().replace("    action_dim: 8\n", "").replace("    action_horizon: 8\n", ""))
    assert run("parity", str(folder), "--record", str(run_folder), "--device", "cpu") == 0
    stages = parity.check(folder, device=CPU, dtype=torch.float32, backend=None)
    assert {s.name for s in stages} == set(parity.expected_stages(mode, engine=False))
    assert ("train.video_loss" in {s.name for s in stages}) == (mode == "video")
    assert all(s.ok for s in stages)


@pytest.mark.parametrize("head", ["library", "one_launch"])
def test_a_recording_takes_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str) -> None:
    assert run("parity", str(tmp_path / "new"), "--record", str(tmp_path), "--device", "cpu", "--head", head) == 2
    assert "leave out --json, --backend, --engine, --checkpoint, --dtype and --head" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["prompts", "images", "draws"])
def test_incomplete_golden_folders_say_so(golden_dir: Path, tmp_path: Path, spoil: str) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(golden_dir / "libero_tiny", folder)
    golden = load_file(folder / "golden.safetensors")
    if spoil == "prompts":
        (folder / "golden.json").write_text("{}")
    golden.pop({"prompts": "x", "images": "in.images", "draws": "train.video_noise_future"}[spoil], None)
    save_file(golden, folder / "golden.safetensors")
    message = {
        "prompts": r"golden\.json: expected 'prompts', a list of instructions, got None",
        "images": r"in\.images: expected uint8 \[B, 5, H, W, 3\], got none",
        "draws": r"train\.video_noise_future: expected shape .* for this checkpoint, got None",
    }[spoil]
    with pytest.raises(CheckpointError, match=message):
        parity.check(folder, device=CPU, dtype=torch.float32, backend=None)


def test_a_folder_without_golden_files_says_so(tmp_path: Path, capsys) -> None:
    assert run("parity", str(tmp_path), "--device", "cpu") == 2
    message = capsys.readouterr().err
    assert "no golden.safetensors" in message
    assert message.count("\n") == 1
