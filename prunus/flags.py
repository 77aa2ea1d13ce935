"""Floor 6: the flags of all verbs, made from the settings of `config.py`: names, help and checks stand there, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from prunus.config import settings
from prunus.errors import UserError
from prunus.recording.artefact import refuse_unwritable
from prunus.setting import Setting
from prunus.targets import LIMITS

MANY = ("--keep", *(f"--{kind.replace('_', '-')}" for kind in LIMITS))  # flags that take several values after one
WORDS = ("--methods", "--lengths", "--tasks", "--front", "--front-tasks")  # with words: all up to the next flag
COMMON = ("device", "dtype", "seed")
UNSEEDED = ("device", "dtype")  # of verbs that draw nothing at random
METAVARS = {"test_text": "FILE", "train.data": "FILE", "calibration.source": "SOURCE", "method": "NAME"}
WIDEST = 44  # of a flag with its choices, so that the help keeps to 80 columns; longer lists stand in the sentence


class Verb(click.Command):
    """A sub-command whose help groups its flags, and where `--keep 0.9 0.8` gives two values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))

    def invoke(self, ctx: click.Context) -> Any:
        file = ctx.params.get("json")
        if file and file != "-":  # the result of hours must have a place
            refuse_unwritable(file)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Command"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class Flag(click.Option):
    """The flag of one setting. Its text is checked by the setting itself."""

    def __init__(self, setting: Setting, name: str | None = None, of_run: bool = False) -> None:
        self.key = setting.key
        section = setting.key.rpartition(".")[0]
        self.group = section.capitalize() if section else "Model and outcome"
        flag = f"--{name or setting.flag}"
        default = "" if of_run or setting.default in (None, ()) else f"  [default: {setting.shown}]"
        is_switch = setting.plain is bool
        is_long = len(f"{flag} {_metavar(setting)}") > WIDEST
        choices = f": {', '.join(setting.choices)}" if is_long else ""
        super().__init__(
            [f"{flag}/--no-{flag[2:]}" if is_switch else flag, setting.key.replace(".", "__")],
            default=None,
            multiple=flag in (*MANY, *WORDS),
            metavar=None if is_switch else "NAME" if is_long else _metavar(setting),
            help=setting.help + choices + default,
        )


def _metavar(setting: Setting) -> str:
    if setting.many and setting.item is not float:
        return "NAME ..."
    if setting.choices:
        return "|".join(setting.choices)
    return METAVARS.get(setting.key) or {int: "N", float: "X", str: "TEXT"}.get(setting.plain, "X ...")


def spread(args: Sequence[str]) -> list[str]:
    """`--keep 0.9 0.8 X` as `--keep 0.9 --keep 0.8 X`: what follows such a flag are its values."""
    out: list[str] = []
    flag = ""  # the flag whose values may follow
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in (*MANY, *WORDS):
            flag = name
            out += [flag, value] if equals else [flag]
        elif flag and (_is_numbers(arg) if flag in MANY else not arg.startswith("-")):
            out += [arg] if out[-1] == flag else [flag, arg]
        else:
            flag = ""
            out.append(arg)
    return out


def _is_numbers(text: str) -> bool:
    try:
        return bool([float(part) for part in text.split(",") if part])
    except ValueError:
        return False


def flags(
    *keys: str,
    names: Mapping[str, str] | None = None,
    common: Sequence[str] = COMMON,
    of_run: bool = False,
    files: bool = True,
) -> Callable[[click.Command], click.Command]:
    """Adds the flags of some settings, and those that every command has, to a command.

    common: settings beside those. of_run: what is not given is as it is in a run, whatever the default. files: also
    --config and --set, by which any setting may be given.
    """

    def add(command: click.Command) -> click.Command:
        for key in dict.fromkeys((*keys, *common)):
            command.params.append(Flag(settings()[key], (names or {}).get(key), of_run))
        if files:
            command.params += [
                click.Option(["--config"], metavar="FILE", help="YAML file of settings; flags win over it"),
                click.Option(["--set"], metavar="KEY=VALUE", multiple=True, help="any setting by its name in the file"),
            ]
        command.params += [
            click.Option(["--json"], metavar="FILE", help="also write the result as JSON; - for stdout"),
            click.Option(["--quiet"], is_flag=True, help="no progress, no tables"),
        ]
        return command

    return add


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's parameters, by dotted key, those of --set included."""
    asked = {
        key: (" ".join(value) if isinstance(value, tuple) else value)
        for key in settings()
        if (value := parameters.get(key.replace(".", "__"))) not in (None, ())
    }
    for item in parameters.get("set") or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, as in --set search.mlp_step=64; given {item!r}")
        asked[key.strip()] = value.strip()
    return asked


__all__ = ["COMMON", "MANY", "UNSEEDED", "WORDS", "Flag", "Verb", "flags", "given", "spread"]
