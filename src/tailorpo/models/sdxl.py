"""Stable Diffusion XL base (Podell et al. 2023, arXiv 2307.01952).

Two text encoders: their last but one hidden states side by side are the conditioning, and the second's pooled text
embedding goes to the network's time embedding. So do six numbers (Section 2.2 of the paper): the size of the original
picture, the corner of the crop, and the size to draw, here (H, W, 0, 0, H, W), as diffusers' pipeline does by default.
The empty prompt of guidance is zeros, where the model says so (`force_zeros_for_empty_prompt`; the base model does).

The original VAE overflows in float16, so under a half dtype it runs in float32, except for a VAE that says that it need
not (`force_upcast: false`), such as the repaired one people put at `model.vae_path`.

Left out: the refiner, and sizes or crops other than the picture's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailorpo.device import sent
from tailorpo.errors import UserError
from tailorpo.models import Conditioning, ModelConfig
from tailorpo.models.latent import LatentDiffusion, token_ids
from tailorpo.models.loading import Parts


class StableDiffusionXL(LatentDiffusion):
    """Stable Diffusion XL; see `tailorpo.models.DiffusionModel` for the meaning of each member."""

    def __init__(self, parts: Parts, config: ModelConfig, *, seed: int) -> None:
        if (
            parts.unet.config["addition_embed_type"] != "text_time"
            or parts.unet.config["addition_time_embed_dim"] is None
        ):
            raise UserError("model.family is sdxl, but the network takes no picture sizes: this is no SDXL")
        if parts.vae.config["force_upcast"]:
            nn.Module.to(parts.vae, dtype=torch.float32)
        super().__init__(parts, config, seed=seed)

    def encode_texts(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        embeddings: list[Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.parts.tokenizers, self.parts.text_encoders, strict=True):
            output = encoder(sent(token_ids(tokenizer, prompts), self.device), output_hidden_states=True)
            embeddings.append(output.hidden_states[-2])
            pooled = output[0]  # of the second encoder, whose first output it is
        return torch.cat(embeddings, dim=-1), pooled

    def conditioning(self, positive: tuple[Tensor, ...], empty: tuple[Tensor, ...]) -> Conditioning:
        if self.parts.zeros_for_empty:
            empty = tuple(map(torch.zeros_like, empty))
        sizes = sent(torch.tensor([[*self.picture_shape[1:], 0, 0, *self.picture_shape[1:]]]).float(), self.device)
        return Conditioning(
            positive[0],
            empty[0].expand_as(positive[0]),
            pooled_positive=positive[1],
            pooled_negative=empty[1].expand_as(positive[1]),
            sizes=sizes.expand(len(positive[0]), -1),
        )

    def added_conditions(self, cond: Conditioning, *, guided: bool) -> dict[str, Tensor] | None:
        assert cond.pooled_positive is not None
        assert cond.pooled_negative is not None
        assert cond.sizes is not None
        if not guided:
            return {"text_embeds": cond.pooled_positive, "time_ids": cond.sizes}
        pooled = torch.cat([cond.pooled_negative, cond.pooled_positive])
        return {"text_embeds": pooled, "time_ids": cond.sizes.repeat(2, 1)}
