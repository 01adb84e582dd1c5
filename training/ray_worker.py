"""Pretraining on Ray Train: starts the workers, restarts them when one dies, and registers what they made.

Ray's part is processes and the gloo group; state is ours (training.checkpoint), so a killed driver, a killed worker
and another number of workers are all the same thing: start again, go on from the latest checkpoint. Ray's own (name,
storage) resumption is kept out by a fresh name for every attempt. One torch thread a worker: Ray gives a worker one
CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.dataset import Dataset, absolute_url, filesystem_of
from training import tracking
from training.loop import Rank
from training.recipes import PretrainConfig
from training.run import Metrics, RunSpec, build_model, prepare, read_material, work, write_run_file
from training.trained import TrainedModel

MAX_WORKER_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where a pretraining run ended."""

    name: str
    folder: str  # checkpoints and result of the run
    model_folder: str  # model.safetensors, config.json, vocab.txt
    run_id: str | None  # None where the tracker was out of reach
    version: str | None
    steps: int
    train_s: float  # of this call; 0 where the run was done before

    @property
    def model_uri(self) -> str:
        """What `videobert evaluate --model` takes."""
        return f"models:/{tracking.MODEL_NAME}/{self.version}" if self.version else self.model_folder

    def summary(self) -> str:
        """A line for people."""
        how = f"trained in {self.train_s:.0f} s" if self.train_s else "was already trained"
        return f"run {self.name}: {self.steps} steps, {how}, {self.model_uri} (alias {tracking.CANDIDATE})"


def pretrain(
    config: PretrainConfig,
    dataset_url: str,
    *,
    storage: str | None = None,
    name: str | None = None,
    tracking_uri: str | None = None,
    connect: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> PretrainResult:
    """Train, log, register as `videobert` with the alias `candidate`. Called again, it goes on where it stood.

    Args:
        storage: folder of runs; `runs` in the dataset by default. All workers must see it.
        name: of the run; by default recipe and a digest of settings and dataset.
        tracking_uri: by default MLFLOW_TRACKING_URI or the dataset's own sqlite file.
        connect: entered when there is something to train; Ray must run inside.

    Raises ValueError for a dataset or settings that cannot be trained, FileNotFoundError for a missing dataset.
    """
    dataset_url = absolute_url(dataset_url)  # workers have another working directory
    uri = tracking_uri or tracking.tracking_uri(dataset_url)
    spec = prepare(config, dataset_url, storage=storage or _runs_folder(dataset_url), name=name, tracking_uri=uri)
    if spec.folder.exists("result.json"):
        return replace(PretrainResult(**json.loads(spec.folder.read("result.json"))), train_s=0.0)
    read_material(spec)  # what is wrong with the dataset is said here, not in a worker's traceback
    spec = _track(spec)
    started_s = time.monotonic()
    if latest(spec) < spec.config.optim.steps:
        with connect():
            run_workers(spec)
    result = _publish(spec, train_s=time.monotonic() - started_s)
    if result.version is not None:
        spec.folder.write("result.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


def latest(spec: RunSpec) -> int:
    """The step of the latest checkpoint, 0 before the first."""
    return max(spec.store.steps(), default=0)


def run_workers(spec: RunSpec) -> None:
    """Run the training processes to the end. Raises ValueError if the cluster is too small or training fails."""
    workers = spec.config.workers
    _require_cpus(workers)
    with tempfile.TemporaryDirectory(prefix="videobert-ray-train-") as scratch, lines_shown() as lines:
        TorchTrainer(
            train_worker,
            train_loop_config={"spec": spec, "lines": lines},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=f"{spec.name}-{os.getpid()}-{time.time_ns()}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            ),
        ).fit()


def train_worker(told: dict[str, Any]) -> None:
    """One worker, inside Ray."""
    context = ray.train.get_context()
    rank = Rank(rank=context.get_world_rank(), world_size=context.get_world_size())

    def report(metrics: Metrics) -> None:
        ray.train.report(metrics)

    def say(line: str) -> None:
        told["lines"].add.remote(line)

    work(told["spec"], rank=rank, report=report, say=say)


@ray.remote(num_cpus=0)
class Lines:
    """Lines on their way from rank 0 to the terminal of the command; Ray would put a name and a colour before each."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def lines_shown() -> Iterator[Any]:
    """A `Lines` actor whose lines come out on stdout while the block runs."""
    lines = Lines.remote()  # type: ignore[attr-defined]
    ended = threading.Event()

    def show() -> None:
        while True:
            last = ended.wait(1.0)
            for line in ray.get(lines.take.remote()):
                sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
            if last:
                return

    shower = threading.Thread(target=show, name="lines-shown", daemon=True)
    shower.start()
    try:
        yield lines
    finally:
        ended.set()
        shower.join(10.0)


def _require_cpus(workers: int) -> None:
    """Raises ValueError if the running Ray has too few CPUs; it would wait for ever."""
    available = int(ray.cluster_resources().get("CPU", 0))
    if available < workers:
        raise ValueError(
            f"{workers} workers need a CPU each and the Ray cluster has {available}; set workers={available}."
        )


def _track(spec: RunSpec) -> RunSpec:
    """The spec with the id of its tracker run, made or found again."""
    dataset = Dataset(spec.dataset_url)
    tags = {
        "dataset": spec.dataset_url,
        "dataset_digest": spec.identity["dataset"],
        "vocabulary": dataset.info.vocabulary,
        "extractor": f"{dataset.info.extractor} {dataset.info.extractor_digest}",
        "code_version": tracking.code_version(),
        "recipe": spec.config.recipe,
    }
    params = {**spec.config.flat(), "dataset": spec.identity["dataset"]}

    def start() -> str:
        return tracking.start_run(spec.tracking_uri, name=spec.name, run_id=spec.run_id, params=params, tags=tags)

    spec = replace(spec, run_id=tracking.attempt("starting the run", start))
    write_run_file(spec)
    return spec


def _publish(spec: RunSpec, *, train_s: float) -> PretrainResult:
    """Make the model folder of the last checkpoint and register it."""
    material = read_material(spec)
    model, _ = build_model(spec, material.layout)
    step = latest(spec)
    spec.store.restore(step, model, None, identity=spec.identity)
    info = Dataset(spec.dataset_url).info
    training = {**spec.config.flat(), "dataset": spec.identity["dataset"], "vocabulary": info.vocabulary, "steps": step}
    trained = TrainedModel(model=model.eval(), vocabulary=material.vocabulary, training=training)
    with tempfile.TemporaryDirectory(prefix="videobert-model-") as scratch:
        trained.save(Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            spec.folder.write(f"model/{path.name}", path.read_bytes())
        version = _register(spec, Path(scratch))
    return PretrainResult(
        name=spec.name,
        folder=spec.folder_url,
        model_folder=f"{spec.folder_url}/model",
        run_id=spec.run_id,
        version=version,
        steps=step,
        train_s=train_s,
    )


def _register(spec: RunSpec, folder: Path) -> str | None:
    run_id = spec.run_id
    if run_id is None:
        return None
    tags = {"dataset_digest": str(spec.identity["dataset"]), "recipe": spec.config.recipe}

    def publish() -> str:
        from training import registry  # with MLflow's slow import, which the workers do not need

        return registry.register(folder, uri=spec.tracking_uri, run_id=run_id, tags=tags)

    version = tracking.attempt("registering the model", publish)
    if version is not None:
        tracking.attempt(
            "closing the run", lambda: tracking.finish_run(spec.tracking_uri, run_id, tags={"model_version": version})
        )
    return version


def _runs_folder(dataset_url: str) -> str:
    """`runs` in the dataset. Raises ValueError for what workers on other machines may not be able to write."""
    filesystem_of(dataset_url)
    return f"{dataset_url.rstrip('/')}/runs"
