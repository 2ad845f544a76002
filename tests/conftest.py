"""Settings that all tests share."""

import os

from hypothesis import HealthCheck, settings

# Tests run beside each other, one process a core; more threads each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine must not fail a test for being slow; a failing example is printed and can be replayed.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
