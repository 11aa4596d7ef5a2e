"""Strict recipes: a frozen dataclass filled from YAML (`--config`) and the command line; unknown keys are refused.

YAML files --> check_file ---+
                             +--> jsonargparse --> Recipe(...)
--a.b value --> check_option +
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Recipe = TypeVar("Recipe")

# Old key -> new key, for "did you mean".
RENAMED = {
    "beside": "compare_with",
    "joint": "embed_dim",
    "most_bad": "max_bad_fraction",
    "most_megabytes": "max_upload_mb",
    "most_pictures": "max_images",
    "most_pixels": "max_pixels",
    "patience": "shutdown_seconds",
    "pictures": "images",
    "rows": "batch_size",
    "square": "image_aspect_ratio",
    "waiting": "queue_size",
}
OPTIONS_OF_EVERY_COMMAND = ("--help", "--config", "--print_config", "--verbose", "--quiet")


def parse_recipe(kind: type[Recipe], argv: list[str], *, command: str, positional: tuple[str, ...] = ()) -> Recipe:
    """Build `kind` from `argv`: defaults, then the files given by `--config`, then the other options.

    Args:
        kind: a dataclass; its docstring and defaults become `--help`.
        positional: fields given by position instead of by `--name`; a list takes one or more words.
    Raises:
        UserError: unknown key, wrong type, missing value or unreadable file.
    """
    argv = join_repeated_options(complete_flags(argv, kind), kind)
    for option in option_names(argv):
        check_option(option, kind)
    for file in config_files(argv):
        check_file(file, kind, command)
    recipe = parse(build_parser(kind, command, positional), argv, command)
    return kind(**{name: expand_home(value) for name, value in recipe.items()})


def complete_flags(argv: list[str], kind: type) -> list[str]:
    """Append `=true` to a boolean option without a value."""
    flags = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint is bool}
    following = [*argv[1:], "--"][: len(argv)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def join_repeated_options(argv: list[str], kind: type) -> list[str]:
    """Replace `--file a --file b`, for a list of strings or paths, by `--file ["a", "b"]`."""
    options = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint in (list[str], tuple[Path, ...])}
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if option not in options or not (equals or (words and not words[0].startswith("--"))):
            rest.append(option + equals + value)
            continue
        value = value if equals else words.pop(0)
        if value.startswith("["):  # already a list
            rest += [option, value]
        else:
            values.setdefault(option, []).append(value)
    return [*rest, *(word for option, items in values.items() for word in (option, json.dumps(items)))]


def option_names(argv: list[str]) -> list[str]:
    """Return the options of a command line without their values."""
    return [word.partition("=")[0] for word in argv if word.startswith("--")]


def config_files(argv: list[str]) -> list[Path]:
    """Return the files given by `--config FILE` or `--config=FILE`."""
    files = [after for word, after in itertools.pairwise(argv) if word == "--config"]
    files += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return [Path(file) for file in files]


def check_option(option: str, kind: type) -> None:
    """Raise UserError for an option that is not a (dotted) field of the recipe."""
    if option in OPTIONS_OF_EVERY_COMMAND:
        return
    hint: Any = kind
    prefix = "--"
    for name in option.removeprefix("--").split("."):
        sections = _sections(hint)
        if not sections:  # the key of a dict field, free to choose
            return
        hints = get_type_hints(sections[0])
        if name not in hints:
            raise _unknown_key(name, list(hints), prefix)
        hint, prefix = hints[name], f"{prefix}{name}."


def check_file(file: Path, kind: type, command: str) -> None:
    """Raise UserError, naming the file, for unreadable YAML, an unknown key or a value of the wrong type."""
    import yaml

    if not file.is_file():
        raise UserError("no such recipe", file=file, remedy="see configs/ for examples")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", file=file) from error
    if not isinstance(tree, Mapping):
        content = "empty" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"expected a mapping of keys to values, this is {content}", file=file, remedy="see configs/")
    _check_keys(tree, kind, file, prefix="")
    parse(build_parser(kind, command, require=False), ["--config", str(file)], command, file)


def _check_keys(tree: Mapping[str, Any], kind: type, file: Path, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            raise _unknown_key(str(key), list(hints), prefix, file)
        for section in _sections(hints[key]):
            _check_section(value, section, file, f"{prefix}{key}")


def _check_section(value: Any, section: type, file: Path, path: str) -> None:
    """Check the keys of a section: a mapping, or a list of mappings (`tasks[0].data`)."""
    if isinstance(value, Mapping):
        _check_keys(value, section, file, prefix=f"{path}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_section(item, section, file, f"{path}[{index}]")


def _unknown_key(key: str, known: list[str], prefix: str, file: Path | None = None) -> UserError:
    renamed = RENAMED.get(key)
    near = [renamed] if renamed in known else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
    return UserError("unknown key" if file else "unknown option", file=file, key=f"{prefix}{key}", remedy=remedy)


def _sections(hint: Any) -> list[type]:
    """Return the dataclasses in a field's type: of `Part`, `Part | None` and `tuple[Part, ...]`, all `[Part]`."""
    return [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part) and isinstance(part, type)]


class _ReadByRunCommand(argparse.Action):
    """An option without a value in the recipe; `run_command` reads it (logs.py)."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, *_: Any) -> None:
        """Store nothing."""


def build_parser(kind: type, command: str, positional: tuple[str, ...] = (), *, require: bool = True) -> ArgumentParser:
    """Build the parser of a recipe; `require=False` checks values, but no fields without a default."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    class PartialParser(ArgumentParser):
        def validate(self, *args: Any, **options: Any) -> None:
            super().validate(*args, **(options | {"skip_required": True}))

    parser = (ArgumentParser if require else PartialParser)(
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
        words: dict[str, Any] = {"type": hint}
        if get_origin(hint) is list:
            words = {"nargs": "+", "type": get_args(hint)[0]}
        parser.add_argument(name, help=_field_help(kind)[name], **words)
    parser.add_class_arguments(kind, skip=set(positional), as_group=False)
    return parser


def parse(parser: ArgumentParser, argv: list[str], command: str, file: Path | None = None) -> dict[str, Any]:
    """Return the fields by name, sections as dataclasses, with jsonargparse's errors as UserError.

    Args:
        file: the file to name in errors.
    """
    from jsonargparse import ArgumentError

    try:
        namespace = parser.parse_args(argv)
        namespace.pop("config", None)
        return vars(parser.instantiate(namespace)) if file is None else {}
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(message, file=file, remedy=f"see 'clips-mllm {command} --help'") from error


def _field_help(kind: type) -> dict[str, str]:
    """Return the description of each field, from the docstrings of the dataclass and its bases."""
    from docstring_parser import parse

    entries = [entry for base in reversed(kind.__mro__) for entry in parse(base.__doc__ or "").params]
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


def check_ranges(section: object, prefix: str = "", **ranges: str) -> None:
    """Raise UserError for a field outside its interval, such as `epochs="(0, inf)"`. None is not checked.

    Args:
        prefix: path of the section in the recipe, for the error.
    """
    for name, interval in ranges.items():
        value = getattr(section, name)
        low, high = map(float, interval[1:-1].split(","))
        excluded = {low} if interval[0] == "(" else set()
        excluded |= {high} if interval[-1] == ")" else set()
        if value is not None and (not low <= value <= high or value in excluded):
            raise UserError(f"must be in {interval}", key=f"{prefix}{name}", value=value)


def refuse_unused(
    section: Any, names: Iterable[str], problem: str, prefix: str = "", remedy: str = "remove it"
) -> None:
    """Raise UserError for a field that was set although it has no effect, for the reason in `problem`.

    Args:
        names: fields without effect; a field that has its default counts as not set.
        prefix: path of the section in the recipe, for the error.
    """
    default = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(section)
    }
    for name in names:
        if (value := getattr(section, name)) != default[name]:
            raise UserError(problem, key=f"{prefix}{name}", value=value, remedy=remedy)


def expand_home(value: Any) -> Any:
    """Expand a leading `~/` in paths, which the shell does neither in YAML nor after `=`."""
    match value:
        case str() if value.startswith("~/"):
            return str(Path(value).expanduser())
        case Path():
            return value.expanduser()
        case list() | tuple():
            return type(value)(map(expand_home, value))
        case dict():
            return {key: expand_home(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: expand_home(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def dump_recipe(recipe: Any) -> str:
    """Write a recipe as YAML, which `parse_recipe` reads back to an equal value."""
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
