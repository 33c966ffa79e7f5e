"""Opening videos: time stamps first, then only the frames that are wanted; or one clear line.

What is a video: a file that PyAV reads (extra ``video``: MP4, MOV, MKV, WebM, AVI, MPEG, …); an animated GIF, WebP or
PNG and a folder or list of pictures (all without PyAV). Audio is ignored.

How a file is read: its packets are listed without decoding, which gives the exact presentation time of every frame
and the key frames. For each wanted frame the decoder starts at the key frame before it, unless it is already between
the two. `Video.decoded` counts what the decoder put out. Animations cannot be entered in the middle: all frames up
to the wanted one are decoded, and once before that to learn their times; both are counted, and `MAX_ANIMATION_PIXELS`
is the limit.

Decided here:
- The rotation that a file carries (phones) is always applied, mirrored or not, whatever the tile policy does with EXIF.
- Resolution that changes inside a stream is allowed: every frame keeps its own size, and whoever cuts tiles resizes
  each frame by itself.
- Times are seconds after the first frame. A stream without time stamps counts frames by its stated rate.
- An animation's delay of 0 is a tenth of a second, as browsers take it.
- FFmpeg is handed open files, never names, and may use no playlist format: a file cannot make it open another one.
- What is cut off or damaged is refused; nothing stands in for a frame that cannot be decoded.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from chiasm.errors import ImageError, MissingExtraError, missing_extra
from chiasm.media.fetch import file_error, is_url, load_bytes, local_path, short_name
from chiasm.media.frames import Frames, FrameSampling, choose_frames
from chiasm.media.image import FORMATS as IMAGE_FORMATS
from chiasm.media.image import MAX_PIXELS, open_image, quiet_pillow, to_rgb

__all__ = [
    "MAX_ANIMATION_PIXELS",
    "MAX_VIDEO_BYTES",
    "VIDEO_SUFFIXES",
    "Video",
    "is_video",
    "open_video",
    "read_frames",
]

MAX_VIDEO_BYTES = 512 * 2**20
"""Limit for a video that is downloaded, decoded from a ``data:`` URL or read from a pipe; files have none."""

MAX_ANIMATION_PIXELS = 2**31
"""Largest accepted frames x width x height of an animation, all of whose frames are decoded to learn their times."""

VIDEO_SUFFIXES = frozenset(
    [
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv"),
        *(".flv", ".3gp", ".3g2", ".ogv", ".vob", ".asf", ".mxf", ".y4m"),
    ]
)
"""Endings by which a name is taken for a video, readable or not."""

# Containers by FFmpeg's names; no playlists (hls, dash, concat), which name other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,"
    "yuv4mpegpipe,ivf,h264,hevc,m4v,nut"
)
_ANIMATIONS = ("GIF", "WEBP", "PNG")
_STILL_BRANDS = (
    b"avif",
    b"avis",
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"mif1",
    b"msf1",
    b"crx ",
    b"jxl ",
)
_DEFAULT_DELAY = 0.1
# Seconds for a download: the largest accepted video at a megabyte a second.
_DEADLINE = 540.0

# Signs of the display matrix (a, b, c, d), which sends (x, y) to (a x + c y, b x + d y) with y downwards.
_UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

VideoSource = str | Path | bytes | Frames | Sequence[Any]


class Video:
    """An opened video: its time stamps are known, its frames are decoded when they are asked for.

    A context manager; close it when done.

    Attributes:
        name: for messages.
        times: when each frame begins, in seconds after the first one, rising.
        duration: when the last frame ends.
        whole: its frames were chosen by whoever made it (a list of pictures), so sampling is for others.
        decoded: frames that were decoded so far, wanted or on the way to wanted ones.
    """

    whole = False

    def __init__(self, name: str, times: Sequence[float], duration: float) -> None:
        if not times:
            raise ImageError(f"{name}: has no frames; give a video that shows something")
        self.name, self.times, self.duration = name, tuple(times), duration
        self.decoded = 0
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go."""

    def plan(self, sampling: FrameSampling | None = None) -> list[int]:
        """Indices of the frames that a sampling takes, without decoding; see `choose_frames` for the errors."""
        return choose_frames(self.times, self.duration, sampling or FrameSampling(), name=self.name)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first frame, upright, in pixels; that frame is decoded for it, once.

        Headers do not tell how a stream is turned. Later frames may have another size.

        Raises:
            ImageError: the frame cannot be decoded.
        """
        if self._size is None:
            image, _ = next(self.each([0]))
            self._size = image.size
        return self._size

    def read(self, indices: Sequence[int]) -> Frames:
        """Decode these frames, given in rising order; an index may come several times.

        Raises:
            ImageError: a frame cannot be decoded.
        """
        taken = list(self.each(indices))
        return Frames(
            images=tuple(image for image, _ in taken),
            times=tuple(when for _, when in taken),
            name=self.name,
            total=len(self),
            duration=self.duration,
        )

    def each(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, float]]:
        """Image and exact time of each frame as `read` takes them, decoded one after the other."""
        decoded = self._decode(sorted(set(indices)))
        for _, same in groupby(sorted(indices)):
            frame = next(decoded)
            for _ in same:
                yield frame

    def _decode(self, wanted: list[int]) -> Iterator[tuple[Image.Image, float]]:
        """Image and exact time of each wanted index (rising, no index twice)."""
        raise NotImplementedError


def open_video(
    source: VideoSource, *, folder_fps: float = 1.0, allow_files: bool = True, allow_urls: bool = True
) -> Video:
    """Open a video and list its frames; nothing that is not needed for that is decoded.

    Args:
        source: path of a file or of a folder of pictures (in natural order: 2 before 10), ``data:`` or ``http(s)``
            URL, encoded bytes, a list of pictures (anything that `open_image` takes), or `Frames`.
        folder_fps: frames a second of a folder or list.
        allow_files: accept paths. A server turns this off for what comes over the network.
        allow_urls: accept ``http(s)`` URLs.

    Raises:
        ImageError: missing, not a video, broken, without frames, audio only; one line with the remedy.
        MissingExtraError: PyAV is needed and absent.
    """
    if isinstance(source, Frames):
        return _Given(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_file(io.BytesIO(source), f"video of {len(source)} bytes")
    if isinstance(source, list | tuple):
        allow = {"allow_files": allow_files, "allow_urls": allow_urls}
        return _Pictures("list of pictures", list(source), folder_fps, whole=True, **allow)
    if not isinstance(source, str | Path):
        raise ImageError(
            f"cannot open a {type(source).__name__} as a video; give a path, a URL, bytes or a list of pictures"
        )
    name = short_name(source)
    if isinstance(source, str) and is_url(source):
        if not allow_urls and source[:5].lower() != "data:":
            raise ImageError(f"{name}: URLs are not accepted here; send the video itself (data: URL)")
        return _open_file(io.BytesIO(_load(source)), name)
    if not allow_files:
        raise ImageError(f"{name}: paths are not accepted here; send the video itself (data: URL)")
    if _is_folder(source):
        return _Pictures(name, _pictures_of(Path(source), name), folder_fps)
    path = local_path(source)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe cannot be sought in
        return _open_file(io.BytesIO(_load(path)), name)
    try:
        file = path.open("rb")
    except OSError as error:
        raise file_error(name, error) from error
    return _open_file(file, name)


def read_frames(source: VideoSource, sampling: FrameSampling | None = None) -> Frames:
    """Open, sample and decode at once; a list of pictures is taken whole unless a sampling is given."""
    folder_fps = sampling.folder_fps if sampling else 1.0
    with open_video(source, folder_fps=folder_fps) as video:
        whole = video.whole and sampling is None
        return video.read(list(range(len(video))) if whole else video.plan(sampling))


def is_video(source: str | Path, *, animations: bool = True) -> bool:
    """Whether a path or URL is meant as a video: a folder, by its first bytes, or by its ending.

    Args:
        source: path or URL.
        animations: animated GIF, WebP and PNG files are videos too (never their URLs, as only the file would tell).
    """
    text = str(source)
    if text[:5].lower() == "data:":
        return text[5:11].lower() == "video/"
    if is_url(text):
        return Path(re.split(r"[?#]", text, maxsplit=1)[0]).suffix.lower() in VIDEO_SUFFIXES
    if _is_folder(source):
        return True
    by_name = Path(text).suffix.lower() in VIDEO_SUFFIXES
    try:
        if not os.path.isfile(text):  # missing, or a pipe, which can be read once only
            return by_name
        with open(text, "rb") as file:
            head = file.read(400)
            if head[:4] in (b"GIF8", b"RIFF", b"\x89PNG") and head[8:12] != b"AVI ":
                return animations and _is_animated(file)
    except (OSError, ValueError):
        return by_name
    return _is_container(head) or (by_name and not head.startswith(b"\xff\xd8\xff"))


# Files -----------------------------------------------------------------------------------------------------------


def _load(source: str | Path) -> bytes:
    """A video's bytes from a URL or pipe."""
    return load_bytes(source, limit=MAX_VIDEO_BYTES, deadline=_DEADLINE, kind="video")


def _open_file(file: IO[bytes], name: str) -> Video:
    """A video from an open file, which is closed with it, or at once if it is none."""
    try:
        head = file.read(16)
        file.seek(0)
        if not head:
            raise ImageError(f"{name}: is empty (0 bytes); copy or download it again")
        if head[:4] in (b"GIF8", b"\x89PNG") or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
            return _Animation(file, name)
        return _Stream(file, name)
    except BaseException:
        file.close()
        raise


def _is_container(head: bytes) -> bool:
    """Whether a file begins as the common video containers do."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in _STILL_BRANDS
    return (
        head[:4] in (b"\x1a\x45\xdf\xa3", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75")  # Matroska, MPEG-PS, ASF
        or (head[:4], head[8:12]) == (b"RIFF", b"AVI ")
        or head[:3] == b"FLV"
        or head[4:8] in (b"moov", b"mdat")  # QuickTime of old
        or (head[:1] == head[188:189] == b"\x47")  # MPEG-TS
    )


def _is_animated(file: IO[bytes]) -> bool:
    file.seek(0)
    # What is wrong with it is said by whoever opens it as a picture.
    with suppress(Exception), quiet_pillow(), Image.open(file, formats=_ANIMATIONS) as image:
        return getattr(image, "n_frames", 1) > 1
    return False


def _is_folder(source: str | Path) -> bool:
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # too long or impossible for a name; opening it says so
        return False


# Pictures in order -----------------------------------------------------------------------------------------------


class _Given(Video):
    """Frames that are decoded already."""

    whole = True

    def __init__(self, frames: Frames) -> None:
        super().__init__(frames.name, frames.times, frames.duration)
        self._frames = frames

    def _decode(self, wanted: list[int]) -> Iterator[tuple[Image.Image, float]]:
        return ((self._frames.images[index], self.times[index]) for index in wanted)

    def read(self, indices: Sequence[int]) -> Frames:
        """The frames themselves, where all are wanted."""
        return self._frames if list(indices) == list(range(len(self))) else super().read(indices)


class _Pictures(Video):
    """A folder or list of pictures, one frame each, opened when wanted."""

    def __init__(
        self, name: str, sources: list[Any], fps: float, *, whole: bool = False, **allow: Any
    ) -> None:
        super().__init__(name, [n / fps for n in range(len(sources))], len(sources) / fps)
        self.whole = whole
        self._sources, self._allow = sources, allow

    def _decode(self, wanted: list[int]) -> Iterator[tuple[Image.Image, float]]:
        for index in wanted:
            image = open_image(self._sources[index], **self._allow)
            self.decoded += 1
            yield image, self.times[index]


def _pictures_of(folder: Path, name: str) -> list[Path]:
    """The pictures of a folder in natural order."""
    Image.init()
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in IMAGE_FORMATS}
    try:
        found = [
            path
            for path in folder.iterdir()
            if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
        ]
    except OSError as error:
        raise file_error(name, error) from error
    if not found:
        raise ImageError(f"{name}: is a folder without pictures; give one that holds frames, or a video file")
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key by which frame2 comes before frame10; the name itself decides between 02 and 2."""
    pieces = re.split(r"([0-9]+)", name.lower())
    return [(int(piece), "") if n % 2 else (0, piece) for n, piece in enumerate(pieces)], name


class _Animation(Video):
    """GIF, WebP or PNG by Pillow."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        delays: list[float] = []
        try:
            with quiet_pillow():
                self._image = Image.open(file, formats=_ANIMATIONS)
                if self._image.width * self._image.height > MAX_PIXELS:
                    raise ImageError(
                        f"{name}: has frames of more than {MAX_PIXELS:,} pixels; make it smaller first"
                    )
                pixels = getattr(self._image, "n_frames", 1) * self._image.width * self._image.height
                if pixels > MAX_ANIMATION_PIXELS:
                    raise ImageError(
                        f"{name}: its frames together have more than {MAX_ANIMATION_PIXELS:,} pixels; "
                        "shorten it, make it smaller, or convert it to MP4"
                    )
                for _ in self._walk():
                    delay = float(self._image.info.get("duration") or 0) / 1000
                    delays.append(delay if delay > 0 else _DEFAULT_DELAY)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{name}: is not an animation that can be read here; save it as GIF or MP4"
            ) from error
        # Decoders report damage by nearly every exception type there is.
        except Exception as error:
            raise _damaged(name, error) from error
        super().__init__(name, list(accumulate(delays[:-1], initial=0.0)), sum(delays))
        self.decoded = len(delays)

    def close(self) -> None:
        self._image.close()
        self._file.close()

    def _walk(self) -> Iterator[int]:
        """Decode one frame after the other."""
        for index in range(getattr(self._image, "n_frames", 1)):
            with quiet_pillow():
                self._image.seek(index)
                self._image.load()
            yield index

    def _decode(self, wanted: list[int]) -> Iterator[tuple[Image.Image, float]]:
        try:
            for index in self._walk():
                self.decoded += 1
                if index in wanted:
                    with quiet_pillow():
                        image = to_rgb(self._image, name=self.name)
                    yield image, self.times[index]
                if index == wanted[-1]:
                    break
        except Exception as error:
            raise _damaged(self.name, error) from error


# PyAV ------------------------------------------------------------------------------------------------------------


class _Stream(Video):
    """The first real video stream of a file, by PyAV."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self.name = file, name
        try:
            self._container = self._open()
        except MissingExtraError:
            raise
        except Exception as error:
            raise ImageError(
                f"{name}: is not a video that can be read here, or is cut off ({_reason(error)}); "
                "convert it to MP4, or copy it again"
            ) from error
        try:
            self._stream = self._find_stream()
            self._list_frames()
        except ImageError:
            self._container.close()
            raise
        except Exception as error:
            self._container.close()
            raise _damaged(name, error) from error

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def _open(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise missing_extra("av", "video") from error
        options = {"format_whitelist": _CONTAINERS}
        return av.open(self._file, mode="r", options=options, metadata_errors="replace")

    def _find_stream(self) -> Any:
        streams = self._container.streams
        # A song's cover is a video stream of one picture.
        real = [s for s in streams.video if "attached_pic" not in str(s.disposition.name or "").lower()]
        if not real:
            audio = " (audio only)" if len(streams.audio) else ""
            raise ImageError(f"{self.name}: holds no video{audio}; give a file that shows something")
        stream = real[0]
        if stream.codec_context is None:
            raise ImageError(
                f"{self.name}: its video codec is unknown to this FFmpeg; convert it to MP4 (H.264)"
            )
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise ImageError(
                f"{self.name}: has frames of more than {MAX_PIXELS:,} pixels; make it smaller first"
            )
        # Threads that work ahead are wasted at every jump: a few help between key frames, many would not.
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = min(4, os.cpu_count() or 1)
        return stream

    def _list_frames(self) -> None:
        """Times and key frames from the packets, nothing decoded."""
        stream, base = self._stream, self._stream.time_base
        packets: list[tuple[int, int | None, bool, int]] = []
        loose, broken, ended = 0, False, 0.0
        container = self._container.format.name
        matroska = "matroska" in container
        for packet in self._container.demux() if matroska else self._container.demux(stream):
            if not packet.size:
                continue
            # In a broadcast (MPEG-TS) that flag means a gap, and such recordings have many.
            broken |= packet.is_corrupt and container != "mpegts"
            if packet.pts is not None and packet.time_base:
                ended = max(ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index or packet.is_discard:
                continue
            if packet.pts is None:
                loose += 1
            else:
                packets.append((packet.pts, packet.dts, packet.is_keyframe, packet.duration or 0))
        if not packets and not loose:
            raise ImageError(f"{self.name}: has no frames; give a video that shows something")
        stated = (self._container.duration or 0) / 1e6  # of the header; Matroska has no count of frames
        if broken or (matroska and stated > ended + max(1.0, 0.05 * stated)):
            raise ImageError(f"{self.name}: is cut off ({ended:.1f} s are there); copy or download it again")
        # AVI stores the order of decoding; what FFmpeg gives out as times of showing is wrong with B-frames.
        if loose or (container == "avi" and stream.codec_context.has_b_frames):
            self._pts: list[int] = []
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if not 0 < rate < 1e5:
                raise ImageError(f"{self.name}: has neither time stamps nor a frame rate; convert it to MP4")
            count = loose + len(packets)
            super().__init__(self.name, [n / rate for n in range(count)], count / rate)
            return
        packets.sort(key=lambda packet: packet[0])
        self._keys = [(pts, dts) for pts, dts, key, _ in packets if key] or [packets[0][:2]]
        self._pts = sorted({pts for pts, *_ in packets})
        times = [float((pts - self._pts[0]) * base) for pts in self._pts]
        # Some containers leave the last frame's length out.
        last = float(packets[-1][3] * base) or (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
        super().__init__(self.name, times, times[-1] + last)

    def _decode(self, wanted: list[int]) -> Iterator[tuple[Image.Image, float]]:
        missing = list(reversed(wanted))
        try:
            frames = self._pick(wanted) if self._pts else self._count(wanted)
            for index, frame in frames:
                if index != missing[-1]:
                    break
                when = self.times[index]
                if self._pts:
                    when = float((frame.pts - self._pts[0]) * self._stream.time_base)
                yield self._picture(frame), when
                missing.pop()
        except ImageError:
            raise
        # Of FFmpeg, of the file object below it, of the conversion to RGB.
        except Exception as error:
            raise _damaged(self.name, error) from error
        if missing:
            raise _damaged(self.name, EOFError(f"no frame at {self.times[missing[-1]]:.2f} s"))

    def _pick(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """The frame on screen at each wanted time; the decoder is moved only forwards over key frames."""
        starts = [pts for pts, _ in self._keys]
        frames: Iterator[Any] = iter(())
        at: int | None = None  # time stamp of the last frame that came out
        shown = ahead = None
        for index in wanted:
            pts = self._pts[index]
            key = self._keys[max(0, bisect_right(starts, pts) - 1)]
            if at is None or key[0] > at:
                frames, shown, ahead = self._from(*key), None, None
            for frame in chain([] if ahead is None else [ahead], frames):
                at = frame.pts
                if frame.pts <= pts:
                    shown = frame
                ahead = frame if frame.pts > pts else None
                if frame.pts >= pts:
                    break
            # A file may begin with frames that lean on missing ones: then what comes first is the first frame.
            best = shown if shown is not None else ahead
            if best is not None:
                if best.is_corrupt:
                    raise _damaged(self.name, ValueError(f"the frame at {self.times[index]:.2f} s"))
                yield index, best

    def _from(self, pts: int, dts: int | None) -> Iterator[Any]:
        """Decoded frames from a key frame on. Containers seek by either stamp; some land too late by one."""
        for target in (pts, pts if dts is None else dts, 0):
            self._container.seek(target, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            first = next((packet for packet in packets if packet.size), None)
            if first is not None and first.pts is not None and first.pts <= pts:
                return self._frames(chain([first], packets))
        raise _damaged(self.name, EOFError("its key frames cannot be found again"))

    def _count(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """Frames by their number, decoded from the beginning: there are no times to seek by, nor can one always."""
        self._container.close()
        self._file.seek(0)
        self._container = self._open()
        self._stream = self._find_stream()
        for index, frame in enumerate(self._frames(self._container.demux(self._stream))):
            if index in wanted:
                yield index, frame
            if index >= wanted[-1]:
                return

    def _frames(self, packets: Iterator[Any]) -> Iterator[Any]:
        for packet in packets:
            for frame in packet.decode():
                self.decoded += 1
                if frame.pts is not None or not self._pts:
                    yield frame

    def _picture(self, frame: Any) -> Image.Image:
        if frame.width * frame.height > MAX_PIXELS:
            raise ImageError(
                f"{self.name}: has frames of more than {MAX_PIXELS:,} pixels; make it smaller first"
            )
        image = frame.to_image()
        turn = _turn(frame)
        return image if turn is None else image.transpose(turn)


def _turn(frame: Any) -> Image.Transpose | None:
    """How to bring a stored frame upright. Oblique angles, which no camera writes, are left alone."""
    for n in range(len(frame.side_data)):
        data = frame.side_data[n]
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("<9i" if struct.pack("=i", 1)[0] else ">9i", bytes(data))
            size = math.hypot(a, b) or 1.0
            signs = tuple(round(value / size) for value in (a, b, c, d))
            return _UPRIGHT.get(signs)  # type: ignore[arg-type]
    return None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return short_name(text.split("\n")[0], 100)


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(
        f"{name}: is truncated or damaged ({_reason(error)}); copy, download or convert it again"
    )
