"""What must be set before torch is loaded, here and in the programs that tests start."""

import os
import tempfile

# Threads of a test that wait for each other sleep: those that spin take the cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Code that torch.compile has made for another processor's instructions does not compile.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = os.path.join(tempfile.gettempdir(), f"torchinductor_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
