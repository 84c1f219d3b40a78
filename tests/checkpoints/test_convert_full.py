"""A conversion onto a disk that is full, or becomes full: one line with what is needed and free, and no half checkpoint."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_disk import small_disk

from dit4dit.checkpoints import native
from dit4dit.errors import CheckpointError

NEEDED = 4_400_000
"""Bytes of the golden model's weights, about."""


@pytest.fixture(scope="module")
def own(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("own") / "own"
    native.to_own(golden_dir / "libero_tiny", target)
    return target


CONVERSIONS: dict[str, Callable[[Path, Path, Path], None]] = {
    "native": lambda run, own, target: native.to_own(run, target),
    "published": lambda run, own, target: native.to_published(own, target),
}


@pytest.fixture(params=CONVERSIONS)
def convert(request: pytest.FixtureRequest, golden_dir: Path, own: Path) -> Callable[[Path], None]:
    return lambda target: CONVERSIONS[request.param](golden_dir / "libero_tiny", own, target)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def test_a_full_disk_is_seen_before_anything_is_written(
    convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "write_shards", lambda *_: pytest.fail("wrote"))
    monkeypatch.setattr("torch.save", lambda *_: pytest.fail("wrote"))
    with small_disk(tmp_path / "disk", 2**20) as disk:
        with pytest.raises(CheckpointError) as caught:
            convert(disk / "new")
        assert list(disk.iterdir()) == []
    found = re.fullmatch(
        rf"{disk}/new: not written \(No space left on device; 1\.0 MB free in {disk}, (\d\.\d) MB needed\); nothing of it stays; "
        "free space, or choose another folder",
        str(caught.value),
    )
    assert found
    assert float(found[1]) * 1e6 == pytest.approx(NEEDED, rel=0.05)


def test_a_disk_that_becomes_full(convert, own: Path, golden_dir: Path, tmp_path: Path) -> None:
    """There is room for the weights and not for what comes with them."""
    weights = native._bytes(native.open_checkpoint(own).tensors)
    with small_disk(tmp_path / "disk", weights + 3 * 4096) as disk:
        with pytest.raises(CheckpointError, match=rf"^{disk}/new: not written \(.* free in {disk}, \d\.\d MB needed\)"):
            convert(disk / "new")
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_write_that_fails_half_way(convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write, copy = Path.write_text, shutil.copyfile

    def refuse(file: Path) -> None:
        if file.name in ("checksums.json", "config.yaml"):
            raise OSError(code, os.strerror(code), str(file))

    def writing(self: Path, *given, **named) -> int:
        refuse(self)
        return write(self, *given, **named)

    def copying(source: str, target: str, **named) -> str:
        refuse(Path(target))
        return copy(source, target, **named)

    monkeypatch.setattr(Path, "write_text", writing)
    monkeypatch.setattr(shutil, "copyfile", copying)
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}/new: not written \({os.strerror(code)}.*nothing of it stays"
    ):
        convert(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_read_only(convert, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**25, "ro") as disk:
        with pytest.raises(CheckpointError, match=rf"^{disk}/new: not written \(Read-only file system\)"):
            convert(disk / "new")
        assert list(disk.iterdir()) == []


def test_the_command_ends_in_one_line(main, golden_dir: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        code, _, shown = main("convert", golden_dir / "libero_tiny", disk / "new")
    assert code == 2
    assert "not written (No space left on device; 1.0 MB free in" in shown
    assert "Traceback" not in shown
