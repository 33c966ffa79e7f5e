"""Videos: exact times, only the wanted frames decoded, rotation, animations, folders, and what is refused."""

from __future__ import annotations

import base64
import builtins
import http.server
import os
import random
import threading
import time
from pathlib import Path

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import ChiasmError, ImageError, MissingExtraError
from chiasm.media import video as video_module
from chiasm.media.frames import Frames, FrameSampling
from chiasm.media.video import MAX_VIDEO_BYTES, is_video, open_video, read_frames
from clips import animation, folder, number, numbered, write_clip

# mpeg4 and VP9 are in every build of PyAV; H.264 has B-frames, so that order of decoding and of showing differ.
CODECS = [codec for codec in ("mpeg4", "libx264", "libvpx-vp9") if codec in av.codecs_available]

CONTAINERS = [
    (suffix, codec)
    for codec, suffixes in {
        "mpeg4": (".mp4", ".mkv", ".mov", ".avi", ".ts"),
        "libx264": (".mp4", ".mkv", ".mov", ".ts"),
        "libvpx-vp9": (".webm", ".mkv"),
    }.items()
    for suffix in suffixes
    if codec in CODECS
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 50, audio=True)


# Times and frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_every_container_gives_exact_frames_and_times(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_clip(tmp_path / f"c{suffix}", 50, codec=codec)
    with open_video(path) as video:
        assert len(video) == 50
        assert video.times == pytest.approx([n / 10 for n in range(50)])
        assert video.duration == pytest.approx(5.0)
        for wanted in ([0], [49], [3, 4, 5, 31, 49], [10, 10, 20], [9, 11, 19, 21]):
            frames = video.read(wanted)
            assert [number(image) for image in frames.images] == wanted
            assert frames.times == pytest.approx([n / 10 for n in wanted])
            assert (frames.total, frames.duration) == (50, pytest.approx(5.0))
            assert all(image.mode == "RGB" for image in frames.images)


@pytest.mark.parametrize("suffix", [".avi", ".h264"])
def test_streams_without_time_stamps_are_counted(tmp_path: Path, suffix: str) -> None:
    """H.264 in AVI, or bare: there are no presentation times."""
    if "libx264" not in CODECS:
        pytest.skip("no H.264 encoder")
    path = write_clip(tmp_path / f"c{suffix}", 30, codec="libx264")
    frames = read_frames(path, FrameSampling(frames=5))
    assert [number(image) for image in frames.images] == [2, 8, 14, 19, 25]
    rate = 25 if suffix == ".h264" else 10  # nothing says it in a bare stream; 25 is what FFmpeg takes
    assert frames.times == pytest.approx([n / rate for n in (2, 8, 14, 19, 25)])


@pytest.mark.parametrize("codec", CODECS)
def test_only_what_is_needed_is_decoded(tmp_path: Path, codec: str) -> None:
    path = write_clip(tmp_path / "long.mkv", 250, codec=codec, gop=10, rate=25)
    with open_video(path) as video:
        assert video.decoded == 0
        frames = video.read(video.plan(FrameSampling(frames=8)))
        assert [number(image) for image in frames.images] == [15, 46, 77, 108, 139, 171, 202, 233]
        # From the key frame before each; a few more may already be in the decoder.
        assert 8 <= video.decoded <= 8 * 12
        before = video.decoded
        video.read([200, 201, 202])
        assert video.decoded - before <= 12
    with open_video(path) as video:
        video.read(list(range(250)))
        assert video.decoded <= 252  # once through, not back to a key frame each time


def test_frames_that_lean_on_an_earlier_group(tmp_path: Path) -> None:
    """Open groups: frames shown before a key frame, stored after it, need the group before."""
    if "libx264" not in CODECS:
        pytest.skip("no H.264 encoder")
    params = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}
    path = write_clip(tmp_path / "open.mp4", 60, codec="libx264", gop=12, codec_options=params)
    with open_video(path) as video:
        for index in range(60):
            (image,) = video.read([index]).images
            assert number(image) == index


def test_reading_backwards_is_fine(clip: Path) -> None:
    with open_video(clip) as video:
        assert number(video.read([40]).images[0]) == 40
        assert number(video.read([2]).images[0]) == 2


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_choice_of_frames(clip: Path, data: st.DataObject) -> None:
    wanted = sorted(data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=12)))
    with open_video(clip) as video:
        assert [number(image) for image in video.read(wanted).images] == wanted


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_goes_by_time_stamps(tmp_path: Path, suffix: str) -> None:
    """One frame a second for nine seconds, then ten a second."""
    ticks = [*range(0, 9000, 1000), *range(9000, 10000, 100)]
    path = write_clip(tmp_path / f"vfr{suffix}", len(ticks), ticks=ticks)
    with open_video(path) as video:
        assert video.times == pytest.approx([t / 1000 for t in ticks], abs=1e-3)
        each = video.read(video.plan(FrameSampling(mode="fps", fps=1)))
        assert each.times == pytest.approx([0, 2, 4, 6, 8, 9.5], abs=1e-3)
        assert [ticks[number(image)] / 1000 for image in each.images] == pytest.approx(each.times, abs=1e-3)
        ends = video.plan(FrameSampling(frames=5, clip=(9.0, 9.5)))
        assert ends == [9, 10, 11, 12, 13] or ends == [9, 10, 11, 11, 12]


def test_audio_is_ignored(clip: Path) -> None:
    assert len(av.open(str(clip)).streams.audio) == 1
    assert len(read_frames(clip)) == 8


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    path = write_clip(tmp_path / "turned.mp4", 12, rotation=rotation)
    stored = Image.fromarray(numbered(11))
    with open_video(path) as video:
        for index in (0, 11):
            (image,) = video.read([index]).images
            # FFmpeg's angle is counterclockwise, as Pillow's.
            expected = stored.rotate(rotation, expand=True)
            assert image.size == expected.size
            assert number(image.rotate(-rotation, expand=True)) == index


def test_resolution_may_change_inside_a_stream(tmp_path: Path) -> None:
    """Every frame keeps its own size."""
    one = write_clip(tmp_path / "1.ts", 10)
    two = write_clip(tmp_path / "2.ts", 10, size=(96, 64), first=10)
    (tmp_path / "both.ts").write_bytes(one.read_bytes() + two.read_bytes())
    with open_video(tmp_path / "both.ts") as video:
        assert len(video) == 20
        frames = video.read([2, 12, 19])
    assert [image.size for image in frames.images] == [(64, 48), (96, 64), (96, 64)]
    assert [number(image) for image in frames.images] == [2, 2, 9]


# Other sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyAV."""
    monkeypatch.setattr(builtins, "__import__", without_av)
    options = {"lossless": True} if suffix == ".webp" else {}
    path = animation(tmp_path / f"a{suffix}", 5, [50, 100, 40, 200, 300], **options)
    with open_video(path) as video:
        assert video.times == pytest.approx([0, 0.05, 0.15, 0.19, 0.39])
        assert video.duration == pytest.approx(0.69)
        assert [number(image) for image in video.read([1, 3, 3]).images] == [1, 3, 3]
        assert video.decoded == 5 + 4  # all of them for their times, then up to the last wanted one
    assert [number(i) for i in read_frames(path, FrameSampling(clip=(0.05, 0.19))).images] == [1, 2]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_of_too_many_pixels_is_refused_undecoded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = animation(tmp_path / f"a{suffix}", 5)
    monkeypatch.setattr(video_module, "MAX_ANIMATION_PIXELS", 5 * 64 * 48)
    assert len(read_frames(path)) == 5
    monkeypatch.setattr(video_module, "MAX_ANIMATION_PIXELS", 5 * 64 * 48 - 1)
    monkeypatch.setattr(video_module._Animation, "_walk", lambda _: pytest.fail("decoded"))
    refused(path, rf"a\{suffix}: its frames together have more than 15,359 pixels; shorten it")


def test_a_delay_of_zero_is_a_tenth_of_a_second(tmp_path: Path) -> None:
    with open_video(animation(tmp_path / "a.gif", 3, 0)) as video:
        assert video.times == pytest.approx([0, 0.1, 0.2])


def test_a_still_gif_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(numbered(3)).save(tmp_path / "still.gif")
    assert not is_video(tmp_path / "still.gif")
    assert len(read_frames(tmp_path / "still.gif")) == 1


def test_folders_come_in_natural_order(tmp_path: Path) -> None:
    names = ["f1.png", "f2.png", "F3.jpg", "f10.png", "f11.PNG"]
    path = folder(tmp_path / "frames", names)
    (path / ".hidden.png").write_bytes(b"x")
    (path / "notes.txt").write_text("no picture")
    (path / "more.png").mkdir()
    frames = read_frames(path)
    assert [number(image) for image in frames.images] == [0, 1, 2, 3, 4]
    assert frames.times == (0, 1, 2, 3, 4)
    faster = read_frames(path, FrameSampling(folder_fps=2.0, clip=(0.5, 1.5)))
    assert [number(image) for image in faster.images] == [1, 2]
    assert faster.times == (0.5, 1.0)
    with open_video(path) as video:
        video.read([2])
        assert video.decoded == 1


def test_lists_of_pictures_are_taken_whole(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered(n)) for n in range(12)]
    assert len(read_frames(pictures)) == 12
    assert len(read_frames(pictures, FrameSampling(frames=3))) == 3
    frames = read_frames(pictures)
    assert read_frames(frames) is frames
    assert read_frames(frames, FrameSampling(frames=2)).times == (2.0, 8.0)


def test_bytes_urls_and_pipes(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(data), daemon=True).start()
    for source in (data, url, pipe):
        assert [number(i) for i in read_frames(source).images] == [3, 9, 15, 21, 27, 34, 40, 46]


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.accepted.append(self.headers["Accept"])
        data = self.server.data
        self.send_response(200)
        self.send_header("Content-Length", str(2**40 if self.path == "/huge.mp4" else len(data)))
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[:half])
        if self.path == "/slow.mp4":
            time.sleep(0.3)
        if self.path != "/huge.mp4":
            self.wfile.write(data[half:])

    def log_message(self, *_: object) -> None:
        pass


def test_downloads_are_those_of_videos(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        httpd.accepted, httpd.data = [], clip.read_bytes()
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            place = f"http://127.0.0.1:{httpd.server_port}"
            assert len(read_frames(place + "/clip.mp4")) == 8
            assert set(httpd.accepted) == {"video/*,*/*;q=0.1"}
            refused(place + "/huge.mp4", "holds more than 512 MiB; make the video smaller")
            assert len(read_frames(place + "/slow.mp4")) == 8
            monkeypatch.setattr(video_module, "_DEADLINE", 0.1)
            refused(place + "/slow.mp4", "the server is too slow; download the video and give its path")
        finally:
            httpd.shutdown()
            thread.join()
    refused("data:video/mp4", "is not of the form data:video/…;base64,…")


def test_a_slow_download_has_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(video_module, "load_bytes", lambda _, **given: asked.update(given) or b"")
    refused("http://x.org/a.mp4", "is empty")
    assert asked == {"limit": MAX_VIDEO_BYTES, "deadline": 540.0, "kind": "video"}


def test_what_is_a_video(tmp_path: Path, clip: Path) -> None:
    Image.fromarray(numbered(1)).save(tmp_path / "still.jpg")
    (tmp_path / "still.mp4").write_bytes((tmp_path / "still.jpg").read_bytes())
    (tmp_path / "renamed.dat").write_bytes(clip.read_bytes())
    (tmp_path / "text.txt").write_text("Hello")
    (tmp_path / "junk.mp4").write_text("Hello")
    for name, yes in {
        "still.jpg": False,
        "still.mp4": False,
        "renamed.dat": True,
        "text.txt": False,
        "junk.mp4": True,
        "missing.mkv": True,
        "missing.jpg": False,
        ".": True,
    }.items():
        assert is_video(tmp_path / name) is yes, name
    for name in ("a.gif", "a.webp", "a.png"):
        assert is_video(animation(tmp_path / name))
    assert is_video("https://x.org/a.mp4?b=c")
    assert not is_video("https://x.org/a.gif")
    assert is_video("data:video/mp4;base64,AAAA")
    assert not is_video("data:image/gif;base64,AAAA")
    assert not is_video("a\0b")
    assert not is_video("x" * 5000)
    for suffix in (".mkv", ".avi", ".ts", ".mov", ".mpg", ".flv"):
        made = write_clip(tmp_path / f"c{suffix}", 3, rate=25, codec="flv1" if suffix == ".flv" else "mpeg4")
        made = made.rename(tmp_path / f"anything{suffix[1:]}")
        assert is_video(made), suffix


# What is refused ---------------------------------------------------------------------------------------------------


def without_av(name, *args, __real=builtins.__import__, **kwargs):
    if name == "av":
        raise ImportError("no av here")
    return __real(name, *args, **kwargs)


def refused(source: object, match: str) -> None:
    with pytest.raises(ImageError, match=match) as caught:
        read_frames(source)
    assert "\n" not in str(caught.value)


def test_without_pyav(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(MissingExtraError, match=r"^av is not installed: run pip install 'chiasm\[video\]'$"):
        open_video(clip)


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("Hello " * 99)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "nowhere.mp4", r"nowhere\.mp4: no such file; check the path")
    refused(tmp_path / "text.mp4", r"text\.mp4: is not a video that can be read here.*convert it to MP4")
    refused(tmp_path / "empty.mp4", r"empty\.mp4: is empty \(0 bytes\)")
    refused(tmp_path / "none", "none: is a folder without pictures; give one that holds frames")
    refused([], "list of pictures: has no frames")
    refused(b"", "is empty")
    refused(7, "cannot open a int as a video")
    refused("ftp://x.org/a.mp4", "the scheme ftp is not supported")
    with pytest.raises(ImageError, match="paths are not accepted here"):
        open_video(tmp_path / "text.mp4", allow_files=False)
    with pytest.raises(ImageError, match="URLs are not accepted here"):
        open_video("http://x.org/a.mp4", allow_urls=False)
    with (
        pytest.raises(ImageError, match="paths are not accepted here"),
        open_video(["a.png"], allow_files=False) as v,
    ):
        v.read([0])


def test_without_pictures(tmp_path: Path) -> None:
    refused(
        write_clip(tmp_path / "song.m4a", audio=True, video=False),
        r"song\.m4a: holds no video \(audio only\)",
    )
    # A file whose video stream was announced and never written.
    with av.open(str(tmp_path / "bare.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    refused(tmp_path / "bare.avi", r"bare\.avi: has no frames; give a video")


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    import io

    song = write_clip(tmp_path / "song.m4a", audio=True, video=False)
    cover = io.BytesIO()
    Image.fromarray(numbered(1)).save(cover, "JPEG")
    with av.open(str(song)) as source, av.open(str(tmp_path / "covered.m4a"), "w", format="mp4") as target:
        sound = target.add_stream_from_template(source.streams.audio[0])
        picture = target.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.size:
                packet.stream = sound
                target.mux(packet)
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
        target.mux(packet)
    refused(tmp_path / "covered.m4a", r"holds no video \(audio only\)")


@pytest.mark.parametrize(
    ("suffix", "options", "match"),
    [
        (".mp4", {}, "is not a video that can be read here, or is cut off"),  # its index comes last
        (".mp4", {"movflags": "faststart"}, r"is cut off \(.* s are there\); copy or download it again"),
        (".mkv", {}, r"is cut off \(.* s are there\)"),
        (".gif", {}, "is truncated or damaged"),
    ],
)
def test_cut_off(tmp_path: Path, suffix: str, options: dict[str, str], match: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".gif":
        animation(path, 30)
    else:
        write_clip(path, 50, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, rf"x\{suffix}: {match}")


def test_damage_is_one_line_or_unnoticed(tmp_path: Path) -> None:
    """Noise in a file: refused in one line, or hidden by the codec, but never another kind of exception."""
    draw = random.Random(0)
    made = [
        write_clip(tmp_path / "a.mp4", 20),
        write_clip(tmp_path / "a.mkv", 20, codec=CODECS[1] if len(CODECS) > 2 else "mpeg4"),
        animation(tmp_path / "a.gif", 8),
        animation(tmp_path / "a.webp", 8),
    ]
    said = []
    for path in made:
        whole = path.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            for _ in range(draw.choice([1, 20])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            try:
                read_frames(bytes(data))
            except ChiasmError as error:
                said.append(str(error))
    assert said
    assert not any("\n" in line for line in said)


def test_playlists_open_no_other_file(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:5,\n{clip}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    for name in ("list.m3u8", "list.mp4"):
        refused(tmp_path / name, "is not a video that can be read here")


def test_the_clip_must_lie_inside(clip: Path) -> None:
    with pytest.raises(ImageError, match=r"clip\.mp4: the clip 6:9 lies outside of its 5\.00 seconds"):
        read_frames(clip, FrameSampling(clip=(6, 9)))


def test_frames_of_the_plan_are_those_read(clip: Path) -> None:
    sampling = FrameSampling(mode="rand", seed=3)
    with open_video(clip) as video:
        planned = video.plan(sampling)
        assert video.decoded == 0
    frames = read_frames(clip, sampling)
    assert isinstance(frames, Frames)
    assert [number(image) for image in frames.images] == planned
