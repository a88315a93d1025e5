"""500 random cases of damage to config.json, index and safetensors headers; `make soak` runs 10,000."""

import pytest

from ..soak.fuzz import TARGETS, Sample, fuzz
from .tiny_checkpoint import Recipe, write_checkpoint

CASES = 500


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", TARGETS)
def test_random_damage_is_refused_in_one_sentence(tmp_path, target):
    write_checkpoint(tmp_path, Recipe("Qwen2", layers=1, k_bits=4, v_bits=4))
    cases = round(TARGETS[target] * CASES)
    seen = fuzz(target, Sample(tmp_path), cases)
    assert seen["cases"] >= cases * 0.9  # hypothesis stops early where it has run out of new cases
    assert sum(n for kind, n in seen.items() if kind.endswith("refused")) > cases / 4
