"""A recording that is interrupted, killed, or out of disk: episodes that had ended are whole, others are not there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recordings import WRIST, episode, files, record

from dit4dit.data import writer as writer_module
from dit4dit.data import writer_meta
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.writer import VideoFile, Writer
from dit4dit.errors import DataError, InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_an_open_episode_is_not_closed_over(tmp_path: Path) -> None:
    words = r"episode 1 is open with 2 frames; keep it with end_episode\(\) or discard_episode\(\)"
    writer = Writer(tmp_path / "set", 10)
    record(writer, 0, 2)
    writer.end_episode()
    record(writer, 1, 2)
    with pytest.raises(InputError, match=words):
        writer.add({"action": np.zeros(3)}, {}, "go")
    with pytest.raises(InputError, match=words + r", then close\(\)"), writer:
        pass
    assert not (tmp_path / "set/meta/info.json").exists()
    writer.end_episode()
    writer.close()
    writer.close()
    assert [e.length for e in LeRobot.open(tmp_path / "set").meta.episodes] == [2, 2]
    with pytest.raises(InputError, match="is closed; record further episodes into another folder"):
        writer.append(*episode(0, 1)[0])


def test_an_exception_in_the_block_leaves_what_had_ended(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "set", 10, version="v3.0")
    record(writer, 0, 2)
    writer.end_episode()
    record(writer, 1, 2)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert not (tmp_path / "set/meta/info.json").exists()
    assert {file.split("/")[1] for file in files(tmp_path / "set")} == {"episode_000000"}
    writer.close()
    assert [e.length for e in LeRobot.open(tmp_path / "set").meta.episodes] == [2]


def test_a_frame_that_was_written_in_part_can_only_be_discarded(tmp_path: Path, monkeypatch) -> None:
    """A full disk in the second camera would leave cameras of unequal lengths."""
    write = VideoFile.append

    def full(self, images):
        if WRIST in str(self.path):
            raise OSError(28, "No space left on device")
        write(self, images)

    with Writer(tmp_path / "set", 10) as writer:
        record(writer, 0, 2)
        monkeypatch.setattr(VideoFile, "append", full)
        with pytest.raises(OSError, match="No space left"):
            record(writer, 1, 1)
        monkeypatch.undo()
        for call in (writer.end_episode, lambda: record(writer, 1, 1)):
            with pytest.raises(InputError, match=r"was written in part; discard_episode\(\)"):
                call()
        writer.discard_episode()
        record(writer, 2, 3)
        writer.end_episode()
    assert [e.length for e in LeRobot.open(tmp_path / "set").meta.episodes] == [3]


def test_an_episode_whose_end_fails_can_only_be_discarded(tmp_path: Path, monkeypatch) -> None:
    """And leaves no task and no number behind."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with Writer(tmp_path / "set", 10) as writer:
        record(writer, 1, 2)
        monkeypatch.setattr(writer_module, "table", full)
        with pytest.raises(OSError, match="No space left"):
            writer.end_episode()
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"was written in part; discard_episode\(\)"):
            writer.end_episode()
        writer.discard_episode()
        record(writer, 2, 3)
        writer.end_episode()
    data = LeRobot.open(tmp_path / "set")
    assert ([e.length for e in data.meta.episodes], dict(data.meta.tasks)) == ([3], {0: "task 2"})


FULL = {
    "rows": ("v3.0", pq, "write_table"),
    "videos": ("v3.0", writer_module, "join"),
    "meta": ("v2.1", writer_meta, "write"),
    "info": ("v2.0", Path, "write_text"),
    "info of v3.0": ("v3.0", Path, "write_text"),
    "info at its place": ("v2.1", Path, "replace"),
}


@pytest.mark.parametrize("step", FULL)
def test_a_disk_that_was_full_while_closing(tmp_path: Path, monkeypatch, step: str) -> None:
    """Closing again is enough, and until then it is no data set."""
    version, where, name = FULL[step]
    write = getattr(where, name)

    def full(*given, **options):
        if where is Path and "info.json" not in given[0].name:
            return write(*given, **options)
        if name == "write_text":
            write(given[0], "{")
        raise OSError(28, "No space left on device")

    root = tmp_path / "set"
    writer = Writer(root, 10, version=version, episodes_per_file=5)
    kept = []
    for number, length in ((0, 3), (1, 2)):
        kept.append(record(writer, number, length))
        writer.end_episode()
    monkeypatch.setattr(where, name, full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    monkeypatch.undo()
    assert not (root / "meta/info.json").exists()
    with pytest.raises(DataError, match="a recording that was not closed"):
        LeRobot.open(root)
    writer.close()
    assert not (root / ".recording").exists()
    data = LeRobot.open(root)
    for i, frames in enumerate(kept):
        np.testing.assert_array_equal(
            data.column("observation.count", i).ravel(), [f[0]["observation.count"] for f in frames]
        )
        assert data.pictures(WRIST, i, range(len(frames))).shape == (len(frames), 8, 8, 3)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from recordings import record
from dit4dit.data.writer import Writer

writer = Writer(Path(sys.argv[1]), 10, version=sys.argv[2])
for number in range(2):
    record(writer, number, 4)
    writer.end_episode()
record(writer, 2, 3)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_killed_recording_says_so_and_keeps_ended_episodes(tmp_path: Path, version: str) -> None:
    import av
    from pyarrow import parquet

    root = tmp_path / "set"
    words = [sys.executable, "-c", KILLED, str(root), version, str(Path(__file__).parents[1] / "helpers")]
    assert subprocess.run(words, check=False, cwd=tmp_path).returncode == -signal.SIGKILL
    whole = root / ".recording" if version == "v3.0" else root
    for number in range(2):
        rows = [file for file in whole.rglob("*.parquet") if f"episode_{number:06d}" in str(file)]
        assert [parquet.read_table(file).num_rows for file in rows] == [4]
        videos = [file for file in whole.rglob("*.mp4") if f"episode_{number:06d}" in str(file)]
        assert len(videos) == 2
        for file in videos:
            with av.open(str(file)) as container:
                assert len(list(container.decode(video=0))) == 4
    with pytest.raises(DataError, match=r"a recording that was not closed, or a copy in part"):
        LeRobot.open(root)
    with pytest.raises(InputError, match="of a recording that was not closed; choose another folder"):
        Writer(root, 10)
