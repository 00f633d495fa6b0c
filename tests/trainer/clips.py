"""Videos for tests: folders of frames, and files that PyAV writes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE, BITS = (64, 48), 8
ANSWER = "The patch is here from 1 s on."


def frame(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A frame that tells its number in stripes, black and white, with a grey upper half whose left
    corner is white."""
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    pixels[:8, :16] = 255
    width = size[0] // BITS
    for bit in range(BITS):
        pixels[size[1] // 2 :, bit * width : (bit + 1) * width] = 255 * (number >> bit & 1)
    return Image.fromarray(pixels)


def number_of(image: Image.Image) -> int:
    """The number that a frame tells, also after lossy compression."""
    lower = np.asarray(image.convert("L"))[image.height // 2 + 4 :]
    stripes = np.array_split(lower[:, : image.width // BITS * BITS], BITS, axis=1)
    return sum(int(stripe.mean() > 128) << bit for bit, stripe in enumerate(stripes))


def write_frames(folder: Path, count: int, name: str = "frame_{}.png", **more: Any) -> Path:
    """A folder of frames, numbered without leading zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        frame(number, **more).save(folder / name.format(number))
    return folder


def write_clip(
    path: Path,
    count: int = 40,
    *,
    codec: str = "mpeg4",
    rate: int = 20,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    sound: bool = False,
) -> Path:
    """A file of frames, a keyframe every ten; `times` in seconds if their rate is not steady."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 2
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            _add_sound(container)
        for number in range(count):
            picture = av.VideoFrame.from_image(frame(number))
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file without pictures."""
    import av

    with av.open(str(path), "w") as container:
        _add_sound(container)
    return path


def _add_sound(container: Any) -> None:
    import av

    stream = container.add_stream("pcm_s16le" if container.format.name == "matroska" else "aac")
    stream.rate = 8000
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
    silence.rate = 8000
    for packet in [*stream.encode(silence), *stream.encode()]:
        container.mux(packet)


def record(*videos: Any, regions: Sequence[dict] = (), **more: Any) -> dict[str, Any]:
    """A sample of videos."""
    parts = [{"type": "video"} for _ in videos]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "Where?"}]}
    messages = [asked, {"role": "assistant", "content": ANSWER}]
    return {"videos": list(videos), "messages": messages, "regions": list(regions), **more}
