"""S3D, the video encoder of the paper, in torchvision's parameter layout, and its weights.

One clip in, one 1024-d feature out: the plain mean over T', H', W' of the last feature map. torchvision's own head
averages windows of (2, 7, 7) with stride 1 and then averages the windows, which counts the middle frames of a 30-frame
clip (T' = 4) twice and refuses pictures under 224 pixels; the paper says "3D average pooling" and the plain mean is
that.

S3D, not decoding, is the bottleneck of ingestion on a CPU, so the network is rebuilt for speed at load: batch norms
folded into their convolutions, channels-last memory (the order in which frames are decoded), bfloat16 where the CPU
multiplies it natively. A 30-frame clip of 224 pixels then takes 0.3 s on 2 cores where fused float32 takes 0.8 s, and
the features keep a cosine of at least 0.999 with it; elsewhere the same code runs in float32.

`random:SEED` gives an untrained network that still tells scenes apart (see `random_s3d`): at 64 pixels, 0.03 s a clip,
64 visual tokens of the narrated kitchen name the verb of a clip nine times in ten. It is for demos and tests: honest
colour, shape and motion statistics, no knowledge of the world.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURE_DIM = 1024
NUM_CLASSES = 400
MIN_FRAMES = 8  # the temporal strides multiply to 8; fewer frames leave nothing to average
MIN_PIXELS = 32

# Channels of an Inception block: in, branch0, branch1 reduce and out, branch2 reduce and out, branch3 (Xie et al.,
# figure 6).
_MIXED_3 = ((192, 64, 96, 128, 16, 32, 32), (256, 128, 128, 192, 32, 96, 64))
_MIXED_4 = (
    (480, 192, 96, 208, 16, 48, 64),
    (512, 160, 112, 224, 24, 64, 64),
    (512, 128, 128, 256, 24, 64, 64),
    (512, 112, 144, 288, 32, 64, 64),
    (528, 256, 160, 320, 32, 128, 128),
)
_MIXED_5 = ((832, 256, 160, 320, 32, 128, 128), (832, 384, 192, 384, 48, 128, 128))

# Bump when the recipe of random weights changes: their digest is made of it.
_RANDOM_RECIPE = "s3d-random-1"

Precision = Literal["auto", "float32", "bfloat16"]


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit; the message is one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a family of checkpoints expects of its pixels (after division by 255)."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# torchvision S3D_Weights.KINETICS400_V1
# https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.video.s3d.html
KINETICS400 = Preset(name="kinetics400", mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU: keys `0.weight` and `1.*`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        super().__init__(
            nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False),
            nn.BatchNorm3d(out_channels, eps=1e-3, momentum=1e-3),
            nn.ReLU(inplace=True),
        )


class SeparableConv(nn.Sequential):
    """A k x k convolution in space, then one of k in time: keys `0.*` and `1.*`."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int = 1) -> None:
        super().__init__(
            ConvNormAct(in_channels, out_channels, kernel=(1, kernel, kernel), stride=(1, stride, stride)),
            ConvNormAct(out_channels, out_channels, kernel=(kernel, 1, 1), stride=(stride, 1, 1)),
        )


class Inception(nn.Module):
    """Four branches over the same input, joined along channels."""

    def __init__(self, channels: tuple[int, int, int, int, int, int, int]) -> None:
        super().__init__()
        c_in, b0, b1_reduce, b1, b2_reduce, b2, b3 = channels
        one = (1, 1, 1)
        self.branch0 = ConvNormAct(c_in, b0, kernel=one)
        self.branch1 = nn.Sequential(ConvNormAct(c_in, b1_reduce, kernel=one), SeparableConv(b1_reduce, b1, kernel=3))
        self.branch2 = nn.Sequential(ConvNormAct(c_in, b2_reduce, kernel=one), SeparableConv(b2_reduce, b2, kernel=3))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, stride=1, padding=1), ConvNormAct(c_in, b3, kernel=one))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)), dim=1)


class S3D(nn.Module):
    """Separable 3D CNN (Xie et al. 2018, https://arxiv.org/abs/1712.04851) under torchvision's key names.

    464 state-dict keys and 8,320,048 parameters with 400 classes. The classifier is kept so that a checkpoint loads
    whole; features do not use it.
    """

    def __init__(self, *, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(
            SeparableConv(3, 64, kernel=7, stride=2),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            ConvNormAct(64, 64, kernel=(1, 1, 1)),
            SeparableConv(64, 192, kernel=3),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            *map(Inception, _MIXED_3),
            nn.MaxPool3d(3, stride=2, padding=1),
            *map(Inception, _MIXED_4),
            nn.MaxPool3d(2, stride=2),
            *map(Inception, _MIXED_5),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(FEATURE_DIM, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, T, H, W] -> features [N, 1024]: mean over T', H', W' before the classifier."""
        return self.features(x).mean(dim=(2, 3, 4), dtype=torch.float32)


class S3DExtractor:
    """A loaded S3D ready to turn frames into features; holds the network, so make one a process and keep it."""

    dim = FEATURE_DIM

    def __init__(
        self,
        *,
        model: S3D,
        name: str,
        digest: str,
        preset: Preset,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.name = name
        self.digest = digest
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        fused = _fuse(model)
        self._model = fused.to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._mean = torch.tensor(preset.mean, device=device).view(1, 3, 1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(preset.std, device=device).view(1, 3, 1, 1, 1) * 255)

    def extract(self, frames: np.ndarray) -> np.ndarray:
        """RGB clips [N, T, H, W, 3] uint8 -> features [N, 1024] float32.

        T >= 8 and H, W >= 32. Clips are handled `batch_size` at a time, so N is free.
        Raises ValueError for another shape or type.
        """
        _check_frames(frames)
        features = np.empty((len(frames), FEATURE_DIM), np.float32)
        for start in range(0, len(frames), self.batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(frames[start : start + self.batch_size])).to(self.device)
            # [N, T, H, W, 3] in memory *is* channels-last [N, 3, T, H, W]: a view, no copy.
            pixels = ((batch.permute(0, 4, 1, 2, 3).float() - self._mean) * self._scale).to(self.dtype)
            with torch.inference_mode():
                features[start : start + self.batch_size] = self._model(pixels).cpu().numpy()
        return features


def load_s3d(
    *,
    weights: str,
    device: str | None = None,
    precision: Precision = "auto",
    batch_size: int = 4,
    cache_dir: Path | None = None,
) -> S3DExtractor:
    """An extractor with the weights that `weights` names.

    `PATH` or `PATH#sha256=HEX` (.pth, .pt, .safetensors), `https://...#sha256=HEX` (downloaded once into `cache_dir`,
    default ~/.cache/videobert/weights), or `random:SEED`. `device` defaults to CUDA where there is one; `precision`
    "auto" is bfloat16 on CUDA and on CPUs with bfloat16 instructions, else float32. A batch of four 30-frame clips of
    224 pixels needs about 0.5 GB.
    Raises WeightsError for weights that are missing, do not match their digest, or are not torchvision's S3D.
    """
    model, name, digest = load_weights(weights, cache_dir=cache_dir)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return S3DExtractor(
        model=model,
        name=name,
        digest=digest,
        preset=KINETICS400,
        device=where,
        dtype=_dtype(precision=precision, device=where),
        batch_size=batch_size,
    )


def load_weights(weights: str, *, cache_dir: Path | None = None) -> tuple[S3D, str, str]:
    """(float32 network in eval mode, its name, sha256 of its parameters) for a weights spec; see `load_s3d`."""
    if weights.startswith("random:"):
        made = _random_once(_random_seed(weights), cache_dir=cache_dir or _default_cache_dir())
        return made, *identify(weights)
    state = _read_state(_weights_file(weights, cache_dir=cache_dir))
    model = S3D(num_classes=_num_classes(state, weights=weights)).eval()
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) or sorted(k for k in expected if expected[k].shape != state[k].shape)
    if wrong:
        raise WeightsError(
            f"{_shown(weights)} is not S3D in torchvision's layout ({len(wrong)} of {len(expected)} keys differ, "
            f"first {wrong[0]!r}): use torchvision's s3d-d76dad2f.pth or a checkpoint with its key names."
        )
    model.load_state_dict(state)
    return model, f"s3d-{KINETICS400.name}", state_digest(model.state_dict())


def identify(weights: str, *, cache_dir: Path | None = None) -> tuple[str, str]:
    """Name and digest as `load_weights` gives them; a random network, which takes seconds to make, is not made."""
    if not weights.startswith("random:"):
        return load_weights(weights, cache_dir=cache_dir)[1:]
    seed = _random_seed(weights)
    # Not a hash of the floats: measured statistics may differ in their last bits from one CPU to the next.
    return f"s3d-random-{seed}", hashlib.sha256(f"{_RANDOM_RECIPE}:{seed}".encode()).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes of a state dict, in name order; the file format does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}{tuple(state[name].shape)}".encode())
            digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_s3d(*, seed: int) -> S3D:
    """An untrained S3D whose features still tell clips apart.

    Normalised at every layer, 25 layers of random ReLUs are chaotic: small differences grow, alike clips drift apart
    and bfloat16 itself is noise (cosine 0.98 to float32). Batch norms with bias 1 keep most units in their linear
    range, which removes that (0.9997). Half of the kernels are smooth blobs and averages over time, so colours survive;
    the other half are edges in space and, with no mean over time, changes.

    Weights and clips come from numpy's PCG64, so they are the same on any machine; the measured statistics agree to
    float32 rounding.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    model = S3D()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = torch.from_numpy(_random_kernels(tuple(module.weight.shape), rng))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for norm in norms:
        nn.init.ones_(norm.bias)
        norm.momentum = 1.0  # running statistics become exactly those of the one batch below
    clips = torch.from_numpy(_synthetic_clips(rng)).permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (KINETICS400.mean, KINETICS400.std))
    with torch.no_grad():
        model.train()((clips - mean) / std)
    for norm in norms:
        norm.momentum = 1e-3
    return model.eval()


def _random_once(seed: int, *, cache_dir: Path) -> S3D:
    """`random_s3d` from `cache_dir`, where it is kept: each worker of a run would take seconds to make it."""
    from safetensors.torch import load_file, save_file

    path = cache_dir / f"{_RANDOM_RECIPE}-{seed}.safetensors"
    model = S3D().eval()
    with contextlib.suppress(OSError, SafetensorError, RuntimeError):  # not there yet, or not whole
        model.load_state_dict(load_file(path))
        return model
    model = random_s3d(seed=seed)
    with contextlib.suppress(OSError, SafetensorError):  # a home that cannot be written costs the seconds again
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as unfinished:
            save_file(model.state_dict(), Path(unfinished, path.name))
            os.replace(Path(unfinished, path.name), path)
    return model


def _random_kernels(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Kernels [out, in, T, H, W] float32 with squared norm 2 (He et al. 2015); see `random_s3d` for the two halves."""
    num_out, num_in, num_frames, height, width = shape
    half = num_out // 2
    kernels = rng.standard_normal(shape, dtype=np.float32)
    smooth = rng.standard_normal((half, num_in, 1, 1, 1), dtype=np.float32)
    if height > 1:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) - height // 2
        kernels[:half] = smooth * np.exp(-(x**2 + y**2) / (2 * (height / 6) ** 2))
    if num_frames > 1:
        kernels[:half] = smooth
        kernels[half:] -= kernels[half:].mean(axis=2, keepdims=True)
    norm = np.sqrt((kernels**2).sum(axis=(1, 2, 3, 4), keepdims=True))
    return np.asarray(kernels * (np.sqrt(np.float32(2)) / norm), np.float32)


def _synthetic_clips(
    rng: np.random.Generator, *, num_clips: int = 12, num_frames: int = 16, size: int = 96
) -> np.ndarray:
    """[num_clips, num_frames, size, size, 3] float32 in [0, 1]: coloured discs at several speeds, some noise."""
    t = np.arange(num_frames, dtype=np.float32)[:, None, None]
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)[:, None] / size
    clips = np.empty((num_clips, num_frames, size, size, 3), np.float32)
    for clip in clips:
        clip[:] = rng.uniform(0.2, 0.9, 3)
        for _ in range(6):
            radius, speed = rng.uniform(0.05, 0.25), rng.uniform(0.0, 0.12)
            angle, (start_x, start_y) = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1, 2)
            at_x = (start_x + speed * np.cos(angle) * t) % 1
            at_y = (start_y + speed * np.sin(angle) * t) % 1
            clip[(x - at_x) ** 2 + (y - at_y) ** 2 < radius**2] = rng.uniform(0, 1, 3)
        clip += rng.normal(0, rng.uniform(0, 0.05), clip.shape)
    return clips.clip(0, 1)


def _fuse(model: S3D) -> S3D:
    """The same function without batch norms: each is folded into the convolution before it."""
    fused = S3D(num_classes=model.classifier[1].out_channels)  # type: ignore[arg-type]
    fused.load_state_dict(model.state_dict())
    for block in fused.eval().modules():
        if isinstance(block, ConvNormAct):
            conv, norm = block[0], block[1]
            assert isinstance(conv, nn.Conv3d)
            assert isinstance(norm, nn.BatchNorm3d)
            block[0], block[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return fused.requires_grad_(False)


def _dtype(*, precision: Precision, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Without these instructions bfloat16 on a CPU is emulated and slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [N, T, H, W, 3], not {frames.dtype} {list(frames.shape)}.")
    num_frames, height, width = frames.shape[1:4]
    if num_frames < MIN_FRAMES or min(height, width) < MIN_PIXELS:
        raise ValueError(
            f"a clip of {num_frames} frames of {width}x{height} is too small for S3D: "
            f"give at least {MIN_FRAMES} frames of {MIN_PIXELS}x{MIN_PIXELS}."
        )


def _random_seed(weights: str) -> int:
    seed = weights.removeprefix("random:")
    if not seed.isdecimal():
        raise WeightsError(f"{weights!r} has no seed: write random:SEED with a whole number, such as random:0.")
    return int(seed)


def _weights_file(weights: str, *, cache_dir: Path | None) -> Path:
    """The local file of a path or URL spec, digest checked."""
    location, _, fragment = weights.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise WeightsError(f"{weights!r} has an unreadable digest: write #sha256= and 64 hexadecimal digits.")
    if re.match(r"https?://", location):
        if not sha256:
            raise WeightsError(f"{location} is not downloaded without a digest: add #sha256=HEX to it.")
        return _download(location, sha256=sha256, cache_dir=cache_dir or _default_cache_dir())
    path = Path(location).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"no weights at {path}: give a file, https://...#sha256=HEX, or random:SEED for untrained ones."
        )
    if sha256:
        _check_sha256(path, sha256=sha256, remedy="fetch the file again or correct the digest")
    return path


def _download(url: str, *, sha256: str, cache_dir: Path) -> Path:
    """The cached file of `url`; named after its digest, so a changed file at the same URL is never mistaken for it."""
    target = cache_dir / f"{sha256[:16]}-{url.rsplit('/', 1)[-1]}"
    if target.is_file():
        _check_sha256(target, sha256=sha256, remedy="delete the file and start again")
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    handle, partial_name = tempfile.mkstemp(dir=cache_dir, suffix=".partial")
    partial = Path(partial_name)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as response:
            shutil.copyfileobj(response, out)
        _check_sha256(partial, sha256=sha256, remedy=f"check {url} and its digest")
        partial.replace(target)
    except OSError as error:
        raise WeightsError(
            f"{url} could not be downloaded ({error}): fetch it elsewhere and give its path instead."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_sha256(path: Path, *, sha256: str, remedy: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise WeightsError(f"{path.name} has sha256 {found}, not {sha256}: {remedy}.")


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videobert" / "weights"


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; bare, or under the usual wrappers of training scripts. Never unpickles objects."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is not theirs
        raise WeightsError(
            f"{path.name} is not readable as weights ({type(error).__name__}): "
            "give a .pth, .pt or .safetensors state dict."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path.name} holds no state dict: save model.state_dict() and give that file.")
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def _num_classes(state: Mapping[str, Tensor], *, weights: str) -> int:
    head = state.get("classifier.1.weight")
    if head is None or head.ndim != 5:
        first = next(iter(state), "nothing")
        raise WeightsError(
            f"{_shown(weights)} has no classifier.1.weight (its first key is {first!r}): "
            "give S3D in torchvision's layout, such as s3d-d76dad2f.pth."
        )
    return int(head.shape[0])


def _shown(weights: str) -> str:
    return weights.partition("#")[0]
