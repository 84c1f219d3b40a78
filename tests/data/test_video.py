"""Frames by number, from videos whose frames show their number."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import film, install_torchcodec, numbered, shown

from dit4dit.data.frame_times import read_header
from dit4dit.data.video import PyAvDecoder, TorchcodecDecoder, VideoReader
from dit4dit.data.writer import VideoCodec, VideoFile
from dit4dit.errors import ConfigError, DataError

CODECS = {
    "default": VideoCodec(),
    "long gop, B-frames": VideoCodec(gop=60, options={"bf": "3"}),
    "open gop": VideoCodec(gop=12, options={"x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
    "one key frame": VideoCodec(gop=1000),
    "av1": VideoCodec(name="libsvtav1", crf=30, options={"preset": "12"}),
    "lossless": VideoCodec.lossless(),
}


def write(path: Path, count: int = 90, codec: VideoCodec = CODECS["default"], fps: float = 10) -> Path:
    video = VideoFile(path, fps, (32, 64), codec)
    video.append(np.stack([numbered(i) for i in range(count)]))
    video.close()
    return path


@pytest.mark.parametrize("name", CODECS)
def test_the_exact_frame(name: str, tmp_path: Path) -> None:
    decoder = PyAvDecoder(write(tmp_path / "v.mp4", codec=CODECS[name]))
    assert [shown(x) for x in decoder.frames(range(90))] == list(range(90))
    for numbers in ([0], [89], [13, 15, 17, 19], [40, 40, 7, 89, 0], [59, 60, 61]):
        assert [shown(x) for x in decoder.frames(numbers)] == numbers


@pytest.mark.parametrize("name", ["default", "open gop", "av1"])
def test_torchcodec_gives_the_same_frames(name: str, tmp_path: Path, monkeypatch) -> None:
    install_torchcodec(monkeypatch)
    reader = VideoReader("torchcodec")
    path = write(tmp_path / "v.mp4", codec=CODECS[name])
    assert [shown(x) for x in reader.decoder(path).frames([40, 40, 7, 89, 0])] == [40, 40, 7, 89, 0]
    for number in (90, -1):
        with pytest.raises(DataError, match=rf"v\.mp4: frame {number}: the video has 90 frames"):
            reader.decoder(path).frames([3, number])


def test_torchcodec_is_not_believed_about_numbers(tmp_path: Path, monkeypatch) -> None:
    """Its frame numbers are its own; where they are not those of the video's times, that is an error."""
    install_torchcodec(monkeypatch)
    decoder = VideoReader("torchcodec").decoder(write(tmp_path / "v.mp4"))
    assert isinstance(decoder, TorchcodecDecoder)
    right = decoder.decoder.get_frames_at

    class Shifted:
        get_frames_at = staticmethod(lambda indices: right([index + (index > 5) for index in indices]))

    decoder.decoder = Shifted()
    assert [shown(x) for x in decoder.frames([5, 0])] == [5, 0]
    message = r"v\.mp4: frame 6: torchcodec gave the one of 0\.7000 s, its time is 0\.6000 s; use the backend pyav"
    with pytest.raises(DataError, match=message):
        decoder.frames([5, 6])


def test_uneven_times_do_not_matter(tmp_path: Path) -> None:
    """A camera that dropped frames: the i-th frame is the i-th one, not the one nearest i / fps."""
    times = np.cumsum(np.random.default_rng(0).integers(1, 7, 40)).tolist()
    decoder = PyAvDecoder(film(tmp_path / "v.mp4", times, Fraction(1, 90)))
    assert [shown(x) for x in decoder.frames(range(40))] == list(range(40))
    assert [shown(x) for x in decoder.frames([39, 3, 20])] == [39, 3, 20]


def test_the_header(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "v.mp4", count=7, fps=12.5))
    assert (header.frames, header.height, header.width) == (7, 32, 64)
    assert header.times.seconds.tolist() == pytest.approx([0.08 * i for i in range(7)])


def remux_with_index_first(source: Path, target: Path) -> Path:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def test_damage_names_the_file(tmp_path: Path) -> None:
    last = write(tmp_path / "last.mp4", codec=CODECS["lossless"])
    whole = remux_with_index_first(last, tmp_path / "first.mp4").read_bytes()
    cases = {
        "missing": (None, "no such file"),
        "no index": (last.read_bytes()[: len(whole) * 3 // 4], "unreadable video"),
        "cut off": (whole[: len(whole) * 3 // 4], "truncated: its index reaches to byte"),
        "text": (b"not a video" * 100, "unreadable video"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_header(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value), name
    with pytest.raises(DataError, match=r"first\.mp4: frame 90: the video has 90 frames"):
        PyAvDecoder(tmp_path / "first.mp4").frames([3, 90])


def test_a_hole_in_the_data_is_an_error_and_the_rest_still_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video = VideoFile(tmp_path / "v.mp4", 10, (64, 64), VideoCodec(gop=10))
    video.append(rng.integers(0, 256, (60, 64, 64, 3), dtype=np.uint8))
    video.close()
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = rng.integers(0, 256, 4000, dtype=np.uint8).tobytes()
    (tmp_path / "v.mp4").write_bytes(data)
    decoder = PyAvDecoder(tmp_path / "v.mp4")
    with pytest.raises(DataError, match=r"v\.mp4: frame \d+: (cannot be decoded|the decoder did not give it)"):
        decoder.frames(range(60))
    assert decoder.frames([0, 1]).shape == (2, 64, 64, 3)


CHILD = """
import pickle, sys
reader, path = pickle.load(sys.stdin.buffer)
pickle.dump(list(reader.decoder(path).frames([5, 6])), sys.stdout.buffer)
"""


def test_a_reader_keeps_few_files_open_and_can_be_sent_to_a_process(tmp_path: Path) -> None:
    reader = VideoReader(keep=2)
    paths = [write(tmp_path / f"{i}.mp4", count=10) for i in range(4)]
    for path in (*paths, *paths):
        assert shown(reader.decoder(path).frames([9])[0]) == 9
        assert len(reader._open) <= 2
    assert not pickle.loads(pickle.dumps(reader))._open
    # away from the source tree, which would be taken for the package
    given = pickle.dumps((reader, paths[0]))
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, check=True, cwd=tmp_path)
    assert [shown(x) for x in pickle.loads(done.stdout)] == [5, 6]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected pyav or torchcodec, got 'decord'"):
        VideoReader("decord")  # type: ignore[arg-type]


def test_decoding_starts_no_threads(tmp_path: Path) -> None:
    """Threads would not survive the fork that makes a worker, and would be one per core and open file."""
    reader = VideoReader()
    before = len(list(Path("/proc/self/task").iterdir()))
    for i, name in enumerate(("default", "av1", "lossless")):
        path = write(tmp_path / f"{i}.mp4", count=20, codec=CODECS[name])
        reader.decoder(path).frames(range(20))
    assert len(list(Path("/proc/self/task").iterdir())) == before
    assert len(reader._open) == 3


@pytest.mark.parametrize("name", ["default", "av1"])
def test_a_forked_process_opens_its_own_files(name: str, tmp_path: Path) -> None:
    """A worker of a run that has read samples itself, as an evaluation does. It frees what it inherits, which would hang if the
    decoder had threads.
    """
    reader, path = VideoReader(), write(tmp_path / "v.mp4", count=10, codec=CODECS[name])
    inherited = weakref.ref(reader.decoder(path))
    assert shown(reader.decoder(path).frames([3])[0]) == 3

    def child() -> None:
        own = reader.decoder(path)
        assert inherited() is None
        assert own is reader.decoder(path)
        assert shown(own.frames([7])[0]) == 7

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    assert reader.decoder(path) is inherited()
    assert shown(reader.decoder(path).frames([5])[0]) == 5


AV1 = """
import os, sys
from pathlib import Path
import numpy as np
from dit4dit.data.writer import VideoCodec, VideoFile
def policies():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
before = policies()
video = VideoFile(Path("v.mp4"), 10, (64, 64), VideoCodec(name="libsvtav1", crf=30, options={"preset": "12"}))
video.append(np.zeros((40, 64, 64, 3), np.uint8))
running, threads = policies(), len(os.listdir("/proc/self/task"))
video.close()
print([sorted(before), sorted(running), sorted(policies())], threads)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling policies are Linux's")
def test_encoding_leaves_the_scheduling_as_it_is(tmp_path: Path) -> None:
    """SVT-AV1 makes its caller real-time where it runs as root. In a child: this process would stay so, and starve the others."""
    done = subprocess.run([sys.executable, "-c", AV1], capture_output=True, text=True, check=True, cwd=tmp_path)
    policies, _, threads = done.stdout.rpartition(" ")
    assert policies == str([[os.sched_getscheduler(0)]] * 3)  # a child has its parent's
    assert int(threads) > 1, "the encoder's own threads"
