"""A program's settings: dataclasses read from JSON, strictly, with `key.sub=value` overrides.

A key that is not a field, a value of another type and a missing value are all refused by name and file:
a setting that was silently dropped has cost more training runs than any bug in the learning.
Where an object is expected, a string is the path of another JSON file, relative to the file it stands in;
an object's "include" names a file whose values the object's own keys override.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from so101.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, UserError, tell
from so101.files import parse_json, read_json, write_atomic
from so101.signals import take_signals

T = TypeVar("T")
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
HELP_COLUMNS = 100
DEFAULTS = "defaults"  # where a value comes from that nobody set


def option(default: Any = dataclasses.MISSING, help: str = "", positional: bool = False) -> Any:
    """A dataclass field and its meaning. A mutable default is copied for each instance; none: required.

    `positional`: a command line may give the value alone, without `key=`, in the order of such fields.
    """
    metadata = {"help": help, "positional": positional}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require_within(config: Any, **ranges: tuple[float, float]) -> None:
    """For a __post_init__: ConfigError, naming the field, where a value is outside its (low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            most = f" and at most {high:g}" if math.isfinite(high) else ""
            raise ConfigError(f"{name}: got {value}, must be {low:g} or more{most}")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values; `from_dict` gives an equal config back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    return plain


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key, as a command line names them."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return rows


def save(config: Any, path: Path) -> None:
    """Write the whole config, defaults included, as JSON that `load` reads back equal."""
    write_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build a `cls` from JSON values; `where` is the file they came from, named in every ConfigError."""
    return _build(cls, [(data, where)])


def load(cls: type[T], path: Path | str) -> T:
    """Read a config file. Raises ConfigError with the file and the key for whatever is wrong in it."""
    return _build(cls, [(str(path), "")])


def parse(cls: type[T], argv: list[str], description: str) -> T:
    """The config that a command line asks for: defaults, then `--config FILE`, then each `key.sub=value`.

    `--key value`, `--key=value` and, for what is true or false, `--key` say the same as `key=value`. `--help`
    prints every field and ends the program. Raises ConfigError for anything that does not fit.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, description), flush=True)
        raise SystemExit(EXIT_DONE)
    files: list[str] = []
    overrides: list[Any] = []
    alone: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if key == "config" and word != key:
            files.append(text if equals else next(words, ""))
        elif word.startswith("--"):
            name, hints = _field_of(cls, key), get_type_hints(cls)
            takes_none = hints.get(name) is bool or name.partition(".")[0] not in hints  # an unknown key is told below
            value = text if equals else "true" if takes_none else next(words, None)
            if value is None:
                raise ConfigError(f"command line: {word} needs a value after it (--help says which)")
            overrides.append(_nested(f"{name}={value}"))
        elif equals and not word.startswith("-"):
            overrides.append(_nested(f"{_field_of(cls, key)}={text}"))
        else:
            alone.append(word)
    if len(files) > 1 or "" in files:
        raise ConfigError(f"command line: --config takes one file, got {' and '.join(files) or 'none'}")
    overrides += _positional(cls, alone)
    layers = [(file, "") for file in files] + [(values, "command line") for values in overrides]
    return _build(cls, layers)


def _field_of(cls: Any, flag: str) -> str:
    """The field that a flag means: dry-run is dry_run, and import is import_, as Python keeps that word to itself."""
    key = flag.replace("-", "_")
    return f"{key}_" if any(field.name == f"{key}_" for field in dataclasses.fields(cls)) else key


def _positional(cls: Any, words: list[str]) -> list[Any]:
    """Words without a key, given to the positional fields in order; a list as the last takes all that are left."""
    places = [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    given: list[Any] = []
    for place in places:
        if words and get_origin(get_type_hints(cls)[place]) is list:
            given.append(_Dotted({place: [_Text(word) for word in words]}))
            words = []
        elif words and not words[0].startswith("-"):
            given.append(_Dotted({place: _Text(words[0])}))
            words = words[1:]
    if words:
        takes = f"takes {', '.join(places)} and then key=value" if places else "takes key=value"
        raise ConfigError(f"command line: unknown argument {words[0]!r}; it {takes} (--help lists what there is)")
    return given


class _Section(dict[str, Any]):
    """The values of a dataclass that is still being put together, and the file that last set one."""

    def __init__(self, cls: Any, values: dict[str, Any], file: str = DEFAULTS) -> None:
        super().__init__(values)
        self.cls, self.file = cls, file


class _Dotted(dict[str, Any]):
    """One step of an override's dotted key: unlike an object written as JSON, it keeps its siblings."""


class _Text(str):
    """An override's value as typed: 7 is text for a field that takes text, a number for another."""


def _nested(override: str) -> Any:
    key, _, text = override.partition("=")
    nested: Any = _Text(text)
    for name in reversed(key.split(".")):
        nested = _Dotted({name: nested})
    return nested


def _build(cls: type[T], layers: list[tuple[Any, str]]) -> T:
    """Lay each (values, file) over the defaults, checking it on the way, and make the dataclasses."""
    section: Any = _defaults(cls)
    for values, file in layers:
        section = _lay(cls, section, values, "", file, ())
    built: T = _close(section, "")
    return built


def _defaults(cls: Any) -> _Section:
    return _Section(cls, {f.name: _open(_default(f)) for f in dataclasses.fields(cls) if not _required(f)})


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _open(value: Any) -> Any:
    """A default with its dataclasses taken apart, so that single values in them can be replaced."""
    if dataclasses.is_dataclass(value):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _Section(type(value), {name: _open(item) for name, item in values.items()})
    return {name: _open(item) for name, item in value.items()} if isinstance(value, dict) else value


def _close(value: Any, key: str) -> Any:
    """Make the dataclasses of a finished tree; the errors of their own checks get file and key in front."""
    dot = f"{key}." if key else ""
    if isinstance(value, list | tuple):
        return type(value)(_close(item, f"{key}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    closed = {name: _close(item, dot + name) for name, item in value.items()}
    if not isinstance(value, _Section):
        return closed
    for field in dataclasses.fields(value.cls):
        if _required(field) and field.name not in value:
            where = "command line" if value.file == DEFAULTS else value.file
            raise ConfigError(f"{where}: {dot}{field.name} is missing: {field.metadata.get('help')}")
    try:
        return value.cls(**closed)
    except ConfigError as error:
        names_field = str(error).partition(":")[0] in closed
        raise ConfigError(f"{value.file}: {dot if names_field or not key else key + ': '}{error}") from None


class _Mismatch(Exception):
    """A value is not of the type tried; it may fit the next alternative."""


def _lay(hint: Any, base: Any, new: Any, key: str, file: str, reading: tuple[Path, ...]) -> Any:
    """Check `new` (from `file`) against a type and lay it over `base`; `reading` are the files being read."""
    if isinstance(new, _Text):
        new = _parse_text(hint, new)
    if hint is Any or (new is None and type(None) in get_args(hint)):
        return new
    for arm in _arms(hint):
        try:
            return _lay_arm(arm, base, new, key, file, reading)
        except _Mismatch:
            continue
    shown = json.dumps(new) if len(json.dumps(new)) <= 60 else json.dumps(new)[:57] + "..."
    raise ConfigError(f"{file}: {key}: got {shown}, must be {describe_type(hint)}")


def _lay_arm(arm: Any, base: Any, new: Any, key: str, file: str, reading: tuple[Path, ...]) -> Any:
    origin, inner = get_origin(arm), get_args(arm)
    if dataclasses.is_dataclass(arm) and isinstance(new, str | dict):
        return _lay_section(arm, base, new, key, file, reading)
    if origin is Literal and any(new == choice and type(new) is type(choice) for choice in inner):
        return new
    if arm is float and type(new) in (int, float) and abs(new) <= sys.float_info.max:  # not NaN, not inf
        return float(new)
    if arm in (bool, int, str) and type(new) is arm:  # by type: true is no whole number
        return new
    if origin is dict and isinstance(new, dict):
        kept = dict(base) if isinstance(new, _Dotted) and isinstance(base, dict) else {}
        for name, item in new.items():
            kept[name] = _lay(inner[1], kept.get(name), item, f"{key}.{name}", file, reading)
        return kept
    if origin in (list, tuple) and isinstance(new, list):
        hints = inner[:1] * len(new) if origin is list or Ellipsis in inner else inner
        if len(hints) == len(new):
            items = enumerate(zip(hints, new, strict=True))
            return origin(_lay(hint, None, item, f"{key}[{i}]", file, reading) for i, (hint, item) in items)
    raise _Mismatch


def _lay_section(cls: Any, base: Any, new: Any, key: str, file: str, reading: tuple[Path, ...]) -> _Section:
    """An object, or the path of a file that holds one, laid over the section that is there so far."""
    if isinstance(new, str):
        path = Path(file).parent / new
        if path.resolve() in reading:
            raise ConfigError(f"{file}: {path} is read by way of itself; break the circle of files")
        values = read_json(path, ConfigError, f" (asked for by {key!r} in {file})" if file else "")
        return _lay_section(cls, base, values, key, str(path), (*reading, path.resolve()))
    hints, dot = get_type_hints(cls), f"{key}." if key else ""
    names = [field.name for field in dataclasses.fields(cls)]
    if isinstance(new.get("include"), str) and "include" not in names:
        base = _lay_section(cls, base, new["include"], key, file, reading)
        new = {name: value for name, value in new.items() if name != "include"}
    section = _Section(cls, base if isinstance(base, _Section) else _defaults(cls), file)
    for name, value in new.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            then = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(names)}"
            raise ConfigError(f"{file}: unknown key {dot + name!r}; {then}")
        section[name] = _lay(hints[name], section.get(name), value, dot + name, file, reading)
    return section


def _parse_text(hint: Any, text: str) -> Any:
    """An override's value: as JSON where it is JSON, except that a text field takes it as typed."""
    try:
        value = parse_json(text)
    except ValueError:
        return str(text)
    takes_only_text = _arms(hint) == (str,) and not isinstance(value, str)
    null = value is None and type(None) in get_args(hint)
    return str(text) if takes_only_text and not null else value


def _arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type, None left out."""
    union = get_origin(hint) in (Union, types.UnionType)
    return tuple(arm for arm in (get_args(hint) if union else (hint,)) if arm is not type(None))


def describe_type(hint: Any) -> str:
    """A type in words, as in `null or a whole number`."""
    words = []
    for arm in _arms(hint):
        origin, inner = get_origin(arm), get_args(arm)
        if origin is Literal:
            words.append("one of " + ", ".join(json.dumps(choice) for choice in inner))
        elif dataclasses.is_dataclass(arm):
            words.append("an object or the path of a JSON file")
        elif origin is dict:
            words.append(f"an object, each value {describe_type(inner[1])}")
        elif origin is list or Ellipsis in inner:
            words.append(f"a list, each item {describe_type(inner[0])}")
        elif origin is tuple:
            words.append(f"a list of {len(inner)}: {', '.join(describe_type(item) for item in inner)}")
        else:
            words.append(PLAIN.get(arm, "any value"))
    return " or ".join(["null"] * (type(None) in get_args(hint)) + words)


def help_text(cls: Any, description: str) -> str:
    """What `--help` prints: each field with its dotted name, meaning, type and default, in 100 columns."""
    alone = [f"[{field.name.upper()}] " for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    program = Path(sys.argv[0])
    called = f"-m so101.tools.{program.stem}" if program.parent.name == "tools" else program.name
    lines = [f"usage: python {called} {''.join(alone)}[--config FILE] [key=value ...]", ""]
    for example, part in groupby(description.strip().splitlines(), lambda line: line[:1] in ("", " ")):
        rows = list(part)
        lines += rows if example else textwrap.wrap(" ".join(rows), HELP_COLUMNS)
    lines.append("")
    usage = (
        "Settings come from their defaults, then a JSON file (--config), then key=value. In a file, a string "
        "where an object is expected is the path of another JSON file, and the key include names a file that "
        "the other keys of its object override; such paths are relative to the file they stand in."
    )
    lines += [*textwrap.wrap(usage, HELP_COLUMNS), ""]
    for name, text in _help_rows(cls, _defaults(cls), ""):
        indent = " " * 32
        wrapped = textwrap.wrap(text, HELP_COLUMNS, initial_indent=indent, subsequent_indent=indent)
        if text and len(name) <= 28:
            wrapped[0] = f"  {name}".ljust(32) + wrapped[0].lstrip()
            lines += wrapped
        elif text:
            lines += [f"  {name}", *wrapped]
        else:
            lines += textwrap.wrap(name, HELP_COLUMNS, subsequent_indent="  ") or [""]
    return "\n".join(lines)


def _help_rows(cls: Any, defaults: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each field, a class's own settings before its sections; a heading has no text."""
    hints = get_type_hints(cls)
    sections: list[tuple[str, str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        name, hint, meaning = prefix + field.name.rstrip("_"), hints[field.name], field.metadata.get("help", "")
        default = defaults.get(field.name)
        shown = "required" if _required(field) else f"default {json.dumps(default)}"
        arm = next(iter(_arms(hint)))
        if dataclasses.is_dataclass(arm):
            sections.append((name, meaning + " (null: none)" * (default is None), arm, default))
            continue
        yield name, f"{meaning} ({describe_type(hint)}; {shown})"
        if get_origin(arm) is dict and dataclasses.is_dataclass(get_args(arm)[1]):
            sections.append((f"{name}.<name>", meaning, get_args(arm)[1], None))
    for name, meaning, section, default in sections:
        yield "", ""
        yield f"{name}: {meaning}", ""
        yield from _help_rows(section, default or _defaults(section), f"{name}.")


def launch(cls: type[T], main: Callable[[T], int | None], description: str) -> None:
    """Run a script's `main` on the config of its command line, and end the program with its exit code.

    SIGTERM takes the same path as Ctrl-C, and so does the loss of the terminal, so that the arm comes to
    rest. A UserError ends as one sentence on stderr; any other exception is a bug and keeps its traceback.
    """
    take_signals()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  to the end of the program
    code: int | None
    lost = None
    try:
        code = main(parse(cls, sys.argv[1:], description))
    except UserError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except OSError as error:
        code, lost = 1, None if error.filename else _lost_output("\n")
        if lost is None and isinstance(error, BrokenPipeError):
            raise  # another pipe broke, which is not ours to hide
        if lost is None:  # a full disk, a folder that may not be written: the person's to mend, not a bug
            print(f"{error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
    lost = lost or _lost_output("")
    if lost is not None and not isinstance(lost, BrokenPipeError):  # a reader that had enough (`| head`) is no error
        tell(f"standard output: {lost.strerror}; not all of it was written")
        code = code or 1
    sys.exit(code or EXIT_DONE)


def _lost_output(probe: str) -> OSError | None:
    """Why stdout does not take `probe` after what was printed; the rest is dropped then, as exiting writes it too."""
    try:
        print(probe, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
