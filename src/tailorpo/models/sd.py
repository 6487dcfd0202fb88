"""Stable Diffusion 1.x and 2.x, and every model in the same format (such as the bundled miniature).

One text encoder, whose last hidden states are the conditioning; the empty prompt of guidance is encoded like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tailorpo.device import sent
from tailorpo.models import Conditioning
from tailorpo.models.latent import LatentDiffusion, token_ids


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x / 2.x; see `tailorpo.models.DiffusionModel` for the meaning of each member."""

    def encode_texts(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        ids = token_ids(self.parts.tokenizers[0], prompts)
        return (self.parts.text_encoders[0](sent(ids, self.device))[0],)

    def conditioning(self, positive: tuple[Tensor, ...], empty: tuple[Tensor, ...]) -> Conditioning:
        return Conditioning(positive[0], empty[0].expand_as(positive[0]))
