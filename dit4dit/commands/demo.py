"""`dit4dit demo`: the whole path on real input. A small model drives one episode of the built-in tabletop world.

The checkpoint is made at the first run: the world's own trained VAE, everything else fresh weights, so the arm wanders; what
is shown is that pictures, words and state go in and actions come out, how fast, and in which units.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.commands.report import quantiles_ms, table, write_json
from dit4dit.policy import Policy
from dit4dit.types import Noise

Picture = NDArray[np.uint8]
STATISTICS_EPISODES = 40


@dataclass(frozen=True)
class Episode:
    """One closed-loop episode: pictures [steps + 1], actions [steps, A], seconds per chunk, and how it ended."""

    instruction: str
    pictures: list[Picture]
    actions: NDArray[np.float32]
    seconds: list[float]
    success: bool


def make_checkpoint(folder: Path, seed: int) -> None:
    """A tabletop checkpoint in the own format: trained VAE, fresh backbone, text encoder and head."""
    from safetensors.torch import load_file

    from dit4dit.envs import tabletop_vae_dir
    from dit4dit.model.own_format import save_model
    from dit4dit.model.text import byte_tokenizer
    from dit4dit.model.weights import random_model
    from dit4dit.presets import preset

    vae = {name: value.float() for name, value in load_file(tabletop_vae_dir() / "model.safetensors").items()}
    model = random_model(preset("tabletop").model, seed, vae_weights=vae)
    save_model(
        folder,
        model,
        embodiment="tabletop",
        statistics=expert_statistics(STATISTICS_EPISODES),
        tokenizer=byte_tokenizer(),
    )


def expert_statistics(episodes: int) -> dict[str, Any]:
    """Normalisation statistics of the scripted expert's first `episodes` training layouts, as a data set would have them."""
    from dit4dit.envs.tabletop import ScriptedExpert, TabletopEnv

    states, actions = [], []
    for seed in range(episodes):
        env = TabletopEnv(seed)
        expert, observation = ScriptedExpert(env), env.reset().observation
        for _ in range(env.max_steps):
            states.append(observation["state"])
            actions.append(expert.act())
            result = env.step(actions[-1])
            observation = result.observation
            if result.success or result.truncated:
                break
    mask = {"action": [True, True, False], "state": [True, True, True]}
    entry = {name: _summary(np.stack(rows), mask[name]) for name, rows in (("state", states), ("action", actions))}
    return {"tabletop": {**entry, "num_transitions": len(actions), "num_trajectories": episodes}}


def _summary(rows: NDArray[Any], mask: list[bool]) -> dict[str, Any]:
    x = rows.astype(np.float64)
    numbers = {
        "mean": x.mean(0),
        "std": x.std(0),
        "min": x.min(0),
        "max": x.max(0),
        "q01": np.quantile(x, 0.01, axis=0),
        "q99": np.quantile(x, 0.99, axis=0),
    }
    return {**{name: value.tolist() for name, value in numbers.items()}, "mask": mask}


def run_episode(policy: Policy, seed: int, progress: Callable[[int], None]) -> Episode:
    """One episode; every chunk's noise is a function of the seed and the chunk's number."""
    from dit4dit.envs.tabletop import TabletopEnv

    env = TabletopEnv(seed)
    frame = env.reset()
    observation, instruction = frame.observation, frame.instruction
    pictures: list[Picture] = [np.asarray(observation["image"], dtype=np.uint8)]
    seen = policy.embodiment.observe(observation)
    policy.warm_up({name: picture.shape[:2] for name, picture in seen.images.items()})
    policy.prepare(instruction).result()
    actions: list[NDArray[np.float32]] = []
    seconds: list[float] = []
    while True:
        start = time.perf_counter()
        seen = policy.embodiment.observe(observation)
        chunk = policy.infer(seen, instruction, noise=Noise.from_seed(seed, len(seconds)))
        seconds.append(time.perf_counter() - start)
        for action in chunk.actions:
            result = env.step(policy.embodiment.command(action))
            observation = result.observation
            actions.append(action)
            pictures.append(np.asarray(observation["image"], dtype=np.uint8))
            progress(1)
            if result.success or result.truncated:
                return Episode(instruction, pictures, np.stack(actions), seconds, result.success)


def write_video(path: Path, pictures: Sequence[Picture], rate_hz: float, zoom: int = 6) -> None:
    """An h264 video; each pixel becomes zoom x zoom so that small pictures stay crisp."""
    import av

    height, width = (side * zoom for side in pictures[0].shape[:2])
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=round(rate_hz))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            large = np.ascontiguousarray(picture.repeat(zoom, axis=0).repeat(zoom, axis=1))
            for packet in stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def plot_episode(path: Path, episode: Episode, names: Sequence[str], rate_hz: float, horizon: int) -> None:
    """Actions over the episode, one plot per dimension, with the moments at which a new chunk began."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = np.arange(len(episode.actions)) / rate_hz
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 1.7 * len(names)), sharex=True, squeeze=False)
    for i, (name, axis) in enumerate(zip(names, axes[:, 0], strict=True)):
        axis.step(seconds, episode.actions[:, i], where="post")
        for begin in seconds[::horizon]:
            axis.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("seconds (grey: a new chunk)")
    figure.suptitle(episode.instruction)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def demo(out: Path, *, seed: int, device: str, progress: Callable[[int], None]) -> dict[str, Any]:
    """Make the checkpoint if it is not there, run one episode, write episode.mp4, actions.png and demo.json into `out`."""
    import torch

    checkpoint = out / "checkpoint"
    made = not checkpoint.is_dir()
    if made:
        make_checkpoint(checkpoint, seed=0)
    start = time.perf_counter()
    policy = Policy.from_pretrained(checkpoint, device=device)
    load_seconds = time.perf_counter() - start
    episode = run_episode(policy, seed, progress)
    horizon, rate = policy.config.head.action_horizon, policy.embodiment.rate_hz
    write_video(out / "episode.mp4", episode.pictures, rate)
    plot_episode(out / "actions.png", episode, policy.embodiment.action_names, rate, horizon)
    steady = episode.seconds[1:] or episode.seconds
    result = {
        "instruction": episode.instruction,
        "seed": seed,
        "steps": len(episode.actions),
        "chunks": len(episode.seconds),
        "success": episode.success,
        "checkpoint": str(checkpoint),
        "checkpoint_made_now": made,
        "weights": "VAE trained on this world; backbone, text encoder and action head random",
        "load_seconds": load_seconds,
        "first_chunk_ms": episode.seconds[0] * 1e3,
        "chunk_ms": quantiles_ms(steady),
        "machine": {
            "device": str(policy.device),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "actions": episode.actions.tolist(),
        "action_names": list(policy.embodiment.action_names),
    }
    write_json(out / "demo.json", result)
    return result


def show(result: dict[str, Any], out: Path) -> str:
    """What the command prints."""
    ms = result["chunk_ms"]
    rows = [[name, f"{ms[name]:.1f} ms"] for name in ("p50", "p95", "p99", "max")]
    rows.append(["first chunk (encodes the instruction)", f"{result['first_chunk_ms']:.1f} ms"])
    return "\n".join(
        [
            f'"{result["instruction"]}": {result["steps"]} steps, {result["chunks"]} chunks, '
            f"{'success' if result['success'] else 'no success (the weights are random)'}",
            table(["chunk latency", f"{ms['samples']} chunks on {result['machine']['device']}"], rows),
            f"wrote {out / 'episode.mp4'}, {out / 'actions.png'}, {out / 'demo.json'}",
        ]
    )
