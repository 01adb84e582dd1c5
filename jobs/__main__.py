"""`videobert COMMAND ...`: the table of commands. `python -m jobs.COMMAND ...` is the same thing.

A command's module is imported when it is called and not before: `videobert --help` answers without Ray or torch.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "doctor": "what works on this machine: ffmpeg, codecs, weights, GPU, Ray, MLflow, with remedies",
    "demo": "the whole path on a small generated corpus, from videos to an evaluated, registered model",
    "ingest": "videos in, dataset out: shards, previews and a ledger of what became of every source",
    "report": "the ledger: sources = kept + filtered + quarantined + pending, by reason",
    "vocabulary": "the visual vocabulary of a dataset, and how its corpus uses it",
    "pretrain": "train a VideoBERT on a dataset; resumes by itself",
    "evaluate": "measure a model on a task against its baselines",
    "promote": "give a registered version an alias, such as champion",
}
USER_ERROR = 2  # as in jobs.command, which this module does not import: it would cost half of the start


def main(argv: list[str] | None = None) -> int:
    """Run a command; without one, or with --help, print the table. The exit code is the command's."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(table())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"videobert {version()}")
        return 0
    if name not in COMMANDS:
        print(f"videobert: there is no command {name!r}; {_nearest(name)}.", file=sys.stderr)
        return USER_ERROR
    code: int = importlib.import_module(f"jobs.{name}").main(rest)
    return code


def table() -> str:
    """The commands with one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: videobert COMMAND [arguments]", ""]
    lines += [f"  {name.ljust(width)}{description}" for name, description in COMMANDS.items()]
    lines += ["", "`videobert COMMAND --help` explains a command; `videobert --version` names the release."]
    return "\n".join(lines)


def version() -> str:
    """The installed release; a plain remark where the package runs from a folder that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("videobert")
    except metadata.PackageNotFoundError:
        return "(not installed; run `pip install -e .` for a version)"


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"the nearest is {close[0]!r}" if close else f"the commands are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
