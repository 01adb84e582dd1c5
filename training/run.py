"""One pretraining run as each of its processes lives it: its files, resumption, checkpoints, evaluation, log lines.

    STORAGE/NAME/run.json         identity of the run and its tracker id
                 vocab.txt        text vocabulary, fixed at the start
                 checkpoints/     see training.checkpoint
                 result.json      what it was registered as; written last

NAME ends in a digest of settings and dataset, so the same command finds its own run again and no other's. Nothing here
knows Ray: `training.ray_worker` starts processes that call `work`, tests call it directly.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.dataset import Dataset, Folder
from training import recipes
from training.checkpoint import CheckpointStore, check_identity
from training.loop import Rank, StepReport, evaluate, train
from training.model import VideoBERT
from training.optimizer import build_optimizer
from training.plan import EpochPlan, Planner
from training.reader import Corpus, PackReader, build_corpus, read_split, sentences
from training.recipes import PretrainConfig
from training.text import TextVocabulary, TokenLayout, build_vocabulary
from training.tracking import MetricLogger
from training.weights import bert_config, bert_vocabulary, load_bert, set_visual_rows

PROGRESS_EVERY_S = 5.0

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What every process of a run is told."""

    config: PretrainConfig
    dataset_url: str
    folder_url: str
    identity: dict[str, Any]
    tracking_uri: str
    run_id: str | None = None

    @property
    def name(self) -> str:
        return self.folder_url.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> Folder:
        return Folder.at(self.folder_url)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(folder=self.folder, keep=self.config.keep_checkpoints)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a process trains on."""

    vocabulary: TextVocabulary
    layout: TokenLayout
    reader: PackReader
    planner: Planner
    held_reader: PackReader | None
    held_plan: EpochPlan | None


def prepare(config: PretrainConfig, dataset_url: str, *, storage: str, name: str | None, tracking_uri: str) -> RunSpec:
    """Make or find the run's folder with its vocabulary. Done once, before any worker starts.

    Raises ValueError for a dataset that cannot be trained on and for a name that another run has.
    """
    if config.bert:
        config = replace(config, model=bert_config(Path(config.bert).expanduser(), config.model))
    dataset = Dataset(dataset_url)
    identity = {**config.identity(), "dataset": dataset.digest()}
    name = name or f"{config.recipe}-{recipes.digest(identity)[:8]}"
    spec = RunSpec(
        config=config,
        dataset_url=dataset_url,
        folder_url=f"{storage.rstrip('/')}/{name}",
        identity=identity,
        tracking_uri=tracking_uri,
    )
    if spec.folder.exists("run.json"):
        known = json.loads(spec.folder.read("run.json"))
        check_identity(found=known["identity"], expected=identity)
        return replace(spec, run_id=known["run_id"])
    train_samples, _ = read_split(dataset, fraction=config.held_out_fraction)
    if config.bert:
        vocabulary = bert_vocabulary(Path(config.bert).expanduser())
    else:
        vocabulary = build_vocabulary(sentences(train_samples), max_size=config.max_words)
    spec.folder.write("vocab.txt", vocabulary.to_text().encode())
    write_run_file(spec)
    return spec


def write_run_file(spec: RunSpec) -> None:
    record = {"identity": spec.identity, "run_id": spec.run_id}
    spec.folder.write("run.json", (json.dumps(record, sort_keys=True, indent=1) + "\n").encode())


def read_material(spec: RunSpec) -> Material:
    """Read the dataset and plan. Raises ValueError where there is nothing to train on."""
    config, dataset = spec.config, Dataset(spec.dataset_url)
    vocabulary = TextVocabulary.from_text(spec.folder.read("vocab.txt").decode())
    layout = TokenLayout(num_text=len(vocabulary), num_visual=dataset.info.num_visual_tokens)
    train_samples, held_samples = read_split(dataset, fraction=config.held_out_fraction)

    def reader(corpus: Corpus) -> PackReader:
        return PackReader(
            corpus=corpus,
            vocabulary=vocabulary,
            layout=layout,
            masking=config.masking,
            mask_misaligned=config.objectives.mask_misaligned,
            seed=config.seed,
        )

    corpus, held = build_corpus(train_samples, vocabulary), build_corpus(held_samples, vocabulary)
    return Material(
        vocabulary=vocabulary,
        layout=layout,
        reader=reader(corpus),
        planner=_planner(corpus, config),
        held_reader=reader(held) if len(held) else None,
        held_plan=_planner(held, config).epoch(0) if len(held) else None,
    )


def build_model(spec: RunSpec, layout: TokenLayout) -> tuple[VideoBERT, Metrics]:
    """The model as a run starts it, and the norms of its embedding rows."""
    torch.manual_seed(spec.config.seed)
    model = VideoBERT(spec.config.model, layout)
    if spec.config.bert:
        load_bert(model, Path(spec.config.bert).expanduser())
    norms = set_visual_rows(model, Dataset(spec.dataset_url).centroids())
    return model, {f"start/{name}_row_norm": value for name, value in norms._asdict().items()}


def work(spec: RunSpec, *, rank: Rank, report: Callable[[Metrics], None], say: Callable[[str], None]) -> Metrics:
    """Train from the latest checkpoint to the end; returns the last metrics.

    Args:
        report: called after each checkpoint, equally often on every rank.
        say: called by rank 0 with a line for people every few seconds.
    """
    config, store = spec.config, spec.store
    material = read_material(spec)
    model, norms = build_model(spec, material.layout)
    optimizer = build_optimizer(model, config.optim)
    cursor = material.planner.start()
    if (step := latest_step(store, rank)) > 0:
        cursor = store.restore(step, model, optimizer, identity=spec.identity)
    elif rank.world_size > 1:  # ranks on unlike machines may differ in the last bits
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    log = RunLog(spec, say=say, norms=norms, first_step=cursor.step) if rank.rank == 0 else None
    metrics: Metrics = {}
    for done in train(
        model,
        optimizer,
        planner=material.planner,
        reader=material.reader,
        optim=config.optim,
        objectives=config.objectives,
        cursor=cursor,
        rank=rank,
    ):
        step, last = done.cursor.step, done.cursor.step == config.optim.steps
        metrics = {**metrics, **done.metrics}
        if log is not None:
            log.step(done)
        if (last or step % config.eval_every_steps == 0) and material.held_reader and material.held_plan:
            held = evaluate(model, material.held_reader, material.held_plan, objectives=config.objectives, rank=rank)
            metrics |= {f"held_out/{name}": value for name, value in held.items()}
            if log is not None:
                log.held_out(held, step=step)
        if last or step % config.checkpoint_every_steps == 0:
            if log is not None:
                log.flush()
                store.save(model, optimizer, cursor=done.cursor, identity=spec.identity)
            report(metrics)
    if log is not None:
        log.close()
    return metrics


def latest_step(store: CheckpointStore, rank: Rank) -> int:
    """The step of the latest checkpoint as rank 0 sees it; 0 where there is none."""
    step = torch.tensor(store.steps()[-1:] or [0])
    if rank.world_size > 1:
        dist.broadcast(step, 0)
    return int(step)


class RunLog:
    """Log lines and curves of a run, written by rank 0."""

    def __init__(self, spec: RunSpec, *, say: Callable[[str], None], norms: Metrics, first_step: int) -> None:
        self._say, self._spec, self._curves = say, spec, MetricLogger(spec.tracking_uri, spec.run_id)
        self._pending: list[StepReport] = []
        self._line: list[StepReport] = []
        self._line_s = time.monotonic() - PROGRESS_EVERY_S + 1  # the first line comes soon
        if first_step:
            self._say(f"resumed after step {first_step} of {spec.config.optim.steps}")
        else:
            self._curves.log(norms, step=0)

    def step(self, report: StepReport) -> None:
        """Keep a point; write what is due."""
        self._pending.append(report)
        self._line.append(report)
        step, last = report.cursor.step, self._spec.config.optim.steps
        if step % self._spec.config.log_every_steps == 0 or step == last:
            means = {f"train/{name}": value for name, value in mean_metrics(self._pending).items()}
            self._curves.log(means, step=step)
            self._pending.clear()
        if time.monotonic() - self._line_s >= PROGRESS_EVERY_S or step == last:
            self._say(progress_line(self._line, last_step=last))
            self._line.clear()
            self._line_s = time.monotonic()

    def held_out(self, losses: Metrics, *, step: int) -> None:
        self._curves.log({f"held_out/{name}": value for name, value in losses.items()}, step=step)
        self._say(f"step {step} held out: " + " ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    def flush(self) -> None:
        self._curves.flush()

    def close(self) -> None:
        self._curves.close()


def mean_metrics(reports: list[StepReport]) -> Metrics:
    """Means over some steps, of each metric over the steps that have it, and tokens per second."""
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    means: Metrics = {}
    for name in names:
        values = [report.metrics[name] for report in reports if name in report.metrics]
        means[name] = sum(values) / len(values)
    means["tokens_per_s"] = sum(r.num_tokens for r in reports) / max(1e-9, sum(r.step_s for r in reports))
    return means


def progress_line(reports: list[StepReport], *, last_step: int) -> str:
    """One line for people: step, losses, speed, time left."""
    means, step = mean_metrics(reports), reports[-1].cursor.step
    left_s = (last_step - step) * sum(report.step_s for report in reports) / len(reports)
    shown = ("total_loss", "masked_text_nats", "masked_visual_nats", "alignment_accuracy")
    losses = " ".join(f"{name} {means[name]:.3f}" for name in shown if name in means)
    return f"step {step}/{last_step} {losses} {means['tokens_per_s']:.0f} tokens/s, {left_s:.0f} s left"


def _planner(corpus: Corpus, config: PretrainConfig) -> Planner:
    return Planner(
        lengths=corpus.lengths,
        config=config.plan,
        masking=config.masking,
        mask_misaligned=config.objectives.mask_misaligned,
        seed=config.seed,
    )
