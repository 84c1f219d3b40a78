"""Checkpoints in which something is of another kind than its name says: a folder, a file, a dead link, or closed to this user."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import native
from dit4dit.errors import CheckpointError

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def own(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("own") / "own"
    native.to_own(golden_dir / "libero_tiny", target)
    return target


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ck, "_download", lambda *_: pytest.fail("asked the hub"))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def file(path: Path) -> None:
    remove(path)
    path.write_text("x")


def dead(path: Path) -> None:
    remove(path)
    path.symlink_to("/nowhere")


def pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def device(path: Path) -> None:
    remove(path)
    path.symlink_to("/dev/zero")


GONE = "is a link to /nowhere, which is not there"
A_FILE = "is a folder; expected a file"
ENDLESS = "is a pipe, a socket or a device; expected a file"
OWN: list[tuple[Change, str, str]] = [
    *((folder, name, A_FILE) for name in ("config.json", "statistics.json", "model.safetensors")),
    *((dead, name, GONE) for name in ("config.json", "statistics.json", "model.safetensors", "vae", "tokenizer")),
    *((file, name, "is a file; expected a folder") for name in ("text_encoder", "vae", "tokenizer")),
    (folder, "vae/model.safetensors", A_FILE),
    *((change, name, ENDLESS) for change in (pipe, device) for name in ("statistics.json", "vae/model.safetensors")),
]
PUBLISHED: list[tuple[Change, str, str]] = [
    *((folder, name, A_FILE) for name in ("config.yaml", "dataset_statistics.json")),
    *(
        (dead, name, GONE)
        for name in ("config.yaml", "dataset_statistics.json", "checkpoints/steps_10_pytorch_model.pt")
    ),
    *((change, "dataset_statistics.json", ENDLESS) for change in (pipe, device)),
    *((change, "checkpoints/steps_10_pytorch_model.pt", ENDLESS) for change in (pipe, device)),
]


@pytest.mark.parametrize(("change", "name", "reason"), OWN)
def test_the_native_format(own: Path, tmp_path: Path, change: Change, name: str, reason: str) -> None:
    run = Path(shutil.copytree(own, tmp_path / "run"))
    change(run / name)
    with pytest.raises(CheckpointError) as caught:
        ck.open_checkpoint(run)
    assert str(caught.value).startswith(f"{run / name}: {reason}"), str(caught.value)


@pytest.mark.parametrize(("change", "name", "reason"), PUBLISHED)
def test_a_published_run(libero_run: Path, change: Change, name: str, reason: str) -> None:
    change(libero_run / name)
    with pytest.raises(CheckpointError) as caught:
        ck.open_checkpoint(libero_run)
    assert str(caught.value).startswith(f"{libero_run / name}: {reason}"), str(caught.value)


def test_what_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors: neither config.yaml .* nor config.json"):
        ck.open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match=r"^checkpoint '.*link': is a link to .*gone, which is not there; give what"
    ):
        ck.open_checkpoint(tmp_path / "link")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(CheckpointError, match=r"^checkpoint '.*circle': is a link to .*circle"):
        ck.open_checkpoint(tmp_path / "circle")


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody may read `path`, and this user is one whom that stops."""
    root = os.geteuid() == 0
    mode = path.stat().st_mode
    path.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no such users here")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", r"config.json: cannot be opened \(Permission denied\); check its permissions"),
        ("model.safetensors", r"model.safetensors: cannot be opened \(Permission denied\); check its permissions"),
        ("statistics.json", r"statistics.json: cannot be opened \(Permission denied\)"),
        ("vae", r"vae.*Permission denied.*permissions"),
        ("", r"Permission denied.*check.* permissions"),
    ],
)
def test_what_this_user_may_not_read(own: Path, name: str, words: str) -> None:
    place = Path(tempfile.mkdtemp())  # pytest's folders are closed to everybody else
    try:
        place.chmod(0o755)
        run = Path(shutil.copytree(own, place / "run"))
        ck.open_checkpoint(run)  # what it imports is there
        with closed(run / name), pytest.raises(CheckpointError, match=words):
            ck.open_checkpoint(run)
    finally:
        shutil.rmtree(place)
