"""The search of Hypothesis for an order of events that breaks a promise.

By default the search is short, and the same at each run. With the environment variable EXAMPLES it tries this many
orders, different ones at each run: ``EXAMPLES=2000 python -m pytest tests/test_*_machine.py``.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def search(machine: type[RuleBasedStateMachine], examples: int, steps: int = 40) -> None:
    """Run a machine. examples: the orders that a short search tries. steps: the most events of one."""
    wanted = int(os.environ.get("EXAMPLES", "0"))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=wanted or examples,
            stateful_step_count=steps,
            derandomize=not wanted,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
