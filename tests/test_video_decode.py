"""Reading video files: the right frames at the right times, upright, in the right colours; words for broken ones."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_cases import av, number_of, plain, write_audio, write_video

from seqlong.cli import main
from seqlong.datamodules.video import decode
from seqlong.datamodules.video.check import examine
from seqlong.datamodules.video.decode import PyAVReader, at_rate, evenly, open_video, torchcodec_problem
from seqlong.datamodules.video.index import DecodeError, read_index
from seqlong.errors import ConfigError

REAL = Path(__file__).parents[2] / "shared" / "data" / "video"
EXPECTED = REAL / "expected_decode.json"
FILES = (
    sorted(name for name in json.loads(EXPECTED.read_text()) if (REAL / name).is_file()) if EXPECTED.is_file() else []
)
NASA = REAL / "torchcodec_nasa_13013.mp4"
needs_real = pytest.mark.skipif(not FILES, reason="the real videos (../shared/data/video) are not on this machine")


# --- real files against what is known of them ------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("bbb_")])
def test_a_real_file_is_what_it_is_known_to_be(name: str) -> None:
    known = json.loads(EXPECTED.read_text())[name]
    facts = examine(REAL / name)
    assert facts.frames == (known.get("decoded_frames") or 0)
    assert (facts.status == "whole") == ("decode_error" not in known and facts.frames > 0)
    if "codec" in known:
        assert facts.videos == known["n_video_streams"] and facts.audios == len(known["audio"])
    if facts.frames:
        assert facts.rotation == known["rotation_deg"][0] and facts.variable == known.get("vfr", False)
        assert facts.keys == known["keyframes"]
        index = read_index(REAL / name)
        assert index.stream == known["stream_index"]
        last = index.seconds[facts.frames - 1]
        assert last == pytest.approx(known.get("last_pts", 0) - known.get("first_pts", 0), abs=2e-3)


@needs_real
def test_frames_and_times_are_those_of_the_oracle() -> None:
    """torchcodec ships frame 15 of stream 0, and all times of streams 0 and 3. Ours is stream 3, the best."""
    every = json.loads((REAL / f"{NASA.name}.stream3.all_frames_info.json").read_text())
    times = [float(frame["pts_time"]) for frame in every]
    index = read_index(NASA)
    assert len(index) == len(times) == 390
    np.testing.assert_allclose(index.seconds, np.array(times) - times[0], atol=1e-6)
    assert index.shown_at(np.array([times[100] + 1e-4, times[101] - 1e-4])).tolist() == [100, 100]
    # The shipped pictures are of stream 0: the same conversion must give them to the bit.
    with av.open(str(NASA)) as container:
        frames = container.decode(container.streams.video[0])
        for number, frame in zip(range(16), frames, strict=False):
            if number in (0, 15):
                shipped = torch.load(REAL / f"{NASA.name}.stream0.frame0000{number:02}.pt", weights_only=True).numpy()
                shipped = shipped if shipped.shape[-1] == 3 else shipped.transpose(1, 2, 0)
                assert np.array_equal(decode.to_rgb(frame), shipped)


@needs_real
@pytest.mark.parametrize("name", ["torchcodec_nasa_13013.mp4", "muxjs_test-no-audio-segment.ts", "decord_unordered.mov",
                                  "torchcodec_h265_video.mp4", "torchcodec_av1_video.mkv"])  # fmt: skip
def test_jumping_gives_the_frames_of_one_pass(name: str) -> None:
    with open_video(REAL / name) as video:
        whole = video.read(range(len(video.index))).pixels
    random = np.random.default_rng(0)
    with open_video(REAL / name) as video:
        for number in random.integers(0, len(whole), 6).tolist():
            assert np.array_equal(video.read([number]).pixels[0], whole[number]), number


@needs_real
def test_torchcodec_gives_the_same_frames() -> None:
    if torchcodec_problem():
        pytest.skip(f"torchcodec does not decode here: {torchcodec_problem()}")
    for name in FILES:
        try:
            with open_video(REAL / name) as one, open_video(REAL / name, "torchcodec") as other:
                numbers = np.unique(np.linspace(0, len(one.index) - 1, 5).astype(int))
                assert np.array_equal(one.read(numbers).pixels, other.read(numbers).pixels), name
        except DecodeError:
            assert examine(REAL / name).status != "whole"


@needs_real
def test_a_broken_file_says_how_far_it_went() -> None:
    with open_video(REAL / "decord_corrupted.mp4") as video, pytest.raises(DecodeError, match="at frame 28") as caught:
        video.read(range(20, 40))
    assert caught.value.reached == 8 and len(caught.value.frames) == 8
    assert caught.value.frames.numbers.tolist() == list(range(20, 28)) and caught.value.frames.pixels.std() > 10
    with pytest.raises(DecodeError, match=r"chunk_out_of_range.mp4: cannot be opened as a video"):
        open_video(REAL / "mozilla_chunk_out_of_range.mp4")
    with pytest.raises(DecodeError, match="has no video frames, whatever its head says"):
        open_video(REAL / "mozilla_invalid_userdata.mp4")


# --- made files ------------------------------------------------------------------------------------------------------


def test_frames_are_found_by_the_time_at_which_they_are_shown(tmp_path: Path) -> None:
    stamps = [0, 10, 15, 50, 52, 90, 100, 101, 160, 200]
    path = write_video(tmp_path / "vfr.mkv", 10, stamps=stamps)
    with open_video(path) as video:
        assert video.index.variable_rate
        np.testing.assert_allclose(video.index.seconds, np.array(stamps) / 100, atol=1e-3)
        numbers = video.index.shown_at(np.array([-1.0, 0.0, 0.09, 0.1, 0.499, 0.51, 1.2, 1.7, 99.0]))
        assert numbers.tolist() == [0, 0, 0, 1, 2, 3, 7, 8, 9]
        assert [number_of(picture) for picture in video.read(numbers).pixels] == numbers.tolist()
    assert not read_index(write_video(tmp_path / "cfr.mp4")).variable_rate


def test_times_of_clips() -> None:
    assert evenly(4, 0.0, 2.0).tolist() == [0.25, 0.75, 1.25, 1.75]
    assert at_rate(2.0, 1.0, 2.6).tolist() == [1.0, 1.5, 2.0, 2.5]
    assert at_rate(10.0, 0.0, 0.3).tolist() == pytest.approx([0, 0.1, 0.2]) and at_rate(1.0, 0.0, 0.1).tolist() == [0]


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_rotation_is_applied(turn: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "r.mp4", 2, rotation=turn)
    with open_video(path) as video:
        picture = video.read([1]).pixels[0]
    upright = np.rot90(plain(2)[1], turn // 90)
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).mean() < 6


def test_files_without_times_are_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", 12, codec="mpeg4", options={"bf": "2", "qscale": "2"})
    with open_video(path) as video:
        assert len(video.index) == 12
        assert [number_of(picture) for picture in video.read([0, 5, 11]).pixels] == [0, 5, 11]
        assert number_of(video.read([3]).pixels[0]) == 3  # back again


def test_several_kinds_of_files(tmp_path: Path) -> None:
    for name, codec, pixels in (("a.ts", "libx264", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p"),
                                ("a.mov", "libx265", "yuv420p10le"), ("a.mp4", "libx264", "yuv420p10le"),
                                ("a.mkv", "ffv1", "yuv444p")):  # fmt: skip
        path = write_video(tmp_path / name, 6, codec=codec, pixels=pixels, options={})
        with open_video(path) as video:
            numbers = [number_of(picture) for picture in video.read(range(6)).pixels]
        assert numbers == list(range(6)), name


def test_what_is_transparent_lies_over_black(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgra"
        picture = np.full((16, 16, 4), 200, dtype=np.uint8)
        picture[:, :8, 3], picture[:, 8:, 3] = 0, 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode(None))
    with open_video(path) as video:
        found = video.read([0]).pixels[0]
    assert (found[:, :8] == 0).all() and (found[:, 8:] == 200).all()


def test_a_gif_opens(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.gif", 5, codec="gif", pixels="rgb8", options={})
    with open_video(path) as video:
        assert video.read(range(5)).pixels.shape == (5, 32, 48, 3)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv444p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 5])
def test_colours_are_those_of_the_matrix_and_range_that_the_file_names(
    pixels: str, full: bool, space: int, tmp_path: Path
) -> None:
    """By hand: R = y + 2 (1 - kr) v, B = y + 2 (1 - kb) u, y = kr R + kg G + kb B; ITU-R BT.709 (1) and BT.601 (5)."""
    kr, kb = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[space]
    values = (90, 100, 190)
    deep = "10" in pixels
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height = stream.width = 32
        stream.pix_fmt = pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
        frame = av.VideoFrame(32, 32, pixels)
        for plane, value in zip(frame.planes, values, strict=True):
            kind, by = (np.uint16, 4) if deep else (np.uint8, 1)
            count = plane.line_size * plane.height // np.dtype(kind).itemsize
            plane.update(np.full(count, value * by, kind).tobytes())
        frame.colorspace, frame.color_range, frame.pts, frame.time_base = space, 2 if full else 1, 0, Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_video(path) as video:
        found = video.read([0]).pixels[0, 16, 16]
    y = values[0] / 255 if full else (values[0] - 16) / 219
    u, v = ((value - 128) / (255 if full else 224) for value in values[1:])
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    np.testing.assert_allclose(found, np.array([red, green, blue]) * 255, atol=2.5)  # swscale rounds to a level or two


def test_scaling_as_it_decodes_keeps_the_shape(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, size=(64, 96), rotation=90)
    with open_video(path) as video:
        assert video.read([0], short_side=32).pixels.shape == (1, 48, 32, 3)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_a_jump_or_one_pass_whichever_costs_less(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 100, gop=10, options={"crf": "10", "bf": "0", "sc_threshold": "0"})
    video = PyAVReader(path)
    assert len(video.index.keys) == 10
    video.read([0, 95])
    assert video.decoded <= 1 + 6 + 2  # two key frames and what leads from them
    video.read([97, 99])
    assert video.decoded <= 9 + 4  # went on where it stood
    video = PyAVReader(path)
    video.read(range(0, 100, 3))
    assert video.decoded <= 100  # every group of pictures is needed: one pass, nothing twice
    video.close()


def test_an_open_video_stays_in_its_process(tmp_path: Path) -> None:
    import pickle

    with open_video(write_video(tmp_path / "a.mp4")) as video, pytest.raises(TypeError, match="send its path"):
        pickle.dumps(video)


# --- bad files -------------------------------------------------------------------------------------------------------


def test_words_for_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 100)
    sound = write_audio(tmp_path / "sound.mp4")
    for path, words in (
        (tmp_path / "none.mp4", "there is no such file"),
        (tmp_path / "empty.mp4", "the file is empty"),
        (tmp_path / "text.mp4", "cannot be opened as a video"),
        (sound, "has no video stream that can be decoded, only audio"),
    ):
        with pytest.raises(DecodeError, match=words) as caught:
            open_video(path)
        assert str(path) in str(caught.value)
        assert examine(path).status == "none" and words in examine(path).problem


def test_a_cut_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.ts", 60, gop=10)
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    facts = examine(cut)
    assert 0 < facts.frames < 60
    with open_video(cut) as video:
        read = video.read(range(min(facts.frames, len(video.index)) - 1))
    assert [number_of(p) for p in read.pixels[:20]] == list(range(20))


def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"seqlong\[video\]"):
        open_video(path)


def test_torchcodec_is_asked_to_decode_before_it_is_believed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    if not torchcodec_problem():
        pytest.skip("torchcodec decodes here")
    with pytest.raises(ConfigError, match=r"data.backend=torchcodec does not decode here \(it cannot"):
        open_video(path, "torchcodec")


# --- the command -----------------------------------------------------------------------------------------------------


def test_check_audits_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cat").mkdir()
    write_video(tmp_path / "cat" / "good.mp4", 6, rotation=90)
    write_audio(tmp_path / "cat" / "sound.mp4")
    assert (
        main(["video", "check", str(tmp_path), "--out", str(tmp_path / "a.json"), "--good", str(tmp_path / "g.csv")])
        == 1
    )
    said = capsys.readouterr().out
    assert "2 files, 6 frames, 0.6 s: 1 decode whole, 0 in part, 1 not at all" in said and "turned by" in said
    rows = {Path(row["path"]).name: row for row in json.loads((tmp_path / "a.json").read_text())}
    assert rows["good.mp4"]["width"] == 32 and rows["good.mp4"]["height"] == 48
    assert rows["sound.mp4"]["decodes"] == "none" and "only audio" in rows["sound.mp4"]["problem"]
    listed = (tmp_path / "g.csv").read_text().splitlines()
    assert listed[0] == "path,label" and len(listed) == 2 and listed[1].endswith("good.mp4,cat")
    assert main(["video", "check", str(tmp_path / "cat" / "good.mp4")]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["video", "check", str(tmp_path / "empty")]) == 2
    assert "has no video files" in capsys.readouterr().err


def test_a_sheet_shows_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", 8)
    assert main(["video", "sheet", str(path), "--out", str(tmp_path / "a.png"), "--frames", "5"]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and "5 frames" in capsys.readouterr().out
    assert main(["video", "sheet", str(path), "--out", "x.png", "--start", "7"]) == 2


def test_an_av_that_knows_no_metadata_errors_opens_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV 19 has no such option."""
    path, real = write_video(tmp_path / "a.mp4"), av.open

    def strict(file: Any, mode: str = "r", **options: Any) -> Any:
        if "metadata_errors" in options:
            raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
        return real(file, mode, **options)

    found = len(read_index(path))
    monkeypatch.setattr(av, "open", strict)
    assert len(read_index(path)) == found > 0
