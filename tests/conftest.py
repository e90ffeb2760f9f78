"""What holds for every test, before any of them imports torch."""

import os

# Tests run side by side: threads of OpenMP that wait for each other by spinning would take each other's core. Torch
# reads it when it is imported, processes started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
