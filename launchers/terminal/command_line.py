"""What the command lines have in common: the parser, the run's JSON, the options that repeat."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from magnetar.data.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
_UNKNOWN = "unrecognized arguments: "


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
    parser.add_argument(
        "json",
        nargs="?",
        metavar="JSON",
        help="the run's JSON: a path, or the name of a shipped config, such as quickstart",
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="the same, as DeepSpeed has it")
    add_set_option(parser)


def add_set_option(parser: argparse.ArgumentParser, dest: str = "set") -> None:
    """`--set KEY=VALUE`, which may be repeated."""
    parser.add_argument(
        "--set",
        dest=dest,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace the value of any key, such as magnetar.model.num_layers=4; may be repeated",
    )


def take_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """The one JSON that was given; anything else ends the program with status 2."""
    given = [text for text in (options.json, options.deepspeed_config) if text is not None]
    if not given:
        parser.error("the run's JSON is missing: give its path, or a name such as quickstart")
    if len(given) > 1:
        parser.error(f"two JSONs, {' and '.join(given)}: give one of them")
    return find_config(given[0])


def add_run_options(parser: argparse.ArgumentParser, run: str, data: str) -> None:
    """A trained run, one of its checkpoints, and a folder that replaces the run's own data."""
    parser.add_argument("run", type=Path, help=run)
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="such as step_00000400 (default: the newest)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)


def option_of(name: str) -> str:
    """The option whose value the attribute `name` holds."""
    return f"--{name.replace('_', '-')}"


def require_at_least_1(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse values below 1; None is allowed.

    Raises:
        UserError: naming the option and its value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{option_of(name)} {value} must be at least 1")


def given_values(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values that were given, by name. What is None is left to its default elsewhere."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def whole_number(text: str, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on; see `whole_number`."""
    return whole_number(text, 1)
