"""The command line as a person meets it: what may be typed, what comes back, what an error says."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from jobs import __main__ as table
from jobs.command import UsageError, door, parse


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A nested group."""

    fps: float = 20.0
    """Frames per second."""
    size_bytes: int = 1 << 30
    """How large."""

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError("grid.fps must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Base:
    deadline_s: float = 3.0
    """How long to wait."""


@dataclass(frozen=True, kw_only=True)
class Job(Base):
    """A job with a field of every kind."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("sources",)

    sources: tuple[str, ...]
    """What to read."""
    dataset: str
    """Where it goes."""
    dry_run: bool = False
    """Only say what would be done."""
    keep: bool = True
    """Keep it."""
    engine: Literal["auto", "whisper"] = "auto"
    """Who listens."""
    weights: Path | None = None
    """A file."""
    limit: int | None = None
    """At most so many."""
    seeds: tuple[int, ...] = (1, 2)
    """Starts."""
    grid: Grid = field(default_factory=lambda: Grid(fps=25))
    other: Grid | None = None


@dataclass(frozen=True, kw_only=True)
class Action:
    POSITIONAL: ClassVar[tuple[str, ...]] = ("action", "target")

    action: Literal["fit", "show"]
    """What to do."""
    target: str = "here"
    """Where."""


def read(*argv: str) -> Job:
    return parse(Job, [*argv], prog="videobert test", description="A test.")


def refusal(*argv: str) -> str:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_fields_are_written_as_options_or_as_assignments() -> None:
    expected = Job(sources=("a", "b"), dataset="d", dry_run=True, limit=4, grid=Grid(fps=3.0), seeds=(3, 4))
    assert read("a", "b", "--dataset", "d", "--dry-run", "--limit=4", "--grid.fps", "3", "--seeds", "3,4") == expected
    assert read("dataset=d", "a", "dry_run=true", "b", "limit=4", "grid.fps=3", "seeds=[3,4]") == expected
    assert read("--dry_run", "a", "--dataset=d", "b", "--limit", "4", "grid.fps=3e0", "--seeds", "3,4") == expected


def test_defaults_stay_where_nothing_is_said() -> None:
    assert read("a", "dataset=d") == Job(sources=("a",), dataset="d")


def test_values_keep_their_type() -> None:
    job = read("7", "--dataset", "007", "--deadline-s", "1e-3", "--weights", "w.pt", "--limit", "null")
    assert (job.sources, job.dataset, job.deadline_s, job.weights, job.limit) == (
        ("7",),
        "007",
        0.001,
        Path("w.pt"),
        None,
    )
    assert read("a", "dataset=d", "keep=false", "other.fps=2").keep is False
    assert read("a", "dataset=d", "other.fps=2").other == Grid(fps=2)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("sources: [x, y]\ndataset: from_file\nlimit: 5\ngrid:\n  fps: 7\n")
    assert read("--config", str(file)) == Job(sources=("x", "y"), dataset="from_file", limit=5, grid=Grid(fps=7))
    job = read("z", "grid.fps=8", f"--config={file}")
    assert (job.sources, job.grid.fps, job.limit) == (("z",), 8.0, 5)


def test_a_word_that_is_a_path_is_not_an_assignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("limit=4").touch()
    assert read("limit=4", "dataset=d") == Job(sources=("limit=4",), dataset="d")
    assert read("s3://bucket?x=1", "dataset=d").sources == ("s3://bucket?x=1",)
    assert read("dataset=d", "--", "--odd", "b=1").sources == ("--odd", "b=1")


def test_positional_fields_are_taken_in_order() -> None:
    assert parse(Action, ["show"], prog="p", description="") == Action(action="show")
    assert parse(Action, ["fit", "there"], prog="p", description="") == Action(action="fit", target="there")
    with pytest.raises(UsageError, match="'more' has no place here"):
        parse(Action, ["fit", "there", "more"], prog="p", description="")
    with pytest.raises(UsageError, match="ACTION must be given"):
        parse(Action, [], prog="p", description="")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--datast", "d"], "there is no field 'datast'; the nearest is 'dataset'."),
        (["a", "grid.pfs=3"], "the nearest is 'grid.fps'."),
        (["a", "fps=3"], "the nearest is 'grid.fps'."),
        (["a", "grid=3"], "'grid' is a group of fields; give one of grid.fps, grid.size_bytes."),
        (["-x"], "there is no option '-x'"),
        (["a"], "--dataset must be given; `videobert test --help`"),
        (["a", "--dataset"], "--dataset needs a value."),
        (["a", "dataset=d", "limit=x"], "limit takes a whole number or null, not 'x'."),
        (["a", "dataset=d", "limit=1.5"], "limit takes a whole number or null, not '1.5'."),
        (["a", "dataset=d", "engine=wisper"], "engine takes one of auto, whisper, not 'wisper'."),
        (["a", "dataset=d", "seeds=1,b"], "seeds takes a list, each a whole number"),
        (["a", "dataset=d", "dry_run=maybe"], "dry_run takes true or false, not 'maybe'."),
        (["a", "dataset=d", "grid.fps=0"], "grid.fps must be above 0."),
    ],
)
def test_a_mistyped_command_line_is_answered_in_one_sentence(argv: list[str], words: str) -> None:
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("datast: d", "sets 'datast', which is no field; the nearest is 'dataset'."),
        ("grid: {fsp: 3}", "sets 'grid.fsp', which is no field; the nearest is 'grid.fps'."),
        ("dataset: d\ngrid: {fps: abc}", "grid.fps takes a number, not 'abc'."),
        ("dataset: 5", "dataset takes text, not '5'."),
        ("dataset: [d", "is not YAML"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_mistyped_file_is_answered_in_one_sentence(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(content)
    assert words in refusal("a", "--config", str(tmp_path / "job.yaml"))


def test_a_missing_file_is_answered_in_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read" in refusal("a", "--config", str(tmp_path / "none.yaml"))


def test_help_shows_meaning_unit_and_default_of_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    assert "How long to wait. (default: 3.0)" in lines["--deadline-s SECONDS"]  # inherited
    assert "Where it goes. (required)" in lines["--dataset TEXT"]
    assert "Frames per second. (default: 25)" in lines["--grid.fps NUMBER"]  # the default of this job, not of Grid
    assert "(default: 1073741824 = 1 GiB)" in lines["--grid.size-bytes BYTES"]
    assert "--keep true|false" in lines
    assert "--dry-run" in lines
    assert not any("print_config" in line for line in lines)


@door
def misbehave(argv: list[str]) -> int:
    errors = {
        "usage": UsageError("say it otherwise."),
        "value": ValueError("two\n  lines."),
        "file": FileNotFoundError(2, "No such file or directory", "/there"),
        "stop": KeyboardInterrupt(),
        "ours": RuntimeError("a defect"),
    }
    if argv[0] in errors:
        raise errors[argv[0]]
    return 3


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("usage", 2, "videobert test_command: say it otherwise.\n"),
        ("value", 2, "videobert test_command: two lines.\n"),
        ("file", 2, "videobert test_command: /there: no such file or directory; give a path that this user can use.\n"),
        ("stop", 130, "videobert test_command: interrupted; the same command continues.\n"),
        ("nothing", 3, ""),
    ],
)
def test_an_error_that_the_user_can_mend_is_one_line(
    kind: str, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert misbehave([kind]) == code
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback_and_all_do_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        misbehave(["ours"])
    monkeypatch.setenv("VIDEOBERT_TRACEBACK", "1")
    with pytest.raises(UsageError):
        misbehave(["usage"])


def test_the_table_names_every_command_and_the_nearest_to_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--help"]) == table.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in table.COMMANDS)
    assert table.main(["repot"]) == 2
    assert "there is no command 'repot'; the nearest is 'report'." in capsys.readouterr().err
    assert table.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("videobert ")


def test_help_comes_at_once() -> None:
    fastest_s = float("inf")
    unwanted = "{'ray', 'torch', 'jsonargparse'}"
    code = f"import sys, jobs.__main__ as m; m.main(['--help']); assert not {unwanted} & {{*sys.modules}}"
    for _ in range(5):  # the machine may be busy with something else
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        fastest_s = min(fastest_s, time.perf_counter() - start_s)
    assert fastest_s < 0.3


def test_python_m_and_the_command_say_the_same(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    for command in (["jobs", "report"], ["jobs.report"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "--dataset", missing], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        remedy = f"make one with `videobert ingest SOURCE --dataset {missing}`."
        assert done.stderr == f"videobert report: no dataset at {missing}: {remedy}\n"
