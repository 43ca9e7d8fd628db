"""The mercy gate: what it takes back, run by run and bit for bit, what it says, and when it gives up."""

import copy
import logging

import pytest
import torch

from cachemedic.training.run_adam import RunAdam
from cachemedic.training.valence.gate import GateKeeper, MercyGate, MercyGateError, SmallProbeWarning

RUNS = 3


def stack(optimizer: type[torch.optim.Optimizer] = RunAdam, updates: int = 0):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(RUNS, *shape, generator=generator)) for shape in ((4, 2), (3,))]
    adam = optimizer(parameters, lr=1e-2)
    for update in range(updates):
        gradients(parameters, update)
        adam.step()
    return parameters, adam


def gradients(parameters, update: int) -> None:
    generator = torch.Generator().manual_seed(100 + update)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def state_of(parameters, adam, run: int) -> list[torch.Tensor]:
    return [x[run].clone() for p in parameters for x in (p.detach(), *adam.state[p].values())]


def projecting(*valences: float):
    return lambda gate: (torch.tensor(valences), torch.full((RUNS,), 0.5))


@pytest.mark.parametrize("updates", [0, 3])
def test_a_blocked_run_is_what_it_was_and_the_others_move_on(updates):
    parameters, adam = stack(updates=updates)
    free_parameters, free = stack(updates=updates)
    before = state_of(parameters, adam, 1)
    keeper = GateKeeper(MercyGate(), RUNS, adam)
    gradients(parameters, updates)
    gradients(free_parameters, updates)
    verdict = keeper.step(4, projecting(0.46, 0.44, 0.45))  # the bound is 0.45
    free.step()
    assert verdict.blocked.tolist() == [False, True, False]
    assert all(torch.equal(x, y) for x, y in zip(state_of(parameters, adam, 1), before, strict=True))
    for run in (0, 2):
        same = zip(state_of(parameters, adam, run), state_of(free_parameters, free, run), strict=True)
        assert all(torch.equal(x, y) for x, y in same)
    # and from here the blocked run goes on as if the update had never been tried
    again, fresh = stack(updates=updates)
    for p, q in ((parameters, adam), (again, fresh)):
        gradients(p, 50)
        q.step()
    assert all(torch.equal(x, y) for x, y in zip(state_of(parameters, adam, 1), state_of(again, fresh, 1), strict=True))


def test_steps_are_those_of_torch():
    mine, adam = stack(updates=40)
    other, reference = stack(torch.optim.Adam, updates=40)
    assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
    assert all(
        torch.equal(adam.state[x]["exp_avg_sq"], reference.state[y]["exp_avg_sq"])
        for x, y in zip(mine, other, strict=True)
    )


def test_any_optimiser_can_be_set_back_as_a_whole_but_not_in_part():
    parameters, adam = stack(torch.optim.Adam, updates=2)
    before = [p.detach().clone() for p in parameters], {p: dict(adam.state[p]) for p in parameters}
    steps = [adam.state[p]["step"].clone() for p in parameters]
    keeper = GateKeeper(MercyGate(), RUNS, adam)
    gradients(parameters, 9)
    keeper.step(3, projecting(0.1, 0.1, 0.1))
    assert all(torch.equal(p, q) for p, q in zip(parameters, before[0], strict=True))
    assert all(torch.equal(adam.state[p]["step"], s) for p, s in zip(parameters, steps, strict=True))
    gradients(parameters, 9)
    with pytest.raises(ValueError, match="state 'step' of Adam is not one a run: use RunAdam"):
        keeper.step(4, projecting(0.1, 0.9, 0.9))


def test_it_says_what_it_blocked_and_counts(caplog):
    parameters, adam = stack()
    keeper = GateKeeper(MercyGate(), RUNS, adam)
    with caplog.at_level(logging.WARNING):
        for update, valences in enumerate(((0.9, 0.4, 0.9), (0.9, 0.4, 0.2), (0.9, 0.9, float("nan"))), 1):
            gradients(parameters, 0)
            verdict = keeper.step(update, projecting(*valences))
    assert keeper.blocked.tolist() == [0, 2, 2]
    assert keeper.in_a_row.tolist() == [0, 0, 2]
    assert len(caplog.messages) == 4
    said = "Mercy gate blocked – low projected valence trajectory: 0.4000 is projected, 0.4500 needed"
    assert caplog.messages[0] == f"run 1: {said} (0.9 of the teacher's)"
    assert verdict.message[0] is None
    assert verdict.message[2].startswith("Mercy gate blocked – low projected valence trajectory: nan is projected")
    other = GateKeeper(MercyGate(), RUNS, adam)
    other.load_state_dict(keeper.state_dict())
    assert other.in_a_row.tolist() == [0, 0, 2]


def test_blocks_in_a_row_end_in_an_error():
    parameters, adam = stack()
    keeper = GateKeeper(MercyGate(patience=3), RUNS, adam)
    for update, valences in enumerate(((0.1, 0.9, 0.9), (0.1, 0.1, 0.9)), 1):
        gradients(parameters, 0)
        keeper.step(update, projecting(*valences))
    gradients(parameters, 0)
    message = r"3 checks in a row were blocked in runs \[0\].*0.1000 is projected, 0.4500 needed"
    with pytest.raises(MercyGateError, match=message):
        keeper.step(3, projecting(0.1, 0.9, 0.1))


def test_a_run_of_which_no_state_passed_is_an_error_at_the_end():
    parameters, adam = stack()
    keeper = GateKeeper(MercyGate(), RUNS, adam)
    keeper.start(projecting(0.9, 0.1, 0.1))
    assert keeper.has_passed.tolist() == [True, False, False]
    gradients(parameters, 0)
    keeper.step(1, projecting(0.1, 0.9, 0.1))
    other = GateKeeper(MercyGate(), RUNS, adam)
    other.load_state_dict(keeper.state_dict())
    for resumed in (keeper, other):
        with pytest.raises(MercyGateError, match=r"no state of runs \[2\] passed the mercy gate"):
            resumed.end()
    gradients(parameters, 0)
    keeper.step(2, projecting(0.1, 0.1, 0.9))
    keeper.end()


def test_what_does_not_judge_is_measured_when_it_would_be_due():
    parameters, adam = stack()
    keeper, asked = GateKeeper(MercyGate("proxy", both=True), RUNS, adam), []

    def measure(gate):
        asked.append(gate.projection)
        return projecting(*((0.9,) * RUNS if gate.projection == "proxy" else (0.1,) * RUNS))(gate)

    for update in range(1, 6):
        gradients(parameters, update)
        verdict = keeper.step(update, measure)
        assert not verdict.blocked.any()
        assert (verdict.other is None) == (update < 5)
    assert asked == ["proxy"] * 5 + ["rollout"]
    assert verdict.other[0].tolist() == pytest.approx([0.1] * RUNS)


@pytest.mark.parametrize(("gate", "checked"), [(MercyGate(), [5, 10]), (MercyGate("proxy"), list(range(1, 11)))])
def test_when_it_is_asked(gate, checked):
    assert [update for update in range(1, 11) if gate.due(update)] == checked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "rollouts"}, "did you mean 'rollout'"),
        ({"threshold": -0.1}, "threshold must be 0 to 1, not -0.1"),
        ({"horizon": 9}, "horizon must be 10 to 30 steps, not 9"),
        ({"horizon": 31}, "not 31"),
        ({"every": 0}, "every must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_bad_gates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MercyGate(**options)


def test_a_probe_of_less_than_sixteen_sequences_is_told():
    assert MercyGate().probe == 16
    with pytest.warns(SmallProbeWarning, match="a probe of 15 is below 16 sequences"):
        MercyGate(probe=15)


def test_a_run_goes_back_to_its_last_state_that_passed_a_check():
    """A gate that looks at every third update: what lies between is unseen, and gone with the update that fails."""
    parameters, adam = stack(updates=2)
    keeper = GateKeeper(MercyGate(every=3), RUNS, adam)
    states = {0: copies_of(parameters, adam)}
    for update in range(1, 10):
        gradients(parameters, update)
        if update % 3:
            adam.step()
            continue
        keeper.step(update, projecting(*{3: (0.9, 0.1, 0.9), 6: (0.1, 0.9, 0.9), 9: (0.1, 0.1, 0.1)}[update]))
        states[update] = copies_of(parameters, adam)
        if update == 6:  # a training that is resumed here
            other = GateKeeper(MercyGate(every=3), RUNS, adam)
            other.load_state_dict(copy.deepcopy(keeper.state_dict()))
            keeper = other
    for run, passed in ((0, 3), (1, 6), (2, 6)):
        assert all(torch.equal(x[run], y[run]) for x, y in zip(states[9], states[passed], strict=True))
    assert all(torch.equal(x[1], y[1]) for x, y in zip(states[3], states[0], strict=True))
    assert all(torch.equal(x[0], y[0]) for x, y in zip(states[6], states[3], strict=True))


def copies_of(parameters, adam):
    return [x.detach().clone() for p in parameters for x in (p, *adam.state[p].values())]
