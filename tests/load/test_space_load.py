"""A short version of `space_load.py`, and its judgement."""

import pytest
from space_load import faults, overtaken, run_load, waits

FINE = {"lost": 0, "asked": 9, "served": 9, "of_another_visitor": 0, "served_per_client": [3, 3]}
FINE |= {"overtaken_share": 0.0, "memory_mb": [900, 905], "files_that_stayed": 0, "start_s": 11.0}


@pytest.mark.parametrize(
    "change",
    [
        {"lost": 1},
        {"served": 8},
        {"asked": 0, "served": 0},
        {"of_another_visitor": 1},
        {"served_per_client": [1, 9]},
        {"overtaken_share": 0.3},
        {"memory_mb": [900, 1100]},
        {"files_that_stayed": 1},
        {"start_s": 16.0},
    ],
)
def test_what_counts_as_a_fault(change):
    assert faults(FINE) == [] and len(faults({**FINE, **change})) == 1


def test_overtaking_is_counted():
    assert overtaken([(0, 1), (1, 2), (2, 3)], 0.5) == 0
    assert overtaken([(0, 9), (1, 2), (2, 3)], 0.5) == pytest.approx(2 / 3)


def test_waits_are_measured_where_something_was_served():
    assert waits([(0, 1), (1, 3), (2, 8)]) == {"wait_median_s": 2.0, "wait_longest_over_median": 3.0}
    assert waits([]) == {"wait_median_s": None, "wait_longest_over_median": None} and overtaken([], 0.5) == 0


@pytest.mark.slow
def test_a_few_visitors_at_once():
    pytest.importorskip("gradio")
    assert faults(run_load(clients=8, seconds=20)) == []
