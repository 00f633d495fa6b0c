"""Files of videos by PyAV: frames at their own times, turned upright, and damaged ones."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer.data.video_files import VideoFile
from groundkern.trainer.data.videos import VideoRules
from tests.trainer.clips import frame, number_of, record, write_clip, write_sound
from tests.trainer.test_videos import parse, refused, region

ALL = VideoRules(fps=None, frames=1000)


av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")


def loaded(root, video, **options):
    (video,) = parse(record(video), root, **options).load().videos
    return video


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_clip(folder / "a.mp4")
    write_clip(folder / "a.mkv", sound=True)
    write_clip(folder / "turned.mov", 10, rotation=-90)
    write_sound(folder / "sound.mp4")
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_are_taken_at_their_times(root, name):
    video = loaded(root, {"path": name, "fps": 5, "start": 0.5, "end": 1.7})
    assert [number_of(frame) for frame in video.frames] == [10, 14, 18, 22, 26, 30]
    np.testing.assert_allclose(video.times, [0.5, 0.7, 0.9, 1.1, 1.3, 1.5], atol=1e-9)
    assert video.fps == 20
    assert [number_of(frame) for frame in loaded(root, name).frames] == [0, 10, 20, 30]
    few = loaded(root, name, videos=VideoRules(fps=None, frames=4))
    assert [number_of(frame) for frame in few.frames] == [0, 10, 20, 30]


def test_a_frame_is_the_same_alone_and_with_all_others(root):
    """A decoder that begins at a keyframe, and one that begins at the first frame."""
    file = VideoFile(root / "a.mp4", "v.jsonl:3", "videos[0]")
    with av.open(str(file.path)) as container:
        wanted = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    assert len(file.times().stamps) == len(wanted) == 40
    together = file.frames(range(40), (64, 48))
    for number, pixels in enumerate(wanted):
        (alone,) = file.frames([number], (64, 48))
        assert np.array_equal(np.asarray(alone), pixels)
        assert np.array_equal(np.asarray(together[number]), pixels)


def test_every_process_has_the_same_frames(root):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        theirs = pool.submit(loaded, root, "a.mp4").result()
    assert theirs == loaded(root, "a.mp4")


def test_a_variable_rate_is_kept(tmp_path):
    times = [round(number**2 / 100, 3) for number in range(20)]  # 0 to 3.61 s
    write_clip(tmp_path / "v.mp4", 20, times=times)
    video = loaded(tmp_path, "v.mp4", videos=ALL)
    np.testing.assert_allclose(video.times, times, atol=1e-3)
    assert [number_of(frame) for frame in video.frames] == list(range(20))
    sparse = loaded(tmp_path, {"path": "v.mp4", "fps": 1})  # those shown at 0, 1, 2 and 3 s
    assert [number_of(frame) for frame in sparse.frames] == [0, 10, 14, 17]
    sample = parse(record("v.mp4", regions=[region(frame=10), region(frame=19)]), tmp_path)
    np.testing.assert_allclose(sample.regions[0].time, (1.0, 1.21), atol=1e-3)
    assert sample.regions[1].time[1] > 3.61
    got = refused(record("v.mp4", regions=[region(frame=20)]), tmp_path)
    assert "`regions[0].frame`: expected a frame of the 20 of 'v.mp4', from 0, got 20" in got


def test_frames_are_turned_upright(root):
    """A phone held upright: its frames lie, and the file says to turn them to the right."""
    sample = parse(record("turned.mov", regions=[region(box=[0, 0, 48, 64])]), root)
    assert sample.videos[0].size == (48, 64)
    assert sample.regions[0].boxes == ((0, 0, 1, 1),)
    (first, *_) = sample.load().videos[0].frames
    wanted = np.asarray(frame(0).transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(first).astype(int) - wanted).mean() < 12  # of lossy compression
    assert np.asarray(first)[2:12, -6:-2].mean() > 200  # the white corner, now on the right
    assert np.asarray(first)[2:12, 12:20].mean() < 120
    assert "within video 0, 48 x 64" in refused(
        record("turned.mov", regions=[region(box=[0, 0, 64, 48])]), root
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"no video", "expected a video that can be decoded (MP4, MOV, Matroska, WebM, A"),
        ("empty.mp4", b"", "expected a video that can be decoded (MP4, MOV, Matroska, WebM, AVI"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n", "that can be decoded"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile a.mp4\n", "that can be decoded"),
        ("sound.mp4", None, "a file with a video stream, got 'sound.mp4', which has sound"),
    ],
)  # fmt: skip
def test_what_is_no_video(root, name, content, message):
    if content is not None:
        (root / name).write_bytes(content)
    assert message in refused(record(name), root)


def test_a_file_that_cannot_be_read_is_a_bad_sample(root, monkeypatch):
    """Its permissions are wrong, or it goes away while it is looked at."""
    (root / "b.mp4").write_bytes((root / "a.mp4").read_bytes())

    def gone(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(av, "open", gone)
    monkeypatch.setattr("pathlib.Path.open", gone)
    got = refused(record("b.mp4"), root)
    assert "expected a video that can be decoded" in got
    assert "'b.mp4' (Permission denied)" in got


def test_an_image_belongs_elsewhere(root):
    Image.new("RGB", (9, 9)).save(root / "a.gif")
    assert "got 'a.gif', a GIF image, which belongs into `images`" in refused(record("a.gif"), root)


def test_damage_is_an_error_where_it_is_seen(root, tmp_path):
    whole = (root / "a.mp4").read_bytes()
    with av.open(str(root / "a.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    middle = packets[22].pos
    broken = bytearray(whole)
    broken[middle : middle + packets[22].size] = bytes(range(packets[22].size % 256)).ljust(
        packets[22].size, b"\xa5"
    )
    (tmp_path / "broken.mp4").write_bytes(bytes(broken))
    before = loaded(tmp_path, {"path": "broken.mp4", "fps": 20, "end": 1.0})
    assert [number_of(frame) for frame in before.frames] == list(range(20))
    assert "`videos[0]`: expected" in refused(record({"path": "broken.mp4", "fps": 20}), tmp_path)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert "that can be decoded" in refused(record("cut.mp4"), tmp_path)


def test_limits_of_files(root):
    wanted = "expected at most 100 bytes (`data.video_bytes`), got"
    assert wanted in refused(record("a.mp4"), root, videos=VideoRules(max_bytes=100))
    wanted = "expected at most 1 seconds (`data.video_seconds`), got 2.0 in 'a.mp4'"
    assert wanted in refused(record("a.mp4"), root, videos=VideoRules(max_seconds=1))
    wanted = "at most 9000 pixels in all frames together (`data.video_pixels`), got 12288 with 4"
    assert wanted in refused(record("a.mp4"), root, videos=VideoRules(max_pixels=9000))
    assert "at most 3000 pixels, got 64 x 48" in refused(record("a.mp4"), root, max_pixels=3000)
