"""Schedules against torch's: the same rates at every step."""

import numpy as np
import pytest
import torch

from research.training.schedule import Cosine, Exponential, Linear, Plateau, Step

STEPS = 60


def rates(make):
    """What torch's scheduler sets at each step, at a peak rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Cosine(final=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1)),
        (Linear(final=0.2), lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=STEPS)),
        (Step(every=20, factor=0.3), lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=20, gamma=0.3)),
        (Step(at=(15, 40), factor=0.3), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[15, 40], gamma=0.3)),
        (Exponential(rate=0.97, every=1), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.97)),
    ],
    ids=["cosine", "linear", "step", "milestones", "exponential"],
)
def test_the_shape_equals_torchs(schedule, make):
    ours = np.array([schedule(step, STEPS) for step in range(STEPS + 1)])
    np.testing.assert_allclose(ours, rates(make), rtol=2e-6)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_plateau_lowers_the_rate_where_torch_does(mode, cooldown):
    values = np.abs(np.random.RandomState(0).randn(80)) + np.linspace(2, 1, 80)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=3, threshold=0.01, cooldown=cooldown, min_lr=0.01)
    ours, record, rate = Plateau(mode=mode, factor=0.5, patience=3, threshold=0.01, cooldown=cooldown, minimum=0.01), {}, 1.0
    for value in values:
        theirs.step(value)
        record, factor = ours.observe(record, float(value))
        rate *= factor
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert rate < 0.1
