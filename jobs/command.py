"""The one binding of a typed config to YAML and the command line; a user's error becomes one sentence here.

jsonargparse reads values, checks types and builds the dataclasses. What is ours is small: names are checked before it
runs, because a person who mistypes a field wants the nearest one and not a usage dump, and help is drawn from the
docstrings under the fields. The price is one pass over the tokens that brings `field=value`, `--dry-run` and positional
words into jsonargparse's own `--field=value` form.

    @door
    def main(argv: list[str]) -> int:
        config = parse(ReportJob, argv, prog="videobert report", description="What became of every source.")
        ...
        return 0
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
Main = Callable[[list[str]], int]

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TRACEBACK_VARIABLE = "VIDEOBERT_TRACEBACK"

# What a person can mend by typing or placing something else. Other errors are ours and keep their traceback.
USER_ERRORS = (ValueError, OSError)
UNITS = {"_s": "SECONDS", "_bytes": "BYTES", "_mb": "MB", "_gb": "GB", "_px": "PIXELS", "_hz": "HZ"}
FIELD_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


class UsageError(ValueError):
    """A request that cannot be met as it was typed; the message is one sentence that says what to do instead."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One leaf of a config: a field that takes a value."""

    name: str  # dotted, as in YAML
    type: Any
    default: Any  # dataclasses.MISSING where the field is required
    doc: str

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(option) in (tuple, list) for option in alternatives(self.type))

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def parse(config: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """A config from its defaults, overridden by `--config FILE.yaml`, overridden by the rest of the command line.

    Fields are written `--field value`, `--field=value` or `field=value`, with dots for nested ones and dashes or
    underscores; switches stand alone (`--dry-run`); lists are `a,b` or `[a, b]`. The fields that the class attribute
    `POSITIONAL` names are also taken from the bare words, in order, and a list takes all the words that are left.

    Prints help and raises SystemExit(0) on `--help`. Raises UsageError for an unknown or missing field and for a value
    of the wrong type, and ValueError for a value that the config's own `__post_init__` refuses.
    """
    options = {option.name: option for option in config_options(config)}
    positional: tuple[str, ...] = getattr(config, "POSITIONAL", ())
    if any(token in ("-h", "--help") for token in argv):
        print(render_help(config, prog=prog, description=description))
        raise SystemExit(0)
    files, values, words = split_tokens(argv, options)
    values = [*place_words(words, positional, options), *values]
    in_files = {name for file in files for name in check_yaml(Path(file), options)}
    given = in_files | {name for name, _ in values}
    missing = [o.name for o in options.values() if o.default is dataclasses.MISSING and o.name not in given]
    if missing:
        shown = [name.upper() if name in positional else options[name].flag for name in missing]
        raise UsageError(f"{' and '.join(shown)} must be given; `{prog} --help` says what each of them means.")
    return _bind(config, files, values, options)


def config_options(config: Any, *, prefix: str = "") -> Iterator[Option]:
    """The leaves of a config in the order of their declaration; nested dataclasses are entered."""
    hints, docs = typing.get_type_hints(config), field_docs(config)
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        name = prefix + field.name
        nested = [option for option in alternatives(hints[field.name]) if dataclasses.is_dataclass(option)]
        if not nested:
            yield Option(name=name, type=hints[field.name], default=default, doc=docs.get(field.name, ""))
            continue
        for option in config_options(nested[0], prefix=f"{name}."):
            if dataclasses.is_dataclass(default):
                option = dataclasses.replace(option, default=_attribute(default, option.name[len(name) + 1 :]))
            elif default is None:  # an absent group: nothing in it is required
                option = dataclasses.replace(option, default=None)
            yield option


def field_docs(config: Any) -> dict[str, str]:
    """The docstring under each field, inherited fields included; nothing where the source is not at hand."""
    from docstring_parser import parse_from_object

    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= {param.arg_name: param.description or "" for param in parse_from_object(base).params}
    return docs


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: the members of a union, without None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(option for option in typing.get_args(hint) if option is not type(None))
    return (hint,)


def split_tokens(argv: Sequence[str], options: dict[str, Option]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Config files, (field, value) pairs and bare words, each in the order in which they were typed."""
    files: list[str] = []
    values: list[tuple[str, str]] = []
    words: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            return files, values, [*words, *tokens]
        if not token.startswith("--"):
            name, equals, value = token.partition("=")
            if re.match(r"-[A-Za-z]", token) and not os.path.exists(token):
                raise UsageError(f"there is no option {token!r}; options are written with two dashes, --field value.")
            if equals and FIELD_NAME.fullmatch(name) and not os.path.exists(token):
                values.append((field_name(name, options), value))
            else:
                words.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        if name == "config":
            files.append(value if equals else _next_value(name, tokens))
            continue
        name = field_name(name, options)
        if not equals:
            value = _switch_value(tokens) if options[name].is_switch else _next_value(name, tokens)
        values.append((name, value))
    return files, values, words


def field_name(name: str, options: dict[str, Option]) -> str:
    """The field that a typed name means. Raises UsageError that names the nearest field where there is none."""
    known = name.replace("-", "_")
    if known in options:
        return known
    inside = [option for option in options if option.startswith(f"{known}.")]
    if inside:
        raise UsageError(f"{name!r} is a group of fields; give one of {', '.join(inside)}.")
    raise UsageError(f"there is no field {name!r}; {nearest_sentence(known, list(options))}.")


def nearest_sentence(name: str, names: Sequence[str]) -> str:
    """What to write instead of an unknown name: the nearest one, also by its last dotted part, or all of them."""
    by_last = {option.rpartition(".")[2]: option for option in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1) or [
        by_last[last] for last in difflib.get_close_matches(name.rpartition(".")[2], list(by_last), n=1)
    ]
    return f"the nearest is {close[0]!r}" if close else f"the fields are {', '.join(names)}"


def place_words(words: list[str], positional: tuple[str, ...], options: dict[str, Option]) -> list[tuple[str, str]]:
    """The bare words as values of the positional fields. Raises UsageError for a word that has no place."""
    values, left = [], list(words)
    for name in positional:
        if left and options[name].is_list:
            values.append((name, json.dumps(left)))
            left = []
        elif left:
            values.append((name, left.pop(0)))
    if left:
        raise UsageError(f"{left[0]!r} has no place here; fields are written --field value or field=value.")
    return values


def check_yaml(path: Path, options: dict[str, Option]) -> set[str]:
    """The fields that a YAML file sets. Raises UsageError if it cannot be read or names a field that does not exist."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror}); give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {_one_line(str(error))}.") from error
    if content is None:
        return set()
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must be a mapping of fields to values, not a {type(content).__name__}.")
    return set(_check_mapping(content, "", path, options))


def _check_mapping(content: dict[Any, Any], prefix: str, path: Path, options: dict[str, Option]) -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in options:
            yield name
        elif any(option.startswith(f"{name}.") for option in options) and (isinstance(value, dict) or value is None):
            yield from _check_mapping(value or {}, f"{name}.", path, options)
        else:
            raise UsageError(f"{path} sets {name!r}, which is no field; {nearest_sentence(name, list(options))}.")


def render_help(config: type, *, prog: str, description: str) -> str:
    """Help for a terminal: every field with its meaning, unit and default, nested groups after the plain fields."""
    options = list(config_options(config))
    positional: tuple[str, ...] = getattr(config, "POSITIONAL", ())
    words = [f"{name.upper()}{'...' if o.is_list else ''}" for name in positional for o in options if o.name == name]
    required = [
        f"{o.flag} {_metavar(o)}" for o in options if o.default is dataclasses.MISSING and o.name not in positional
    ]
    lines = [f"usage: {' '.join([prog, *words, *required])} [--config FILE.yaml] [--field value | field=value ...]", ""]
    lines += [*textwrap.wrap(description, 110), ""]
    for name, word in zip(positional, words, strict=True):
        lines += _help_entry(f"  {word}", next(o for o in options if o.name == name))
    group = ""
    for option in sorted((o for o in options if o.name not in positional), key=lambda o: o.name.rpartition(".")[0]):
        owner = option.name.rpartition(".")[0]
        if owner != group:
            lines += ["", f"{owner}:"]
            group = owner
        lines += _help_entry(f"  {option.flag} {_metavar(option)}".rstrip(), option)
    lines += ["", "  --config FILE.yaml".ljust(34) + "Fields from a file; the command line overrides it."]
    lines += ["", f"In YAML, dashes are underscores. {TRACEBACK_VARIABLE}=1 shows where an error comes from."]
    return "\n".join(lines)


def describe_type(hint: Any) -> str:
    """A type in the words of the person who typed the value."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    optional = " or null" if type(None) in typing.get_args(hint) else ""
    described = []
    for option in alternatives(hint):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is typing.Literal:
            described.append("one of " + ", ".join(str(value) for value in inner))
        elif origin in (tuple, list):
            described.append(f"a list, each {describe_type(inner[0])}" if inner else "a list")
        else:
            described.append(words.get(option, str(getattr(option, "__name__", option))))
    return " or ".join(described) + optional


def run(main: Main, argv: list[str] | None = None) -> int:
    """Run a command and turn how it ended into an exit code.

    An error that the user can mend becomes one line on stderr and exit code 2, Ctrl-C one line and 130. Any other error
    keeps its traceback; VIDEOBERT_TRACEBACK=1 keeps all of them.
    """
    prog = _prog_of(main)
    try:
        return main(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BrokenPipeError:  # `videobert report | head` is fine; stop Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues.", file=sys.stderr)
        return INTERRUPTED
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"{prog}: {sentence(error)}", file=sys.stderr)
        return USER_ERROR


def door(main: Main) -> Callable[..., int]:
    """Decorates a job's `main`: it may be called without arguments and its user errors are sentences (see `run`)."""

    @functools.wraps(main)
    def opened(argv: list[str] | None = None) -> int:
        return run(main, argv)

    return opened


def sentence(error: BaseException) -> str:
    """An error as one line. An error that crossed a Ray worker is reduced to its cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return sentence(cause)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}; give a path that this user can use."
    # pyarrow puts errno in front and the whole again behind.
    text = re.sub(r"^\[Errno \d+\] |\. Detail: \[errno.*$", "", _one_line(str(error)))
    return text or f"{type(error).__name__} without a message; {TRACEBACK_VARIABLE}=1 shows where."


def _bind(config: type[Config], files: list[str], values: list[tuple[str, str]], options: dict[str, Option]) -> Config:
    """Let jsonargparse read the values and build the dataclass."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config)
    # Files first, wherever they were typed: the command line overrides them.
    argv = [f"--config={file}" for file in files]
    argv += [f"--{name}={_list_value(value) if options[name].is_list else value}" for name, value in values]
    try:
        built = parser.instantiate(parser.parse_args(argv))
    except (ArgumentError, TypeError) as error:
        raise _type_error(str(error), options) from error
    names = {field.name for field in dataclasses.fields(config) if field.init}  # type: ignore[arg-type]
    return config(**{name: built[name] for name in names})


def _type_error(message: str, options: dict[str, Option]) -> ValueError:
    """jsonargparse's complaint about a value as one sentence with the field, the value and what it takes."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and value and key[1] in options:
        option = options[key[1]]
        given = value[1].strip()
        return UsageError(f"{option.name} takes {describe_type(option.type)}, not {given!r}.")
    return UsageError(_one_line(message))


def _help_entry(head: str, option: Option) -> list[str]:
    default = "required" if option.default is dataclasses.MISSING else f"default: {_show(option.default)}"
    if option.name.endswith("_bytes") and isinstance(option.default, int):
        default += f" = {option.default / 2**30:g} GiB"
    choices = describe_type(option.type) if "one of" in describe_type(option.type) else ""
    text = " ".join(filter(None, [_one_line(option.doc), f"({'; '.join(filter(None, [choices, default]))})"]))
    body = textwrap.wrap(text, 110, initial_indent=" " * 34, subsequent_indent=" " * 34, break_long_words=False)
    if len(head) <= 32 and body:
        body[0] = head.ljust(34) + body[0][34:]
        return body
    return [head, *body]


def _metavar(option: Option) -> str:
    if option.is_switch:
        return "true|false" if option.default is True else ""
    unit = next((word for suffix, word in UNITS.items() if option.name.endswith(suffix)), "")
    first = alternatives(option.type)[0]
    if typing.get_origin(first) is typing.Literal:
        return "CHOICE"
    kinds = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}
    return "A,B,..." if option.is_list else unit or kinds.get(first, "VALUE")


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _list_value(value: str) -> str:
    if value.startswith("[") or value == "null":
        return value
    return json.dumps([_scalar(part) for part in value.split(",") if part])


def _scalar(text: str) -> Any:
    """A number stays a number inside a JSON list, so that `1,2` is a list of ints as well as of texts."""
    try:
        return json.loads(text) if re.fullmatch(r"-?\d+(\.\d+)?([eE]-?\d+)?", text) else text
    except json.JSONDecodeError:  # 007
        return text


def _switch_value(tokens: list[str]) -> str:
    return tokens.pop(0) if tokens and tokens[0].lower() in ("true", "false") else "true"


def _next_value(name: str, tokens: list[str]) -> str:
    if not tokens or tokens[0].startswith("--"):
        raise UsageError(f"--{name.replace('_', '-')} needs a value.")
    return tokens.pop(0)


def _attribute(instance: Any, dotted: str) -> Any:
    return functools.reduce(getattr, dotted.split("."), instance)


def _prog_of(main: Main) -> str:
    """`videobert ingest` for the main of jobs/ingest.py, also when it was started as `python -m jobs.ingest`."""
    return f"videobert {Path(inspect.getfile(inspect.unwrap(main))).stem}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
