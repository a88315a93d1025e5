"""What the GPU tests compare an engine's rounding with: its counts and bounds."""

import pytest
import torch

from ..gpu import noise


def test_leads_of_changed_tokens():
    exact = torch.tensor([[[3.0, 1.0, 0.0], [0.5, 0.0, 2.75]], [[0.0, 4.0, -1.0], [1.0, 1.5, 0.0]]])
    leads = noise.changed_leads(exact, torch.tensor([[1, 2], [0, 0]]))
    assert leads.tolist() == [2.0, 4.0, 0.5]
    assert noise.counts(leads) == {0.0: 3, 1.0: 2, 2.0: 2, 4.0: 1}
    assert noise.delta(leads) == 6.0
    assert noise.delta(leads[:0]) == noise.FLOOR


@pytest.mark.parametrize("mean", [0.5, 5.0, 200.0, 6000.0])
def test_bounds_of_counts(mean):
    """An engine that rounds as much as is allowed passes; twice the noise fails of enough tokens."""
    torch.manual_seed(0)
    means = torch.full((20_000,), mean)
    bounds = torch.tensor([noise.most_changes(int(n)) for n in torch.poisson(means)])
    assert (torch.poisson(noise.FACTOR * means) > bounds).float().mean() < 5e-4
    if mean > 1000:
        assert (torch.poisson(2 * means) > bounds).float().mean() > 0.99
