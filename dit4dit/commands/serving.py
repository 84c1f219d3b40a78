"""`dit4dit serve`: a policy behind a WebSocket."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dit4dit.commands.loading import PolicyToLoad
from dit4dit.commands.shell import check_outputs, read_lines, say
from dit4dit.errors import ConfigError, Dit4DitError, InputError, require, shown
from dit4dit.progress import bar
from dit4dit.serving.settings import Settings

if TYPE_CHECKING:
    from socket import socket

    from dit4dit.policy.policy import Policy
    from dit4dit.serving.server import Server

Pictures = tyro.conf.UseAppendAction[tuple[str, ...]]


def serve(
    policy: PolicyToLoad,
    host: str = Settings.host,
    port: int = Settings.port,
    steps: int | None = None,
    quantization: Literal["fp8"] | None = None,
    calibration: Path | None = None,
    packs: Path | None = None,
    instructions: Path | None = None,
    warm_up: bool = False,
    picture: Pictures = (),
    max_batch: int = Settings.max_batch,
    batch_window_ms: float = Settings.batch_window_ms,
    max_clients: int = Settings.max_clients,
    max_queued: int = Settings.max_queued,
    max_frame_mib: int = Settings.max_frame_bytes // 2**20,
    idle_timeout: float | None = Settings.idle_timeout_s,
    ping_timeout: float | None = Settings.ping_timeout_s,
    seed: int | None = Settings.seed,
    api_key_file: Path | None = None,
    insecure: bool = False,
    json: Path | None = None,
) -> int:
    """Serve a checkpoint to robots and simulators (the published WebSocket dialect, with actions in robot units beside it).

    Args:
        policy: the policy.
        host: address to listen at; any that others can reach needs a key.
        port: 0 takes a free one.
        steps: Euler steps (1, 2, 4, 8) instead of the checkpoint's number; changes the result.
        quantization: fp8 multiplies the backbone's matrices in 8-bit floats; changes the result.
        calibration: file of dit4dit calibrate, for and only for fp8.
        packs: folder of dit4dit pack: only its instructions can be used, and no text encoder is loaded.
        instructions: text file, one instruction a line, that are encoded before the first request.
        warm_up: run a pass of each batch size before the first request.
        picture: VIEW=HEIGHTxWIDTH of the robot's own pictures, for --warm-up; once per view, the model's size when not given.
        max_batch: chunks in one pass, in which clients take turns; 1 keeps each client's bits independent of the others.
        batch_window_ms: how long a pass waits for other connected clients.
        max_clients: clients connected at once; more are refused.
        max_queued: requests that wait; more are refused.
        max_frame_mib: largest request; see serving/settings.py for what the memory must hold.
        idle_timeout: end after so many seconds without a message.
        ping_timeout: cut off a client that answers no ping for so many seconds (a simulator may block); None never.
        seed: of every connection's noise until it resets; a fresh one each when not given.
        api_key_file: file with the key that clients must send; without it, the variable DIT4DIT_API_KEY.
        insecure: serve any address without a key.
        json: write the statistics to this file at the end.
    """
    for module in ("msgpack", "websockets"):
        require(module, "serve")
    from dit4dit.checkpoints.summary import checkpoint_name
    from dit4dit.evaluation.identity import checkpoint_hash
    from dit4dit.serving.backend import PolicyBackend
    from dit4dit.serving.server import Server
    from dit4dit.serving.settings import find_key

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it has a warning for each byte that is sent to who is gone
    if not 1 <= max_frame_mib <= 2048:
        raise InputError(f"--max-frame-mib: expected 1 to 2048, got {max_frame_mib}")
    try:
        settings = Settings(
            host=host,
            port=port,
            api_key=find_key(api_key_file),
            insecure=insecure,
            max_batch=max_batch,
            batch_window_ms=batch_window_ms,
            max_clients=max_clients,
            max_queued=max_queued,
            max_frame_bytes=max_frame_mib * 2**20,
            idle_timeout_s=idle_timeout,
            ping_timeout_s=ping_timeout,
            seed=seed,
        )
    except ConfigError as error:
        raise ConfigError(_as_option(str(error))) from None
    check_outputs(json=json)
    pictures = dict(_size(text) for text in picture)
    if pictures and not warm_up:
        raise InputError("--picture says what --warm-up prepares for; give both")
    words = [] if instructions is None else read_lines(instructions)
    with settings.listen() as bound:
        loaded = policy.load(
            steps=steps, quantization=quantization, calibration=calibration, packs=packs, text_encoder=packs is None
        )
        hashed = checkpoint_hash(policy.checkpoint, policy.backbone)
        server = Server(PolicyBackend(loaded, checkpoint_name(policy.checkpoint), hashed), settings)
        _prepare(loaded, words, max_batch if warm_up else 0, pictures)
        _run(server, loaded.embodiment.name, bound, json)
    return 0


def _run(server: Server, name: str, bound: socket, json: Path | None) -> None:
    """Serve until the end, then leave the statistics.

    A thread that the end finds in a pass, an encoding or a large request may need minutes, or never be done. Python would wait
    for it; where there is one, the process ends here, and the operating system takes the rest.
    """
    import asyncio

    from dit4dit.files.json_files import write_json

    host, port = bound.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    log, code = logging.getLogger("dit4dit.serving"), 0
    try:
        try:
            asyncio.run(server.run(bound, lambda: say(f"serving {name} at ws://{where}"), signals=True))
        finally:
            log.info("%s", server.statistics.line())
            if json is not None:
                write_json(json, server.statistics.summary())
    except Exception as error:
        if not server.left_behind:
            raise
        log.error("%s", error, exc_info=not isinstance(error, Dit4DitError))
        code = 1
    if server.left_behind:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)


def _prepare(policy: Policy, words: list[str], batches: int, pictures: dict[str, tuple[int, int]]) -> None:
    """Encode the words; for raw and for joined pictures make a plan of each batch size; then freeze what is there: the process
    is the server's own, and no full garbage collection shall hold up a reply.
    """
    from dit4dit.policy import garbage

    with bar("instructions", len(words), active=bool(words)) as done:
        for line in words:
            policy.prepare(line).result()
            done.update()
    height, width = policy.config.image_size
    joined = (height, width * len(policy.embodiment.views))
    # the largest first: graphs of smaller ones find room in what it leaves of its memory
    with bar("batch sizes", batches, active=batches > 0) as done:
        for batch in range(batches, 0, -1):
            policy.warm_up(pictures, batch=batch)
            policy.warm_up(batch=batch, joined=joined)
            done.update()
    garbage.freeze()


def _as_option(message: str) -> str:
    """What `Settings` says of a field, about the option that sets it."""
    name, colon, rest = message.partition(":")
    if name not in (field.name for field in fields(Settings)):
        return message
    return f"--{name.removesuffix('_s').replace('_', '-')}{colon}{rest}"


def _size(text: str) -> tuple[str, tuple[int, int]]:
    view, _, size = text.partition("=")
    height, _, width = size.partition("x")
    if not view or not height.isdecimal() or not width.isdecimal():
        raise InputError(f"--picture {shown(text)}: expected VIEW=HEIGHTxWIDTH, such as wrist_image=480x640")
    return view, (int(height), int(width))
