"""The graph's shape: what fuses, what each stage reserves, and that everything fits."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.graph import Graph, allot_workers
from pipelines.rows import ROW_SCHEMA
from pipelines.stages import IngestConfig
from pipelines.storage import Folder


@given(cpus=st.integers(1, 512), gpus=st.integers(0, 16), num_sources=st.integers(1, 10_000))
def test_all_stages_fit_at_once_on_any_cluster(cpus: int, gpus: int, num_sources: int) -> None:
    """Ray Data would wait for ever, in silence, where they do not."""
    workers = allot_workers(cpus=float(cpus), gpus=float(gpus), num_sources=num_sources)
    pools = workers.num_features * workers.features_cpus + workers.num_transcribe * workers.transcribe_cpus
    assert pools + workers.transcode_cpus + 2 * workers.num_light * workers.light_cpus <= cpus
    assert max(workers.features_cpus, workers.transcribe_cpus) <= 1  # Ray takes fractions below one CPU only
    assert workers.num_features * workers.features_gpus <= gpus


def test_a_cluster_without_a_whole_cpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="start Ray with at least 1 CPU"):
        allot_workers(cpus=0.5, gpus=0, num_sources=1)


@pytest.mark.integration
def test_the_heavy_stages_are_actor_pools_and_nothing_stands_between_them(
    ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator that creeps in would copy every preview once more; one that fuses would share a core's worth."""
    workers = allot_workers(cpus=2.0, gpus=0.0, num_sources=3)
    listing = pa.Table.from_pylist([{"uri": "a.mp4"}] * 3, schema=ROW_SCHEMA)
    Graph(config=IngestConfig(), folder=Folder.at("/nowhere"), workers=workers).extracted(listing).explain()
    plan = capsys.readouterr().out.split("Physical Plan (Optimized)")[1]
    assert [line.strip("+- ") for line in plan.splitlines() if "[" in line] == [
        "ActorPoolMapOperator[MapBatches(Features)]",
        "ActorPoolMapOperator[MapBatches(Transcribe)]",
        "TaskPoolMapOperator[MapBatches(fetch_and_transcode)]",
        "InputDataBuffer[Input]",
    ]
