"""From flags to a diffusion training run."""
