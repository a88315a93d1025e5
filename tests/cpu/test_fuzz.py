"""500 random cases of damage to config.json, index and safetensors headers; `make soak` runs 10,000."""

import pytest

from vllm_flatquant.calibration.errors import UserError

from ..soak.fuzz import TARGETS, fuzz, make_samples, one_sentence

CASES = 500


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Folders to damage, by kind."""
    return make_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", TARGETS)
def test_random_damage_is_refused_in_one_sentence(samples, target):
    cases = round(TARGETS[target] * CASES)
    seen = fuzz(target, samples, cases)
    assert seen["cases"] >= cases * 0.9  # hypothesis stops early where it has run out of new cases
    assert sum(n for kind, n in seen.items() if kind.endswith("refused")) > cases / 4


def test_an_error_of_another_kind_is_not_accepted():
    with pytest.raises(KeyError):
        one_sentence(lambda: {}["absent"])
    for message in ("", "two\nlines", "x" * 2000):
        with pytest.raises(AssertionError):
            one_sentence(lambda message=message: fail(message))
    assert one_sentence(lambda: fail("one sentence")) == "one sentence"


def fail(message):
    raise UserError(message)
