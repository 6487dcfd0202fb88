"""What a look measures, against brute force; and the gated KL against finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import settings
from torch import Tensor

from tailorpo._distributed import ALONE
from tailorpo.algorithms.gated import gated_kl
from tailorpo.algorithms.spo import SPO
from tailorpo.algorithms.tailorpo import TailorPO
from tailorpo.control import adapted
from tailorpo.errors import RunFileError
from tailorpo.gaussian_step import GaussianStep
from tailorpo.objectives import disagreement as pair_disagreement
from tailorpo.picture_statistics import FLAT, edge_energy, flat_share, saturation
from tailorpo.policy import Policy
from tailorpo.report.sentinels import peak_chart
from tailorpo.rewards import Brightness, Colourfulness, Scorer
from tailorpo.run import Run
from tailorpo.sentinels.measure import disagreement, spread_evenly
from tailorpo.sentinels.watch import BETA, open_watch

TAILORPO = {"name": "tailorpo", "train_steps": 2}


def test_low_level_statistics_against_loops_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 6, 5, generator=generator)
    images[1, :, 2:, 1:] = 0.5 + 0.02 * torch.rand(3, 4, 4, generator=generator)  # partly flat
    for image, edges, flat, colour in zip(
        images.numpy(), edge_energy(images), flat_share(images), saturation(images), strict=True
    ):
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        across = [(grey[y, x + 1] - grey[y, x]) ** 2 for y in range(6) for x in range(4)]
        down = [(grey[y + 1, x] - grey[y, x]) ** 2 for y in range(5) for x in range(5)]
        assert float(edges) == pytest.approx(np.mean(across) + np.mean(down), rel=1e-5)
        even = [
            all(abs(image[c, y, x] - image[c, y + dy, x + dx]) < FLAT for c in range(3) for dy, dx in ((0, 1), (1, 0)))
            for y in range(5)
            for x in range(4)
        ]
        assert float(flat) == pytest.approx(sum(even) / len(even))
        pixels = [(max(p) - min(p)) / max(p) for p in image.reshape(3, -1).T.tolist()]
        assert float(colour) == pytest.approx(np.mean(pixels), rel=1e-5)
    assert 0 < float(flat_share(images)[1]) < 1
    even = torch.full((1, 3, 4, 4), 0.3)
    assert (float(edge_energy(even)), float(flat_share(even)), float(saturation(even))) == (0, 1, 0)


def test_disagreement_counts_opposed_pairs() -> None:
    assert disagreement([[1, 2, 3], [10, 20, 30]]) == 0
    assert disagreement([[1, 2, 3], [3, 2, 1]]) == 1
    assert disagreement([[1, 2, 3], [1, 3, 2]]) == pytest.approx(1 / 3)
    assert disagreement([[1, 2], [5, 5]]) == 0  # no preference is no objection
    assert disagreement([[1, 2], [2, 1], [1, 2]]) == pytest.approx(2 / 3)
    assert math.isnan(disagreement([[1, math.nan], [1, 2]]))


def test_prompts_are_spread_over_the_list_and_none_is_there_twice() -> None:
    assert spread_evenly(["a", "b", "a"], 5) == ("a", "b")
    assert spread_evenly([str(n) for n in range(10)], 4) == ("0", "2", "5", "7")


def rewarded(tiny_folder: Any, **sentinels: Any) -> Run:
    return Run.from_dict(
        settings(
            tiny_folder,
            reward=[{"name": "brightness"}, {"name": "colourfulness", "weight": -0.01}],
            eval={"judge": {"name": "jpeg_incompressibility"}},
            sentinels={"count": 2, "seeds": 3, "batch_size": 4, **sentinels},
        )
    )


def test_a_look_at_a_moved_model_against_every_picture_drawn_alone(
    tiny_folder: Any, tiny_policy: Callable[..., Policy]
) -> None:
    """Pictures, KL, Vendi score and distances again, picture by picture, in float64 and by other means."""
    policy = tiny_policy(steps=4, guidance_scale=2.0, moved=0.1)
    members = [(Brightness(), 1.0), (Colourfulness(), -0.01)]
    watch = open_watch(rewarded(tiny_folder), policy, Scorer(members), ALONE)
    assert watch is not None
    counted = policy.model.evaluations
    look, cost = watch.probe.look(5, on_step=lambda done, total: None)
    assert policy.model.evaluations == counted
    assert cost.pictures == 6
    assert cost.forwards == 6 * 4 + 2 * 4  # every picture, and the reference along the first seed of each prompt

    noise = watch.probe.noise
    for index, prompt in enumerate(("a cat", "a dog")):
        features, light, kls = [], [], []
        for seed in range(3):
            key = ("sentinel", prompt, seed)
            x, cond = (
                noise.normal(policy.model.latent_shape, *key, "initial").unsqueeze(0),
                policy.model.encode([prompt]),
            )
            total = 0.0
            for k in range(4):
                with torch.no_grad():
                    ours = policy.step(x, k, cond).gaussian
                    theirs = policy.reference_step(x, k, cond)
                p, q = (torch.distributions.Normal(g.mean.double(), g.std) for g in (ours, theirs))
                total += float(torch.distributions.kl_divergence(p, q).sum())
                x = ours.mean + ours.std * noise.normal(x.shape[1:], *key, "step", k)
            picture = policy.model.decode(x)[0].detach()
            kls.append(total)
            light.append(float(Brightness()(picture[None], [prompt])))
            features.append(torch.nn.functional.adaptive_avg_pool2d(picture, 8).flatten().double().numpy() - 0.5)
        assert look.values["kl"][index] == pytest.approx(kls[0], rel=1e-3)
        cosine = [[float(a @ b / np.sqrt((a @ a) * (b @ b))) for b in features] for a in features]
        distance = np.mean([1 - cosine[a][b] for a, b in itertools.combinations(range(3), 2)])
        assert look.values["distance"][index] == pytest.approx(distance, rel=1e-3)
        eigenvalues = np.linalg.svd(np.array(cosine) / 3, compute_uv=False)
        assert look.values["vendi"][index] == pytest.approx(np.prod(eigenvalues**-eigenvalues), rel=1e-3)
        assert look.values["reward:brightness"][index] == pytest.approx(np.mean(light), rel=1e-3)
    kl = look.values["kl"]
    assert look.kl == pytest.approx(sum(value or 0 for value in kl) / 2, rel=1e-5)
    assert sum(look.kl_by_step) == pytest.approx(look.kl, rel=1e-5)
    assert set(look.values) >= {"reward", "judge", "saturation", "edges", "jpeg", "flat", "disagreement"}


def test_the_base_has_no_kl_and_an_untrained_adapter_draws_its_pictures(
    tiny_folder: Any, tiny_policy: Callable[..., Policy]
) -> None:
    watches = [
        open_watch(rewarded(tiny_folder), tiny_policy(steps=4, guidance_scale=2.0, moved=moved), score, ALONE)
        for moved, score in ((0.0, Scorer([(Brightness(), 1.0)])), (0.1, Scorer([(Brightness(), 1.0)])))
    ]
    plain, moved = [watch for watch in watches if watch is not None]
    base, cost = plain.probe.look(0, on_step=lambda done, total: None)
    assert cost.forwards == 6 * 4
    assert base.kl == 0
    for watch, update in ((plain, 5), (moved, 0)):
        other, _ = watch.probe.look(update, on_step=lambda done, total: None)
        assert {name: row for name, row in other.values.items() if name != "kl"} == base.values
        assert other.kl == 0


def test_beta_follows_the_memory_and_nothing_else_changes() -> None:
    algorithm = TailorPO(beta=0.5, train_steps=3)
    assert adapted(algorithm, {}) is algorithm
    assert adapted(algorithm, {BETA: [4.0]}) == TailorPO(beta=2.0, train_steps=3)
    assert adapted(SPO(beta=5.0), {BETA: [4.0]}) == SPO(beta=20.0)


def test_the_disagreement_of_a_pair_by_hand() -> None:
    gaps = torch.tensor([[1.0, 1.0, 3.0, 0.0, 2.0], [1.0, -1.0, 1.0, 0.0, 0.0]])
    found = pair_disagreement(gaps, torch.tensor([1.0, 1.0]))
    # 3 and 1: mean 2, sd 1, 1 / (4 + 1); 2 and 0: mean 1, sd 1, 1 / 2
    assert found.tolist() == pytest.approx([0, 1, 0.2, 0, 0.5])
    # Three quarters and a quarter of a say: mean 1/2, mean square 1.
    assert float(pair_disagreement(gaps, torch.tensor([3.0, -1.0]))[1]) == pytest.approx(0.75)


def test_gated_kl_pulls_a_contested_pair_back_to_the_reference() -> None:
    """The gradient with respect to the policy's mean, against finite differences of torch's own divergence."""
    generator = torch.Generator().manual_seed(1)
    mean, reference = (torch.randn(3, 1, 2, 2, generator=generator) for _ in range(2))
    mean.requires_grad_()
    gate = torch.tensor([0.0, 0.5, math.nan])
    pair: Any = SimpleNamespace(
        reference=GaussianStep(reference, 0.7),
        extra={"disagreement": gate},
        present=torch.tensor([True, True, False]),
    )

    def total(at: Tensor) -> float:
        p, q = (torch.distributions.Normal(each.double(), 0.7) for each in (at, reference))
        return float(3.0 * 0.5 * torch.distributions.kl_divergence(p, q)[1].sum())

    loss = 3.0 * gated_kl(pair, GaussianStep(mean, 0.7))
    assert loss.tolist()[::2] == [0, 0]
    assert loss[1].item() == pytest.approx(total(mean.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    for index in range(4):
        step = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
        step.view(3, -1)[1, index] = 1e-4
        slope = (total(mean.detach() + step) - total(mean.detach() - step)) / 2e-4
        assert float(gradient.view(3, -1)[1, index]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentinels": {"every": 0}}, "sentinels.every: got 0, expected at least 1"),
        ({"sentinels": {"evry": 3}}, "sentinels.evry: unknown key; did you mean `every`?"),
        (
            {"sentinels": {"on_alarm": "panic"}},
            'sentinels.on_alarm: got "panic", expected warn, stop, rollback or raise_b',
        ),
        ({"sentinels": {"beta_raise": 1}}, "sentinels.beta_raise: got 1, expected more than 1"),
        ({"sentinels": {"rules": {"fall": 2}}}, "sentinels.rules.fall: got 2, expected at most 1"),
        ({"sentinels": {"rules": {"certain": 0.9}}}, "certain (0.9) must be at least confidence (0.99)"),
        ({"sentinels": {"rules": {"collapse": 0.9}}}, "collapse (0.9) must be at most diversity (0.85)"),
        ({"sentinels": {"on_alarm": "rollback"}}, "sentinels.on_alarm is rollback, which goes back to the look with"),
        (
            {"sentinels": {"judge": {"name": "brightness"}}},
            "the judge brightness (sentinels.judge) is one of the train",
        ),
        ({"sentinels": {}, "eval": {"judge": {"name": "brightness"}}}, "the judge brightness (eval.judge) is one of"),
        ({"sentinels": {"on_alarm": "raise_beta"}, "algorithm": {"name": "ddpo"}}, "ddpo has no beta"),
        (
            {"algorithm": {"name": "tailorpo", "train_steps": 2, "gated_kl": -1.0}},
            "gated_kl must be at least 0, got -1.0",
        ),
        (
            {"algorithm": {**TAILORPO, "gated_kl": 1.0}},
            "algorithm.gated_kl weighs the KL by how much",
        ),
        (
            {"algorithm": {**TAILORPO, "gated_kl": 1.0, "update": "buffered"}},
            "gated_kl needs update: inline",
        ),
    ],
)
def test_mistakes_of_a_run_file(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFileError) as error:
        Run.from_dict(settings("emoji", **change), files=False)
    assert any(message in problem for problem in error.value.problems), error.value.problems


def test_what_may_change_in_a_run_that_has_begun() -> None:
    judge = {"judge": {"name": "colourfulness"}}
    run = Run.from_dict(settings("emoji", sentinels={"every": 2}, eval=judge), files=False)
    assert run.resumed(["sentinels.on_alarm=stop", "sentinels.rules.fall=0.2"]).sentinels is not None
    assert run.resumed(["sentinels=null"]).sentinels is None
    for change in ("sentinels.every=3", "sentinels.seeds=5", "sentinels.on_alarm=rollback"):
        with pytest.raises(RunFileError, match="`sentinels` cannot change"):
            run.resumed([change])


def test_the_peak_is_the_look_with_the_best_judge_and_kl_is_on_a_root_scale() -> None:
    seen = [
        {"update": update, "kl": kl, "state": "ok", "measures": {"judge": {"difference": change}}}
        for update, kl, change in ((5, 4.0, 1.0), (10, 16.0, 2.0), (15, 64.0, -1.0))
    ]
    chart = peak_chart(seen)
    assert chart is not None
    xs = [dot[0] for dot in chart.dots]
    assert chart.peak[2] == "update 10"
    assert (xs[1] - xs[0], xs[2] - xs[0]) == pytest.approx(((xs[3] - xs[0]) / 4, (xs[3] - xs[0]) / 2), abs=0.2)
    assert min(chart.dots, key=lambda dot: dot[1])[3] == "update 10"  # up is up
    assert peak_chart([{"update": 5, "kl": 1.0, "state": "ok", "measures": {}}]) is None
