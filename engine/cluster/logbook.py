"""The logbook of a run, logbook.md in its folder: what happened to it, and when, for people.

- 2026-11-22 19:20:05 **resume** after step 120, ...
"""

import os
from datetime import datetime
from pathlib import Path

NAME = "logbook.md"


def write(run_dir: Path, event: str, text: str) -> None:
    """Append a line; the folder and the logbook are made where there are none.

    Lines of `text` after its first become a list below it.

    Raises:
        OSError: if it cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / NAME
    when = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    entry = f"- {when} **{event}** " + text.replace("\n", "\n  - ") + "\n"
    if not path.exists():
        entry = f"# Logbook of {run_dir.name}\n\n{entry}"
    # Several processes write, so each entry is one write at the end of the file.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, entry.encode())
    finally:
        os.close(descriptor)
