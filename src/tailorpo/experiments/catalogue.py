"""Every experiment, as data. The command runs what stands here; docs/experiments.md shows what came out.

The paper is arXiv 2502.01667. Its settings are for Stable Diffusion 1.5; here the recipes for the bundled miniature
are the starting points, and `tune` gives every method the same number of settings to choose from.
"""

from __future__ import annotations

from dataclasses import replace

from tailorpo.experiments import beyond, diversity_price, gradient_direction, pair_worth, pushed, step_reward
from tailorpo.experiments.grid import Grid, Variant
from tailorpo.experiments.measurement import Measurement
from tailorpo.experiments.protocol import BUDGET, COLOUR, EVALUATION, JPEG, PAPERS_G, PREFERENCE

METHODS = (
    Variant(name="DDPO", recipe="emoji_ddpo.yaml", tuned="DDPO"),
    Variant(name="D3PO", recipe="emoji_d3po.yaml", tuned="D3PO"),
    Variant(name="SPO", recipe="emoji_spo.yaml", overrides=("algorithm.step_reward=predicted",), tuned="SPO"),
    Variant(name="TailorPO", recipe="emoji_tailorpo.yaml", tuned="TailorPO"),
    Variant(name="TailorPO-G", recipe="emoji_tailorpo_g.yaml", overrides=PAPERS_G, tuned="TailorPO-G"),
    Variant(name="reward backprop", recipe="emoji_reward_backprop.yaml", tuned="reward backprop"),
)

SPO_AWARE = Variant(
    name="SPO, step-aware",
    recipe="emoji_spo.yaml",
    overrides=("algorithm.step_reward=aware",),
    tuned="SPO",
    proxy=(PREFERENCE, "emoji_step_preference"),
)
"""SPO as in its paper, with a preference model that was trained on noisy steps; the others, and SPO above, score the
predicted clean picture."""

ABLATION = (
    Variant(name="ranking trajectories (D3PO)", recipe="emoji_d3po.yaml", tuned="D3PO"),
    Variant(name="ranking steps", recipe="emoji_d3po.yaml", overrides=("algorithm.ranking=step",), tuned="D3PO"),
    Variant(name="+ same input (TailorPO)", recipe="emoji_tailorpo.yaml", tuned="TailorPO"),
    Variant(name="+ guidance (TailorPO-G)", recipe="emoji_tailorpo_g.yaml", overrides=PAPERS_G, tuned="TailorPO-G"),
)
"""What TailorPO adds to D3PO, one thing after the other. Ranking steps is D3PO's two chains, each pair of steps
labelled by the step reward of x_{k+1}. From there to TailorPO the loss changes too (sum in place of the mean, no
clamp) and five steps are trained in place of twenty."""

LONGER = (
    *(method for method in METHODS if method.name in ("SPO", "TailorPO", "TailorPO-G")),
    Variant(
        name="TailorPO, beta 0.1", recipe="emoji_tailorpo.yaml", overrides=("algorithm.beta=0.1",), tuned="TailorPO"
    ),
    Variant(
        name="TailorPO, lr 1e-3",
        recipe="emoji_tailorpo.yaml",
        overrides=("algorithm.beta=0.1", "optimizer.lr=1e-3"),
        tuned="TailorPO",
    ),
)
"""The last two, because the settings found for a third of the length do not hold TailorPO for all of it."""

LEARNING_RATES = ("3e-4", "1e-3", "3e-3")
KNOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DDPO": ("algorithm.clip", ("1e-4", "1e-3")),
    "D3PO": ("algorithm.accumulate", ("20", "5")),
    "SPO": ("algorithm.beta", ("10", "50")),
    "TailorPO": ("algorithm.beta", ("0.1", "0.3")),
    "TailorPO-G": ("algorithm.guidance.k", ("2", "4")),
    "reward backprop": ("algorithm.last_steps", ("1", "5")),
}
"""What `tune` tries of each method beside the learning rate: its main strength. D3PO's is the number of optimizer steps
per update, since its beta is divided out by Adam (see algorithms/d3po.py)."""

FURTHER = {
    "DDPO": "algorithm.clip=3e-5",
    "D3PO": "algorithm.accumulate=2",
    "SPO": "algorithm.beta=100",
    "TailorPO": "algorithm.beta=0.03",
    "TailorPO-G": "algorithm.guidance.k=8",
    "reward backprop": "algorithm.last_steps=10",
}
"""The same strength one step beyond the value that won in `tune`, for `refine`."""

EIGHT = ("batch.trajectories=8", "batch.micro=8")
HALF = ("batch.trajectories=4", "batch.micro=4")
DOUBLE = ("batch.trajectories=16", "batch.micro=16")
BUFFERED = {"DDPO", "D3PO", "SPO"}
"""Methods whose minibatch has to grow with the batch; a smaller batch bounds it anyway."""

OBJECTS = tuple(
    """
    a red apple|a pear|an orange|a lemon|a banana|a watermelon|a strawberry|a peach|a pineapple|a tomato|an avocado
    |an eggplant|a potato|a carrot|a broccoli|a mushroom|a croissant|a pretzel|a hamburger|a pizza|a cupcake|a doughnut
    |a cookie|an ice cream|a car|a bus|an airplane|a rocket|a train|a house|a balloon|a gift|a crown|a guitar|a drum
    |a bell|a book|a clock|a camera|a basketball|a star|a cactus|a tree|a rose|a robot
    """.replace("\n    ", "")
    .strip()
    .split("|")
)
"""45 things that the bundled miniature draws and that are no animals: what `tune` trains and measures on."""

FINALISTS = ("best", "second best")
"""Of the nine settings that `tune` and `refine` tried of a method: what `confirm` runs once more."""

ON_OBJECTS = (
    f"prompts={{list: [{', '.join(OBJECTS)}]}}",
    "eval.prompts_seen=null",
    "eval.prompts_unseen=null",
    "eval.judge=null",
    "eval.seeds=2",
)


def _tuning() -> tuple[Variant, ...]:
    return tuple(
        Variant(
            name=f"{method.name}, lr {rate}, {key.removeprefix('algorithm.')} {value}",
            recipe=method.recipe,
            overrides=(*method.overrides, f"optimizer.lr={rate}", f"{key}={value}", *EIGHT),
        )
        for method in METHODS
        for key, values in [KNOBS[method.name]]
        for rate in LEARNING_RATES
        for value in values
    )


def _refining() -> tuple[Variant, ...]:
    found: list[Variant] = []
    for method in METHODS:
        double = (*DOUBLE, "algorithm.minibatch=16") if method.name in BUFFERED else DOUBLE
        key, _, value = FURTHER[method.name].removeprefix("algorithm.").partition("=")
        tried = {f"{key} {value}": (FURTHER[method.name],), "batch 4": HALF, "batch 16": double}
        found += [
            replace(method, name=f"{method.name}, {name}", overrides=(*method.overrides, *each))
            for name, each in tried.items()
        ]
    return tuple(found)


GRIDS = (
    Grid(
        name="tune",
        question="Which learning rate and strength suits each method? Six settings for every one of them.",
        paper="none; the paper does not say how its baselines were tuned",
        statistic="mean gain of the trained reward over 45 prompts that are no animals, one seed; no judge",
        variants=_tuning(),
        seeds={PREFERENCE: (101,)},
        budget=BUDGET,
        overrides=ON_OBJECTS,
        reference=None,
    ),
    Grid(
        name="refine",
        question="Does the best of `tune` gain by another batch, or by more of its strength? Three more for each.",
        paper="none",
        statistic="as in tune",
        variants=_refining(),
        seeds={PREFERENCE: (101,)},
        budget=BUDGET,
        overrides=ON_OBJECTS,
        reference=None,
    ),
    Grid(
        name="confirm",
        question="Which of the two best settings of each method is better over two seeds?",
        paper="none",
        statistic="as in tune, from a second seed",
        variants=tuple(
            replace(method, name=f"{method.name}, {place}", tuned=f"{method.name}, {place}")
            for method in METHODS
            for place in FINALISTS
        ),
        seeds={PREFERENCE: (102,)},
        budget=BUDGET,
        overrides=ON_OBJECTS,
        reference=None,
    ),
    Grid(
        name="methods",
        question="Which method makes the pictures better, at equal network evaluations?",
        paper="Table 2",
        statistic="interquartile mean of the gain over seeds and prompts, probability of improvement",
        variants=(*METHODS, SPO_AWARE),
        seeds={PREFERENCE: (1, 2, 3, 4, 5), COLOUR: (1, 2, 3), JPEG: (1, 2, 3)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="TailorPO-G",
    ),
    Grid(
        name="longer",
        question="Who goes on rising with three times the evaluations?",
        paper="Figure 3",
        statistic="as in methods",
        variants=LONGER,
        seeds={PREFERENCE: (1, 2, 3)},
        budget=3 * BUDGET,
        overrides=EVALUATION,
        reference="TailorPO-G",
    ),
    Grid(
        name="ablation",
        question="What does each part contribute: ranking steps, the same input, guidance?",
        paper="Table 10",
        statistic="interquartile mean of the gain over seeds and prompts",
        variants=ABLATION,
        seeds={PREFERENCE: (1, 2, 3)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="+ guidance (TailorPO-G)",
    ),
    Grid(
        name="train-steps",
        question="How many of the 20 steps should be trained?",
        paper="Table 8",
        statistic="interquartile mean of the gain over seeds and prompts",
        variants=tuple(
            Variant(
                name=f"K = {count}",
                recipe="emoji_tailorpo.yaml",
                overrides=(f"algorithm.train_steps={count}",),
                tuned="TailorPO",
            )
            for count in (3, 5, 8, 10, 15, 20)
        ),
        seeds={PREFERENCE: (1, 2, 3), COLOUR: (1,), JPEG: (1,)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="K = 5",
        points=2,
    ),
    Grid(
        name="step-rewards",
        question="Which steps should be trained, and does it pay to rank by more than the predicted picture?",
        paper="none; Table 8 and Section 3.2 leave both open",
        statistic="interquartile mean of the gain over seeds and prompts",
        variants=tuple(
            Variant(
                name=name,
                recipe="emoji_tailorpo.yaml",
                overrides=(f"algorithm.{setting}",) if setting else (),
                tuned="TailorPO",
            )
            for name, setting in {
                "steps 4 to 16": "",
                "5 evenly spread": "train_steps=5",
                "5 by measurement": f"train_steps={{auto: 5, measured: {PREFERENCE}}}",
                "10 by measurement": f"train_steps={{auto: 10, measured: {PREFERENCE}}}",
                "lookahead 2": "step_reward={lookahead: 2}",
                "2 continuations": "step_reward={continuations: 2}",
                "2 continuations, cut after 2": "step_reward={continuations: 2, cut: 2}",
            }.items()
        ),
        seeds={PREFERENCE: (1, 2, 3)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="steps 4 to 16",
        points=2,
    ),
    Grid(
        name="guidance",
        question="Which form of guidance helps, and does it need the network's Jacobian?",
        paper="Table 9",
        statistic="interquartile mean of the gain over seeds and prompts",
        variants=tuple(
            Variant(
                name=name,
                recipe="emoji_tailorpo_g.yaml",
                overrides=(*PAPERS_G, f"algorithm.guidance={guidance}"),
                tuned="TailorPO-G",
            )
            for name, guidance in {
                "none": "null",
                "Eq. 14, eta 0.1": "{form: target, delta: 0.5, eta: 0.1}",
                "Eq. 14, eta 0.2": "{form: target, delta: 0.5, eta: 0.2}",
                "Eq. 14, cosine 0.1 to 0.2": "{form: target, delta: 0.5, eta: cosine}",
                "sigma, k 2": "{form: sigma, k: 2.0}",
                "sigma, k 4": "{form: sigma, k: 4.0}",
                "sigma, k 8": "{form: sigma, k: 8.0}",
                "sigma, k 4, Jacobian-free": "{form: sigma, k: 4.0, jacobian: free}",
                "sigma, k 8, symmetric": "{form: sigma, k: 8.0, symmetric: true}",
                "sigma, k 8, shell": "{form: sigma, k: 8.0, shell: true}",
                "sigma, k 8, corrected beta": "{form: sigma, k: 8.0, corrected_beta: true}",
                "sigma, k 8, annealed to 1": "{form: sigma, k: 8.0, anneal: {to: 1.0, over: 19}}",
            }.items()
        ),
        seeds={PREFERENCE: (1, 2, 3)},
        budget=BUDGET,
        overrides=EVALUATION,
        reference="sigma, k 4",
    ),
    *beyond.GRIDS,
)

MEASUREMENTS = (
    Measurement(
        name="step-reward",
        question="How well does the reward of the predicted clean picture stand for the expected final reward?",
        paper="Tables 6 and 7, Appendix D.2",
        statistic="relative error; share of sibling pairs that the step reward ranks wrongly",
        recipe="emoji_tailorpo.yaml",
        overrides=(f"reward=[{{name: {PREFERENCE}}}, {{name: {COLOUR}}}, {{name: {JPEG}}}]", "seed=7"),
        sizes={"states": 60, "continuations": 100},
        quick={"states": 2, "continuations": 2},
        cost=step_reward.cost,
        measure=step_reward.measure,
        table=step_reward.table,
        plot=step_reward.plot,
    ),
    Measurement(
        name="gradient-direction",
        question="How often does a gradient step lower the winner's likelihood or raise the loser's?",
        paper="Section 3, Eq. 7 and 8",
        statistic="shares over pairs and steps with Wilson's intervals",
        recipe="emoji_tailorpo.yaml",
        overrides=("seed=8",),
        sizes={"pairs": 100},
        quick={"pairs": 1},
        cost=gradient_direction.cost,
        measure=gradient_direction.measure,
        table=gradient_direction.table,
        plot=gradient_direction.plot,
    ),
    Measurement(
        name="pair-worth",
        question="How many plain pairs is a guided pair worth, and how much of its progress does the judge see?",
        paper="none; guidance is Section 4.3",
        statistic="squared signal to noise of a pair's gradient along the mean gradient of plain pairs",
        recipe="emoji_tailorpo_g.yaml",
        overrides=("seed=10",),
        sizes={"pairs": 80},
        quick={"pairs": 4},
        cost=pair_worth.cost,
        measure=pair_worth.measure,
        table=pair_worth.table,
        plot=pair_worth.plot,
    ),
    Measurement(
        name="pushed",
        question="What do judge, diversity and KL show while a reward is pushed until the pictures break?",
        paper="Figure 11",
        statistic="change against the base model at every evaluation, intervals over prompts",
        recipe="emoji_tailorpo.yaml",
        overrides=(
            f"reward={{name: {JPEG}}}",
            "seed=9",
            "eval.seeds=2",
            "eval.batch_size=32",
            "algorithm.beta=0.02",
            "optimizer.lr=2e-3",
        ),
        sizes={"updates": 20, "points": 10},
        quick={"updates": 2, "points": 2},
        cost=pushed.cost,
        measure=pushed.measure,
        table=pushed.table,
        plot=pushed.plot,
    ),
    Measurement(
        name="diversity-price",
        question="How much diversity does a gain of the judge cost, even if nothing else is lost?",
        paper="none",
        statistic="distance within a prompt against the judge's gain, of the weighted base and of trained models",
        recipe="emoji_tailorpo.yaml",
        overrides=("seed=12", "eval.judge={name: emoji_judge}", "eval.batch_size=32"),
        sizes={"pictures": 32},
        quick={"pictures": 3},
        cost=diversity_price.cost,
        measure=diversity_price.measure,
        table=diversity_price.table,
        plot=diversity_price.plot,
    ),
)
