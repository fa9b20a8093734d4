"""Films: the frames that the policy saw, one game and no more, playable when written."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, EnvStep, Episode, Nest
from asyncagent.video import MAX_CLIP_FRAMES, Clip, Picture, Recorder, frames_per_s

Bytes = npt.NDArray[np.uint8]
SPEC = EnvSpec(ArraySpec((9, 11, 3), "uint8"), Discrete(2), 4)


def picture(spec: Nest, observation: Nest) -> Bytes:
    """What is shown of environment 1."""
    return Picture(EnvSpec(spec, Discrete(2), 1))(observation, 1)


def row(shade: int, ends: Sequence[int] = (), lost: bool = False) -> EnvStep:
    """A row of two environments: the first all ``shade``, the second never."""
    observation = np.zeros((2, 9, 11, 3), np.uint8)
    observation[0] = (shade, 255 - shade, 40)
    never = np.zeros(2, np.bool_)
    episodes = tuple(Episode("catch", 1.0, 5, index) for index in ends)
    return EnvStep(
        observation, np.zeros(2, np.float32), never, never, never, np.array([lost, False]), episodes
    )


def film(path: Path) -> list[Bytes]:
    """The frames of an mp4."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = (frame.to_ndarray(format="rgb24") for frame in file.decode(video=0))
        return [frame.astype(np.uint8) for frame in frames]


def test_picture_of_stacked_frames_is_the_newest() -> None:
    """Of four grey frames, the last one, in three equal channels."""
    observation = np.random.default_rng(1).integers(0, 256, (2, 4, 84, 84), np.uint8)
    shown = picture(ArraySpec((4, 84, 84), "uint8"), observation)
    assert shown.shape == (84, 84, 3)
    for channel in range(3):
        assert (shown[..., channel] == observation[1, 3]).all()


@pytest.mark.parametrize("channels_first", [False, True])
def test_picture_in_colours(channels_first: bool) -> None:
    """Three channels are red, green and blue, wherever their axis is."""
    image = np.random.default_rng(1).integers(0, 256, (2, 72, 96, 3), np.uint8)
    observation = image.transpose(0, 3, 1, 2) if channels_first else image
    shown = picture(ArraySpec(observation.shape[1:], "uint8"), observation)
    assert (shown == image[1]).all()


def test_picture_among_other_things() -> None:
    """Of several observations, the first that is an image; a sentence or a vector is none."""
    image = np.random.default_rng(1).integers(0, 256, (2, 72, 96, 3), np.uint8)
    spec = {
        "a_sentence": ArraySpec((16, 20), "uint8", num_tokens=100),
        "measurements": ArraySpec((23,), "float32"),
        "rgb": ArraySpec((72, 96, 3), "uint8"),
    }
    others = {"a_sentence": np.zeros((2, 16, 20), np.uint8), "measurements": np.zeros((2, 23))}
    assert (picture(spec, others | {"rgb": image}) == image[1]).all()
    with pytest.raises(UsageError, match="no image"):
        Picture(EnvSpec(spec["measurements"], Discrete(2), 1))


def test_real_time() -> None:
    """15 frames per second at four repeats, 35/4 in ViZDoom."""
    assert frames_per_s("atari_pong", 4) == 15
    assert frames_per_s("doom_basic", 4) == 35 / 4


def test_film_of_one_game(tmp_path: Path) -> None:
    """The first game of environment 0: every row once, magnified, of even size, in its colours."""
    recorder = Recorder(tmp_path / "video", "catch", 3000, SPEC)
    shades = [0, 200, 100, 30, 250]
    for shade in shades[:-1]:
        recorder.on_row(row(shade, ends=[1]))
    assert not recorder.done
    recorder.on_row(row(shades[-1], ends=[0]))
    assert recorder.done
    recorder.on_row(row(77))  # the next game
    recorder.close()
    frames = film(recorder.path)
    assert recorder.path == tmp_path / "video" / "catch-3000.mp4"
    assert len(frames) == len(shades)
    # 9 x 11 pixels take 27 of them to 240 rows; 243 and 297 are odd.
    assert {frame.shape for frame in frames} == {(244, 298, 3)}
    for frame, shade in zip(frames, shades, strict=True):
        assert np.abs(frame.astype(int) - (shade, 255 - shade, 40)).mean() < 6
    with av.open(str(recorder.path)) as file:
        assert file.streams.video[0].average_rate == 15


def test_clip_in_tensorboard(tmp_path: Path) -> None:
    """The clip is an animation under <level>/video, at the frames learned from."""
    recorder = Recorder(tmp_path, "catch", 3000, SPEC)
    for shade in (0, 200, 100):
        recorder.on_row(row(shade, ends=[0] if shade == 100 else []))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("catch/video")
    assert (image.step, image.height, image.width) == (3000, 9, 11)
    (tmp_path / "clip.gif").write_bytes(image.encoded_image_string)
    with Image.open(tmp_path / "clip.gif") as clip:
        shades = []
        for index in range(clip.n_frames):  # type: ignore[attr-defined]
            clip.seek(index)
            shades.append(np.asarray(clip.convert("RGB"))[4, 4, 0])
    assert shades == pytest.approx([0, 200, 100], abs=8)


def test_clip_is_bounded(tmp_path: Path) -> None:
    """Of a game of 999 rows the clip keeps at most MAX_CLIP_FRAMES, at equal distances."""
    recorder = Recorder(tmp_path, "catch", 0, SPEC)
    kept = 0
    for index in range(999):
        recorder.on_row(row(index // 4))
        kept = max(kept, len(recorder._clip.frames))
    recorder.on_row(row(250, ends=[0]))
    assert kept <= MAX_CLIP_FRAMES
    shades = [int(frame[0, 0, 0]) for frame in recorder._clip.frames]
    # Every eighth row: shades two apart.
    assert shades == list(range(0, 250, 2))


def test_lost_game_is_not_in_the_film(tmp_path: Path) -> None:
    """A game that its environment does not survive is dropped; the one played instead is filmed."""
    recorder = Recorder(tmp_path, "catch", 1, SPEC)
    recorder.on_row(row(0))
    recorder.on_row(row(0, lost=True))
    recorder.on_row(row(0, lost=True))
    assert list(tmp_path.iterdir()) == []
    recorder.on_row(row(200))
    recorder.on_row(row(100, ends=[0]))
    shades = [frame[..., 0].mean() for frame in film(recorder.path)]
    assert shades == pytest.approx([200, 100], abs=6)
    assert len(recorder._clip.frames) == 2


def test_lost_game_is_not_in_the_clip() -> None:
    """A clip alone begins anew, too, ends with the game, and shows nothing where nothing is."""
    clip = Clip("catch", SPEC)
    assert clip.summary() is None
    clip.on_row(row(0))
    clip.on_row(row(0, lost=True))
    assert clip.summary() is None
    clip.on_row(row(200))
    clip.on_row(row(100, ends=[1]))
    assert not clip.done
    clip.on_row(row(50, ends=[0]))
    assert clip.done
    clip.on_row(row(77))
    value = clip.summary()
    assert value.tag == "catch/video"
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as film:
        assert film.n_frames == 3


def test_unfinished_film_is_removed(tmp_path: Path) -> None:
    """Closing in mid-game leaves no file behind, and may be repeated."""
    recorder = Recorder(tmp_path, "catch", 1, SPEC)
    for index in range(200):  # the encoder looks ahead before it writes
        recorder.on_row(row(index))
    assert len(list(tmp_path.iterdir())) == 1
    recorder.close()
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_level_with_a_path_in_its_name(tmp_path: Path) -> None:
    """What a file's name cannot hold is replaced."""
    recorder = Recorder(tmp_path, "doom:/home/me/a map.cfg", 1, SPEC)
    assert recorder.path.name == "doom_home_me_a_map.cfg-1.mp4"


def test_nothing_to_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, no folder and no PyAV are each told in one line, before anything is played."""
    blind = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)
    with pytest.raises(UsageError, match="--video: catch shows no picture"):
        Recorder(tmp_path, "catch", 1, blind)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/video cannot be made"):
        Recorder(tmp_path / "file" / "video", "catch", 1, SPEC)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"av cannot be imported .*pip install -e '\.\[video\]'"):
        Recorder(tmp_path, "catch", 1, SPEC)
