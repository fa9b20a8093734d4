"""One game as a film: an mp4 file, a shorter clip in TensorBoard, or both.

Frames are what the policy sees, newest frame last; they go to the encoder one by one.
"""

from __future__ import annotations

import io
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import optree

from asyncagent.bodies import image_layout
from asyncagent.config import family_of
from asyncagent.envs.base import import_engine
from asyncagent.errors import UsageError
from asyncagent.structs import EnvSpec, EnvStep, Nest

Frame = npt.NDArray[np.uint8]
"""uint8 [height, width, 3]."""

MIN_SIDE = 240
"""Frames of the mp4 whose shorter side has fewer pixels are magnified by a whole number."""
MAX_CLIP_FRAMES = 200
"""Of a longer game the clip shows frames at equal distances."""
MAX_CLIP_SIDE = 256
"""Larger frames are thinned by a whole number for the clip."""


class Picture:
    """Finds the image in an observation: the first leaf that is one."""

    def __init__(self, spec: EnvSpec) -> None:
        """UsageError if there is no image: a leaf of type uint8 and rank 3 (or 2: grey)."""
        for place, leaf in enumerate(optree.tree_leaves(spec.observation)):
            if leaf.dtype == "uint8" and len(leaf.shape) in (2, 3) and not leaf.num_tokens:
                self._place = place
                self._channels_first = len(leaf.shape) == 3 and image_layout(leaf)[3]
                return
        raise UsageError("its observations hold no image")

    def __call__(self, observation: Nest, env_index: int) -> Frame:
        """The newest frame of one environment in ``observation`` [E, ...]."""
        image = optree.tree_leaves(observation)[self._place][env_index]
        if image.ndim == 2:
            image = image[..., None]
        elif self._channels_first:
            image = image.transpose(1, 2, 0)
        if image.shape[-1] != 3:
            # Stacked grey frames; the newest is the last.
            image = image[..., -1:].repeat(3, axis=-1)
        return np.ascontiguousarray(image)


def frames_per_s(level_name: str, action_repeats: int) -> Fraction:
    """Real time: engines advance 60 frames per second, ViZDoom 35."""
    return Fraction(35 if family_of(level_name) == "doom" else 60, action_repeats)


class Camera(Protocol):
    """Films a game of a group's environment 0. Every call from one thread."""

    @property
    def done(self) -> bool:
        """There is nothing more to film."""
        ...

    def on_row(self, row: EnvStep) -> None:
        """Take in the group's next row; ignored once done."""
        ...

    def close(self) -> None:
        """The group plays no more; harmless when repeated."""
        ...


class Clip:
    """What can be shown of a game within TensorBoard: a ``Camera`` that keeps a few frames."""

    def __init__(self, level_name: str, spec: EnvSpec) -> None:
        """UsageError if the level shows no picture."""
        self._picture = Picture(spec)
        self._level_name = level_name
        self._rate = frames_per_s(level_name, spec.action_repeats)
        self._frames = _Frames()
        self.done = False

    def on_row(self, row: EnvStep) -> None:
        """Take in the group's next row; ignored once the game is over."""
        if self.done:
            return
        if row.lost[0]:
            self._frames = _Frames()  # the game is played again by the replacement
            return
        self._frames.add(self._picture(row.observation, 0))
        self.done = any(episode.env_index == 0 for episode in row.episodes)

    def close(self) -> None:
        """Nothing: what there is can still be shown."""

    def summary(self) -> Any:
        """``<level>/video`` for an event file: an animation; None if nothing was filmed."""
        return self._frames.summary(self._level_name, self._rate)


class Recorder:
    """Films the first game of a group's environment 0. Every call from one thread."""

    def __init__(self, folder: Path, level_name: str, frames: int, spec: EnvSpec) -> None:
        """Writes ``<folder>/<level>-<frames>.mp4`` and an event file beside it.

        Args:
          frames: that the policy was trained for; the clip's step in TensorBoard.

        Raises:
          UsageError: the level shows no picture, the folder cannot be written, or PyAV is missing.
        """
        try:
            self._picture = Picture(spec)
        except UsageError as error:
            raise UsageError(f"--video: {level_name} shows no picture: {error}") from None
        self._av = import_engine("av", "video")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
        name = re.sub(r"[^\w.-]+", "_", level_name)[-100:]
        self.path = folder / f"{name}-{frames}.mp4"
        self._beside = self.path.with_suffix(".tmp")
        self._level_name = level_name
        self._frames = frames
        self._rate = frames_per_s(level_name, spec.action_repeats)
        self._film: Film | None = None
        self._clip = _Frames()
        self.done = False

    def on_row(self, row: EnvStep) -> None:
        """Take in the group's next row; ignored once the game is over."""
        if self.done:
            return
        if row.lost[0]:
            self.close()  # the game is played again by the replacement
            return
        frame = self._picture(row.observation, 0)
        if self._film is None:
            self._film = Film(self._av, self._beside, self._rate, frame.shape)
        self._film.add(frame)
        self._clip.add(frame)
        if any(episode.env_index == 0 for episode in row.episodes):
            self._film.close()
            self._beside.replace(self.path)
            self._write_clip()
            self.done = True

    def close(self) -> None:
        """Remove what there is of a game that did not end; harmless otherwise."""
        if self._film is not None and not self.done:
            self._film.close()
            self._beside.unlink(missing_ok=True)
            self._film = None
            self._clip = _Frames()

    def _write_clip(self) -> None:
        # Imported where a film ended: they take a second.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.writer import FileWriter

        # In a folder of its own: of several event files in one, TensorBoard follows the newest,
        # and would lose sight of a training that goes on.
        writer = FileWriter(str(self.path.parent))
        value = self._clip.summary(self._level_name, self._rate)
        writer.add_summary(Summary(value=[value]), self._frames)
        writer.close()


class Film:
    """An H.264 file, encoded as frames come in."""

    def __init__(self, av: Any, path: Path, rate: Fraction, shape: tuple[int, ...]) -> None:
        height, width, _ = shape
        self._av = av
        self._scale = -(-MIN_SIDE // min(height, width))
        # The table of contents first: a browser plays it before it has the whole file.
        self._file = av.open(
            str(path), "w", format="mp4", container_options={"movflags": "faststart"}
        )
        self._stream = self._file.add_stream("libx264", rate=rate)
        # yuv420p, which every player knows, halves the colours' resolution: sides must be even.
        self._stream.pix_fmt = "yuv420p"
        self._stream.height = height * self._scale + height * self._scale % 2
        self._stream.width = width * self._scale + width * self._scale % 2
        self._stream.codec_context.thread_count = 1
        self._stream.options = {"preset": "veryfast", "crf": "18"}

    def add(self, frame: Frame) -> None:
        large = frame.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        missing = (self._stream.height - large.shape[0], self._stream.width - large.shape[1])
        if any(missing):
            large = np.pad(large, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        picture = self._av.VideoFrame.from_ndarray(large, format="rgb24")
        self._file.mux(self._stream.encode(picture))

    def close(self) -> None:
        self._file.mux(self._stream.encode(None))
        self._file.close()


class _Frames:
    """At most MAX_CLIP_FRAMES frames at equal distances of a game of unknown length."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self._every = 1
        self._count = 0

    def add(self, frame: Frame) -> None:
        if self._count % self._every == 0:
            thin = -(-max(frame.shape) // MAX_CLIP_SIDE)
            self.frames.append(frame[::thin, ::thin].copy())
            if len(self.frames) == MAX_CLIP_FRAMES:
                del self.frames[1::2]
                self._every *= 2
        self._count += 1

    def summary(self, level_name: str, rate: Fraction) -> Any:
        """An animated GIF, as an event file holds it; None if there are no frames."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self.frames:
            return None
        first, *others = map(Image.fromarray, self.frames)
        # Browsers slow down what is faster than 50 frames per second.
        duration_ms = max(20, round(1000 / rate))
        file = io.BytesIO()
        first.save(file, "GIF", save_all=True, append_images=others, duration=duration_ms, loop=0)
        image = Summary.Image(
            height=first.height,
            width=first.width,
            colorspace=3,
            encoded_image_string=file.getvalue(),
        )
        return Summary.Value(tag=f"{level_name}/video", image=image)
