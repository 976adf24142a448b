"""Writes the small parallel corpus of `make translate-demo` as tables for magnetar prepare-pairs.

magnetar verses --languages en es --out prepared/verses
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from magnetar.data.pairs.verses import TRANSLATIONS, write_verses
from magnetar.launchers.terminal.command_line import CommandParser
from magnetar.launchers.terminal.user_errors import user_errors


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables, and say how long they are."""
    parser = CommandParser(prog="magnetar verses", description=__doc__)
    add = parser.add_argument
    known = ", ".join(TRANSLATIONS)
    add("--languages", nargs="+", default=["en", "es"], metavar="L", help=f"some of {known}")
    add("--max-chars", type=int, default=100, metavar="N", help="longest verse (%(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for train.tsv and valid.tsv")
    options = parser.parse_args(arguments)
    train, valid = write_verses(options.out, options.languages, options.max_chars)
    print(
        f"{options.out}: {train:,} verses to learn from, {valid:,} to be tested on, "
        f"in {', '.join(options.languages)}"
    )


if __name__ == "__main__":
    sys.exit(main())
