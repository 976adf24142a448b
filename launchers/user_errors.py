"""How every launcher ends when something a person can mend has gone wrong."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program without a traceback: status 2 after a UserError, 130 after Ctrl-C.

    Wrap a launcher's `main` in it, as a decorator or in a `with` statement. The message is printed
    once a machine, by local rank 0. The other ranks wait a second first: a multi-process launcher
    kills everybody as soon as one rank has ended, and that must not be the rank that prints.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
