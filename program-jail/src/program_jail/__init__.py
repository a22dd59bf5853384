"""Run Python programs that nobody trusts, such as those that a language model wrote.

>>> from program_jail import Limits, run_isolated
>>> run_isolated("print(sum(range(10)))", Limits(seconds=2))
Outcome(passed=True, detail='passed')
"""

from program_jail.run import IsolationError, Limits, Outcome, check_isolation, run_isolated

__all__ = ["IsolationError", "Limits", "Outcome", "check_isolation", "run_isolated"]
