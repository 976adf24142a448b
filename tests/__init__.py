"""Threads of a test that wait for each other sleep: those that spin take the cores from others."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
