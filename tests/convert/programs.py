"""What the tests of this folder run in processes of their own; see tests.ranks."""

import re
import threading
from pathlib import Path


def memory_of_reshard(small: Path, source: Path, out: Path, part_bytes: int) -> int:
    """Bytes by which the process grows at most while it reshards, mapped files not counted.

    Args:
        small: another source, resharded first: what Python and torch load once does not count.
        source: what is resharded.
        out: its new folder.
        part_bytes: of a file at most.
    """
    import magnetar.convert.reshard
    from magnetar.engine.config.schema import Layout

    magnetar.convert.reshard.PART_BYTES = part_bytes
    magnetar.convert.reshard.reshard(small, out.with_name("small_out"), Layout(2, 2, 1), None)
    done = threading.Event()
    before = own_memory()
    largest = before

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    magnetar.convert.reshard.reshard(source, out, Layout(2, 2, 1), None)
    done.set()
    watching.join()
    return largest - before


def own_memory() -> int:
    """Bytes in memory that no file holds."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
