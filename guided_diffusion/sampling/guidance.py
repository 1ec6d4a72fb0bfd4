"""Guidance: trade diversity for fidelity to the class or mask."""

from collections.abc import Callable

import torch as th
import torch.nn.functional as F


class ClassifierFree:
    """Classifier-free guidance of a conditional network (arXiv 2207.12598, equation 6).

    prediction = unconditional + scale (conditional - unconditional), with scale = 1 + w in the
    paper's notation. Learned variances are the conditional ones. Each call predicts twice.

    :param model: network trained with condition dropout, called as model(x, timesteps, y=classes).
    :param scale: 1 gives the conditional prediction.
    :param null: value of the condition that stands for "none".
    :param name: the argument that holds the condition, by default the class "y".
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
    """A `cond_fn` for samplers: scale times the gradient of log p(y | x_t) with respect to x_t.

    Section 4 of arXiv 2105.05233.

    :param classifier: callable (x, timesteps) -> logits `[N x classes]`.
    :return: callable (x, timesteps, y) -> gradient of the shape of `x`.
    """

    def gradient(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor, **_: th.Tensor) -> th.Tensor:
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probabilities = F.log_softmax(classifier(x, timesteps).float(), dim=1)
            chosen = log_probabilities.gather(1, y[:, None]).sum()
            return th.autograd.grad(chosen, x)[0] * scale

    return gradient


def ignoring_classes(model: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """Wrap an unconditional network so that it accepts and ignores classes."""

    def call(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        return model(x, timesteps, **kwargs)

    return call
