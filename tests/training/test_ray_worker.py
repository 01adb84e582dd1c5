"""One life of a pretraining run through the command line: started, killed with SIGKILL, resumed, registered, used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jobs import evaluate as evaluate_job
from jobs import pretrain as pretrain_job
from tests.training.conftest import Kitchen, make_kitchen
from training import registry
from training.tracking import loss_curves, tracking_uri

pytestmark = pytest.mark.integration

DEADLINE_S = 180.0
SETTINGS = [
    "model.num_layers=1",
    "model.hidden=16",
    "model.num_heads=2",
    "model.intermediate=32",
    "plan.token_budget=128",
    "optim.steps=60",
    "optim.warmup_steps=2",
    "checkpoint_every_steps=5",
    "eval_every_steps=20",
    "log_every_steps=1",
]
# Runs where our package is not installed: only what was logged with the model may be used.
PREDICT = """
import json, sys
import mlflow, numpy, pandas
sys.path[:] = [path for path in sys.path if path not in ("", {here!r})]
model = mlflow.pyfunc.load_model("models:/videobert@candidate")
import training
rows = pandas.DataFrame({{
    "text": ["now let me show you how to [MASK] the [MASK]", "we [MASK] it"],
    "visual_tokens": [[1, 2, 3], []],
}})
answer = model.predict(rows, params={{"top_k": 3}})
json.dump({{"code": training.__file__, "rows": json.loads(answer.to_json(orient="records"))}}, sys.stdout)
"""


@dataclass(frozen=True, kw_only=True)
class Life:
    kitchen: Kitchen
    killed_at: int
    resumed: str

    @property
    def result(self) -> dict[str, object]:
        return dict(json.loads(self.resumed.splitlines()[-1]))

    @property
    def uri(self) -> str:
        return tracking_uri(self.kitchen.url)


def command(kitchen: Kitchen, *settings: str) -> list[str]:
    return [sys.executable, "-m", "jobs.pretrain", "--dataset", kitchen.url, *SETTINGS, *settings, "--json"]


def environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    return {**env, "OMP_NUM_THREADS": "1"}


def kill_after_a_checkpoint(kitchen: Kitchen) -> int:
    """Start with two workers, SIGKILL the driver once a checkpoint is there; returns the step of the latest one."""
    process = subprocess.Popen(
        command(kitchen, "workers=2"), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := steps_saved(kitchen)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline_s, "no checkpoint in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3.0)  # Ray's processes follow their driver
    return max(found + steps_saved(kitchen))


def steps_saved(kitchen: Kitchen) -> list[int]:
    commits = Path(kitchen.url).glob("runs/*/checkpoints/*/state.json")
    return [int(path.parent.name.removeprefix("step-")) for path in commits]


def finish(kitchen: Kitchen, *settings: str) -> str:
    done = subprocess.run(
        command(kitchen, *settings), env=environment(), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    kitchen = make_kitchen(tmp_path_factory.mktemp("life"), num_videos=6, steps_per_video=6)
    killed_at = kill_after_a_checkpoint(kitchen)
    return Life(
        kitchen=kitchen,
        killed_at=killed_at,
        resumed=finish(kitchen, "workers=1"),
    )


def test_killed_run_goes_on_with_another_number_of_workers(life: Life) -> None:
    assert 0 < life.killed_at < 60
    assert f"resumed after step {life.killed_at} of 60" in life.resumed
    assert life.result["steps"] == 60


def test_finished_run_is_not_trained_again(life: Life, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain_job.main(["--dataset", life.kitchen.url, *SETTINGS, "workers=2", "--json"]) == 0
    printed = capfd.readouterr().out
    assert "was already trained" in printed
    assert json.loads(printed.splitlines()[-1])["version"] == life.result["version"] == "1"


def test_tracker_has_one_run_with_whole_curves(life: Life) -> None:
    curves = loss_curves(str(life.result["run_id"]), uri=life.uri)
    assert [step for step, _ in curves["train/masked_text_nats"]] == list(range(1, 61))
    assert [step for step, _ in curves["held_out/masked_visual_nats"]] == [20, 40, 60]
    assert {"train/alignment_nats", "train/learning_rate", "train/gradient_norm", "train/tokens_per_s"} <= curves.keys()
    api = registry.client(life.uri)
    runs = api.search_runs([api.get_experiment_by_name("videobert").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["model.hidden"] == "16"
    assert len(runs[0].data.tags["dataset_digest"]) == 64


def test_model_loads_and_predicts_without_pickle_and_without_our_package(life: Life, tmp_path: Path) -> None:
    here = str(Path(registry.__file__).parents[1])
    env = {**environment(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_TRACKING_URI": life.uri}
    done = subprocess.run(
        [sys.executable, "-c", PREDICT.format(here=here)], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert not answer["code"].startswith(here)
    joint, text_only = answer["rows"]
    assert [len(words) for words in joint["words"]] == [3, 3]
    assert [len(words) for words in text_only["words"]] == [3]
    assert 0 < joint["alignment"] < 1
    assert text_only["alignment"] is None
    assert (np.diff(joint["log_probabilities"]) <= 0).all()


def test_registered_files_hold_no_pickle(life: Life) -> None:
    folder = registry.local_folder("models:/videobert/1", uri=life.uri).parents[1]
    assert (folder / "MLmodel").is_file()
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "vocab.txt", "predictor.py"} <= set(names)
    assert not [name for name in names if name.endswith((".pkl", ".pth", ".pt", ".pickle"))]


def test_promotion_moves_the_alias(life: Life) -> None:
    assert registry.promote(name="videobert", version="1", uri=life.uri) == ""
    assert registry.promote(name="videobert", version="1", uri=life.uri) == "1"
    registry.load("models:/videobert@champion", uri=life.uri)
    with pytest.raises(ValueError, match=r"no version 7.*it has 1"):
        registry.promote(name="videobert", version="7", uri=life.uri)
    with pytest.raises(FileNotFoundError, match="nobody"):
        registry.load("models:/videobert@nobody", uri=life.uri)


def test_evaluation_reads_the_registered_model(life: Life, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "zero-shot", "--model", "models:/videobert@candidate", "--dataset", life.kitchen.url]
    assert evaluate_job.main([*arguments, "--split", "all", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["num_steps"] == 36
    assert len(result["eligible"]) == 6
