"""Videos of episodes: h264, with a border that says how the episode stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError

Picture = NDArray[np.uint8]

MIN_SIDE = 256  # px; smaller pictures are magnified by whole numbers, so that they stay crisp
BORDER = 8  # px
RUNNING, SUCCESS, FAILURE, ERROR = (150, 150, 150), (40, 160, 70), (200, 40, 40), (240, 150, 20)
LAST_SECONDS = 1.0


class Video:
    """One video, written as the pictures come.

    The border is grey while the episode runs and green from the success on; `close` adds a second of the last picture, green,
    red (no success) or orange (an error, not a failure). Both raise InputError where the file cannot be written, as on a full
    disk; after that the video is given up.
    """

    def __init__(self, path: Path, control_hz: float) -> None:
        """path: of the finished file; the folder must be there."""
        self._path, self._rate = path, Fraction(control_hz).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None
        self._last: Picture | None = None
        self._won = False

    def add(self, picture: Picture, success: bool = False) -> None:
        """One more picture, uint8 [H, W, 3], the same size as those before."""
        self._won = self._won or success
        self._last = picture
        self._write(framed(picture, SUCCESS if self._won else RUNNING))

    def close(self, success: bool | None) -> None:
        """Finish the file; success None: the episode ended in an error."""
        if self._last is not None:
            last = framed(self._last, ERROR if success is None else SUCCESS if success else FAILURE)
            for _ in range(round(LAST_SECONDS * self._rate)):
                self._write(last)
        if self._container is not None:
            with self._told():
                for packet in self._stream.encode():
                    self._container.mux(packet)
                self._container.close()
                self._container = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of FFmpeg as InputError; nothing more is written then."""
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self._container = self._stream = self._last = None
            raise InputError(
                f"{self._path}: the video cannot be written ({error.strerror or error}); make room, or choose --videos none, and "
                "go on with --resume"
            ) from None

    def _write(self, picture: Picture) -> None:
        with self._told():
            self._encode(picture)

    def _encode(self, picture: Picture) -> None:
        import av

        if self._container is None:
            self._container = av.open(str(self._path), mode="w", format="mp4")
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.thread_count = 1  # the cores are the simulators'
            self._stream.options = {"preset": "veryfast", "crf": "20"}
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            self._container.mux(packet)


def framed(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    """The picture, magnified to at least MIN_SIDE, in a border; both sides even, as h264 wants them."""
    zoom = -(-MIN_SIDE // min(picture.shape[:2]))
    large = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = large.shape[:2]
    canvas = np.empty((height + height % 2 + 2 * BORDER, width + width % 2 + 2 * BORDER, 3), np.uint8)
    canvas[:] = np.array(colour, np.uint8)
    canvas[BORDER : BORDER + height, BORDER : BORDER + width] = large
    return canvas
