"""Draws a run: loss, gradient norm, routing entropy, load of the experts.

python -m launchers.plot runs/quickstart [--out curves.png]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.plot import plot_run
from launchers.user_errors import user_errors


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and say where."""
    parser = argparse.ArgumentParser(prog="python -m launchers.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/quickstart")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png in that folder)")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "curves.png"
    plot_run(options.run, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
