"""Draws a run: loss, gradient norm, routing entropy, load of experts, BLEU; or several, compared.

magnetar plot runs/quickstart [--out curves.png]
magnetar plot runs/subln_200 runs/post_200 --out depth.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from magnetar.data.errors import UserError
from magnetar.engine.report.plot import plot
from magnetar.launchers.terminal.command_line import CommandParser, add_option
from magnetar.launchers.terminal.user_errors import user_errors


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and say where."""
    parser = CommandParser(prog="magnetar plot", description=__doc__)
    add_option(
        parser, "runs", "a run's folder, such as runs/quickstart", Path, nargs="+", metavar="run"
    )
    what = "the picture (default: curves.png in the folder of a single run)"
    add_option(parser, "--out OUT", what, Path)
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and options.out is None:
        raise UserError("several runs need --out: name the picture, such as --out compared.png")
    out = options.out or options.runs[0] / "curves.png"
    plot(options.runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
