"""What the command lines have in common: the parser, the run's JSON, the options that repeat."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from magnetar.data.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
_UNKNOWN = "unrecognized arguments: "
MOST_SHOWN = 400  # characters of a message, which may repeat a word of the command line


class CommandParser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its description and names the nearest option."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **keywords)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options. A word that is nobody's ends the program with status 2."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(_UNKNOWN + " ".join(unknown))
        return options

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        if len(message) > MOST_SHOWN:
            message = f"{message[:MOST_SHOWN]}... ({len(message):,} characters)"
        if message.startswith(_UNKNOWN):
            word = message.removeprefix(_UNKNOWN).split()[0].partition("=")[0]
            near = nearest(word, self._option_string_actions)
            message += f": did you mean {near}?" if near else ""
        super().error(message)


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a misspelt word is closest to, or "" if none is close."""
    matches = difflib.get_close_matches(word.replace("-", "_"), names, 1) or (
        difflib.get_close_matches(word, names, 1)
    )
    return matches[0] if matches else ""


Rule = tuple[Callable[[Any], bool], str]  # what holds of a value, and what it must be in words
AT_LEAST_1: Rule = (lambda value: value >= 1, "at least 1")
COUNT: Rule = (lambda value: 1 <= value < 2**31, "at least 1 and less than 2^31")  # of rows
LENGTH_PENALTY: Rule = (
    lambda value: 0 <= value <= 10,  # what n tokens are raised to must stay a number
    "0 to 10: 0 compares plain probabilities, 1 those of a token",
)
TOP_P: Rule = (lambda value: 0 < value <= 1, "more than 0 and at most 1: 1 allows every token")
SEED: Rule = (lambda value: 0 <= value < 2**63, "0 or more and less than 2^63")


class _Ruled(argparse.Action):
    """Stores a value that keeps a rule; any other is a UserError that names the option."""

    def __init__(self, rule: Rule, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.rule = rule

    def __call__(self, _parser: object, options: object, value: Any, *_: object) -> None:
        holds, must = self.rule
        if not holds(value):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{self.option_strings[0]} {shown} must be {must}")
        setattr(options, self.dest, value)


def add_option(
    parser: argparse._ActionsContainer,
    words: str,
    about: str,
    kind: Callable[[str], Any] | None = None,
    default: Any = None,
    **more: Any,
) -> None:
    """Add an argument to a parser, or to a group of it.

    Args:
        parser: the parser or group.
        words: `--name PLACEHOLDER`; `--name` alone for a flag; `name` for an argument by its place.
        about: help text.
        kind: function that makes the value of a text; None: the text itself.
        default: value where the option is missing.
        more: further keywords of `add_argument`; and `rule`, what the value must be.
    """
    *names, last = words.split()
    if names and not last.startswith("-"):
        more["metavar"] = last
    else:
        names.append(last)
    if "metavar" in more or kind or not last.startswith("-"):
        more |= {"type": kind, "default": default}
    else:
        more["action"] = "store_true"
    if "rule" in more:
        more["action"] = _Ruled
    parser.add_argument(*names, help=about, **more)


def shipped_configs() -> list[str]:
    """The names of the configs that are installed with Magnetar, without `.json`."""
    return sorted(path.stem for path in CONFIGS.glob("*.json") if path.name != "schema.json")


def find_config(text: str) -> Path:
    """The JSON file that a path, or the name of a shipped config, stands for.

    Raises:
        UserError: a plain word that is neither a file nor the name of a shipped config.
    """
    path, names = Path(text), shipped_configs()
    if path.is_file() or path.name != text:
        return path
    if path.name.removesuffix(".json") in names:
        return CONFIGS / f"{path.name.removesuffix('.json')}.json"
    if path.suffix or path.exists():
        return path
    near = nearest(text, names)
    way_out = f"did you mean {near}?" if near else f"use a path, or one of {', '.join(names)}"
    raise UserError(f"{text} is neither a file nor the name of a shipped config: {way_out}")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The run's JSON, in two spellings, and `--set`. `take_config` reads them."""
    what = "the run's JSON: a path, or the name of a shipped config, such as quickstart"
    add_option(parser, "json", what, nargs="?", metavar="JSON")
    add_option(parser, "--deepspeed_config JSON", "the same, as DeepSpeed has it")
    add_set_option(parser)


def add_set_option(parser: argparse.ArgumentParser, dest: str = "set") -> None:
    """`--set KEY=VALUE`, which may be repeated."""
    what = "replace the value of any key, such as magnetar.model.num_layers=4; may be repeated"
    add_option(parser, "--set KEY=VALUE", what, default=[], action="append", dest=dest)


def take_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """The one JSON that was given; anything else ends the program with status 2."""
    given = [text for text in (options.json, options.deepspeed_config) if text is not None]
    if not given:
        parser.error("the run's JSON is missing: give its path, or a name such as quickstart")
    if len(given) > 1:
        parser.error(f"two JSONs, {' and '.join(given)}: give one of them")
    return find_config(given[0])


def add_run_options(parser: argparse.ArgumentParser, run: str, data: str) -> None:
    """A trained run, which of its weights, and a folder that replaces the run's own data."""
    add_option(parser, "run", run, Path)
    add_option(parser, "--checkpoint NAME", "such as step_00000400 (default: the newest)")
    add_option(parser, "--ema", "the average of the weights (training.ema_decay)")
    add_option(parser, "--data DIR", data, Path)


def option_of(name: str) -> str:
    """The option whose value the attribute `name` holds."""
    return f"--{name.replace('_', '-')}"


def given_values(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values that were given, by name. What is None is left to its default elsewhere."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def whole_number(text: str, least: int, most: int | None = None) -> int:
    """A whole number of at least `least`, and no more than `most`.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    is_one = re.fullmatch("[0-9]{1,18}", text) is not None and int(text) >= least
    if not is_one or (most is not None and int(text) > most):
        range_ = f"from {least} on" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text} is no whole number {range_}")
    return int(text)


def terminal_bar(text: str, shown: bool = True) -> Progress:
    """A bar on a terminal's standard error; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not (shown and console.is_terminal)
    return Progress(*columns, console=console, transient=True, disable=disable)
