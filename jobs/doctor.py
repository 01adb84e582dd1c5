"""`videobert doctor`: what works on this machine, and for each thing that does not, what to do about it.

A check looks at the real thing (it runs ffmpeg, opens the tracking store, imports torch) and never raises: a broken
installation is what the doctor is for. Checks that the main path cannot do without are *needed* and decide the exit
code; the others are worth knowing. Starting Ray takes ten seconds, so it is done with `--deep` only.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.command import door, parse, sentence

MIN_DISK_GB = 5.0
MIN_MEMORY_GB = 4.0
REINSTALL = "install again into a fresh environment: pip install -c constraints.txt -e ."
DECODERS = ("h264", "hevc", "vp9", "av1", "aac", "opus", "mp3")
# FFmpeg has more than one decoder for some codecs, and any of them will do.
DECODER_NAMES = {"av1": ("av1", "libdav1d", "libaom-av1"), "mp3": ("mp3", "mp3float"), "opus": ("opus", "libopus")}


@dataclass(frozen=True, kw_only=True)
class DoctorJob:
    """What to look at."""

    json: bool = False
    """Print one JSON object instead of text."""
    deep: bool = False
    """Also start Ray on this machine and run one task in it (ten seconds)."""
    dataset: str = "."
    """Local folder in which datasets will lie: its disk is looked at, and the MLflow store is opened beside it."""
    whisper_checkpoint: str | None = None
    """Path of an openai-whisper checkpoint; without it, the package's cache folder is looked at."""
    s3d_weights: str | None = None
    """S3D weights as `features.weights` will name them: a path, URL#sha256=DIGEST, or random:SEED."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one look found. `remedy` is empty where nothing needs doing."""

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str = ""


@door
def main(argv: list[str]) -> int:
    job = parse(
        DoctorJob,
        argv,
        prog="videobert doctor",
        description="What works on this machine, and a remedy for what does not. Exits with 1 if what is needed fails.",
    )
    checks = list(examine(job, say=None if job.json else _say))
    healthy = all(check.ok for check in checks if check.needed)
    if job.json:
        print(json.dumps({"ok": healthy, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
    else:
        missing = ", ".join(check.name for check in checks if check.needed and not check.ok)
        print("\nEverything that the main path needs works." if healthy else f"\nThe main path needs: {missing}.")
    return 0 if healthy else 1


def examine(job: DoctorJob, *, say: Callable[[Check], None] | None = None) -> Iterator[Check]:
    """Every check in turn; `say` hears of each as soon as it is done. A check that breaks is a check that failed."""
    looks: dict[str, Callable[[], Check]] = {
        "python": look_at_python,
        "ffmpeg": look_at_ffmpeg,
        "decoders": look_at_decoders,
        "pyav": look_at_pyav,
        "torch": look_at_torch,
        "s3d weights": lambda: look_at_s3d(job.s3d_weights),
        "whisper": lambda: look_at_whisper(job.whisper_checkpoint),
        "pocketsphinx": look_at_pocketsphinx,
        "ray": lambda: look_at_ray(deep=job.deep),
        "mlflow": lambda: look_at_mlflow(job.dataset),
        "demo voice": look_at_voice,
        "disk": lambda: look_at_disk(job.dataset),
        "memory": look_at_memory,
    }
    for name, look in looks.items():
        try:
            check = look()
        except Exception as error:  # the doctor outlives its patients
            check = Check(
                name=name, ok=False, needed=True, found=f"{type(error).__name__}: {sentence(error)}", remedy=REINSTALL
            )
        if say is not None:
            say(check)
        yield check


def look_at_python() -> Check:
    ok = sys.version_info >= (3, 11)
    remedy = "" if ok else "use Python 3.11 or newer."
    return Check(name="python", ok=ok, needed=True, found=f"{sys.version.split()[0]} at {sys.prefix}", remedy=remedy)


def look_at_ffmpeg() -> Check:
    from pipelines.media import ffmpeg_path

    binary = ffmpeg_path()
    ok = "libx264" in _ffmpeg(binary, "-encoders")
    version = _ffmpeg(binary, "-version").split("\n")[0].removeprefix("ffmpeg version ").split(" ")[0]
    remedy = "" if ok else "install ffmpeg with libx264, or pip install imageio-ffmpeg, which brings one."
    return Check(
        name="ffmpeg", ok=ok, needed=True, found=f"{version}, {binary}{', libx264' if ok else ''}", remedy=remedy
    )


def look_at_decoders() -> Check:
    from pipelines.media import ffmpeg_path

    lines = [line.split() for line in _ffmpeg(ffmpeg_path(), "-decoders").splitlines()]
    there = {words[1] for words in lines if len(words) > 1}
    missing = [codec for codec in DECODERS if not there & set(DECODER_NAMES.get(codec, (codec,)))]
    remedy = f"sources in {', '.join(missing)} will be quarantined: put a full ffmpeg on PATH." if missing else ""
    found = ", ".join(codec for codec in DECODERS if codec not in missing)
    return Check(
        name="decoders", ok=not missing, needed="h264" in missing or "aac" in missing, found=found, remedy=remedy
    )


def look_at_pyav() -> Check:
    import av

    av.Codec("h264", "r")
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return Check(name="pyav", ok=True, needed=True, found=f"{av.__version__}, libavcodec {codec}")


def look_at_torch() -> Check:
    import torch

    found = f"{torch.__version__}, {torch.get_num_threads()} threads, "
    if torch.cuda.is_available():
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        found += f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({memory_gb:.0f} GB)"
    else:
        found += f"CPU only, bf16 arithmetic {_bf16_on_cpu()}"
    return Check(name="torch", ok=True, needed=True, found=found)


def look_at_s3d(weights: str | None) -> Check:
    if weights is None:
        remedy = (
            "give --s3d-weights PATH to check torchvision's s3d-d76dad2f.pth; without weights only random:SEED works, "
            "whose tokens come from an untrained network."
        )
        return Check(name="s3d weights", ok=False, needed=False, found="none named", remedy=remedy)
    from pipelines.s3d import load_weights

    try:
        _, name, digest = load_weights(weights)
    except (OSError, ValueError) as error:
        remedy = "give a path that exists, URL#sha256=DIGEST, or random:0 for a trial."
        return Check(name="s3d weights", ok=False, needed=True, found=sentence(error), remedy=remedy)
    untrained = "; untrained, for trials only" if weights.startswith("random:") else ""
    return Check(name="s3d weights", ok=True, needed=True, found=f"{name}, digest {digest[:16]}{untrained}")


def look_at_whisper(checkpoint: str | None) -> Check:
    if importlib.util.find_spec("whisper") is None:
        return Check(name="whisper", ok=False, needed=True, found="openai-whisper is not installed", remedy=REINSTALL)
    version = importlib.metadata.version("openai-whisper")
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        remedy = "" if path.is_file() else "give the path of a .pt file of openai-whisper."
        return Check(name="whisper", ok=path.is_file(), needed=True, found=f"{version}, {path}", remedy=remedy)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "whisper")
    sizes = sorted(path.stem for path in cache.glob("*.pt"))
    remedy = "" if sizes else f"put a checkpoint into {cache} for better transcripts; until then pocketsphinx listens."
    found = f"{version}, weights: {', '.join(sizes) or 'none at hand'}"
    return Check(name="whisper", ok=bool(sizes), needed=False, found=found, remedy=remedy)


def look_at_pocketsphinx() -> Check:
    import pocketsphinx

    model = Path(pocketsphinx.get_model_path("en-us"))
    ok = (model / "en-us").is_dir()
    version = importlib.metadata.version("pocketsphinx")
    remedy = "" if ok else "pip install --force-reinstall pocketsphinx: its English model is part of the wheel."
    return Check(
        name="pocketsphinx",
        ok=ok,
        needed=True,
        found=f"{version}, English model {'in' if ok else 'not in'} the wheel",
        remedy=remedy,
    )


def look_at_ray(*, deep: bool) -> Check:
    version = importlib.metadata.version("ray")
    address = os.environ.get("RAY_ADDRESS")
    where = f"cluster {address}" if address else f"local, {os.cpu_count()} CPUs"
    if not deep:
        return Check(name="ray", ok=True, needed=True, found=f"{version}, {where} (not started; --deep starts it)")
    import ray

    from jobs.cluster import connected

    with connected():
        ray.get(ray.remote(_task).remote(), timeout=120)
    return Check(name="ray", ok=True, needed=True, found=f"{version}, {where}, started and ran a task")


def look_at_mlflow(dataset: str) -> Check:
    from training.tracking import client

    version = importlib.metadata.version("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        if uri:
            client(uri).search_experiments(max_results=1)
        else:
            folder = _existing_parent(Path(dataset))
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".videobert-doctor-"):
                uri = f"sqlite file in the dataset folder, {folder} can be written"
    except Exception as error:  # MLflow passes on whatever its store raises
        remedy = "set MLFLOW_TRACKING_URI to a store that answers, or choose a --dataset folder that can be written."
        found = f"{version}, {uri or dataset}: {sentence(error)}"
        return Check(name="mlflow", ok=False, needed=True, found=found, remedy=remedy)
    return Check(name="mlflow", ok=True, needed=True, found=f"{version}, {uri}")


def look_at_voice() -> Check:
    ok = importlib.util.find_spec("espeakng_loader") is not None
    found = f"espeakng-loader {importlib.metadata.version('espeakng-loader')}" if ok else "espeak-ng is not installed"
    remedy = "" if ok else "pip install 'videobert[demo]' if `videobert demo` is to speak; ingestion does not need it."
    return Check(name="demo voice", ok=ok, needed=False, found=found, remedy=remedy)


def look_at_disk(dataset: str) -> Check:
    folder = _existing_parent(Path(dataset))
    free_gb = shutil.disk_usage(folder).free / 1e9
    ok = free_gb >= MIN_DISK_GB
    remedy = "" if ok else f"free {MIN_DISK_GB:.0f} GB, or put the dataset elsewhere with --dataset."
    return Check(name="disk", ok=ok, needed=True, found=f"{free_gb:,.0f} GB free at {folder}", remedy=remedy)


def look_at_memory() -> Check:
    total_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    in_kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    available_gb = in_kb["MemAvailable"] * 1024 / 1e9 if "MemAvailable" in in_kb else total_gb
    ok = available_gb >= MIN_MEMORY_GB
    remedy = "" if ok else f"close something: below {MIN_MEMORY_GB:.0f} GB the stages may be killed for their memory."
    return Check(
        name="memory", ok=ok, needed=False, found=f"{available_gb:.0f} of {total_gb:.0f} GB available", remedy=remedy
    )


def _task() -> None:
    """What the worker runs."""


def _say(check: Check) -> None:
    mark = "ok     " if check.ok else "MISSING" if check.needed else "note   "
    print(f"{mark}  {check.name:<13} {check.found}", flush=True)
    if check.remedy:
        print(f"{'':<24}{'->'} {check.remedy}", flush=True)


def _ffmpeg(binary: str, argument: str) -> str:
    return subprocess.run([binary, "-hide_banner", argument], capture_output=True, text=True, timeout=60).stdout


def _bf16_on_cpu() -> str:
    import torch

    capability = torch.cpu.get_capabilities()
    if capability.get("amx_bf16"):
        return "fast (AMX)"
    return "native (AVX-512)" if capability.get("avx512_bf16") else "emulated, fp32 may be faster"


def _existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


if __name__ == "__main__":
    sys.exit(main())
