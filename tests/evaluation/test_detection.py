"""The area under the curve of a detector, against counting pairs."""

import math

import numpy as np
import pytest
import torch

from cachemedic.evaluation.detection import detection_auroc


def brute_force(scores: list[float], damaged: list[bool]) -> float:
    pairs = [
        (s, t)
        for s, hit in zip(scores, damaged, strict=True)
        if hit
        for t, other in zip(scores, damaged, strict=True)
        if not other
    ]
    return float(np.mean([(s > t) + 0.5 * (s == t) for s, t in pairs]))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    damaged = torch.rand(4, 10, generator=generator) < 0.3
    scores = torch.randint(0, 6, (4, 10), generator=generator) + damaged.float()  # with ties
    expected = brute_force(scores.flatten().tolist(), damaged.flatten().tolist())
    assert detection_auroc(scores, damaged) == pytest.approx(expected)
    assert detection_auroc(-scores, damaged) == pytest.approx(1 - expected)


def test_auroc_at_its_ends() -> None:
    damaged = torch.tensor([False, True, True])
    assert detection_auroc(torch.tensor([0.0, 1.0, torch.inf]), damaged) == 1
    assert detection_auroc(torch.zeros(3), damaged) == 0.5
    assert math.isnan(detection_auroc(torch.zeros(3), torch.zeros(3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="got \\(2,\\) and \\(3,\\)"):
        detection_auroc(torch.zeros(2), damaged)
    with pytest.raises(ValueError, match="NaN"):
        detection_auroc(torch.full((3,), torch.nan), damaged)
