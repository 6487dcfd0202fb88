"""tailorpo: align a text-to-image diffusion model with a reward by step-wise preference optimisation."""

__version__ = "0.1.0"
