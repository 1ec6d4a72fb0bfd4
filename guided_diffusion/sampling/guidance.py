"""Guidance: make samples more typical of their class or mask, at the price of variety."""

from collections.abc import Callable

import torch as th
import torch.nn.functional as F


class ClassifierFree:
    """A conditional network whose predictions lean away from those without the condition.

    prediction = without class + scale (with class - without class), equation 6 of
    arXiv 2207.12598 with scale = 1 + w. Learned variances stay those with the class. Costs two
    predictions each.

    :param model: network trained with conditions dropped; called as model(x, timesteps, y=classes).
    :param scale: 1 is the network itself.
    :param null: the number that stands for "no class".
    :param name: of the condition: "y", the class, or another argument of the network.
    """

    def __init__(self, model: Callable[..., th.Tensor], scale: float, null: int, name: str = "y"):
        self.model = model
        self.scale = scale
        self.null = null
        self.name = name

    def __call__(self, x: th.Tensor, timesteps: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        twice = {name: th.cat([value, value]) for name, value in kwargs.items()}
        condition = kwargs[self.name]
        twice[self.name] = th.cat([condition, th.full_like(condition, self.null)])
        both = self.model(th.cat([x, x]), th.cat([timesteps, timesteps]), **twice)
        with_class, without = both.chunk(2)
        channels = x.shape[1]
        guided = without[:, :channels].lerp(with_class[:, :channels], self.scale)
        return th.cat([guided, with_class[:, channels:]], dim=1)


def classifier_gradient(
    classifier: Callable[..., th.Tensor], scale: float
) -> Callable[..., th.Tensor]:
    """The `cond_fn` of samplers: scale times the gradient of log p(y | x_t) with respect to x_t
    (arXiv 2105.05233, section 4).

    :param classifier: callable (x, timesteps) -> logits `[N x classes]`.
    """

    def gradient(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor, **_: th.Tensor) -> th.Tensor:
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probabilities = F.log_softmax(classifier(x, timesteps).float(), dim=1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            return th.autograd.grad(chosen, x)[0] * scale

    return gradient


def ignoring_classes(model: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """A network that has no classes, in places where one is handed the classes of the images."""

    def call(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        return model(x, timesteps, **kwargs)

    return call
