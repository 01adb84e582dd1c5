"""The narrated kitchen: a generated corpus of how-to videos whose truth is known, for demos and tests.

Each video is a real MP4 (H.264, AAC, captions as a mov_text track) of one dish: drawn steps, one verb and one object
each, spoken over by a synthetic voice. A small grammar decides the order of the steps; narration is sometimes chatter
and never quite on time, as in real videos. `NAME.truth.json` beside `NAME.mp4` says what is shown and said when.

Trade-off: pictures are drawn for being told apart by an untrained S3D, not for realism, so a few minutes of video are
enough to see a VideoBERT learn. 24 videos of about 40 s take about 25 s on 2 cores.

The voice is espeak-ng from the `espeakng-loader` wheel (GPL, so an extra). It is not thread-safe: every video is made
in a worker process, which also keeps the library out of the caller.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import multiprocessing
import os
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.kitchen_pictures import OBJECTS, VERBS, Look, Scene

__all__ = ["DISHES", "OBJECTS", "VERBS", "KitchenConfig", "make_kitchen", "plan_recipe", "read_truth"]

MARKER = "kitchen.json"
_VERSION = 1  # of the pictures and the grammar: a corpus of another version is made again

# The grammar: an object goes through the verbs of its dish in this order, each verb at most once. VERBS is the common
# order, every dish a part of it, and every verb is in three dishes.
DISHES = {
    "soup": ("wash", "chop", "stir"),
    "roast": ("wash", "season", "bake"),
    "skillet": ("chop", "season", "flip"),
    "pie": ("chop", "stir", "bake"),
    "grill": ("wash", "season", "flip"),
    "casserole": ("stir", "flip", "bake"),
}

TEMPLATES = (
    "Now let me show you how to {verb} the {thing}.",
    "Next we {verb} the {thing}.",
    "Go ahead and {verb} the {thing} until it looks right.",
    "Then you want to {verb} the {thing}.",
    "It is time to {verb} the {thing}.",
    "I always {verb} the {thing} like this.",
)

CHATTER = (
    "My grandmother loved this kitchen.",
    "It is raining outside today.",
    "Thank you for all the kind comments.",
    "I bought this apron last summer.",
    "My neighbor came over yesterday.",
    "This song always makes me smile.",
    "We had a very busy week.",
    "Please subscribe to my channel.",
)

SPEECH_RATE = 22_050  # samples a second, espeak-ng's own
_PAUSE_S = 0.25  # least silence between two sentences
_LEAD_S = (0.6, 1.6)  # the empty kitchen before the first step
_TAIL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class KitchenConfig:
    """Size and variation of the corpus; the same config gives the same truth."""

    num_videos: int = 24
    """Videos to make."""
    steps_per_video: tuple[int, int] = (6, 8)
    """Fewest and most steps of a video."""
    step_s: tuple[float, float] = (4.0, 6.0)
    """Shortest and longest step in seconds; a step whose narration is longer is stretched to hold it."""
    width: int = 320
    """Picture width in pixels, even."""
    height: int = 240
    """Picture height in pixels, even."""
    fps: int = 20
    """Pictures per second."""
    seed: int = 0
    """Everything random comes from it."""
    chatter_rate: float = 0.2
    """Share of steps with a sentence about something else."""
    jitter_s: float = 0.8
    """A sentence begins up to this many seconds before or after its pictures."""
    num_without_captions: int = 1
    """Videos without a caption track: their words can only be heard."""

    def __post_init__(self) -> None:
        low, high = self.steps_per_video
        if self.num_videos < 1 or self.fps < 1 or not 1 <= low <= high:
            raise ValueError(
                "the kitchen needs num_videos >= 1, fps >= 1 and steps_per_video (low, high) with 1 <= low <= high."
            )
        if not 0 < self.step_s[0] <= self.step_s[1]:
            raise ValueError(f"step_s must be (shortest, longest) in seconds, not {self.step_s}.")
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < 64:
            raise ValueError(f"H.264 needs even picture sizes of at least 64 pixels, not {self.width}x{self.height}.")
        if not 0 <= self.num_without_captions <= self.num_videos:
            raise ValueError(f"num_without_captions must be 0..{self.num_videos}, not {self.num_without_captions}.")


@dataclass(frozen=True, kw_only=True)
class _Speech:
    """A sentence with its sound and its place on the clock."""

    text: str
    start_s: float
    sound: np.ndarray  # int16, mono, at SPEECH_RATE

    @property
    def end_s(self) -> float:
        return round(self.start_s + len(self.sound) / SPEECH_RATE, 3)

    def truth(self) -> dict[str, Any]:
        return {"sentence": self.text, "sentence_start_s": self.start_s, "sentence_end_s": self.end_s}


def make_kitchen(
    out_dir: Path,
    config: KitchenConfig,
    *,
    num_processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Make the corpus in `out_dir` and return its videos in name order.

    A complete corpus of the same config is kept as it is; anything less is made again. `progress` is called with
    (videos done, videos in all). At most `num_processes` workers (default: two, or the machine's cores if fewer).
    Raises RuntimeError when the voice is not installed or ffmpeg fails.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise RuntimeError("the kitchen's voice is missing: pip install 'videobert[demo]' (espeakng-loader).")
    from pipelines.media import ffmpeg_path  # loads PyAV, which the workers do not need

    out_dir.mkdir(parents=True, exist_ok=True)
    names = [f"kitchen-{index:03d}.mp4" for index in range(config.num_videos)]
    videos = [out_dir / name for name in names]
    wanted = json.loads(json.dumps({"version": _VERSION, "config": asdict(config), "videos": names, "complete": True}))
    marker = _read_json(out_dir / MARKER)
    if marker == wanted and all(video.is_file() and truth_path(video).is_file() for video in videos):
        if progress:
            progress(len(videos), len(videos))
        return videos
    for name in marker.get("videos", ()):
        (out_dir / name).unlink(missing_ok=True)
        truth_path(out_dir / name).unlink(missing_ok=True)
    _write_json(out_dir / MARKER, wanted | {"complete": False})
    ffmpeg = ffmpeg_path()
    workers = min(num_processes or min(2, os.cpu_count() or 1), len(videos))
    # Spawned, not forked: the caller may hold threads (Ray, torch).
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_make_video, video, index, config, ffmpeg) for index, video in enumerate(videos)]
        for num_done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            if progress:
                progress(num_done, len(videos))
    _write_json(out_dir / MARKER, wanted)
    return videos


def truth_path(video: Path) -> Path:
    """NAME.truth.json of NAME.mp4."""
    return video.with_suffix(".truth.json")


def read_truth(video: Path) -> dict[str, Any]:
    """The truth of a video of the kitchen.

    {"video", "seed", "recipe", "dish", "captions", "duration_s", "steps": [{"index", "verb", "object", "start_s",
    "end_s", "sentence", "sentence_start_s", "sentence_end_s"}], "chatter": [{"sentence", "sentence_start_s",
    "sentence_end_s"}], "verbs", "objects"}; seconds on the clock, `start_s` and `end_s` those of the pictures.
    """
    return dict(json.loads(truth_path(video).read_text()))


def plan_recipe(*, seed: int, index: int, num_steps: int) -> tuple[str, list[tuple[str, str]]]:
    """(dish, [(verb, object)]) of video `index`: a pure function.

    Dishes and objects go round in shuffled turns, so that a small corpus holds all of them. The objects of a dish are
    cooked side by side or one after the other; either way each follows the order of the dish.
    """
    rng = np.random.default_rng([seed, index, 1])
    dish = _in_turns(tuple(DISHES), seed=seed, start=index, num=1)[0]
    chain = DISHES[dish]
    num_things = -(-num_steps // len(chain))
    things = _in_turns(OBJECTS, seed=seed + 1, start=2 * index, num=num_things)
    if rng.random() < 0.5:
        steps = [(verb, thing) for verb in chain for thing in things]
    else:
        steps = [(verb, thing) for thing in things for verb in chain]
    kept = np.sort(rng.permutation(len(steps))[:num_steps])
    return dish, [steps[i] for i in kept]


def _in_turns(items: tuple[str, ...], *, seed: int, start: int, num: int) -> list[str]:
    """`num` items from position `start` of an endless list that shuffles all items anew each turn."""
    turn, position = divmod(start, len(items))
    order = np.random.default_rng([seed, turn, 2]).permutation(len(items))
    return [items[order[(position + i) % len(items)]] for i in range(num)]


def _make_video(video: Path, index: int, config: KitchenConfig, ffmpeg: str) -> None:
    """Plan, speak, draw and encode one video; the truth is written last."""
    rng = np.random.default_rng([config.seed, index, 0])
    truth, speeches = _plan_video(video.name, index=index, config=config, rng=rng)
    with tempfile.TemporaryDirectory(dir=video.parent, prefix=".kitchen-") as scratch:
        sound, captions, made = (Path(scratch, name) for name in ("sound.wav", "captions.srt", "video.mp4"))
        _write_sound(sound, speeches, duration_s=truth["duration_s"])
        captions.write_text(_srt(speeches))
        command = _ffmpeg_command(ffmpeg, config, sound=sound, captions=captions if truth["captions"] else None)
        title = ["-metadata", f"title={truth['recipe'].capitalize()}"]
        _encode([*command, *title, str(made)], _frames(truth, config=config, rng=rng))
        made.replace(video)
    _write_json(truth_path(video), truth)


def _plan_video(
    name: str, *, index: int, config: KitchenConfig, rng: np.random.Generator
) -> tuple[dict[str, Any], list[_Speech]]:
    """The truth of a video, and its sentences in the order of speaking."""
    low, high = config.steps_per_video
    dish, plan = plan_recipe(seed=config.seed, index=index, num_steps=int(rng.integers(low, high + 1)))
    script = [_lines(verb, thing, config=config, rng=rng) for verb, thing in plan]
    spoken = iter(_speak([text for lines in script for text in lines]))
    steps: list[dict[str, Any]] = []
    chatter: list[dict[str, Any]] = []
    speeches: list[_Speech] = []
    clock_s, silent_from_s = round(rng.uniform(*_LEAD_S), 3), 0.0
    for number, ((verb, thing), lines) in enumerate(zip(plan, script, strict=True)):
        wanted_s = clock_s + rng.uniform(-config.jitter_s, config.jitter_s)
        for text in lines:
            speech = _Speech(text=text, start_s=round(max(wanted_s, silent_from_s), 3), sound=next(spoken))
            speeches.append(speech)
            silent_from_s = speech.end_s + _PAUSE_S
        told = speeches[-len(lines) :]
        chatter += [speech.truth() for speech in told[1:]]
        # The pictures wait for the words, so that every sentence begins while its own step is near.
        end_s = round(max(clock_s + rng.uniform(*config.step_s), silent_from_s), 3)
        steps.append({"index": number, "verb": verb, "object": thing, "start_s": clock_s, "end_s": end_s})
        steps[-1] |= told[0].truth()
        clock_s = end_s
    silent = np.random.default_rng([config.seed, 3]).permutation(config.num_videos)[: config.num_without_captions]
    truth = {
        "video": name,
        "seed": config.seed,
        "recipe": f"{' and '.join(dict.fromkeys(thing for _, thing in plan))} {dish}",
        "dish": dish,
        "captions": index not in silent,
        "duration_s": round(clock_s + _TAIL_S, 3),
        "steps": steps,
        "chatter": chatter,
        "verbs": list(VERBS),
        "objects": list(OBJECTS),
    }
    return truth, speeches


def _lines(verb: str, thing: str, *, config: KitchenConfig, rng: np.random.Generator) -> list[str]:
    """What is said during a step: its sentence, and sometimes one about something else."""
    lines = [TEMPLATES[rng.integers(len(TEMPLATES))].format(verb=verb, thing=thing)]
    if rng.random() < config.chatter_rate:
        lines.append(CHATTER[rng.integers(len(CHATTER))])
    return lines


def _frames(truth: dict[str, Any], *, config: KitchenConfig, rng: np.random.Generator) -> Iterator[bytes]:
    """The pictures of a video as RGB bytes; picture i is shown at i / fps."""
    scene = Scene(width=config.width, height=config.height, rng=rng)
    num_frames = round(truth["duration_s"] * config.fps)
    shown = 0
    for step in truth["steps"]:
        first, last = (round(step[name] * config.fps) for name in ("start_s", "end_s"))
        yield from [scene.background.tobytes()] * (first - shown)
        paint = scene.step(verb=step["verb"], thing=step["object"], look=Look.draw(rng))
        for frame in range(first, last):
            yield paint((frame - first) / config.fps).tobytes()
        shown = last
    yield from [scene.background.tobytes()] * (num_frames - shown)


def _ffmpeg_command(ffmpeg: str, config: KitchenConfig, *, sound: Path, captions: Path | None) -> list[str]:
    """Raw pictures on stdin, sound and captions from files; without the output path, which comes last."""
    size = f"{config.width}x{config.height}"
    command = [ffmpeg, "-nostdin", "-loglevel", "error", "-y"]
    command += [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        size,
        "-r",
        str(config.fps),
        "-i",
        "pipe:0",
        "-i",
        str(sound),
    ]
    if captions:
        command += ["-i", str(captions), "-map", "2:s", "-c:s", "mov_text", "-metadata:s:s:0", "language=eng"]
    command += ["-map", "0:v", "-c:v", "libx264", "-preset", "ultrafast", "-crf", "22", "-pix_fmt", "yuv420p"]
    # One thread each: the workers already fill the cores. Bit-exact: no version strings in the file.
    command += ["-threads", "1", "-map", "1:a", "-c:a", "aac", "-b:a", "64k", "-fflags", "+bitexact"]
    return [*command, "-movflags", "+faststart"]


def _encode(command: list[str], frames: Iterator[bytes]) -> None:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        assert process.stdin is not None
        try:
            for frame in frames:
                process.stdin.write(frame)
            process.stdin.close()
        except BrokenPipeError:
            pass  # ffmpeg gave up; its exit status and log say why
        if process.wait() != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(
                f"ffmpeg could not encode the kitchen ({said[-1] if said else 'no message'}): "
                "it needs libx264 and aac, which `videobert doctor` checks."
            )


def _write_sound(path: Path, speeches: list[_Speech], *, duration_s: float) -> None:
    """A mono WAV of `duration_s` seconds: the sentences at their times, digital silence between."""
    track = np.zeros(round(duration_s * SPEECH_RATE), np.int16)
    for speech in speeches:
        first = round(speech.start_s * SPEECH_RATE)
        track[first : first + len(speech.sound)] = speech.sound
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SPEECH_RATE)
        out.writeframes(track.tobytes())


def _srt(speeches: list[_Speech]) -> str:
    return "".join(
        f"{number}\n{_srt_time(speech.start_s)} --> {_srt_time(speech.end_s)}\n{speech.text}\n\n"
        for number, speech in enumerate(speeches, start=1)
    )


def _srt_time(time_s: float) -> str:
    minutes, milliseconds = divmod(round(time_s * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"


# espeak-ng's C interface, https://github.com/espeak-ng/espeak-ng/blob/master/src/include/espeak-ng/speak_lib.h
_SYNCHRONOUS = 2  # espeak_Synth returns when the sentence is spoken
_RATE_WPM, _PITCH = 1, 3  # espeak_PARAMETER
_UTF8 = 1
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _speak(sentences: list[str]) -> list[np.ndarray]:
    """The sound of each sentence, int16 mono at SPEECH_RATE, silence at its ends cut off.

    espeak-ng carries noise and phase from one sentence to the next; a child that has never spoken makes the result
    depend on the sentences alone. It is forked (milliseconds): this process is a worker without threads.
    """
    context = multiprocessing.get_context("fork")
    results, send = context.Pipe(duplex=False)
    child = context.Process(target=_speak_into, args=(send, sentences))
    child.start()
    send.close()
    try:
        return list(results.recv())
    except EOFError as error:
        raise RuntimeError(
            "espeak-ng did not speak: reinstall it with pip install --force-reinstall espeakng-loader."
        ) from error
    finally:
        child.join()


def _speak_into(results: Connection, sentences: list[str]) -> None:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate != SPEECH_RATE or library.espeak_SetVoiceByName(b"en-us") != 0:
        raise RuntimeError(f"espeak-ng did not start its English voice at {SPEECH_RATE} Hz (got {rate}).")
    library.espeak_SetParameter(_RATE_WPM, 145, 0)
    library.espeak_SetParameter(_PITCH, 45, 0)
    pieces: list[np.ndarray] = []

    def collect(samples: Any, num_samples: int, _events: Any) -> int:
        if samples and num_samples > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(num_samples,)).copy())
        return 0

    callback = _SYNTH_CALLBACK(collect)
    library.espeak_SetSynthCallback(callback)
    sounds = []
    for sentence in sentences:
        pieces.clear()
        data = sentence.encode()
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, _UTF8, None, None)
        sound = np.concatenate(pieces)
        loud = np.flatnonzero(np.abs(sound.astype(np.int32)) > 100)
        sounds.append(sound[loud[0] : loud[-1] + 1])
    results.send(sounds)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: readers never see half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
