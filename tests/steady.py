"""Settings for hypothesis under which a test says the same at every run, on however busy a machine.

The examples follow from the test alone, none are kept from earlier runs, and no time is looked at.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

STEADY = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
