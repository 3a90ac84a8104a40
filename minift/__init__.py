"""Fine-tuning for GPT-2. Imported before torch, which reads the variable below when it is loaded."""

import os

# OpenMP's threads wait for one another by spinning, by default so long (some 10 ms) that on a busy machine they take
# the time of the thread they wait for. The user's own settings win; minift/openmp.py does the rest.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
