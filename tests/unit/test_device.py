"""What is asked of a CUDA GPU, as far as a CPU can tell; the rest is in tests/invariants/test_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tailorpo.device import refusals_in_words, repeat_bits, sent
from tailorpo.errors import RewardError, UserError
from tailorpo.rewards import Scorer


@pytest.fixture
def strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_that_cannot_repeat_its_bits_is_named_with_what_to_do(strict: None) -> None:
    """torch refuses this one on every device."""
    with (
        pytest.raises(UserError, match=r"put_.* has no implementation .* model\.deterministic: false"),
        refusals_in_words(),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_one_inside_a_reward_is_the_rewards(strict: None) -> None:
    class Putting:
        name = "putting"
        differentiable = False

        def __call__(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
            return torch.zeros(2).put_(torch.tensor([0, 1]), torch.ones(2))

    with pytest.raises(RewardError, match=r"(?s)reward 'putting' raised .*model\.deterministic: false allows"):
        Scorer([(Putting(), 1.0)])(torch.rand(2, 3, 8, 8), ["a", "b"])


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="size") as error, refusals_in_words():
        torch.zeros(3) + torch.zeros(4)
    assert not isinstance(error.value, UserError)


def test_a_cpu_repeats_its_bits_anyway() -> None:
    repeat_bits(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.arange(3.0)
    assert sent(x, torch.device("cpu")) is x
