"""Options that take a part away from families D and E: the code alone (`rounds` = 0), and no correction."""

import pytest
import torch
from small_models import shaken
from tiny_repair import base_of, calibrated, case

from cachemedic.defenses.defense import CachedTokens
from cachemedic.token.layerwise.observation import sane
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.token_vectors import KeyRotation, split

BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
FAMILIES = pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])


def some_tokens(c) -> torch.Tensor:
    return (torch.rand(c.ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4) & c.valid


def scrub(architecture, operator, k, v):
    """Repaired k, v, what was found, the repair as an `AugmentedRead` takes it, and the codes of the clean cache."""
    c, scrubber = case(architecture), Scrubber(base_of(architecture).model, operator)
    codes = scrubber.write(CachedTokens.behind_padding(c.k, c.v, c.ids, c.valid))
    told = k, v, c.ids, positions_of(c.valid), codes
    return *scrubber.scrub(*told), scrubber.repair(*told), codes


def said_by_codes(architecture, operator, codes):
    """Keys and values of all tokens as the codes say, and the ids of the lowest layers."""
    c, transform = case(architecture), operator.transform
    rotation = KeyRotation(base_of(architecture).model).at(positions_of(c.valid))
    known = Scrubber(base_of(architecture).model, operator).known(c.ids, positions_of(c.valid))
    sketch = operator.code.understand(codes, positions_of(c.valid) == 0, known)
    z = [known[:, i] for i in range(known.shape[1])]
    z += [operator.code.reconstruct(i, sketch)[1] for i in range(len(z), transform.num_layers)]
    return split(rotation.redo(transform.restore(torch.stack(z, 1))), c.k.shape[2])


@BOTH
@pytest.mark.parametrize("known_layers", [0, 1])
@pytest.mark.parametrize("size", [0.5, 30.0])
def test_without_rounds_a_hit_token_is_what_its_code_says(architecture, known_layers, size):
    c = case(architecture)
    where = some_tokens(c)
    damaged = c.damaged(where, size)
    operator = calibrated(architecture, "layerwise-E", rounds=0, share=0.2, coordinates=8, known_layers=known_layers)
    shaken(operator, 0.3).strength.data.fill_(1.0)  # the network has no say
    k, v, found, repair, codes = scrub(architecture, operator, *damaged)
    hit = found.changed
    assert hit.movedim(1, -1)[where].float().mean() > 0.9
    for x, clean, said in zip((k, v), (c.k, c.v), said_by_codes(architecture, operator, codes), strict=True):
        x, clean, said = (t.movedim(3, 2) for t in (x, clean, said))  # [B, L, T, G, d]
        torch.testing.assert_close(x[hit], said[hit], rtol=1e-4, atol=1e-4)
        sound = ~where[:, None].expand_as(hit)
        assert torch.equal(x[sound], clean[sound]), "sound tokens keep every bit"
    for x, stored, correction in zip((k, v), damaged, split(repair.correction, k.shape[2]), strict=True):
        read = stored.abs() < sane(operator.transform).min()
        torch.testing.assert_close((stored + correction)[read], x[read], rtol=1e-4, atol=1e-4)
    assert not repair.bias.any()


@BOTH
def test_without_rounds_family_d_runs_and_believes_no_damaged_number(architecture):
    c = case(architecture)
    where = some_tokens(c)
    damaged = c.damaged(where, 5.0)
    operator = calibrated(architecture, "layerwise-D", rounds=0)
    k, v, found, *_ = scrub(architecture, operator, *damaged)
    assert k.isfinite().all()
    assert v.isfinite().all()
    for x, clean in ((k, c.k), (v, c.v)):
        torch.testing.assert_close(x[:, 0], clean[:, 0], rtol=1e-4, atol=1e-4)

    def wrong(pair) -> float:
        return sum((x - y).movedim(3, 1)[where].square().mean() for x, y in zip(pair, (c.k, c.v), strict=True))

    assert wrong((k, v)) < 0.2 * wrong(damaged)
    assert found.changed[:, 1:].any()


@BOTH
@FAMILIES
def test_without_correction_nothing_that_is_stored_changes(architecture, family):
    c = case(architecture)
    damaged = c.damaged(some_tokens(c))
    operator = calibrated(architecture, family, correction=False, bias=True, known_layers=2)
    shaken(operator, 0.3).strength.data.fill_(1.0)
    k, v, found, repair, _ = scrub(architecture, operator, *damaged)
    assert torch.equal(k, damaged[0])
    assert torch.equal(v, damaged[1])
    assert not found.changed.any()
    assert not repair.correction.any()
    assert repair.bias[:, 2].any(), "attention is told all the same"
    assert found.suspicion[:, 0].any()
