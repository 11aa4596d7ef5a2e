"""Strict recipes: a frozen dataclass, filled from YAML (`--config`) and the command line, unknown keys refused.

YAML file --+
            +--> jsonargparse --> Recipe(...)        bad key or type --> UserError with file, key, remedy
--a.b value-+
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vision_tower.common.errors import UserError

Recipe = TypeVar("Recipe")


class _ReadByRunCommand(argparse.Action):
    """An option without a value in the recipe; `run_command` reads it (logs.py)."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, *_: Any) -> None:
        """Store nothing."""


def parse_recipe(kind: type[Recipe], argv: list[str], *, command: str, positional: tuple[str, ...] = ()) -> Recipe:
    """Build `kind` from `argv`.

    Args:
        kind: a dataclass; its docstring and defaults become `--help`.
        positional: fields given by place instead of by `--name`; a list takes one or more words.
    Raises:
        UserError: unknown key, wrong type, missing value or unreadable file.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"clips-mllm {command}",
        description=(kind.__doc__ or "").strip().splitlines()[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML recipe; later values override earlier ones")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--verbose", action=_ReadByRunCommand, help="show debug messages too")
    level.add_argument("--quiet", action=_ReadByRunCommand, help="show only warnings and errors")
    for name in positional:
        hint = get_type_hints(kind)[name]
        many = get_origin(hint) is list
        words: dict[str, Any] = {"nargs": "+", "type": get_args(hint)[0]} if many else {"type": hint}
        parser.add_argument(name, help=_field_help(kind)[name], **words)
    parser.add_class_arguments(kind, skip=set(positional), as_group=False)
    argv = _as_lists(_with_values(_with_underscores(argv, kind), kind), kind)
    for file in _config_files(argv):
        _check_keys(file, kind)
    try:
        namespace = parser.parse_args(argv)
        namespace.pop("config", None)
        return kind(**{name: _at_home(value) for name, value in vars(parser.instantiate(namespace)).items()})
    except (ArgumentError, TypeError) as error:
        message = _expected(str(error), kind) or str(error)
        raise UserError(_one_line(command, argv, message) + _nearest_option(str(error), kind)) from error


def _at_home(value: Any) -> Any:
    """Paths that begin with `~/`, which no shell has expanded in a YAML or behind a `=`."""
    match value:
        case str() if value.startswith("~/"):
            return str(Path(value).expanduser())
        case Path():
            return value.expanduser()
        case list() | tuple():
            return type(value)(map(_at_home, value))
        case dict():
            return {key: _at_home(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _at_home(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _with_underscores(argv: list[str], kind: type) -> list[str]:
    """`--batch-size` means `--batch_size`."""
    known = {f"--{name.replace('_', '-')}": f"--{name}" for name in _flat_keys(kind)}
    parts = [word.partition("=") for word in argv]
    return [known.get(option, option) + joined + value for option, joined, value in parts]


def _with_values(argv: list[str], kind: type) -> list[str]:
    """`--flag` alone means true."""
    flags = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint is bool}
    following = [*argv[1:], "--"][: len(argv)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def _as_lists(argv: list[str], kind: type) -> list[str]:
    """`--file a --file b`, for a list of texts or paths, means `--file ["a", "b"]`."""
    lists = (list[str], tuple[Path, ...])
    options = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint in lists}
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        option, joined, value = words.pop(0).partition("=")
        if option not in options or not (joined or (words and not words[0].startswith("--"))):
            rest.append(option + joined + value)
            continue
        value = value if joined else words.pop(0)
        if value.startswith("["):  # the whole list
            rest += [option, value]
        else:
            given.setdefault(option, []).append(value)
    return [*rest, *(word for option, values in given.items() for word in (option, json.dumps(values)))]


def dump_recipe(recipe: Any) -> str:
    """The resolved recipe as YAML; `parse_recipe` reads it back to an equal value."""
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
    return value


def _field_help(kind: type) -> dict[str, str]:
    """What the docstrings of the dataclass and of those it derives from say of each field."""
    from docstring_parser import parse

    entries = [entry for base in reversed(kind.__mro__) for entry in parse(base.__doc__ or "").params]
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


def _config_files(argv: list[str]) -> list[Path]:
    files = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    files += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return [Path(file) for file in files]


def _check_keys(file: Path, kind: type) -> None:
    """Refuse what jsonargparse would refuse too, but naming the nearest key."""
    import yaml

    if not file.is_file():
        raise UserError("no such recipe", file=file, remedy="see configs/ for the ones that ship")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", file=file) from error
    if not isinstance(tree, Mapping):
        what = "empty" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"a recipe is a mapping of keys to values, this is {what}", file=file, remedy="see configs/")
    _check_mapping(file, tree, kind, prefix="")


def _check_mapping(file: Path, tree: Mapping[str, Any], kind: type, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{_unknown_key(str(key), list(hints), prefix)}", file=file)
        for section in _sections(hints[key]):
            _check_section(file, value, section, prefix=f"{prefix}{key}")


def _unknown_key(key: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key '{prefix}{key}'; {remedy}"


def _sections(hint: Any) -> list[type]:
    """The dataclasses of a field's type: of `Part`, `Part | None`, `tuple[Part, ...]`."""
    return [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part) and isinstance(part, type)]


def _check_section(file: Path, value: Any, section: type, prefix: str) -> None:
    """A section is a mapping, or a list of mappings (`tasks[0].data`)."""
    if isinstance(value, Mapping):
        _check_mapping(file, value, section, prefix=f"{prefix}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_section(file, item, section, prefix=f"{prefix}[{index}]")


def _expected(message: str, kind: type) -> str | None:
    """What jsonargparse says of a wrong value, in the words of a recipe's reader; None for other messages."""
    # A section in a list names itself and its key; a message within a message repeats its own.
    place = ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)":', message)))
    hint = _type_of(place, kind) if message.strip().startswith("Parser key") else None
    if hint is None:
        return None
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        known = [name for part in _sections(hint) for name in get_type_hints(part)]
        return f"{place}: {_unknown_key(unknown[1], known)}"
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"{place}: without {missing[1]}; give it"
    value = re.search(r"(?:Got value|Given value): (.*)|Unable to load config ['\"](.*?)['\"]", message)
    return None if value is None else f"{place}: expected {_type_name(hint)}, not '{value[1] or value[2]}'"


def _type_of(place: str, kind: type) -> Any:
    """The type of a field by its dotted name; None where there is none."""
    hint: Any = kind
    for name in place.split("."):
        sections = _sections(hint)
        hint = get_type_hints(sections[0]).get(name) if sections else None
    return hint


def _type_name(hint: Any) -> str:
    """`int | None` is "a whole number or null"."""
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(map(_type_name, parts))
    if origin in (list, tuple):
        return f"a list (each: {_type_name(parts[0])})"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return names.get(hint) or {dict: "a mapping"}.get(origin or hint, str(hint))


def _nearest_option(message: str, kind: type) -> str:
    """`; did you mean ...?` for a command-line option that does not exist."""
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", message.strip(), re.IGNORECASE)
    near = difflib.get_close_matches(unknown[1], _flat_keys(kind), n=1, cutoff=0.5) if unknown else []
    return f"; did you mean '--{near[0]}'?" if near else ""


def _flat_keys(kind: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, hint in get_type_hints(kind).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys += _flat_keys(hint, f"{prefix}{name}.")
    return keys


def _one_line(command: str, argv: list[str], message: str) -> str:
    words = " ".join(message.split())
    key = words.partition(":")[0]
    given_here = any(f"--{key}.".startswith(f"{word.partition('=')[0]}.") for word in argv)
    files = "" if given_here else ", ".join(map(str, _config_files(argv)))
    place = f"{files}: " if files else ""
    return f"{place}{words}; see 'clips-mllm {command} --help'"
