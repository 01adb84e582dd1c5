"""`videobert demo [--videos DIR]`: the whole path on a small corpus, from videos to a page and an answer.

Without `--videos` the corpus is the narrated kitchen, generated here with known truth, so the model can be evaluated.
Every step is the same code as its own command, and re-running goes on where the last run stood.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jobs.command import UsageError, door, parse
from pipelines.features import FeaturesConfig
from pipelines.kitchen import KitchenConfig
from pipelines.stages import IngestConfig
from pipelines.vocabulary import VocabularyConfig
from training import recipes
from training.recipes import PretrainConfig

if TYPE_CHECKING:
    from pipelines.dataset import Dataset, Sample
    from training.tasks.zero_shot import ZeroShotResult

# An untrained S3D on 2 cores: clips of 64 pixels cost a tenth of full ones, and drawn shapes survive it.
DEMO_INGEST = IngestConfig(
    features=FeaturesConfig(weights="random:0", pixels=64, batch_clips=1),
    vocabulary=VocabularyConfig(k=10, depth=2),
)


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """What the demo works on, and how."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ()

    videos: str | None = None
    """Folder of your own videos instead of the generated kitchen."""
    out: str = "demo-data"
    """Folder for everything that the demo makes."""
    recipe: str = "tiny"
    """Recipe of the pretraining."""
    steps: int | None = None
    """Optimizer steps, instead of the recipe's."""
    seed: int = 0
    """Seed of the kitchen, the vocabulary and the training."""
    kitchen: KitchenConfig = field(default_factory=lambda: KitchenConfig(num_videos=36))
    ingest: IngestConfig = field(default_factory=lambda: DEMO_INGEST)


class Clock:
    """Wall seconds of each step of the demo, and the heading that announces it."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        began_s = time.monotonic()
        yield
        self.spent_s[name] = time.monotonic() - began_s

    def table(self) -> str:
        total_s = sum(self.spent_s.values())
        lines = [f"{name:<12}{seconds:>7.1f} s  {seconds / total_s:>4.0%}" for name, seconds in self.spent_s.items()]
        return "\n".join([*lines, f"{'total':<12}{total_s:>7.1f} s"])


@door
def main(argv: list[str]) -> int:
    job = parse(DemoJob, argv, prog="videobert demo", description="The whole path on a small corpus.")
    from jobs.cluster import connected
    from pipelines.dataset import Dataset
    from pipelines.ingest import ingest
    from pipelines.report import render_text, report_of
    from training.ray_worker import pretrain

    recipe, clock, out = demo_recipe(job), Clock(), Path(job.out).resolve()
    claim(out, job)
    url = str(out / "dataset")
    with clock.step("videos"):
        places = [job.videos] if job.videos else [str(make_corpus(out / "videos", job))]
    with connected():  # once for both
        with clock.step("ingest"):
            config = replace(job.ingest, vocabulary=replace(job.ingest.vocabulary, seed=job.seed))
            ingest(places, dataset=url, config=config, say=lambda line: print(line, flush=True))
        with clock.step("pretrain"):
            result = pretrain(recipe, url)
    dataset = Dataset(url)
    with clock.step("evaluate"):
        evaluation = None if job.videos else evaluate(dataset, result.model_uri)
        print(evaluation.table() if evaluation else "no known truth for these videos: nothing to evaluate against.")
    with clock.step("page"):
        page = render(dataset, out / "report.html", run_id=result.run_id, evaluation=evaluation)
    with clock.step("query"):
        answer = query(dataset, result.model_uri, fraction=recipe.held_out_fraction)
    print(f"\n== ledger\n{render_text(report_of(url))}")
    print(f"\n== where the time went\n{clock.table()}")
    print(f"\n== done\nmodel   {result.model_uri}, alias candidate\npage    {page}\n{answer}")
    return 0


def claim(out: Path, job: DemoJob) -> None:
    """Keep demos of different settings apart: old samples under new truth would make the evaluation wrong."""
    settings = {"videos": job.videos, "seed": job.seed, "kitchen": asdict(job.kitchen), "ingest": asdict(job.ingest)}
    text = json.dumps(settings, sort_keys=True, indent=1) + "\n"
    marker = out / "demo.json"
    if marker.exists() and marker.read_text() != text:
        raise UsageError(f"{out} holds a demo with other settings; give another --out, or remove that folder.")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)


def demo_recipe(job: DemoJob) -> PretrainConfig:
    """The recipe with the demo's seed and steps, on as many processes as this machine has cores."""
    recipe = recipes.recipe(job.recipe)
    steps = job.steps or recipe.optim.steps
    optim = replace(recipe.optim, steps=steps, warmup_steps=min(recipe.optim.warmup_steps, steps // 10))
    return replace(recipe, seed=job.seed, optim=optim, workers=min(recipe.workers, os.cpu_count() or 1))


def make_corpus(folder: Path, job: DemoJob) -> Path:
    """The narrated kitchen in a folder."""
    from pipelines.kitchen import make_kitchen

    def progress(done: int, total: int) -> None:
        if done == total or done % 8 == 0:
            print(f"{done} of {total} videos", flush=True)

    make_kitchen(folder, replace(job.kitchen, seed=job.seed), progress=progress)
    return folder


def evaluate(dataset: Dataset, model_uri: str) -> ZeroShotResult:
    """Zero-shot verbs and objects on the held-out videos."""
    from training import registry
    from training.tasks import zero_shot
    from training.tracking import tracking_uri

    trained = registry.load(model_uri, uri=tracking_uri(dataset.url))
    return zero_shot.evaluate(trained, dataset, model_name=model_uri)


def render(dataset: Dataset, out: Path, *, run_id: str | None, evaluation: ZeroShotResult | None) -> Path:
    """The page: the dataset's own sections, the loss curves and the evaluation."""
    from pipelines.page import Section, curves_figure, render_page
    from training.tracking import loss_curves, tracking_uri

    extra: list[Section] = []
    if evaluation is not None:
        extra.append(Section("Zero-shot evaluation", f"<pre>{html.escape(evaluation.table())}</pre>"))
    if run_id is not None:
        curves = loss_curves(run_id, uri=tracking_uri(dataset.url))
        shown = {name: points for name, points in curves.items() if "loss" in name or "nats" in name}
        extra.append(Section("Loss curves", curves_figure(shown or curves)))
    return render_page(dataset, out, extra=extra, title="videobert demo")


def query(dataset: Dataset, model_uri: str, *, fraction: float) -> str:
    """Ask the registered model, through MLflow as any other program would, what happens in a segment of a video."""
    import pandas as pd

    from training import registry
    from training.tracking import tracking_uri

    model = registry.load_served(model_uri, uri=tracking_uri(dataset.url))
    sample = unseen_sample(dataset, fraction=fraction)
    segment = max(sample.segments(), key=lambda segment: len(segment.visual_tokens))
    question = "now let me show you how to [MASK] the [MASK]"
    asked = pd.DataFrame({"text": [question], "visual_tokens": [segment.visual_tokens.tolist()]})
    answer = model.predict(asked, params={"top_k": 3})
    (words,) = answer["words"]
    said = ", ".join(" / ".join(choices) for choices in words)
    return (
        f"query   {sample.title}, {segment.start_s:.1f}-{segment.end_s:.1f} s: {question!r}\n"
        f"answer  {said}\nheard   {segment.text or '(nobody speaks)'}"
    )


def unseen_sample(dataset: Dataset, *, fraction: float) -> Sample:
    """A sample of a video that was held out from training, where there is one."""
    from training.reader import held_out

    samples = sorted(dataset.samples(), key=lambda sample: not held_out(sample.video_id, fraction))
    return next(sample for sample in samples if len(sample.visual_tokens))


if __name__ == "__main__":
    sys.exit(main())
