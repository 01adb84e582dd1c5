"""Kill an ingestion at random moments and see whether the dataset comes out the same: `python -m tests.jobs.killing`.

Each round ingests the same small corpus into an empty dataset, sends SIGKILL to the driver, to a worker or to one of
Ray's own daemons at a random moment, and runs the command again until it succeeds. Then the samples must be those of a
run that nobody disturbed, byte for byte, none twice, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from jobs.cluster import descendants
from pipelines.dataset import Dataset
from pipelines.report import report_of
from pipelines.s3d import random_s3d
from pipelines.scratch import PREFIX
from tests.conftest import ffmpeg

TARGETS = ("driver", "worker", "raylet", "gcs_server")
GIVES_UP_AFTER_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Round:
    number: int
    target: str
    killed: str  # the process that was hit, by its title; "" if the run was over before
    after_s: float
    returncode: int | None  # of the disturbed run; None: it hung and was ended
    ended_after_s: float  # between the kill and the end of the disturbed run
    reruns: int
    faults: tuple[str, ...]  # empty: all is well


def make_corpus(folder: Path) -> Path:
    """Videos of a few seconds, one of them in several parts, a copy, a text that claims to be a video."""
    videos = folder / "videos"
    videos.mkdir()
    captions = folder / "captions.srt"
    captions.write_text("1\n00:00:00,500 --> 00:00:02,000\nchop the onion\n")
    for index, seconds in enumerate((24, 8, 7, 6, 5)):
        picture = f"testsrc2=size=160x120:rate=25:duration={seconds},hue=h={60 * index}"
        sound = f"sine=frequency={220 * (index + 1)}:duration={seconds}"
        inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound, "-i", str(captions)]
        encoding = ["-map", "0", "-map", "1", "-map", "2", "-c:a", "aac", "-c:s", "mov_text", "-preset", "ultrafast"]
        ffmpeg(*inputs, *encoding, str(videos / f"v{index}.mp4"))
    save_file(random_s3d(seed=0).state_dict(), weights_beside(videos))  # made once: each worker would take seconds
    (videos / "copy.mp4").write_bytes((videos / "v1.mp4").read_bytes())
    (videos / "text.mp4").write_text("no video at all\n" * 100)
    return videos


def weights_beside(videos: Path) -> Path:
    return videos.with_name("s3d.safetensors")


def command(videos: Path, dataset: Path) -> list[str]:
    settings = [
        "--features.weights",
        str(weights_beside(videos)),
        "--features.pixels",
        "32",
        "--media.part_seconds",
        "7",
    ]
    settings += ["--vocabulary.k", "3", "--vocabulary.depth", "2", "--transcribe.transcripts", "[captions]"]
    settings += ["--samples_per_shard", "2"]
    return [sys.executable, "-m", "jobs.ingest", str(videos), "--dataset", str(dataset), *settings]


def contents(dataset: Path) -> dict[str, str]:
    """Key -> hash of the members of each sample that counts."""
    return {
        sample.key: hashlib.sha256(json.dumps({k: v.hex() for k, v in sample.members().items()}).encode()).hexdigest()
        for sample in Dataset(str(dataset)).samples()
    }


def choose(target: str, family: dict[int, str], driver: int, rng: random.Random) -> int | None:
    """The process to hit; None if there is none of the kind yet."""
    if target == "driver":
        return driver
    if target == "worker":
        found = [pid for pid, title in family.items() if title.startswith("ray::") and "Agent" not in title]
    else:
        found = [pid for pid, title in family.items() if Path(title.split(" ")[0]).name == target]
    return rng.choice(sorted(found)) if found else None


def disturbed(
    arguments: list[str], *, target: str, after_s: float, rng: random.Random, log: Path, env: dict[str, str]
) -> dict[str, object]:
    """Run the command and kill once."""
    with open(log, "ab") as output:
        driver = subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True, env=env)
    time.sleep(after_s)
    own = {driver.pid: " ".join(arguments)}
    chosen, family = None, own
    while driver.poll() is None and chosen is None:
        family = own | descendants(driver.pid)
        chosen = choose(target, family, driver.pid, rng)
        time.sleep(0.05)
    if chosen is not None:
        os.kill(chosen, signal.SIGKILL)
    killed_s = time.monotonic()
    try:
        driver.wait(timeout=GIVES_UP_AFTER_S)
    except subprocess.TimeoutExpired:
        family |= descendants(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        returncode = None
    else:
        returncode = driver.returncode
    ended_after_s = time.monotonic() - killed_s
    return {
        "killed": family.get(chosen, "")[:60] if chosen is not None else "",
        "returncode": returncode,
        "ended_after_s": round(ended_after_s, 1),
        "left": survivors(family),
    }


def survivors(family: dict[int, str], *, within_s: float = 30.0) -> list[str]:
    """The processes of a run that outlive it by so many seconds; they are ended."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        # Ray's own agents look for their parent at leisure and end a minute later.
        alive = {p: title for p, title in family.items() if is_running(p, title) and "Agent" not in title}
        if not alive:
            return []
        time.sleep(0.25)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return sorted(alive.values())


def is_running(pid: int, title: str) -> bool:
    """Not ended, not a zombie, and not another process that took over its number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        now = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return False
    same_kind = now.split(" ")[0].split("::")[0] == title.split(" ")[0].split("::")[0]
    return stat.rpartition(")")[2].split()[0] != "Z" and same_kind


def environment(videos: Path) -> dict[str, str]:
    """Scratch folders beside the corpus, to be counted; Ray's own where they are, for its sockets need short names."""
    place = scratch_place(videos)
    place.mkdir(exist_ok=True)
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place), "RAY_TMPDIR": tempfile.gettempdir()}


def scratch_place(videos: Path) -> Path:
    return videos.with_name("scratch")


def faults(dataset: Path, reference: dict[str, str], scratch: Path) -> list[str]:
    """What is wrong with a dataset, in words."""
    found = []
    here = contents(dataset)
    if missing := reference.keys() - here.keys():
        found.append(f"missing {sorted(missing)}")
    if extra := here.keys() - reference.keys():
        found.append(f"too many {sorted(extra)}")
    if changed := [key for key in here.keys() & reference.keys() if here[key] != reference[key]]:
        found.append(f"other bytes in {sorted(changed)}")
    index = Dataset(str(dataset)).sample_index()["key"].to_pylist()
    if twice := [key for key, count in Counter(index).items() if count > 1]:
        found.append(f"twice {twice}")
    report = report_of(str(dataset)).to_dict()
    if not report["balanced"] or report["sources"]["pending"]:
        found.append(f"books: {report['sources']} {report['problems']}")
    names = [str(path.relative_to(dataset)) for path in dataset.rglob("*")]
    if partial := [name for name in names if ".tmp-" in name or name.startswith("extracted")]:
        found.append(f"left in the dataset {partial}")
    if temporary := [path.name for path in scratch.glob(f"{PREFIX}*")]:
        found.append(f"left in the temporary folder {temporary}")
    return found


def one_round(number: int, *, videos: Path, work: Path, reference: dict[str, str], usual_s: float, seed: int) -> Round:
    rng = random.Random(f"{seed} {number}")
    target, after_s = TARGETS[number % len(TARGETS)], round(rng.uniform(0.5, usual_s), 2)
    dataset, log = work / f"round-{number:03d}", work / f"round-{number:03d}.log"
    arguments = command(videos, dataset)
    env = environment(videos)
    end = disturbed(arguments, target=target, after_s=after_s, rng=rng, log=log, env=env)
    wrong = [f"outlived the run: {end['left']}"] if end["left"] else []
    if end["returncode"] is None:
        wrong.append(f"hung for {GIVES_UP_AFTER_S:g} s")
    reruns, returncode = 0, end["returncode"]
    while returncode != 0 and reruns < 3:
        reruns += 1
        with open(log, "ab") as output:
            done = subprocess.run(arguments, stdout=output, stderr=output, env=env, timeout=600)
        returncode = done.returncode
    wrong += (
        [f"no success after {reruns} reruns"] if returncode != 0 else faults(dataset, reference, scratch_place(videos))
    )
    return Round(
        number=number,
        target=target,
        killed=str(end["killed"]),
        after_s=after_s,
        returncode=end["returncode"],  # type: ignore[arg-type]
        ended_after_s=end["ended_after_s"],  # type: ignore[arg-type]
        reruns=reruns,
        faults=tuple(wrong),
    )


def run(*, rounds: range, seed: int, work: Path) -> list[Round]:
    """Ingest once undisturbed, then in rounds."""
    videos = make_corpus(work)
    began_s = time.monotonic()
    subprocess.run(command(videos, work / "reference"), check=True, env=environment(videos), timeout=600)
    usual_s = time.monotonic() - began_s
    reference = contents(work / "reference")
    print(f"undisturbed: {usual_s:.1f} s, {len(reference)} samples", flush=True)
    results = []
    for number in rounds:
        done = one_round(number, videos=videos, work=work, reference=reference, usual_s=usual_s, seed=seed)
        print(json.dumps(asdict(done)), flush=True)
        results.append(done)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killing-") as work:
        results = run(rounds=range(options.first, options.first + options.rounds), seed=options.seed, work=Path(work))
    for target in TARGETS:
        mine = [r for r in results if r.target == target]
        hit = [r for r in mine if r.killed]
        print(
            f"{target:<11} {len(mine)} rounds, {len(hit)} hit, "
            f"{sum(r.returncode == 0 for r in hit)} went on by themselves, {sum(r.reruns for r in mine)} reruns, "
            f"{sum(bool(r.faults) for r in mine)} with faults"
        )
    return int(any(r.faults for r in results))


if __name__ == "__main__":
    sys.exit(main())
