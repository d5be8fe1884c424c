"""The rule by which every rung of the ladder finds its length."""

import dataclasses
import math

import pytest

from experiments.ladder.search import Search, next_length

RULE = Search(least=60, most=12_500, quantum=10)


def searched(curve, target, start, rule=RULE):
    tried = {}
    while (length := next_length(rule, tried, target, start)) is not None:
        assert length not in tried
        tried[length] = curve(length)
    return tried


@pytest.mark.parametrize("start", [200, 1000, 9000])
@pytest.mark.parametrize("true", [230, 1700, 8000])
def test_the_search_ends_at_the_shortest_length_that_is_enough(start, true):
    """For a power law, whatever it begins with, as far as its runs reach."""
    target = true**-0.2
    tried = searched(lambda n: n**-0.2, target, start, dataclasses.replace(RULE, runs=20))
    enough = min(n for n, loss in tried.items() if loss <= target)
    assert true <= enough <= 1.25 * 1.02 * true
    assert len(searched(lambda n: n**-0.2, target, start)) <= RULE.runs


def test_the_search_ends_where_the_next_length_would_tell_little():
    assert next_length(RULE, {1000: 1.0, 820: 3.0}, 2.0, 1000) is None
    assert 700 < next_length(RULE, {1000: 1.0, 700: 3.0}, 2.0, 1000) < 1000


def test_the_search_copes_with_what_diverges_and_what_never_arrives():
    assert searched(lambda n: math.nan, 1.0, 9000) == pytest.approx(
        {9000: math.nan, 12_500: math.nan}, nan_ok=True
    )
    tried = searched(lambda n: math.nan if n < 1000 else 0.5, 1.0, 1500)
    assert min(n for n, loss in tried.items() if loss <= 1.0) < 1400
    assert searched(lambda n: 0.5, 1.0, 60) == {60: 0.5}  # nothing is shorter
