"""An encoder to align with that needs neither packages nor time."""

import torch as th


class TinyEncoder(th.nn.Module):
    """Has the interface of ImageNetEncoder; its maps are random projections of patches."""

    strides, widths = (8, 16, 32), (2, 5, 3)

    def __init__(self):
        super().__init__()
        self.network = th.nn.Conv2d(3, 5, 16, 16, bias=False).requires_grad_(False)
        generator = th.Generator().manual_seed(0)
        self.network.weight.copy_(th.randn(5, 3, 16, 16, generator=generator))
        self.seen: list[int] = []

    def forward(self, images):
        self.seen.append(len(images))
        return [images[:, :2], self.network(images), images]


def use_tiny_encoder() -> None:
    """Have --align_encoder name it, whatever the name."""
    from guided_diffusion.training import diffusion

    diffusion.open_encoder = lambda name, side: TinyEncoder()
