"""S3D: goldens of torchvision's layout, equality with an independent forward, weights by path, URL and seed."""

from __future__ import annotations

import functools
import hashlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.s3d import KINETICS400, S3D, WeightsError, identify, load_s3d, load_weights, random_s3d

State = dict[str, torch.Tensor]


pytestmark = pytest.mark.integration  # they run a whole network


@pytest.fixture(scope="module")
def model() -> S3D:
    return random_s3d(seed=3)


@pytest.fixture(scope="module")
def checkpoint(model: S3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    torch.save(model.state_dict(), path)
    return path


def clips(*, seed: int = 0, num: int = 2) -> np.ndarray:
    """[num, 16, 64, 64, 3] uint8: a smooth picture that drifts, so that bfloat16 meets real-looking input."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (num, 3, 4, 6, 6)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(16, 64, 64), mode="trilinear")
    return smooth.permute(0, 2, 3, 4, 1).numpy().astype(np.uint8)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- goldens ----------------------------------------------------------------------------------------------------------


def test_it_has_the_keys_and_parameters_of_torchvision(model: S3D) -> None:
    state = model.state_dict()
    assert len(state) == 464
    assert sum(p.numel() for p in model.parameters()) == 8_320_048
    shapes = {
        "features.0.0.0.weight": (64, 3, 1, 7, 7),
        "features.0.1.0.weight": (64, 64, 7, 1, 1),
        "features.2.0.weight": (64, 64, 1, 1, 1),
        "features.3.0.0.weight": (192, 64, 1, 3, 3),
        "features.5.branch0.0.weight": (64, 192, 1, 1, 1),
        "features.5.branch1.0.1.running_mean": (96,),
        "features.8.branch2.1.0.0.weight": (48, 16, 1, 3, 3),
        "features.12.branch1.1.1.0.weight": (320, 320, 3, 1, 1),
        "features.15.branch3.1.0.weight": (128, 832, 1, 1, 1),
        "features.15.branch3.1.1.num_batches_tracked": (),
        "classifier.1.weight": (400, 1024, 1, 1, 1),
        "classifier.1.bias": (400,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(("num_frames", "left"), [(16, 2), (30, 4), (32, 4), (64, 8)])
def test_time_shrinks_as_in_the_published_network(num_frames: int, left: int) -> None:
    with torch.device("meta"):
        grid = S3D().features(torch.empty(1, 3, num_frames, 224, 224))
    assert grid.shape == (1, 1024, left, 7, 7)


# -- an independent forward, from the key names alone -----------------------------------------------------------------


def conv_norm_relu(
    x: torch.Tensor, state: State, key: str, *, stride: tuple[int, int, int] = (1, 1, 1)
) -> torch.Tensor:
    kernel = state[f"{key}.0.weight"]
    x = F.conv3d(x, kernel, stride=stride, padding=tuple((size - 1) // 2 for size in kernel.shape[2:]))
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{key}.1.{name}"].view(1, -1, 1, 1, 1) for name in names)
    return torch.relu((x - mean) / torch.sqrt(var + 1e-3) * weight + bias)


def reference_features(x: torch.Tensor, state: State) -> torch.Tensor:
    def separable(x: torch.Tensor, key: str, *, step: int = 1) -> torch.Tensor:
        x = conv_norm_relu(x, state, f"{key}.0", stride=(1, step, step))
        return conv_norm_relu(x, state, f"{key}.1", stride=(step, 1, 1))

    def inception(x: torch.Tensor, key: str) -> torch.Tensor:
        outs = [conv_norm_relu(x, state, f"{key}.branch0")]
        for branch in ("branch1", "branch2"):
            outs.append(separable(conv_norm_relu(x, state, f"{key}.{branch}.0"), f"{key}.{branch}.1"))
        outs.append(conv_norm_relu(F.max_pool3d(x, 3, 1, 1), state, f"{key}.branch3.1"))
        return torch.cat(outs, 1)

    x = separable(x, "features.0", step=2)
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = separable(conv_norm_relu(x, state, "features.2"), "features.3")
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = functools.reduce(inception, ("features.5", "features.6"), x)
    x = F.max_pool3d(x, 3, 2, 1)
    x = functools.reduce(inception, [f"features.{n}" for n in range(8, 13)], x)
    x = F.max_pool3d(x, 2, 2)
    x = functools.reduce(inception, ("features.14", "features.15"), x)
    return x.flatten(2).mean(2)


def reference_extract(frames: np.ndarray, state: State) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).contiguous().float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (KINETICS400.mean, KINETICS400.std))
    with torch.no_grad():
        return reference_features((pixels - mean) / std, state).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_float32_features_equal_an_independent_forward(model: S3D, checkpoint: Path) -> None:
    extractor = load_s3d(weights=str(checkpoint), precision="float32", device="cpu")
    found = extractor.extract(clips())
    assert found.shape == (2, 1024)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_extract(clips(), model.state_dict()), rtol=1e-3, atol=1e-4)


def test_bfloat16_features_keep_their_direction(model: S3D, checkpoint: Path) -> None:
    found = load_s3d(weights=str(checkpoint), precision="bfloat16", device="cpu").extract(clips())
    assert cosine(found, reference_extract(clips(), model.state_dict())).min() >= 0.999


def test_the_batch_size_does_not_matter(checkpoint: Path) -> None:
    one, many = (load_s3d(weights=str(checkpoint), precision="float32", device="cpu", batch_size=n) for n in (1, 3))
    np.testing.assert_allclose(one.extract(clips(num=4)), many.extract(clips(num=4)), rtol=1e-3, atol=1e-4)
    assert one.extract(clips(num=4)[:0]).shape == (0, 1024)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 16, 64, 64, 3), np.float32),
        np.zeros((16, 64, 64, 3), np.uint8),
        np.zeros((1, 4, 64, 64, 3), np.uint8),
        np.zeros((1, 16, 16, 64, 3), np.uint8),
    ],
)
def test_frames_of_another_shape_are_refused(checkpoint: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[N, T, H, W, 3\]|too small for S3D"):
        load_s3d(weights=str(checkpoint), device="cpu").extract(frames)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_each_time_and_differ_by_seed(model: S3D, tmp_path: Path) -> None:
    again, name, digest = load_weights("random:3", cache_dir=tmp_path)
    assert name == "s3d-random-3"
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    _, other = identify("random:4")
    assert len(digest) == 64
    assert digest != other


def test_random_weights_are_made_once_and_again_where_their_file_is_damaged(model: S3D, tmp_path: Path) -> None:
    first, _, _ = load_weights("random:3", cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    second, _, _ = load_weights("random:3", cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    third, _, _ = load_weights("random:3", cache_dir=tmp_path)
    for made in (first, second, third):
        assert not made.training
        for key, value in model.state_dict().items():
            torch.testing.assert_close(made.state_dict()[key], value)


def test_random_weights_do_without_a_place_to_keep_them(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    made, _, _ = load_weights("random:3", cache_dir=tmp_path / "a file")
    assert len(made.state_dict()) == 464


def test_random_weights_tell_clips_apart(checkpoint: Path) -> None:
    extractor = load_s3d(weights=str(checkpoint), precision="float32", device="cpu")
    features = np.concatenate([extractor.extract(clips(seed=seed)) for seed in range(3)])
    similar = [cosine(features[i : i + 1], features[j : j + 1])[0] for i in range(6) for j in range(i)]
    assert max(similar) < 0.999
    assert (features.std(0) > 1e-3).mean() > 0.95  # hardly a dead dimension


def test_a_checkpoint_is_known_by_its_parameters_not_its_file(model: S3D, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "wrapped.pth"
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, other)
    tensors = tmp_path / "s3d.safetensors"
    save_file(model.state_dict(), tensors)
    found = {load_weights(str(path))[1:] for path in (checkpoint, other, tensors)}
    assert len(found) == 1
    assert load_weights(f"{checkpoint}#sha256={sha256(checkpoint)}")[1] == "s3d-kinetics400"


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("nowhere.pth", "no weights at nowhere.pth"),
        ("random:", "random:SEED"),
        ("random:-1", "random:SEED"),
        ("https://example.org/s3d.pth", "add #sha256=HEX"),
        ("s3d.pth#sha256=abc", "64 hexadecimal digits"),
        ("s3d.pth#md5=abc", "64 hexadecimal digits"),
    ],
)
def test_a_bad_spec_says_the_remedy(weights: str, says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        load_weights(weights)


def test_another_digest_is_refused(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match=f"has sha256 {sha256(checkpoint)}, not {'0' * 64}"):
        load_weights(f"{checkpoint}#sha256={'0' * 64}")


def test_another_network_is_refused_by_its_keys(model: S3D, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"base.0.conv_s.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"first key is 'base\.0\.conv_s\.weight'.*torchvision"):
        load_weights(str(path))
    torch.save({k: v for k, v in model.state_dict().items() if "features.3" not in k}, path)
    with pytest.raises(WeightsError, match=r"12 of 464 keys differ, first 'features\.3"):
        load_weights(str(path))


def test_a_pickle_with_objects_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"classifier.1.weight": Path("anything")}, path)
    with pytest.raises(WeightsError, match="not readable as weights"):
        load_weights(str(path))


def test_a_url_is_downloaded_once_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    served: list[str] = []
    body = checkpoint.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.append(self.path)
            self.send_response(200 if self.path == "/s3d.pth" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for _ in range(2):
            assert (
                load_weights(f"{url}/s3d.pth#sha256={sha256(checkpoint)}", cache_dir=tmp_path)[1] == "s3d-kinetics400"
            )
        assert served == ["/s3d.pth"]
        with pytest.raises(WeightsError, match="check http"):
            load_weights(f"{url}/s3d.pth#sha256={'1' * 64}", cache_dir=tmp_path)
        with pytest.raises(WeightsError, match=r"could not be downloaded .*404.* give its path"):
            load_weights(f"{url}/gone.pth#sha256={'2' * 64}", cache_dir=tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert len(list(tmp_path.iterdir())) == 1  # neither the wrong file nor a partial one stays
