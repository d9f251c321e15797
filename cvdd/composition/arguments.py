"""The command line before Hydra sees it: groups of numbered files, and answers that Hydra would not give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from cvdd.composition.surroundings import SURROUNDINGS, is_shared_by_rows
from cvdd.support.closest import closest

FIELDS: Mapping[str, str] = MappingProxyType({"ipc": "ipc.images_per_class", "temperature": "temperature.vote"})
"""The field behind each of these groups, for numbers that have no file."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_OVERRIDE = re.compile(rf"({'|'.join(FIELDS)})=['\"]?({_NUMBER}(?:,{_NUMBER})*)['\"]?")
_SURROUNDINGS = re.compile(rf"[+~]*({'|'.join(SURROUNDINGS)}|hydra)[./=@]")
_HOW = frozenset({"engine", "dataset", "experiment", "debug", "sweep", "point"})
"""How it is computed, where the data lie, and choices that stand for a whole command."""
_PLAIN = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_COMPLETION = frozenset({"-sc", "--shell-completion"})
_NO_DIRECTORY = re.compile(r"\+*(hydra\.(?:run|sweep)\.dir)=\s*(['\"]?)\s*\2\s*")
"""As the shell writes it where a variable is not set."""
_ELSEWHERE = ("--config-path", "-cp", "hydra.searchpath")
_EMPTY = re.compile(r"\+*([A-Za-z_][\w.]*)=\{\s*\}")
_VERB = re.compile(r"[+~]*verb(?:=(.*))?")
_VALUED = ("--config-dir", "--config-path", "--config-name", "--package", "--cfg", "--experimental-rerun", "--info")
_VALUED_SHORT = ("-cd", "-cp", "-cn", "-p", "-c", "-i")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What Hydra's option --info may be followed by."""


class ArgumentError(ValueError):
    """An argument that cannot work; the message says what to type instead."""


def is_of_surroundings(override: str) -> bool:
    """Whether an override says where things are and run, and not what is made."""
    return _SURROUNDINGS.match(override) is not None


def key_of(override: str) -> str:
    """Return the dotted key of the field, or the section, that an override sets."""
    group, _, package = override.lstrip("+~/").partition("=")[0].partition("@")
    return (package or group).replace("/", ".")


def says_what_is_made(override: str) -> bool:
    """Whether an override is of a setting that something which a command makes is expected to depend on."""
    key = key_of(override)
    return not (is_shared_by_rows(key) or key.partition(".")[0] in _HOW)


def prepare(arguments: Sequence[str], directory: Path) -> list[str]:
    """Return arguments as Hydra wants them.

    Args:
        arguments: of the command line.
        directory: of the configuration.

    Raises:
        ArgumentError: a number has no file, a group is given no choice, Hydra is given no directory, a group, choice
            or field is not there, an override cannot be read or would change nothing, or a file of one's own has the
            name of another.
    """
    if _COMPLETION & set(arguments):
        return list(arguments)
    options, overrides = apart(arguments)
    folders = [directory, *own_directories(options)]
    for folder in folders[1:]:
        _refuse_hidden(folder, directory)
    for override in overrides:
        if match := _NO_DIRECTORY.fullmatch(override):
            raise ArgumentError(f"{match[1]}=: names no directory; type {match[1]}=DIR, or leave it out")
        _refuse_unreadable(override)
        _refuse_pointless(override, folders)
        _refuse_unknown(override, folders, is_certain(arguments))
    return quote_numbers([*options, *overrides], directory)


def apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return options and overrides: Hydra's parser takes no override after an option that follows others."""
    options: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        # As Hydra, which takes a beginning of an option for the whole.
        longer = [name for name in _VALUED if argument[2:] and name.startswith(argument)]
        if argument == "-i" or longer == ["--info"]:
            options.append(f"--info={rest.pop(0) if rest[:1] and rest[0] in _INFO else 'all'}")
            continue
        options.append(argument)
        if (argument in _VALUED_SHORT or longer) and rest:
            options.append(rest.pop(0))
    return options, overrides


def _choices(folders: Sequence[Path], group: str) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def is_certain(arguments: Sequence[str]) -> bool:
    """Whether all files are known: somebody may have more elsewhere, and then Hydra decides."""
    return not any(argument.lstrip("+~").startswith(_ELSEWHERE) for argument in arguments)


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _refuse_unreadable(override: str) -> None:
    """Refuse what Hydra cannot read, and say how to write it."""
    if _is_readable(override):
        return
    key, sign, value = override.partition("=")
    if not sign or not re.fullmatch(r"[+~]*\w[\w./@-]*", key):
        raise ArgumentError(
            f"{override}: write KEY=VALUE, +KEY=VALUE for what is not there yet, or ~KEY to leave it out"
        )
    if value.startswith("~/"):
        raise ArgumentError(f"{override}: ~ means something else to Hydra; type {key}=$HOME{value[1:]}")
    if value.startswith("["):
        written = f"[{','.join(map(_quoted, _items(value[1:-1])))}]"
    elif value.startswith("{"):
        written = value.replace("=", ": ")
    else:
        written = _quoted(value)
    if not _is_readable(f"{key}={written}"):
        raise ArgumentError(f"{override}: Hydra cannot read this value; see whether brackets and quotes are closed")
    raise ArgumentError(f'{override}: Hydra cannot read this value; type "{key}={written}"')


def _quoted(value: str) -> str:
    """Return a value as Hydra reads it, in quotes if it needs them."""
    return value if _is_readable(f"x=[{value}]") else "'{}'".format(value.replace("'", "\\'"))


def _items(text: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    depth, items = 0, [""]
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items]


def _refuse_pointless(override: str, folders: Sequence[Path]) -> None:
    """Refuse what Hydra takes without a word and that cannot mean what it seems to."""
    if verb := _VERB.fullmatch(override):
        from cvdd.schema.types import Verb

        known = [verb[1]] if verb[1] in get_args(Verb) else get_args(Verb)
        scripts = _listed([f"python {name}.py" for name in known])
        raise ArgumentError(f"{override}: each verb is a command of its own; type {scripts} instead")
    group, _, value = override.partition("=")
    empty = _EMPTY.fullmatch(override)
    is_group = any((folder / group).is_dir() for folder in folders)
    if not empty and not (value == "null" and is_group):
        return
    # The schema takes half a second to read, which a run needs anyway.
    from cvdd.composition.fields import is_dictionary, is_required, model_at

    if not empty:
        if not is_required(group):
            raise ArgumentError(f"{override}: choose {group}=NAME; ~{group} leaves the group out")
        raise ArgumentError(f"{override}: choose {_listed(_choices(folders, group))}")
    path = empty[1].split(".")
    if model_at(path) is not None:
        leave = f", or leave out what you do not want: ~{empty[1]}.NAME" if is_dictionary(path) else ""
        raise ArgumentError(
            f"{override}: what braces hold is added to what is there, and these hold nothing; choose "
            f"{path[0]}=NAME{leave}"
        )


def _refuse_unknown(override: str, folders: Sequence[Path], certain: bool) -> None:
    """Refuse a group, a choice or a field that is not there, for which Hydra would not say what was meant."""
    match = _PLAIN.fullmatch(override)
    if match is None or match[1].partition(".")[0] in ("hydra", "point", "local"):
        return
    key, values = match[1], match[2].split(",")
    if any((folder / key).is_dir() for folder in folders):
        choices = _choices(folders, key)
        wrong = [value for value in values if re.fullmatch(r"[\w-]+", value) and value not in (*choices, "null")]
        if certain and wrong and key not in FIELDS:
            raise ArgumentError(f"{key}={wrong[0]}: choose {_listed(choices)}{closest(wrong[0], choices, '')}")
    elif "." in key or certain:
        from cvdd.composition.fields import fields, is_known

        if not is_known(key):
            groups = [path.name for folder in folders for path in folder.iterdir() if path.is_dir()]
            known = [*groups, *(field.key for field in fields())]
            raise ArgumentError(f"{override}: there is no such field or group{closest(key, known)}")


def own_directories(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the directories of configuration that somebody adds with ``--config-dir``."""
    for index, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in ("--config-dir", "-cd") and (folder := value or next(iter(arguments[index + 1 :]), "")):
            yield Path(folder)


def _refuse_hidden(folder: Path, directory: Path) -> None:
    """Refuse a folder that is not there, or files in it that Hydra would never read: it looks into ours first."""
    if not folder.is_dir():
        raise ArgumentError(f"--config-dir {folder}: there is no such directory")
    if folder.resolve() == directory.resolve():
        return
    for ours in sorted(directory.glob("**/*.yaml")):
        name = ours.relative_to(directory)
        if (folder / name).is_file():
            raise ArgumentError(
                f"{folder / name}: there is a {name} already, which would be taken instead; give yours another name"
            )


def quote_numbers(arguments: Sequence[str], directory: Path, certain: bool = True) -> list[str]:
    """Write ``ipc=10`` as ``ipc='10'``: Hydra takes a bare number for a value, never for the name of a file.

    Lists of a sweep (``ipc=1,10,50``) are quoted one by one, and ``temperature=5.0`` finds the file ``5``; everything
    else is left as it is.

    Args:
        arguments: of the command line.
        directory: of the configuration.
        certain: whether our files are all there are, as far as somebody else knows.

    Raises:
        ArgumentError: a number has no file; the message says which have one and what to type instead.
    """
    certain = certain and is_certain(arguments)
    folders = [directory, *own_directories(arguments)]
    quoted = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            quoted.append(argument)
            continue
        group, values = match[1], match[2].split(",")
        names = preset_numbers(folders, group)
        found = [_same_number(value, names) for value in values]
        if certain and None in found:
            raise ArgumentError(_advice(group, values, found, names))
        chosen = [f"'{name or value}'" for name, value in zip(found, values, strict=True)]
        quoted.append(f"{group}={','.join(chosen)}")
    return quoted


def prepare_row(row: Sequence[str], directory: Path, certain: bool = True) -> list[str]:
    """Return the overrides of a row of a comparison as Hydra wants them; see :func:`quote_numbers`.

    Raises:
        ArgumentError: a number has no file, or an override would change nothing.
    """
    for override in row:
        _refuse_pointless(override, [directory])
    return quote_numbers(row, directory, certain)


def typed_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that Hydra keeps as they were typed.

    Read one by one, interpolations in them would be filled in, and that of a section is no override any more.

    Args:
        overrides: ``hydra.overrides.task``.
    """
    typed = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_list(overrides) else overrides
    assert isinstance(typed, Sequence)
    return [str(override) for override in typed]


def unquoted(override: str) -> str:
    """Return an override as it was typed before :func:`quote_numbers`."""
    return override.replace("'", "") if _OVERRIDE.fullmatch(override.replace("'", "")) else override


def preset_numbers(folders: Sequence[Path], group: str) -> list[str]:
    """Return the numbers that have a file in a group of these directories, in order."""
    names = [name for name in _choices(folders, group) if re.fullmatch(_NUMBER, name)]
    return sorted(names, key=float)


def _same_number(value: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if float(name) == float(value)), None)


def _advice(group: str, values: Sequence[str], found: Sequence[str | None], names: Sequence[str]) -> str:
    unknown = [value for value, name in zip(values, found, strict=True) if name is None]
    field = FIELDS[group]
    whole = group == "ipc"
    if any(float(value) <= 0 or (whole and not float(value).is_integer()) for value in unknown):
        kind = "a whole number of at least 1" if whole else "a number greater than 0"
        instead = f"set {field} to {kind}"
    else:
        instead = f"set {field}={','.join(values)}"
    return f"{group}={','.join(values)}: there is no preset {', '.join(unknown)}; choose {_listed(names)}, or {instead}"


def _listed(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else "".join(choices)
