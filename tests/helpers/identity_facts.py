"""What stored files, caches and records are recognised by, and the first numbers of each random stream, as the code computes them
now: for `golden/identity.json`, which `golden/make_identity.py` wrote once, and for the test that compares.

Texts, integers, and hashes of texts or of stored weights are the same on every machine. What went through a matrix product, a
logarithm or PyTorch's normal draws is not, so it is given as numbers; hashes of their bits hold for one `machine` alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dit4dit import Policy
from dit4dit.config import HeadConfig, ModelConfig, TextConfig, VideoDitConfig
from dit4dit.demo.demonstrations import demonstrate
from dit4dit.engine.calibration import backbone_key
from dit4dit.engine.packs import PackFolder, content_hash, packs_key, text_fingerprint
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import TEST_SEEDS_FROM, TabletopEnv, layout
from dit4dit.evaluation import identity, tabletop
from dit4dit.evaluation.plan import derived_seed
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.noise import STREAMS, Noise, normal, philox
from dit4dit.presets import preset
from dit4dit.robots import TABLETOP
from dit4dit.training import caches, randomness, setup
from dit4dit.training.config import DataConfig, LearningRates, OptimConfig, RunConfig, TrainConfig, WeightsConfig
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {name: GOLDEN / name for name in ("libero_tiny", "gr1_tiny")} | {"tabletop": tabletop_policy_dir()}
INSTRUCTION = "open the drawer"


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Of one checkpoint: its hash, and the keys of its prompt packs and of its calibration."""
    model = Policy.from_pretrained(path, device="cpu", dtype=torch.float32, engine="off").model
    return {
        "checkpoint_hash": identity.checkpoint_hash(path),
        "packs_key": packs_key(model),
        "pack_file": PackFolder.of(Path(), model).path(INSTRUCTION).name,
        "text_fingerprint": text_fingerprint(model.text),
        "backbone_key": backbone_key(model),
    }


def data_facts(folder: Path, statistics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of the small recording, and of random data.

    folder: for a file with a mixture. statistics: taken instead of the computed ones, whose last bits are a processor's.
    """
    model = preset("tiny").model
    file = folder / "robots.yaml"
    file.write_text("mixtures:\n  mine:\n    - {dataset: lerobot_v3, robot: libero_franka}\n")
    config = DataConfig(root=str(GOLDEN), mixture="mine", robots=str(file), holdout=0.34, mask_padding=True)
    data = LeRobotData.open(config, model, seed=3)
    computed = data.statistics
    if statistics is not None:
        vars(data.mixture)["statistics"] = statistics
    return {
        "statistics": computed,
        "columns": dict(sorted(data.mixture.recordings[0].data.columns.digests.items())),
        "held_out": list(data.held_out()),
        "order": [data.index(position) for position in range(8)],
        "sampler": data._train.fingerprint,
        "clip_fingerprint": data.clip_fingerprint,
        "fingerprint": data.fingerprint,
        "every_third": replace_every(data, 3).clip_fingerprint,
        "random": RandomData(model, "libero").fingerprint,
    }


def replace_every(data: LeRobotData, every: int) -> LeRobotData:
    config = DataConfig(mixture="mine", holdout=0.34, sample_every=every)
    return LeRobotData(data.mixture, preset("tiny").model, config, 3)


def stream_facts() -> dict[str, Any]:
    """The first draw of every named stream: integers, and the numbers that are made of them."""
    size = (4, 8)
    drawn = randomness.draws(preset("tiny").model, size, 42, "training", [5])
    held_out = randomness.draws(preset("tiny").model, size, 42, "evaluation", [5])
    purposes = ("training", "evaluation", "order", "sample", "dropout 0", "dropout 1")
    noise = Noise.from_seed(7, 2).draw(dict.fromkeys(STREAMS, (4,)))
    worlds = [layout(seed) for seed in (0, TEST_SEEDS_FROM, TEST_SEEDS_FROM + 1)]
    demonstration = demonstrate(3)
    return {
        "exact": {
            "philox": {
                name: philox(np.array([[0, stream, 2, 0]], dtype=np.uint64), (7, 0))[0].tolist()
                for name, stream in STREAMS.items()
            },
            "keys": {purpose: randomness.key(42, purpose, 5) for purpose in purposes},
            "dropout_keys": randomness.dropout_keys(42, [5, 6], 2).tolist(),
            "dropout_bits": randomness.uniform_bits(torch.tensor([11]), 3, 4)[0].tolist(),
            "derived_seed": derived_seed(7, "libero_10", "03", 4),
            "worlds": [[asdict(goal), paraphrase] for _, goal, paraphrase in worlds],
        },
        "close": {
            "noise": {name: values.tolist() for name, values in noise.items()},
            "normal": normal((4,), 2**40 + 7, 2**33 + 2, 1).tolist(),
            "training": {name: value.flatten()[:4].tolist() for name, value in vars(drawn).items()},
            "evaluation": {name: value.flatten()[:4].tolist() for name, value in vars(held_out).items()},
            "worlds": json.loads(json.dumps([asdict(scene) for scene, _, _ in worlds])),
            "demonstration": [demonstration.actions[0].tolist(), demonstration.actions[-1].tolist()],
        },
    }


def small_libero(folder: Path) -> Path:
    """The LIBERO checkpoint with images of 32 x 32 pixels, in `folder`."""
    run = Path(shutil.copytree(GOLDEN / "libero_tiny", folder / "libero_tiny"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("    image_size:\n    - 224\n    - 224", "    image_size: [32, 32]"))
    return run


def run_config(out: Path, **changes: Any) -> RunConfig:
    facts = dict(
        out=str(out), precision="float32", device="cpu", gradient_checkpointing=False, log_every=1, trackers=()
    )
    return RunConfig(**{**facts, "save_every": 1000, "eval_strips": 0, **changes})


def training_facts(folder: Path) -> dict[str, Any]:
    """Four steps from the LIBERO checkpoint, both losses, dropout, cached latents, evaluated twice."""
    config = TrainConfig(
        model=preset("tiny").model,
        embodiment="libero",
        weights=WeightsConfig(checkpoint=str(small_libero(folder))),
        data=DataConfig(batch_size=2, workers=0, mixture="random", cache_latents=True),
        optim=OptimConfig(learning_rate=LearningRates(1e-3, 1e-3, 1e-3), warmup_steps=4, ema=0.9),
        run=run_config(folder / "run", steps=4, eval_every=2, eval_samples=4),
    )
    data = RandomData(setup.sized(config).model, "libero", clips=12)
    assert train(config, data) == 0
    return run_facts(folder / "run")


def run_facts(run: Path) -> dict[str, Any]:
    """What a run's folder says: its newest checkpoint's progress, its caches, its log without times, a hash of its weights."""
    step = max((run / "checkpoints").glob("step_*"))
    kept = (
        "train/action_loss",
        "train/video_loss",
        "train/grad_norm",
        "eval/action_loss",
        "eval/video_loss",
        "eval/action_mae",
    )
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    weights = load_file(step / "policy" / "model.safetensors")
    return {
        "progress": json.loads((step / "progress.json").read_text()),
        "caches": sorted(str(file.relative_to(run)) for file in (run / "cache").rglob("*.safetensors")),
        "log": [{"step": line["step"]} | {name: line[name] for name in kept if name in line} for line in lines],
        "weights": content_hash(sorted(weights.items())),
    }


def cache_facts(folder: Path) -> dict[str, Any]:
    """Keys of the prompt and latent caches for LIBERO's checkpoint."""
    config = TrainConfig(
        model=preset("tiny").model, embodiment="libero", weights=WeightsConfig(checkpoint=str(GOLDEN / "libero_tiny"))
    )
    start = setup.load(config, torch.device("cpu"))
    key = caches.prompt_key(start.text(), start.tokenizer)
    return {
        "prompt_key": key,
        "prompt_file": caches.PromptCache(folder, key).path(INSTRUCTION).name,
        "latent_key": caches.latent_key(start.model, RandomData(start.model.config, "libero")),
    }


def evaluation_facts(out: Path) -> dict[str, Any]:
    """Three whole episodes of the tabletop world with the shipped policy, in the run folder `out`, and one chunk alone."""
    path = tabletop_policy_dir()
    policy = Policy.from_pretrained(path, device="cpu")
    seen = TABLETOP.observe(TabletopEnv(TEST_SEEDS_FROM).observation())
    chunk = policy.infer(seen, layout(TEST_SEEDS_FROM)[1].instruction(), noise=Noise.from_seed(TEST_SEEDS_FROM))
    records = evaluate(
        policy,
        tabletop.plan(3),
        Options(videos="none"),
        out,
        horizon=chunk.actions.shape[0],
        about_policy=identity.describe(policy, path),
    )
    return {"first_chunk": chunk.actions.tolist(), "episodes": [untimed(record) for record in records]}


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """An episode's line without times, places, versions."""
    kept = {name: value for name, value in record.items() if name not in ("took", "versions")}
    options = {name: value for name, value in record["options"].items() if name != "path"}
    return json.loads(json.dumps({**kept, "options": options}))


def least() -> ModelConfig:
    """The smallest model that can be trained, around the tabletop world's VAE: images of 16 x 16 pixels."""
    text = TextConfig(
        hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=8, vocab_size=328,
        mrope_section=(1, 1, 2), max_position_embeddings=64, max_length=16,
    )  # fmt: skip
    dit = VideoDitConfig(
        num_layers=1, num_heads=1, head_dim=12, mlp_ratio=1.0, adaln_lora_dim=4, text_in=text.embed_width, text_dim=8
    )
    head = HeadConfig(
        num_layers=2, num_heads=1, head_dim=8, hidden_size=8, output_dim=8, action_dim=3, action_horizon=4, state_dim=3,
        context_dim=dit.width, max_seq_len=4,
    )  # fmt: skip
    vae = preset("tabletop").model.vae
    return ModelConfig(
        text=text, vae=vae, dit=replace(dit, latent_channels=vae.z_dim), head=head, frames=5, image_size=(16, 16),
        extract_layer=0,
    )  # fmt: skip


def least_data(model: ModelConfig) -> RandomData:
    return RandomData(model, "tabletop", clips=8)


def least_run(out: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        model=least(),
        embodiment="tabletop",
        data=DataConfig(batch_size=2, workers=0, mixture="random", cache_latents=True),
        optim=OptimConfig(learning_rate=LearningRates(1e-2, 1e-2, 1e-2), warmup_steps=2, ema=0.5),
        run=run_config(out, steps=steps, keep=1, eval_every=0),
    )


def machine() -> str:
    """What decides the last bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [
        line.partition(": ")[2]
        for line in lines
        if line.startswith(("vendor_id", "cpu family", "model\t", "model name"))
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{', '.join(dict.fromkeys(names))}, {capability}, torch {torch.__version__}, numpy {np.__version__}"
