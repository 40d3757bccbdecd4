"""Settings for all tests."""

import os

# Small tensors gain nothing from a second thread, and tests may run beside each other. Set before
# torch starts its threads; tests of threading set the number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
