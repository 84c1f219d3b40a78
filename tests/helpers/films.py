"""Videos whose frames show their number, at any presentation times, and a stand-in for torchcodec."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

BLOCK, BITS = 16, 8


def numbered(number: int) -> np.ndarray:
    """uint8 [32, 64, 3]: eight blocks, black or white, that no lossy codec can confuse."""
    bits = np.array([(number >> i) & 1 for i in range(BITS)], dtype=np.uint8).reshape(2, 4)
    return np.repeat(np.kron(bits * 255, np.ones((BLOCK, BLOCK), np.uint8))[..., None], 3, axis=2)


def shown(picture: np.ndarray) -> int:
    blocks = picture.mean(axis=2).reshape(2, BLOCK, 4, BLOCK).mean(axis=(1, 3)).reshape(-1)
    return sum(1 << i for i, value in enumerate(blocks) if value > 127)


def film(
    path: Path,
    ticks: Sequence[int],
    base: Fraction,
    *,
    numbers: Iterable[int] | None = None,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    key_frames: int = 0,
) -> Path:
    """A video whose i-th frame shows the i-th of `numbers` (its position) at `ticks[i] * base` seconds; the first `key_frames`
    are key frames, so that none of them is reordered.
    """
    import av

    from dit4dit.data.writer_video import scheduling_kept

    path.parent.mkdir(parents=True, exist_ok=True)
    with scheduling_kept(), av.open(str(path), "w", options=dict(container or {})) as target:
        chosen = {"g": "9", "bf": "2", "preset": "ultrafast"} if options is None else dict(options)
        stream = target.add_stream(codec, rate=30, options=chosen)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.time_base = base
        for time, number in zip(ticks, numbers or range(len(ticks)), strict=True):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time, base
            if number < key_frames:
                frame.pict_type = av.video.frame.PictureType.I
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def boxes(data: bytearray, kind: bytes) -> int:
    """Where the content of the only box of this kind begins."""
    assert data.count(kind) == 1
    return data.index(kind) + 4


class VideoDecoder:
    """As much of torchcodec.decoders.VideoDecoder as its documentation promises and the package uses, over PyAV."""

    def __init__(self, source: str, *, dimension_order: str, num_ffmpeg_threads: int, seek_mode: str) -> None:
        import av

        assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
        with av.open(source) as container:
            frames = [
                (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
            ]
        self.shown = sorted(frames, key=lambda frame: frame[0])

    def get_frames_at(self, indices: list[int]) -> types.SimpleNamespace:
        import torch

        if not all(-len(self.shown) <= index < len(self.shown) for index in indices):
            raise IndexError(f"Invalid frame index in {indices}")
        chosen = [self.shown[index] for index in indices]
        return types.SimpleNamespace(
            data=torch.from_numpy(np.stack([picture for _, picture in chosen])),
            pts_seconds=torch.tensor([float(time) for time, _ in chosen], dtype=torch.float64),
        )


def install_torchcodec(monkeypatch) -> bool:
    """torchcodec, or the stand-in where it is not installed; False for the stand-in."""
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError:
        whole, part = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
        whole.decoders, part.VideoDecoder = part, VideoDecoder  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchcodec", whole)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", part)
        return False
    return True
