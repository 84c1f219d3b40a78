"""Training, top to bottom: weights, caches, one step after another, checkpoints.

    config, data -> setup (weights) -> caches (prompts, latents) -> Trainer -> for each step: draw, loss, backward, move, log

Everything random in a step follows from (seed, position) alone (`randomness`), so a run that was killed goes on with the very
losses that it would have had, and several processes train what one would with the same global batch.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import CheckpointError, ConfigError, TrainingError
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.robots.descriptions import described
from dit4dit.training import caches, checkpoint, evaluate, optim, preflight, setup
from dit4dit.training.config import TrainConfig, write_config
from dit4dit.training.feed import Feed, Share, to_batch
from dit4dit.training.logs import Log, Meter, bar, log
from dit4dit.training.parallel import Processes, Root
from dit4dit.training.randomness import Keys, draws, dropout_keys, key_dropouts
from dit4dit.training.samples import Raw, TrainingData
from dit4dit.training.stop import Stop, stop_signal
from dit4dit.training.strategies import make_moves
from dit4dit.types import Batch

FINISHED, PREEMPTED = 0, 75
"""Exit codes; 75 (EX_TEMPFAIL): SIGTERM or Ctrl-C came; what there was to save is saved, start again with --resume."""


def train(config: TrainConfig, data: TrainingData, *, resume: Path | None = None) -> int:
    """Train from the configured weights, or go on from the checkpoint folder `resume`; returns the exit code.

    Raises:
        ConfigError, CheckpointError: before the first step, where the run cannot start. TrainingError: the loss is NaN.
    """
    preflight.check_start(config)
    torch.set_float32_matmul_precision("high")
    processes = Processes(config)
    run = Path(config.run.out)
    with stop_signal() as stop, contextlib.ExitStack() as held:
        saved = None if resume is None else checkpoint.read(resume)
        if saved is not None:
            check_progress(saved, config, data, processes.ranks)
        start = setup.load(config, processes.device)
        if processes.first:
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(checkpoint.one_writer(run))
            checkpoint.sweep(run)
            if saved is None and (run / checkpoint.SHARED_PARTS).is_dir():
                # of a start that came to no checkpoint, perhaps from other weights
                shutil.rmtree(run / checkpoint.SHARED_PARTS)
        prompts, latents = fill_caches(start, data, processes, saved)
        processes.wait()
        trainer = Trainer(start, data, processes, prompts, latents)
        if saved is not None:
            trainer.restore(saved)
        # from here on nobody leaves by itself, or the others would wait for it
        processes.wait()
        stop.stepping = True
        if processes.first:
            for folder in checkpoint.set_aside(run, trainer.step):
                log.warning(
                    "of what the run did after step %d before: %s; delete it when you like", trainer.step, folder
                )
            write_config(run / "config.yaml", config)
        code = trainer.run(stop)
        processes.end()
        return code
    return PREEMPTED


def check_progress(saved: checkpoint.Saved, config: TrainConfig, data: TrainingData, ranks: int) -> None:
    """ConfigError where a run that goes on would not draw the samples that it would have drawn, or is longer than it shall be."""
    progress, share = saved.progress, Share(0, ranks, config.data.batch_size, config.optim.accumulate)
    for name, here, there in (
        ("run.seed", config.run.seed, progress.seed),
        ("global batch (data.batch_size x optim.accumulate x processes)", share.global_batch, progress.global_batch),
        ("the data's fingerprint (files, statistics, split, window)", data.fingerprint, progress.data),
    ):
        if here != there:
            raise ConfigError(
                f"--resume {saved.folder}: {name}: the run has {there}, this one {here}; make them equal, or begin a new run "
                "from its policy with --weights.checkpoint"
            )
    if config.run.steps < progress.step:
        raise ConfigError(
            f"--resume {saved.folder}: {progress.step} steps are done, run.steps is {config.run.steps}; give --run.steps "
            f"{progress.step} or more, or go on from an older checkpoint with --resume DIR"
        )


def fill_caches(
    start: setup.Start, data: TrainingData, processes: Processes, saved: checkpoint.Saved | None
) -> tuple[caches.PromptCache, caches.LatentCache | None]:
    """Both caches, complete on disk. The text encoder lives only in here, and only where an embedding is missing."""
    config, rank, ranks = start.config, processes.rank, processes.ranks
    folder = Path(config.data.cache or Path(config.run.out) / "cache")
    frozen = Path(config.run.out) / checkpoint.SHARED_PARTS
    prompts = None
    if saved is not None:
        prompts = caches.PromptCache(folder, saved.progress.prompts)
    wanted = config.run.save_frozen and not frozen.is_dir()
    if prompts is None or processes.agree(bool(prompts.missing(data.instructions))) or processes.agree(wanted):
        text = start.text()
        if processes.first and (
            cut := preflight.cut_prompts(start.tokenizer, data.instructions, text.config.max_length)
        ):
            log.warning("%s", cut)
        prompts = caches.PromptCache(folder, caches.prompt_key(text, start.tokenizer))
        with bar("prompts", len(prompts.left(data.instructions, rank, ranks)), processes.first) as done:
            caches.fill_prompts(prompts, text, start.tokenizer, data.instructions, rank=rank, ranks=ranks, done=done)
        if config.run.save_frozen and processes.first:
            setup.save_frozen(frozen, start.model, text)
    latents = None
    if config.data.cache_latents:
        latents = caches.LatentCache(folder, caches.latent_key(start.model, data), data.clips)
        with bar("latents", latents.count(latents.left(rank, ranks)), processes.first) as done:
            caches.fill_latents(latents, start.model, data, rank=rank, ranks=ranks, done=done)
    return prompts, latents


class Trainer:
    """One process's part of a run."""

    def __init__(
        self,
        start: setup.Start,
        data: TrainingData,
        processes: Processes,
        prompts: caches.PromptCache,
        latents: caches.LatentCache | None,
    ) -> None:
        config = self.config = start.config
        self.start, self.data, self.processes = start, data, processes
        self.prompts, self.latents = prompts, latents
        self.keys, self.model = Keys(), start.model
        for what in prepare(self.model, config, self.keys):
            log.info("frozen, because no loss of mode %s reaches it: %s", config.model.flow.training, what)
        if self.model.video_vae is not None and processes.device.type == "cpu":
            self.model.video_vae.channels_last()
        self.root = Root(self.model, config.run.precision).train()
        self.moves = make_moves(self.root, config, processes)
        self.share = Share(processes.rank, processes.ranks, config.data.batch_size, config.optim.accumulate)
        self.size = self.model.config.latent_size(*data.picture_size)
        self.fingerprint = data.fingerprint
        self.step = 0
        self._pending: list[Tensor] = []

    def run(self, stop: Stop) -> int:
        """All remaining steps; returns the exit code."""
        run, steps = self.config.run, self.config.run.steps
        log_to = Log(
            Path(run.out), run, first_step=self.step, active=self.processes.first, settings=self.config.to_dict()
        )
        feed = self._feed(self.step, steps)
        meter, agreed = Meter(), torch.zeros(2, dtype=torch.float64)
        with contextlib.closing(log_to), contextlib.closing(feed):
            if self._due(run.eval_every) and self.processes.agree(log_to.evaluation_lost):
                self._evaluate(log_to)
            while self.step < steps:
                start = time.perf_counter()
                micros = [next(feed) for _ in range(self.share.accumulate)]
                waited = time.perf_counter() - start
                # read one step late, when it has long arrived
                if agreed[1].item() > 0:
                    self._log(log_to, meter)
                    self.save()
                    log.warning("stopped by a signal after step %d; go on with --resume", self.step)
                    return PREEMPTED
                agreed = self._agree(micros, stop.requested)
                self.take_step(micros, agreed[0])
                meter.add(self.share.global_batch, waited)
                log_to.advance()
                if self._due(run.log_every):
                    self._log(log_to, meter)
                # first, so that an evaluation that fails costs nothing: a run that goes on makes up for it
                if self._due(run.save_every):
                    self._log(log_to, meter)
                    self.save()
                if self._due(run.eval_every):
                    self._evaluate(log_to)
        return FINISHED

    def _due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one; 0: never."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def _feed(self, first: int, last: int) -> Generator[Raw, None, None]:
        workers, pin = self.config.data.workers, self.processes.device.type == "cuda"
        return iter(Feed(self.data, self.share, first, last, workers=workers, video=self.latents is None, pin=pin))

    def _agree(self, micros: list[Raw], stop: bool) -> Tensor:
        """[real action entries of the whole step, ranks that want to stop] over all processes."""
        count = sum(int(raw.action_mask.sum()) for raw in micros)
        return self.processes.sum(torch.tensor([count, stop], dtype=torch.float64, device=self.processes.device))

    def take_step(self, micros: list[Raw], entries: Tensor) -> None:
        """Forward, backward and one move of the weights; `entries` is the number of action entries in the global batch."""
        flow, pieces = self.model.config.flow, self.share.ranks * self.share.accumulate
        rates = self.moves.set_rates(optim.schedule(self.step, self.config.run.steps, self.config.optim))
        seen = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for i, raw in enumerate(micros):
            with self.moves.micro_step(last=i == len(micros) - 1):
                batch = to_batch(raw, self.model.config, self.processes.device, self.prompts, self.latents)
                drawn = self._draws(raw)
                losses = self.moves.module(partial(loss_step, batch=batch, drawn=drawn))
                # the action loss is a mean over real entries: each piece counts by how many of them it has
                weight = (batch.action_mask.sum() * pieces / entries).float()
                action = losses["action"] * weight if "action" in losses else seen.new_zeros((), dtype=torch.float32)
                video = losses.get("video", torch.zeros_like(action))
                self.moves.backward((action + flow.future_video_weight * video) / self.share.accumulate)
                seen += torch.stack([action.detach(), video.detach()]).double() / pieces
            for why in raw.skipped:
                log.warning("step %d: another sample stands for one that cannot be read: %s", self.step + 1, why)
        norm = self.moves.step()
        self.step += 1
        self.rates = rates
        skipped = torch.tensor([sum(len(raw.skipped) for raw in micros)], dtype=torch.float64, device=seen.device)
        # the norm is the same on every rank, so that a rank's share of it is what is summed
        self._pending.append(torch.cat([seen, norm.double()[None] / self.processes.ranks, skipped]))

    def _draws(self, raw: Raw) -> Draws:
        """This micro step's draws on the device; sets its dropout keys too."""
        config, seed, device = self.model.config, self.config.run.seed, self.processes.device
        self.keys.rows = dropout_keys(seed, raw.positions, config.flow.repeated_diffusion_steps).to(device)
        drawn = draws(config, self.size, seed, "training", raw.positions)
        return Draws(**{name: value.to(device, non_blocking=True) for name, value in vars(drawn).items()})

    def _log(self, log_to: Log, meter: Meter) -> None:
        """Means since the last line; TrainingError when a loss is not a number."""
        if not self._pending:
            return
        rows, self._pending = self.processes.sum(torch.stack(self._pending)), []
        action, video, norm, _ = rows.mean(dim=0).tolist()
        mode = self.model.config.flow.training
        named = {"action_loss": action, "video_loss": video}
        named = {f"train/{k}": v for k, v in named.items() if mode in ("joint", k.removesuffix("_loss"))}
        # float16's scaler leaves steps out whose gradients are not finite
        judged = rows[:, : 2 if self.moves.scaler.is_enabled() else 3]
        if not judged.isfinite().all():
            raise TrainingError(
                f"step {self.step}: the loss or its gradient is not a number ({named}, gradient norm {norm}); lower the "
                "learning rate, and go on from a checkpoint"
            )
        rates = {f"learning_rate/{name}": rate for name, rate in self.rates.items()}
        speed = meter.read()
        skipped = {"skipped": rows[:, 3].sum().item()} if self.data.skip_bad else {}
        log_to.write(self.step, {**named, "train/grad_norm": norm, **rates, **speed, **skipped})
        losses = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in named.items())
        log_to.tell(f"{losses}, {speed['samples_per_s']:.2f} samples/s, data wait {speed['data_wait']:.0%}")

    def _evaluate(self, log_to: Log) -> None:
        run = self.config.run
        common = (self.root, self.moves.module, self.processes, self.data, self.prompts)
        batch = self.config.data.batch_size
        values = evaluate.evaluate(*common, samples=run.eval_samples, batch_size=batch, seed=run.seed)
        if values:
            log_to.write(self.step, values)
        if self.model.config.flow.training != "action" and run.eval_strips:
            folder = Path(run.out) / "strips" / f"step_{self.step:08d}"
            for file in evaluate.draw_strips(*common, folder, count=run.eval_strips, seed=run.seed):
                log_to.picture(self.step, f"future/{file.stem}", file)

    def save(self) -> None:
        """A checkpoint of this step. All ranks give their pieces, the first writes."""
        everything, averaged, state = self.moves.weights(), self.moves.averaged(), self.moves.moments()
        lora = self.config.optim.lora.rank > 0
        if lora or averaged:
            state |= {f"weights.{n}": t for n, t in everything.items()} | {
                f"average.{n}": t for n, t in averaged.items()
            }
        best = everything | averaged
        rngs = self.processes.gather(checkpoint.rng_state(self.processes.device))
        error = None
        if self.processes.first:
            weights = optim.merged_weights(self.model, best) if lora else best
            rng = {f"{rank}.{name}": value for rank, one in enumerate(rngs) for name, value in one.items()}
            try:
                checkpoint.write(Path(self.config.run.out), self._progress(), self._inference(weights), state, rng)
                checkpoint.rotate(Path(self.config.run.out), self.config.run.keep)
            except CheckpointError as caught:
                error = caught
        # every rank must hear of it, or the others would wait for the first one forever
        if error := self.processes.agree(error):
            raise error

    def _progress(self) -> checkpoint.Progress:
        scaler = self.moves.scaler.state_dict()
        return checkpoint.Progress(
            step=self.step,
            seed=self.config.run.seed,
            global_batch=self.share.global_batch,
            data=self.fingerprint,
            prompts=self.prompts.key,
            scale=scaler.get("scale"),
            growth=scaler.get("_growth_tracker"),
        )

    def _inference(self, weights: dict[str, Tensor]) -> checkpoint.Inference:
        return checkpoint.Inference(
            model=self.model.config,
            embodiment=self._embodiment(),
            weights=weights,
            statistics=self.data.statistics,
            tokenizer=self.start.tokenizer,
            frozen=Path(self.config.run.out) / checkpoint.SHARED_PARTS if self.config.run.save_frozen else None,
        )

    def _embodiment(self) -> str | dict[str, Any] | None:
        """The robot that the configuration names, else the data's only one, as checkpoints carry it."""
        robots = {each.embodiment.name: each.embodiment for each in self.data.robots}
        name = self.config.embodiment or (next(iter(robots)) if len(robots) == 1 else None)
        return described(robots[name]) if name in robots else name

    def restore(self, saved: checkpoint.Saved) -> None:
        """Go on from a checkpoint that `check_progress` let pass; ConfigError where its tensors are of another run."""
        progress = saved.progress
        self.moves.restore(saved.weights, saved.moments, str(saved.folder))
        self.moves.restore_average(saved.average, str(saved.folder))
        if progress.scale is not None:
            scaler = self.moves.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": progress.scale, "_growth_tracker": progress.growth})
        own = {n.split(".", 1)[1]: t for n, t in saved.rng.items() if n.split(".", 1)[0] == str(self.processes.rank)}
        if own:  # a rank that was not there before starts its generators anew; no draw of a step comes from them
            checkpoint.set_rng_state(own, self.processes.device)
        self.step = progress.step


def prepare(model: DiT4DiT, config: TrainConfig, keys: Keys) -> tuple[str, ...]:
    """Everything that happens to the modules before they are wrapped; returns what the mode froze by itself."""
    if config.optim.lora.rank:
        optim.add_lora(model, config.optim.lora, config.run.seed)
    unreached = optim.freeze_unreached(model)
    optim.freeze(model, config.optim.freeze)
    blocks = list(model.backbone.transformer.blocks)
    model.backbone.transformer.gradient_checkpointing = config.run.gradient_checkpointing
    if model.head is not None:
        key_dropouts(model.head, keys)
        blocks += model.head.model.blocks  # type: ignore[arg-type]
        model.head.model.gradient_checkpointing = config.run.gradient_checkpointing
    if config.run.compile:
        for block in blocks:
            block.compile()
    return unreached


def loss_step(model: DiT4DiT, batch: Batch, drawn: Draws) -> dict[str, Tensor]:
    """The losses that the mode has, by name."""
    losses = model.loss(batch, drawn)
    named = {"action": losses.action, "video": losses.video}
    return {name: value for name, value in named.items() if value is not None}
