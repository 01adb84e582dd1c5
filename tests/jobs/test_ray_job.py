"""`ray job submit` runs a command of ours on a cluster with token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.report import report_of

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node of its own on free ports, ended with its whole process group; yields the environment to reach it."""
    port, dashboard, agent, agent_grpc, client = free_ports(5)
    token = tmp_path / "token"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    token.write_text(secrets.token_hex(32))  # as `ray get-auth-token --generate` does in the home folder
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    # Ray keeps sockets in it, and their paths are limited to 107 bytes.
    temp_dir = f"/tmp/vb-ray-{os.getpid()}"
    command += [f"--temp-dir={temp_dir}"]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for_port(dashboard, tmp_path / "head.log")
        yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=5)  # Ray's own waits for its daemons, which may hang
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temp_dir, ignore_errors=True)


def wait_for_port(port: int, log: Path, *, deadline_s: float = 90.0) -> None:
    end_s = time.monotonic() + deadline_s
    while time.monotonic() < end_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"the head did not come up:\n{log.read_text()}")


def test_ingest_runs_as_a_submitted_job(
    cluster: dict[str, str], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    videos, dataset = make_video("in/a.mp4", seconds=3.2).parent, tmp_path / "dataset"
    entry = [sys.executable, "-m", "jobs.ingest", str(videos), "--dataset", str(dataset)]
    entry += ["--features.weights", "random:0", "--features.pixels", "32", "--vocabulary.k", "2"]
    submit = [RAY, "job", "submit", "--working-dir", str(ROOT), "--", *entry]
    end_s = time.monotonic() + 120
    while True:
        done = subprocess.run(submit, env=cluster, capture_output=True, text=True, timeout=300)
        if "No available agent" not in done.stderr or time.monotonic() > end_s:  # comes up after the dashboard
            break
    assert done.returncode == 0, done.stdout + done.stderr
    found = report_of(str(dataset)).to_dict()
    assert found["sources"]["kept"] == 1
    assert found["balanced"] is True
