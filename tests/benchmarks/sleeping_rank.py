"""A rank that hangs: it writes its process's number into the file of its last argument."""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    Path(sys.argv[-1]).write_text(str(os.getpid()))
    time.sleep(600)
