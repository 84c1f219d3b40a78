"""`dit4dit doctor`: what is installed, what would run and why, and whether the released models fit. It changes nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit4dit.errors import ConfigError
from dit4dit.tables import number, table

PACKAGES = {
    "torch": "2.10",
    "diffusers": "0.37",
    "transformers": "4.57",
    "safetensors": "",
    "huggingface_hub": "",
    "numpy": "",
    "triton": "3.6",
}
# the parts of the released models in bfloat16, by parameters: they decide what fits where
TEXT_PARAMETERS = 7_070_000_000
BACKBONE_PARAMETERS = 2_060_000_000 + 54_000_000
HEAD_PARAMETERS = 163_000_000
SHOWN = 100
"""Measured calls in the table that is printed."""


@dataclass(frozen=True)
class Finding:
    """One line: `level` is ok, note (works, slower) or problem (does not work)."""

    what: str
    level: str
    detail: str


def examine() -> dict[str, Any]:
    """All findings, ready for JSON; "healthy" is False when a problem was found."""
    findings = [*_packages(), *_extension(), *_devices(), *_memory(), _tiles(), _kernels(), *_measured(), _self_test()]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "findings": [vars(f) for f in findings],
        "ops": _ops(),
        "healthy": all(f.level != "problem" for f in findings),
    }


def _packages() -> list[Finding]:
    from packaging.version import Version

    out = []
    for name, least in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            optional = name == "triton"
            detail = "not installed; only the GPU kernels need it" if optional else f"not installed; pip install {name}"
            out.append(Finding(name, "note" if optional else "problem", detail))
            continue
        old = bool(least) and Version(version) < Version(least)
        out.append(
            Finding(name, "problem" if old else "ok", f"{version}{f', at least {least} is needed' if old else ''}")
        )
    return out


def _extension() -> list[Finding]:
    try:
        from dit4dit import _C
    except ImportError as error:
        return [Finding("dit4dit._C", "problem", f"not loadable ({error}); reinstall dit4dit for this Python")]
    architectures = ", ".join(_C.cuda_architectures) or "CPU only"
    return [Finding("dit4dit._C", "ok", f"built for {architectures}")]


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPU", "note", f"none visible to PyTorch {torch.__version__}; everything runs on the CPU")]
    out = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        detail = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
        out.append(Finding(f"GPU {i}", "ok", detail))
    return out


def _memory() -> list[Finding]:
    import torch

    out = []
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        out += _fits("GPU 0", free, 2)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable:"))
        available = int(line.split()[1]) * 1024
    # a policy on the CPU runs in float32
    return out + _fits("main memory", available, 4)


def _fits(place: str, free: int, size: int) -> list[Finding]:
    policy = BACKBONE_PARAMETERS * size + HEAD_PARAMETERS * 4
    everything = policy + TEXT_PARAMETERS * size
    have = f"{free / 2**30:.1f} GiB free"
    what, gib = f"{place}: released model", 2**30
    need, all_of_it = f"{policy / gib:.1f} GiB", f"{everything / gib:.1f} GiB"
    if free > everything:
        return [Finding(what, "ok", f"fits with its text encoder ({all_of_it} of {have})")]
    if free > policy:
        detail = f"fits without its text encoder ({need} of {have}; {all_of_it} with it): give prompt_embeds"
        return [Finding(what, "note", detail)]
    return [Finding(what, "note", f"does not fit ({need}; {have})")]


def _tiles() -> Finding:
    """Which table of block sizes Triton's kernels take."""
    from dit4dit.ops import tiles

    path = tiles.own_file()
    if path is None:
        return Finding(
            "tiles", "ok", "the package's own table (dit4dit tune --tiles measures one for this machine's GPU)"
        )
    try:
        own = tiles.own()
    except ConfigError as error:
        return Finding("tiles", "problem", str(error))
    columns = ", ".join(f"{op} {'/'.join(columns)}" for op, columns in own.items())
    return Finding(
        "tiles", "ok", f"{path} ({tiles.VARIABLE}) for {columns or 'nothing'}; the package's own for the rest"
    )


def _kernels() -> Finding:
    """Whether the GPU kernels need a compiler on this machine."""
    import torch

    from dit4dit.ops import launch
    from dit4dit.ops.aot import loader, manifest

    if torch.cuda.is_available():
        detail = loader.explain(launch.architecture(torch.device("cuda", torch.cuda.current_device())))
        return Finding("GPU kernels", "note" if detail.startswith("just in time") else "ok", detail)
    found = manifest.installed()
    if isinstance(found, str):
        return Finding("GPU kernels", "note", f"just in time: {found}")
    chips = ", ".join(f"{chip} ({len(kernels)})" for chip, kernels in found.kernels.items())
    return Finding(
        "GPU kernels", "ok", f"ahead of time for {chips}, by Triton {found.triton}; other sizes just in time"
    )


def _measured() -> list[Finding]:
    """For each kind of device, what `dit4dit tune` has found on it, and what of that does not count."""
    import torch

    from dit4dit.ops import dispatch, verdicts
    from dit4dit.ops.explanation import survey

    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    out: dict[str, Finding] = {}
    for device in (*gpus, torch.device("cpu")):
        name, found = verdicts.device_name(device), survey(device, dispatch.files())
        if name in out or (gpus and device.type == "cpu" and not found.counting and not found.ignored):
            continue  # two of one kind; or a processor beside a GPU, which runs nothing
        calls = [verdict for verdict in found.counting if verdict.op not in verdicts.SWITCHES]
        early = [v.chosen == "on" for v in found.counting if v.op == verdicts.PROGRAMMATIC_LAUNCH]
        if found.counting:
            days = sorted({verdict.made[:10] for verdict in found.counting})
            made = " to ".join(dict.fromkeys((days[0], days[-1])))
            detail = f"{len(calls)} calls of {len({verdict.op for verdict in calls})} ops on {name}, made {made}"
            detail += f"; programmatic launches in {sum(early)} of {len(early)} plans" if early else ""
        else:
            detail = f"{name}: {verdicts.NOT_YET}"
            if table := verdicts.shipped_for(device):
                detail += f"; until then {len(table['calls'])} calls as on {table['device']}"
        level = "ok" if found.counting else "note"
        if found.ignored:
            level, count = "note", sum(found.ignored.values())
            detail += f"; {count} files in {found.folder} are ignored: {found.why_ignored}; run dit4dit tune"
        out[name] = Finding("kernels measured here", level, detail)
    return list(out.values())


def _self_test() -> Finding:
    """One chunk of a small random model through the text encoder and the engine: do these versions work together?"""
    import torch

    try:
        from dit4dit.checkpoints.weights import random_model
        from dit4dit.engine import Engine
        from dit4dit.presets import preset

        config = preset("tiny").model
        engine = Engine(random_model(config, 0))
        size, z = config.latent_size(32, 32), config.vae.z_dim
        packs = [engine.pack(engine.model.embed(torch.zeros(1, 8, dtype=torch.long)))]
        posterior, latent = torch.randn(1, z, 1, *size), torch.randn(1, z, config.latent_frames, *size)
        action = torch.randn(1, config.head.action_horizon, config.head.action_dim)
        out = engine.sample(torch.zeros(1, 3, 32, 32), packs, torch.zeros(1, 1, 16), posterior, latent, action)
    except Exception as error:
        return Finding("self test", "problem", f"a small model does not run: {type(error).__name__}: {error}")
    finite = bool(out.isfinite().all())
    return Finding(
        "self test", "ok" if finite else "problem", "a small model runs" if finite else "a small model wrote NaN"
    )


def _ops() -> list[dict[str, Any]]:
    import torch

    import dit4dit.engine  # noqa: F401  makes the example of `action_ode`
    from dit4dit import ops

    found = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            found += [{"device": device, **asdict(explanation)} for explanation in ops.explain(device=device)]
        except ConfigError:  # a broken table of tiles, which is a finding of its own
            continue
    return found


def show(result: dict[str, Any]) -> str:
    """What the command prints."""
    rows = [[f["what"], f["level"], f["detail"]] for f in result["findings"]]
    ops_rows = [
        [
            o["op"],
            o["device"],
            o["chosen"] or "nothing",
            o["tiles"] or "",
            "; ".join(f"{k}: {v}" for k, v in o["refused"].items()),
        ]
        for o in result["ops"]
    ]
    verdict = "healthy" if result["healthy"] else "problems found"
    tables = [
        f"Python {result['python']} on {result['platform']}",
        table(["what", "level", "detail"], rows),
        table(["op", "device", "would run", "tiles", "passed over"], ops_rows),
    ]
    if measured := [[o["op"], o["device"], *_row(one)] for o in result["ops"] for one in o["measured"]]:
        header = ["op", "device", "call", "chosen", "ms", "runner-up", "ms", "measured"]
        tables.append(table(header, measured[:SHOWN], right=(4, 6)))
        if len(measured) > SHOWN:
            tables.append(f"and {len(measured) - SHOWN} more calls: --json FILE has them all")
    return "\n\n".join([*tables, verdict])


def _row(one: dict[str, Any]) -> list[str]:
    """Of a call that was measured."""
    second = one["runner_up"]
    times = [number(one["ms"].get(name), ".4f") for name in (one["chosen"], second)]
    return [one["call"], one["chosen"], times[0], second or "-", times[1], one["shipped"] or "here"]
