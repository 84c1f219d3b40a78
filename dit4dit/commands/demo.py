"""`dit4dit demo` and `dit4dit demo-train`: the built-in world, its policy, and how it is made."""

from __future__ import annotations

from pathlib import Path

from dit4dit.commands.shell import Device, progress, say
from dit4dit.files.atomic import check_folder


def demo(
    out: Path = Path("demo"),
    episodes: int = 50,
    seed: int = 1_000_000,
    device: Device = "auto",
    checkpoint: Path | None = None,
) -> int:
    """The policy that ships with the package drives the built-in tabletop world: success rate, latencies, a page with videos.

    Args:
        out: folder for the results; a run that is there already goes on.
        episodes: how many layouts.
        seed: of the first layout and its noise, the next ones follow; from 1000000 on no layout was trained on.
        device: auto, cpu, cuda or cuda:N.
        checkpoint: another policy for this world.
    """
    from dit4dit.demo import play
    from dit4dit.tables import table

    check_folder("--out", out)
    result = play.demo(out, episodes=episodes, seed=seed, device=device, bar=progress, checkpoint=checkpoint)
    ms = result["chunk_ms"]
    rows = [["success [95 % interval]", result["success"]["words"]]]
    rows += [
        [f"one chunk, {name}", f"{ms[name]:.1f} ms"] for name in ("p50", "p95", "p99", "max") if ms[name] is not None
    ]
    say(table(["layouts never trained on", f"{ms['samples']} chunks on {result['machine']['device']}"], rows))
    say(f"wrote {out / 'report.html'} (videos), {out / 'report.json'}, {out / 'demo.json'}")
    return 0


def demo_train(
    out: Path = Path("demo-train"),
    seed: int = 0,
    demonstrations: int = 5400,
    steps: int | None = None,
    episodes: int = 100,
    processes: int = 2,
) -> int:
    """Train a policy for the built-in world from nothing but its VAE, and measure it before and after.

    Args:
        out: new folder for data, run, episodes and report.
        seed: of the weights, the order of samples, and which layouts are demonstrated.
        demonstrations: episodes that the scripted expert records.
        steps: of training; the recipe's where not given.
        episodes: of each evaluation, on layouts that are never demonstrated.
        processes: of one thread each.
    """
    from dit4dit.demo import train as module
    from dit4dit.demo.report import ROWS
    from dit4dit.tables import table

    check_folder("--out", out)
    settings = module.Settings(seed, demonstrations, steps, episodes, processes)
    result = module.demo_train(out, settings, bar=progress)
    rows = [[ROWS[name], one["words"]] for name, one in result["success"].items()]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    say(table(["test layouts", "success [95 % interval]"], rows))
    say(f"{result['total_seconds'] / 60:.1f} minutes: {times}")
    say(f"wrote {out / 'report.html'}, {out / 'demo-train.json'}; the policy is {result['policy']}")
    return 0
