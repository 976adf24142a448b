"""A bar on stderr for what takes long, so that stdout holds the result alone."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import track


def watched(doing: str, names: Sequence[str]) -> Iterable[str]:
    """The names, with a bar while they go by; none where stderr is no terminal."""
    console = Console(stderr=True)
    return track(
        names, description=doing, console=console, transient=True, disable=not console.is_terminal
    )
