"""The soak's judgement: what counts as a wrong answer, and memory that grows."""

import dataclasses

import pytest

from ..soak.clients import Reference, Report, Request, _check, growth, plan, random_prompts

REFERENCE = Reference([5, 6, 7], [1, 2, 3, 4], [2.0, 0.01, 2.0, 2.0])


def judged(tokens, whole=True):
    report = Report()
    _check(report, Request("complete", REFERENCE, 1), tokens, delta=0.1, whole=whole)
    return report


def test_an_equal_answer_is_right():
    report = judged([1, 2, 3, 4])
    assert (report.checked, report.left, report.wrong, report.errors) == (4, [], [], [])


def test_an_answer_may_leave_where_the_margin_is_small_and_is_not_compared_after_that():
    report = judged([1, 9, 9, 9])
    assert (report.checked, report.left, report.wrong) == (2, [0.01], [])


def test_an_answer_may_not_leave_elsewhere():
    report = judged([1, 2, 9, 4])
    assert report.wrong == [
        "complete, prompt of 3 tokens, position 2: 9 instead of 3, which led by 2.000"
    ]


def test_a_short_answer_is_an_error_unless_it_was_given_up():
    assert judged([1, 2]).errors == ["complete: 2 tokens instead of 4"]
    assert judged([1, 2], whole=False).errors == []


def test_a_plan_is_reproducible_and_has_every_kind():
    references = [dataclasses.replace(REFERENCE, prompt=p) for p in random_prompts(9, 100, 50)]
    assert plan(references, 200, seed=3) == plan(references, 200, seed=3)
    assert len({request.kind for request in plan(references, 200)}) == 6
    lengths = [len(reference.prompt) for reference in references]
    assert (min(lengths), max(lengths)) == (1, 50)


def test_growth_is_that_after_the_warm_up():
    flat = [{"m": value} for value in (1, 5, 9, 9, 9, 9, 9, 9)]
    rising = [{"m": value} for value in range(8)]
    assert growth(flat, "m") == 0
    assert growth(rising, "m") == 4
    with pytest.raises(ValueError, match="too few"):
        growth(flat[:3], "m")
