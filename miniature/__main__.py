"""Re-creates the bundled assets: `python -m miniature`. Finished stages are skipped, interrupted ones resume."""

from __future__ import annotations

from miniature.diffusion import export, train_diffusion
from miniature.evaluate import evaluate
from miniature.prompts import write_prompts
from miniature.rewards import JUDGE, PREFERENCE, train_rewards
from miniature.step_preference import train_step_preference
from miniature.tiny_vae import train_tiny_vae
from miniature.vae import polish_decoder, train_vae


def main() -> None:
    """All stages in order: about three hours on one core (set OMP_NUM_THREADS=1 on a busy machine)."""
    train_vae()
    train_diffusion()
    polish_decoder()
    write_prompts()
    export()
    train_tiny_vae()
    for recipe in (PREFERENCE, JUDGE):
        train_rewards(recipe)
    train_step_preference()
    evaluate()


if __name__ == "__main__":
    main()
