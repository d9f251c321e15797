"""The command line before Hydra sees it: groups of numbered files, and answers that Hydra would not give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from cvdd.closest import closest
from cvdd.surroundings import SURROUNDINGS, is_shared_by_rows

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
_MORE_DIRECTORIES = ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath")


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
            or field is not there, or a file of one's own has the name of another.
    """
    for folder in own_directories(arguments):
        _refuse_hidden(folder, directory)
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value == "null" and (directory / group).is_dir():
            choices = _listed(_choices(directory, group))
            raise ArgumentError(f"{argument}: choose {choices}; ~{group} leaves the group out")
        if match := _NO_DIRECTORY.fullmatch(argument):
            raise ArgumentError(f"{match[1]}=: names no directory; type {match[1]}=DIR, or leave it out")
    certain = is_certain(arguments)
    for argument in arguments if not _COMPLETION & set(arguments) else ():
        _refuse_unknown(argument, directory, certain)
    return quote_numbers(arguments, directory)


def _choices(directory: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (directory / group).glob("*.yaml"))


def is_certain(arguments: Sequence[str]) -> bool:
    """Whether our files are all there are: somebody's own folder may have more, and then Hydra decides."""
    return not any(argument.lstrip("+~").startswith(_MORE_DIRECTORIES) for argument in arguments)


def _refuse_unknown(argument: str, directory: Path, certain: bool) -> None:
    """Refuse a group, a choice or a field that is not there, for which Hydra would not say what was meant."""
    match = _PLAIN.fullmatch(argument)
    if match is None or match[1].partition(".")[0] in ("hydra", "point", "local"):
        return
    key, values = match[1], match[2].split(",")
    if (directory / key).is_dir():
        choices = _choices(directory, key)
        wrong = [value for value in values if re.fullmatch(r"[A-Za-z_]\w*", value) and value not in (*choices, "null")]
        if certain and wrong and key not in FIELDS:
            raise ArgumentError(f"{key}={wrong[0]}: choose {_listed(choices)}{closest(wrong[0], choices, '')}")
    elif "." in key or certain:
        # The schema takes half a second to read, which a run needs anyway.
        from cvdd.fields import fields, is_known

        if not is_known(key):
            groups = [path.name for path in directory.iterdir() if path.is_dir()]
            known = [*groups, *(field.key for field in fields())]
            raise ArgumentError(f"{argument}: there is no such field or group{closest(key, known)}")


def own_directories(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the directories of configuration that somebody adds with ``--config-dir``."""
    for index, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in ("--config-dir", "-cd") and (folder := value or next(iter(arguments[index + 1 :]), "")):
            yield Path(folder)


def _refuse_hidden(folder: Path, directory: Path) -> None:
    """Refuse files that Hydra would never read, because it looks for a name in our directory first."""
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
    quoted = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            quoted.append(argument)
            continue
        group, values = match[1], match[2].split(",")
        names = preset_numbers(directory, group)
        found = [_same_number(value, names) for value in values]
        if certain and None in found:
            raise ArgumentError(_advice(group, values, found, names))
        chosen = [f"'{name or value}'" for name, value in zip(found, values, strict=True)]
        quoted.append(f"{group}={','.join(chosen)}")
    return quoted


def unquoted(override: str) -> str:
    """Return an override as it was typed before :func:`quote_numbers`."""
    return override.replace("'", "") if _OVERRIDE.fullmatch(override.replace("'", "")) else override


def preset_numbers(directory: Path, group: str) -> list[str]:
    """Return the numbers that have a file in a group, in order."""
    names = [path.stem for path in (directory / group).glob("*.yaml") if re.fullmatch(_NUMBER, path.stem)]
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
