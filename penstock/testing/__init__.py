"""How correctness is judged: error budgets derived from data, outputs poisoned with NaN, every case of every implementation."""

from penstock.testing.budget import check_case, judge

__all__ = ["check_case", "judge"]
