"""Rules of ensembles by hand arithmetic, what every rule must keep, and the running scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import settings
from torch import Tensor

from tailorpo._distributed import ALONE
from tailorpo.errors import RunFileError
from tailorpo.rewards import Ensemble, EnsembleScorer
from tailorpo.rewards.ensemble import GapScales
from tailorpo.rewards.ensemble_scorer import Comparison
from tailorpo.run import Run

RULES = ("mean", "worst_case", "uncertainty", "majority", "pareto", "soft_vote")


class Pixel:
    """A reward that is one pixel of the picture, times a factor."""

    def __init__(self, index: int, factor: float = 1.0, name: str = "pixel") -> None:
        self.index, self.factor, self.name, self.differentiable = index, factor, name, True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * images[:, 0, 0, self.index]


def pictures(scores: Sequence[Sequence[float]]) -> Tensor:
    """One picture per member-scores row, whose pixels are those scores."""
    images = torch.zeros(len(scores), 3, 1, len(scores[0]))
    images[:, 0, 0] = torch.tensor(scores)
    return images


def compared(
    scorer: EnsembleScorer, scores: Sequence[Sequence[float]], *, siblings: int = 2, time: int | None = 5
) -> Comparison:
    return scorer.compare(pictures(scores), [""] * len(scores), siblings=siblings, time=time)


def prefer(rule: str, gaps: Sequence[float], weights: Sequence[float] | None = None, **more: Any) -> float:
    ensemble = Ensemble(rule=rule, **more)  # type: ignore[arg-type]
    return float(ensemble.preference(torch.tensor(gaps), torch.tensor(weights or [1.0] * len(gaps))))


@pytest.mark.parametrize(
    ("rule", "gaps", "weights", "more", "expected"),
    [
        ("mean", [1, 2, -6], None, {}, -1.0),
        ("mean", [1, 2, -6], [6, 3, 1], {}, 0.6),  # .6 + .6 - .6
        ("worst_case", [1, 2, -6], None, {}, -2.0),  # worths: -3 against -1
        ("worst_case", [1, 2, -6], [4, 4, 1], {}, 0.3333333),  # loads 4/3, 8/3, -2
        ("worst_case", [3, -1], None, {}, 1.0),  # of two it is the mean
        ("uncertainty", [1, 3], None, {"penalty": 1.0}, 1.0),  # mean 2, sd 1
        ("uncertainty", [-1, -3], None, {"penalty": 0.5}, -1.5),
        ("uncertainty", [3, -1], None, {"penalty": 1.0}, 0.0),  # mean 1, sd 2
        ("uncertainty", [4, 0], [3, 1], {"penalty": 1.0}, 1.2679492),  # mean 3, var .75 + 2.25
        ("majority", [0.1, 0.1, -9], None, {}, 0.3333333),
        ("majority", [0.1, 0.1, -9], [1, 1, 3], {}, -0.2),
        ("majority", [0.1, 0.1, -9], [1, 2, 3], {}, 0.0),
        ("majority", [0.0, 0.0, 1], None, {}, 0.3333333),
        ("pareto", [1, 2, 0], None, {}, 1.0),
        ("pareto", [1, 2, -0.01], None, {}, 0.0),
        ("pareto", [1, 2, -0.3], None, {"tolerance": 0.3}, 0.9),
        ("pareto", [0.2, 0.1, -0.2], None, {"tolerance": 0.3}, 0.0),
        ("pareto", [0.4, -0.3], [1, 9], {"tolerance": 0.3}, 0.0),  # the mean says the other way
        ("soft_vote", [math.log(3), -math.log(3)], None, {}, 0.0),
        ("soft_vote", [math.log(3), math.log(3)], None, {}, math.log(3)),
        ("soft_vote", [2 * math.log(3), 0], [1, 3], {"temperature": 2.0}, math.log(9 / 7)),  # p = 3/16 + 3/8
        ("soft_vote", [200, 200], None, {}, 200.0),
    ],
)
def test_rules_by_hand(
    rule: str, gaps: list[float], weights: list[float] | None, more: dict[str, float], expected: float
) -> None:
    assert prefer(rule, gaps, weights, **more) == pytest.approx(expected, abs=1e-5)


def test_worst_case_is_the_difference_of_two_worths_and_not_the_mean() -> None:
    """Each candidate counted from the siblings' mean is worth its worst member."""
    scores = {"x": [5.0, 1.0, 2.0], "y": [1.0, 2.0, 1.0]}
    means = [fmean(pair) for pair in zip(*scores.values(), strict=True)]
    worth = {name: min(s - m for s, m in zip(row, means, strict=True)) for name, row in scores.items()}
    assert prefer("worst_case", [4, -1, 1]) == pytest.approx(worth["x"] - worth["y"])
    assert worth["x"] - worth["y"] == 1.5
    assert prefer("worst_case", [1, 1, -1.5]) < 0 < prefer("mean", [1, 1, -1.5])


GAPS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=5)


@pytest.mark.parametrize("rule", RULES)
@given(gaps=GAPS)
def test_swapping_the_candidates_negates_and_one_member_decides_alone(rule: str, gaps: list[float]) -> None:
    assert prefer(rule, gaps) == -prefer(rule, [-gap for gap in gaps])
    alone = prefer(rule, gaps[:1])
    assert math.copysign(1, alone) == math.copysign(1, gaps[0]) or alone == 0
    assert prefer(rule, gaps[:1] * 2) == pytest.approx(alone, abs=1e-5, rel=1e-5)
    assert prefer(rule, gaps[::-1]) == pytest.approx(prefer(rule, gaps), abs=1e-4, rel=1e-5)
    if all(gap > 0 for gap in gaps) and rule != "uncertainty":  # a mean may be less sure than its penalty
        assert prefer(rule, gaps) >= 0


def test_siblings_are_ranked_by_the_rule_and_a_pairs_gap_is_the_preference() -> None:
    scorer = EnsembleScorer([(Pixel(0), 1.0), (Pixel(1), -2.0)], Ensemble(rule="mean", normalise="none"))
    # Two trajectories: rows are x of both, then y of both. The second member wants its pixel low.
    found = compared(scorer, [[0.5, 0.3], [0.1, 0.9], [0.2, 0.6], [0.1, 0.3]])
    x, y = found.reward.view(2, 2)
    assert (x - y).tolist() == pytest.approx([(0.3 + 2 * 0.3) / 3, (0 - 2 * 0.6) / 3])
    assert (x + y).tolist() == pytest.approx([0, 0], abs=1e-7)
    assert found.total.tolist() == pytest.approx([-0.1, -1.7, -1.0, -0.5])


@pytest.mark.parametrize("rule", RULES)
def test_until_a_step_has_a_scale_its_siblings_give_it(rule: str) -> None:
    """Whatever the units: in the first update each member's gap of a pair is +1 or -1."""
    scorer = EnsembleScorer([(Pixel(0), 1.0), (Pixel(1), 1.0), (Pixel(2), 1.0)], Ensemble(rule=rule))  # type: ignore[arg-type]
    found = compared(scorer, [[7e3, 2.0, 1.0], [1e3, 1.0, 1.001]])
    gap = float(found.reward[0] - found.reward[1])
    assert gap == pytest.approx(prefer(rule, [1, 1, -1]), abs=1e-6)
    assert {name: float(each[0]) for name, each in found.scales.items()} == {
        "pixel": 6000.0,
        "pixel#2": 1.0,
        "pixel#3": pytest.approx(0.001, rel=1e-3),
    }


def test_scales_are_running_and_stand_still_within_an_update() -> None:
    scorer = EnsembleScorer([(Pixel(0), 1.0), (Pixel(1), 1.0)], Ensemble(decay=0.75))
    compared(scorer, [[3.0, 0.5], [0.0, 0.0], [0.0, 0.0], [1.0, 0.5]])  # gaps 3, -1 and .5, -.5
    assert scorer.scales.get("5", "pixel") is None
    scorer.scales.settle(ALONE.gather)
    assert scorer.scales.get("5", "pixel") == pytest.approx(math.sqrt(5))
    found = compared(scorer, [[1.0, 1.0], [0.0, 0.0]])
    assert float(found.reward[0] - found.reward[1]) == pytest.approx((1 / math.sqrt(5) + 2) / 2)
    compared(scorer, [[9.0, 9.0], [0.0, 0.0]], time=6)  # another step
    compared(scorer, [[9.0, 9.0], [0.0, 0.0]], time=None)  # the finished picture
    scorer.scales.settle(ALONE.gather)
    # Mean squares 5 and then 1 with weights 3/4 * 1/4 and 1/4.
    assert scorer.scales.get("5", "pixel") == pytest.approx(math.sqrt((5 * 0.1875 + 1 * 0.25) / 0.4375))
    assert scorer.scales.get("6", "pixel") == pytest.approx(9)
    assert set(scorer.scales.running) == {f"{step} {name}" for step in ("5", "6", "finished") for name in scorer.names}
    before = dict(scorer.scales.running)
    scorer.scales.settle(ALONE.gather)
    assert scorer.scales.running == before


def test_scales_do_not_depend_on_how_the_gaps_came_in() -> None:
    squares = torch.rand(101, generator=torch.Generator().manual_seed(0)) * 10 ** torch.arange(101).fmod(9)
    whole, parts = GapScales(0.9), GapScales(0.9)
    whole.gather("5", "a", squares)
    for part in squares.flip(0).split(7):
        parts.gather("5", "a", part)
    whole.settle(ALONE.gather)
    parts.settle(ALONE.gather)
    assert whole.running == parts.running


def test_scales_of_several_processes_are_those_of_one() -> None:
    squares = torch.rand(101, generator=torch.Generator().manual_seed(1))
    whole, half = GapScales(0.9), GapScales(0.9)
    whole.gather("5", "a", squares)
    whole.settle(ALONE.gather)
    half.gather("5", "a", squares[:50])
    half.settle(lambda own: [{"5 a": squares[50:].double().tolist()}, own])
    assert half.running == whole.running


def test_more_siblings_are_ranked_by_their_average_preference() -> None:
    """Condorcet's circle ties; of four candidates the counts are Copeland's."""
    scores = [[0.0, 1.0, 2.0], [1.0, 2.0, 0.0], [2.0, 0.0, 1.0]]
    majority = EnsembleScorer([(Pixel(i), 1.0) for i in range(3)], Ensemble(rule="majority"))
    assert compared(majority, scores, siblings=3).reward.tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    worst = [-1.0, -1.0, -1.0]
    found = compared(majority, [*scores, worst], siblings=4).reward
    assert found.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 4, -3 / 4])
    mean = EnsembleScorer([(Pixel(i), 1.0) for i in range(3)], Ensemble(rule="mean", normalise="none"))
    totals = torch.tensor([1.0, 2.0, 6.0])
    found = compared(mean, [[t, t, t] for t in totals.tolist()], siblings=3).reward
    assert found.tolist() == pytest.approx((totals - 3).tolist())


def test_a_missing_score_takes_its_picture_out_and_no_other() -> None:
    nan = math.nan
    for rule in RULES:
        scorer = EnsembleScorer([(Pixel(0), 1.0), (Pixel(1), 1.0)], Ensemble(rule=rule), on_invalid="skip")  # type: ignore[arg-type]
        images = pictures([[nan, 1.0], [3.0, 4.0], [1.0, 2.0]]).requires_grad_()
        found = scorer.compare(images, [""] * 3, siblings=3, time=5)
        assert found.reward.isfinite().tolist() == [False, True, True]
        assert float(found.reward[1]) == -float(found.reward[2]) > 0
        (gradient,) = torch.autograd.grad(found.objective[1:].sum(), images)
        assert bool(gradient[1:].isfinite().all())
        scorer.scales.settle(ALONE.gather)
        assert scorer.scales.get("5", "pixel") == pytest.approx(2)  # of the one pair that is there


@pytest.mark.parametrize("rule", ["mean", "worst_case", "uncertainty", "pareto", "soft_vote"])
def test_guidance_follows_the_gradient_of_the_preference(rule: str) -> None:
    """Central differences of the winner's preference over its rival, whose pixels stay."""
    members = [(Pixel(0), 1.0), (Pixel(1, 100.0), 2.0), (Pixel(2), -1.0)]
    scorer = EnsembleScorer(members, Ensemble(rule=rule))  # type: ignore[arg-type]
    compared(scorer, [[0.5, 0.25, 0.0], [0.0, 0.0, 2.0]])
    scorer.scales.settle(ALONE.gather)
    winner, loser = [1.5, 1.0, 0.25], [0.5, 0.75, 0.5]
    images = pictures([winner, loser]).requires_grad_()
    found = scorer.compare(images, ["", ""], siblings=2, time=5)
    (gradient,) = torch.autograd.grad(found.objective.sum(), images)
    for index in range(3):
        moved = []
        for step in (-1e-2, 1e-2):
            row = [value + (step if i == index else 0) for i, value in enumerate(winner)]
            reward = compared(scorer, [row, loser]).reward
            moved.append(float(reward[0] - reward[1]))
        assert float(gradient[0, 0, 0, index]) == pytest.approx((moved[1] - moved[0]) / 2e-2, abs=2e-3, rel=2e-3)


def test_members_that_agree_to_the_bit_have_a_finite_gradient() -> None:
    scorer = EnsembleScorer([(Pixel(0), 1.0), (Pixel(0), 1.0)], Ensemble(rule="uncertainty"))
    images = pictures([[2.0], [1.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.compare(images, ["", ""], siblings=2, time=5).objective.sum(), images)
    assert gradient[:, 0, 0, 0].tolist() == [1.0, 1.0]


def test_what_is_logged_of_a_pair() -> None:
    scorer = EnsembleScorer([(Pixel(0, name="a"), 1.0), (Pixel(1, name="b"), -1.0)], Ensemble(rule="pareto"))
    found = compared(scorer, [[3.0, 1.0], [3.0, 5.0], [1.0, 4.0], [2.0, 1.0]])
    figures = found.figures(torch.tensor([0, 1]), torch.tensor([2, 3]))
    # The first pair is better by both (b wants less), in the second they disagree.
    expected = {
        "reward_winner:a": [3, 3],
        "reward_loser:a": [1, 2],
        "gap:a": [2, 1],
        "agreement:a": [1, 0.5],
        "scale:a": [2, 1],
        "reward_winner:b": [1, 5],
        "reward_loser:b": [4, 1],
        "gap:b": [-3, 4],
        "agreement:b": [1, 0.5],
        "scale:b": [3, 4],
        "disagreement": [0, 1],  # gaps of 1 and 1, and of 1 and -1
        "abstained": [0, 1],
    }
    assert {name: each.tolist() for name, each in figures.items()} == expected
    assert Comparison.single(torch.ones(2)).figures(torch.tensor([0]), torch.tensor([1])) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": {"rule": "men"}}, "ensemble.rule"),
        ({"ensemble": {"rule": "mean", "penalty": 2.0}}, "penalty has no effect under rule mean"),
        ({"ensemble": {"rule": "soft_vote", "temperature": 0.0}}, "temperature must be positive, got 0.0"),
        ({"ensemble": {"decay": 1.0}}, "decay must be at least 0 and below 1"),
        ({"reward": {"name": "brightness"}}, "ensemble: there is one reward"),
        ({"reward": [{"name": "brightness"}, {"name": "colourfulness", "weight": 0}]}, "a reward of weight 0"),
        ({"algorithm": {"name": "ddpo"}}, "ensemble compares siblings, and ddpo has none"),
        ({"algorithm": {"name": "reward_backprop"}}, "ensemble compares siblings, and reward_backprop has none"),
        ({"algorithm": {"name": "spo", "first_step": 1}, "ensemble": {"rule": "pareto"}}, "algorithm.candidates 2"),
        (
            {
                "algorithm": {"name": "tailorpo", "train_steps": 2, "guidance": {"form": "sigma"}},
                "ensemble": {"rule": "majority"},
            },
            "a count of votes, whose gradient is zero",
        ),
        (
            {
                "algorithm": {
                    "name": "tailorpo",
                    "train_steps": 2,
                    "guidance": {"form": "target", "target": 7.0, "accept_reject": True},
                }
            },
            "algorithm.guidance.target is a reward to reach",
        ),
        (
            {
                "algorithm": {
                    "name": "tailorpo",
                    "train_steps": 2,
                    "guidance": {"form": "sigma", "accept_reject": True},
                }
            },
            "algorithm.guidance.accept_reject asks whether",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    two = [{"name": "brightness"}, {"name": "colourfulness"}]
    with pytest.raises(RunFileError) as error:
        Run.from_dict(settings("emoji", **{"reward": two, "ensemble": {}, **change}), files=False)
    assert any(message in problem for problem in error.value.problems), error.value.problems


def test_an_ensemble_comes_back_from_its_own_yaml() -> None:
    two = [{"name": "brightness"}, {"name": "colourfulness", "weight": 2.0}]
    run = Run.from_dict(settings("emoji", reward=two, ensemble={"rule": "uncertainty", "penalty": 0.5}), files=False)
    assert run.ensemble == Ensemble(rule="uncertainty", penalty=0.5)
    assert Run.from_dict(run.to_dict(), files=False) == run
