"""Files and folders for which there is no room, and other reasons for which a disk takes nothing: one line, and nothing stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from small_disk import small_disk

from dit4dit.engine import Calibration, PackFolder, PromptPack
from dit4dit.errors import CheckpointError, DataError, InputError
from dit4dit.files.atomic import size_text, whole_file, whole_folder
from dit4dit.files.json_files import write_json
from dit4dit.training.caches import write_aside

MUCH = 300_000


def pack(folder: Path) -> None:
    keys = torch.zeros(1, 1, MUCH // 64, 16)
    PackFolder(folder, "key", tuple(keys.shape), keys.dtype, "cpu").store("go", PromptPack(keys, keys.clone()))


def weights(folder: Path) -> None:
    from safetensors.torch import save_file

    with whole_folder(folder / "checkpoint", CheckpointError, "free space", needs=MUCH) as partial:
        save_file({"a": torch.zeros(MUCH)}, partial / "model.safetensors")


WRITERS = {
    "JSON": (lambda folder: write_json(folder / "a.json", ["x" * MUCH]), InputError),
    "calibration": (lambda folder: Calibration("w", 1, {"x" * MUCH: 1.0}).save(folder / "a.json"), InputError),
    "prompt pack": (pack, InputError),
    "training cache": (lambda folder: write_aside(folder / "a", {"a": torch.zeros(MUCH)}), CheckpointError),
    "folder": (weights, CheckpointError),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_is_full(tmp_path: Path, what: str) -> None:
    write, kind = WRITERS[what]
    with small_disk(tmp_path / "disk", 128 * 1024) as disk:
        with pytest.raises(kind) as caught:
            write(disk)
        assert list(disk.iterdir()) == []
    message = str(caught.value)
    assert "not written (" in message
    assert "No space left on device" in message
    assert f"131.1 kB free in {disk}" in message
    assert (f", {size_text(MUCH)} needed" in message) == (what == "folder")
    assert "\n" not in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_disk_says_is_in_the_line(tmp_path: Path, what: str, code: int) -> None:
    whole = {"file": whole_file, "folder": whole_folder}[what]

    def write() -> None:
        with whole(tmp_path / "a", InputError, "free space") as partial:
            (partial if what == "file" else partial / "b").write_text("half")
            raise OSError(code, os.strerror(code), str(partial))

    with pytest.raises(InputError) as caught:
        write()
    assert str(caught.value).startswith(f"{tmp_path}/a: not written ({os.strerror(code)}")
    assert str(caught.value).endswith("); free space")
    assert ("free in" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(InputError, match=r"a.json: not written \(File too large\); choose another file"):
            write_json(tmp_path / "a.json", ["x" * MUCH])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 128 * 1024, "ro") as disk:
        for write, kind in WRITERS.values():
            with pytest.raises(
                kind, match=r"not written \(Read-only file system\)|not written .*Read-only file system"
            ):
                write(disk)


def test_nothing_is_begun_where_there_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with (
        pytest.raises(CheckpointError) as caught,
        whole_folder(tmp_path / "deep" / "er" / "a", CheckpointError, "free space", needs=7_400_000_000),
    ):
        pytest.fail("began")
    reason = "not written (No space left on device; 5.0 kB free in "
    assert str(caught.value) == f"{tmp_path}/deep/er/a: {reason}{tmp_path}/deep/er, 7.4 GB needed); free space"
    with whole_folder(tmp_path / "a", CheckpointError, "free space", needs=5000) as partial:
        (partial / "b").write_text("")
    assert (tmp_path / "a" / "b").is_file()


def test_a_folder_that_cannot_be_copied_whole_says_one_file_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to("nowhere")
    with (
        pytest.raises(DataError) as caught,
        whole_folder(tmp_path / "a", DataError, "try again") as partial,
    ):
        shutil.copytree(source, partial / "source")
    assert str(caught.value).startswith(f"{tmp_path}/a: not written ({source}/link: ")
    assert str(caught.value).count(str(source)) < 3


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (27_000_000, "27.0 MB"), (12_345_678_901, "12.3 GB")],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert size_text(count) == text
