from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load

from tests.training.conftest import Kitchen, make_kitchen, make_sample, small_config, write_dataset
from training.loop import Rank, accumulate, train
from training.optimizer import build_optimizer, learning_rate
from training.recipes import PretrainConfig
from training.run import Metrics, RunSpec, build_model, prepare, read_material, work


class Killed(Exception):
    """Stands for the end of a process."""


def prepared(kitchen: Kitchen, root: Path, config: PretrainConfig | None = None, name: str | None = None) -> RunSpec:
    return prepare(config or small_config(), kitchen.url, storage=str(root), name=name, tracking_uri="")


def run(spec: RunSpec, *, stop_after: int = 10**9) -> tuple[Metrics, list[str]]:
    """Work alone, dying right after the checkpoint of a step."""
    lines: list[str] = []
    reports = 0

    def report(metrics: Metrics) -> None:
        nonlocal reports
        reports += 1
        if reports * spec.config.checkpoint_every_steps >= stop_after:
            raise Killed

    return work(spec, rank=Rank(), report=report, say=lines.append), lines


def weights(spec: RunSpec) -> dict[str, torch.Tensor]:
    return load(spec.folder.read(f"checkpoints/step-{spec.store.steps()[-1]:08d}/model.safetensors"))


def test_resumed_run_equals_the_uninterrupted_one(small_kitchen: Kitchen, tmp_path: Path) -> None:
    """Bit by bit: weights and losses of 6 steps, and of 3 steps, a death and 3 more."""
    whole, stopped = prepared(small_kitchen, tmp_path / "a"), prepared(small_kitchen, tmp_path / "b")
    metrics, _ = run(whole)
    with pytest.raises(Killed):
        run(stopped, stop_after=3)
    assert stopped.store.steps() == [3]
    resumed, lines = run(prepared(small_kitchen, tmp_path / "b"))
    assert lines[0] == "resumed after step 3 of 6"
    assert resumed == metrics
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(stopped).items())


def test_kill_during_a_checkpoint_leaves_the_previous_one(small_kitchen: Kitchen, tmp_path: Path) -> None:
    spec = prepared(small_kitchen, tmp_path)
    with pytest.raises(Killed):
        run(spec, stop_after=3)
    spec.folder.write("checkpoints/step-00000006/model.safetensors", b"cut sho")
    assert spec.store.steps() == [3]
    _, lines = run(spec)
    assert lines[0] == "resumed after step 3 of 6"
    assert spec.store.steps() == [3, 6]


def test_old_checkpoints_go(small_kitchen: Kitchen, tmp_path: Path) -> None:
    config = replace(small_config(), checkpoint_every_steps=1, keep_checkpoints=2)
    spec = prepared(small_kitchen, tmp_path, config)
    run(spec)
    assert spec.store.steps() == [5, 6]
    assert len(spec.folder.names("checkpoints")) == 6


def test_reused_name_with_other_settings_is_refused_with_both_values(small_kitchen: Kitchen, tmp_path: Path) -> None:
    prepared(small_kitchen, tmp_path, name="mine")
    other = replace(small_config(), seed=5, workers=2)
    with pytest.raises(ValueError, match=r"seed: 0 in the checkpoint, 5 now.*--name"):
        prepared(small_kitchen, tmp_path, other, name="mine")


def test_number_of_workers_and_intervals_do_not_make_another_run(small_kitchen: Kitchen, tmp_path: Path) -> None:
    one = prepared(small_kitchen, tmp_path)
    two = prepared(small_kitchen, tmp_path, replace(small_config(), workers=2, checkpoint_every_steps=1))
    assert one.name == two.name


def test_another_dataset_makes_another_run(small_kitchen: Kitchen, tmp_path: Path) -> None:
    other = make_kitchen(tmp_path / "other", num_videos=5, steps_per_video=4, seed=1)
    assert prepared(small_kitchen, tmp_path).name != prepared(other, tmp_path).name


def test_training_lowers_every_loss(small_kitchen: Kitchen, tmp_path: Path) -> None:
    spec = prepared(small_kitchen, tmp_path, small_config(steps=30, learning_rate=3e-3))
    metrics, lines = run(spec)
    first = float(lines[0].split("masked_text_nats ")[1].split()[0])
    assert metrics["masked_text_nats"] < first - 0.5
    assert {"held_out/masked_text_nats", "held_out/masked_visual_nats", "gradient_norm"} <= metrics.keys()


def test_dataset_without_speech_trains_on_video_alone(tmp_path: Path) -> None:
    silent = make_kitchen(tmp_path / "silent", num_videos=5, steps_per_video=8, speech=False)
    metrics, _ = run(prepared(silent, tmp_path))
    assert "masked_visual_nats" in metrics
    assert "masked_text_nats" not in metrics


def test_one_video_trains_without_alignment(tmp_path: Path) -> None:
    url = write_dataset(tmp_path / "one", [make_sample("only", list(range(30)))], np.eye(30, 8, dtype=np.float32))
    config = replace(small_config(), held_out_fraction=0.0)
    metrics, _ = run(prepared(Kitchen(url=url, num_visual=30), tmp_path, config))
    assert "alignment_nats" not in metrics
    assert not any(name.startswith("held_out") for name in metrics)


def test_learning_rate_warms_up_and_decays_to_almost_nothing() -> None:
    optim = small_config(steps=10, warmup_steps=2, learning_rate=1.0).optim
    rates = [learning_rate(step, optim) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, pytest.approx(8 / 9)]
    assert rates[-1] == pytest.approx(1 / 9)


def test_loss_that_is_not_finite_is_named(small_kitchen: Kitchen, tmp_path: Path) -> None:
    spec = prepared(small_kitchen, tmp_path)
    material = read_material(spec)
    model, _ = build_model(spec, material.layout)
    with torch.no_grad():
        model.alignment.bias.fill_(float("nan"))
    steps = train(
        model,
        build_optimizer(model, spec.config.optim),
        planner=material.planner,
        reader=material.reader,
        optim=spec.config.optim,
        objectives=spec.config.objectives,
        cursor=material.planner.start(),
        rank=Rank(),
    )
    with pytest.raises(ValueError, match=r"alignment_nats.*step 1; lower"):
        next(steps)


def gradients(spec: RunSpec, rank: Rank) -> dict[str, torch.Tensor]:
    """Of the first step."""
    torch.set_num_threads(1)
    material = read_material(spec)
    model, _ = build_model(spec, material.layout)
    model.train().double()
    packs = spec.config.optim.packs_per_step
    step = next(material.planner.steps(material.planner.start(), packs_per_step=packs))
    accumulate(model, material.reader, step, objectives=spec.config.objectives, rank=rank)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_in_process(number: int, world_size: int, spec: RunSpec, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=number, world_size=world_size)
    found = gradients(spec, Rank(rank=number, world_size=world_size))
    if number == world_size - 1:
        torch.save(found, f"{out}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_does_not_depend_on_the_number_of_workers(
    small_kitchen: Kitchen, tmp_path: Path, world_size: int
) -> None:
    """Three packs a step: two workers share them unequally, of four one has none, and nothing hangs."""
    config = small_config()
    spec = prepared(small_kitchen, tmp_path, replace(config, model=replace(config.model, dropout=0.1)))
    alone = gradients(spec, Rank())
    mp.spawn(gradients_in_process, args=(world_size, spec, str(tmp_path)), nprocs=world_size)
    shared = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert json.dumps(sorted(alone)) == json.dumps(sorted(shared))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, atol=1e-12, rtol=1e-9)
