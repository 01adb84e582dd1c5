"""Look into a media file: `python probe.py FILE` prints what is in it as one line of JSON.

A script of its own because it opens strangers' bytes in-process with PyAV (the ffmpeg of the imageio-ffmpeg wheel comes
without ffprobe): `pipelines.media` runs it in a child with limits, so that a crash or a hang of the demuxer costs a
child, not a worker. It imports nothing but av.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import av

# Demuxers that read one self-contained file. Playlists and manifests (hls, dash, concat, ffconcat, image2, sdp, rtsp,
# ...) can name other files and hosts, so they are not here.
SAFE_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "wav", "mp3",
    "flac", "aac", "ac3", "amr", "aiff", "caf", "wv", "ape", "gif", "m4v", "h264", "hevc", "ivf", "mxf", "nut", "dv",
)  # fmt: skip
TEXT_SUBTITLES = frozenset({"mov_text", "subrip", "srt", "webvtt", "ass", "ssa", "text"})


def probe(path: str) -> dict[str, Any]:
    """Streams worth using and the container's times, in seconds on the clock; streams by their index in the file.

    Raises av.FFmpegError if the file cannot be opened as one of SAFE_FORMATS.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(SAFE_FORMATS)}
    url = f"file:{os.path.abspath(path)}"  # no name is ever taken for a protocol
    with av.open(url, options=options, metadata_errors="replace") as container:
        pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        pictures = [s for s in pictures if s.codec_context is not None and s.codec_context.width]
        sounds = [s for s in container.streams.audio if s.codec_context is not None]
        # The largest picture and the sound with the most channels, the default first: what ffmpeg itself would take.
        video = max(pictures, key=lambda s: (s.codec_context.width * s.codec_context.height, -s.index), default=None)
        audio = max(sounds, key=lambda s: (_is_default(s), s.codec_context.channels, -s.index), default=None)
        return {
            "format": container.format.name,
            "duration_s": container.duration / 1e6 if (container.duration or -1) >= 0 else None,
            "start_s": (container.start_time or 0) / 1e6,
            "num_streams": len(container.streams),
            "video": None if video is None else _video(video),
            "audio": None if audio is None else {"index": audio.index, "codec": audio.codec_context.name},
            "subtitles": [_subtitle(s) for s in container.streams.subtitles if _codec(s) in TEXT_SUBTITLES],
        }


def _is_default(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.default)


def _codec(stream: Any) -> str | None:
    return None if stream.codec_context is None else stream.codec_context.name


def _video(stream: Any) -> dict[str, Any]:
    context = stream.codec_context
    return {"index": stream.index, "codec": context.name, "width": context.width, "height": context.height}


def _subtitle(stream: Any) -> dict[str, Any]:
    return {"index": stream.index, "codec": _codec(stream), "language": stream.metadata.get("language")}


def main(path: str) -> dict[str, Any]:
    """What `probe` finds, or {"error": why it cannot, "forbidden": whether the format is known but not a safe one}."""
    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture(local=False) as said:
        try:
            return probe(path)
        except (av.FFmpegError, OSError, ValueError) as failure:
            # EINVAL alone would not tell: broken headers end in it too.
            forbidden = any("whitelist" in message for _, _, message in said)
            return {"error": str(failure), "forbidden": forbidden}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))
