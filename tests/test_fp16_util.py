"""guided_diffusion.fp16_util: float16 weights with float32 masters, as in the original."""

import copy

import pytest
import torch as th
from torch import nn

from guided_diffusion import fp16_util
from guided_diffusion.fp16_util import (
    MixedPrecisionTrainer,
    check_overflow,
    convert_module_to_f16,
    convert_module_to_f32,
    get_param_groups_and_shapes,
    make_master_params,
    master_params_to_model_params,
    master_params_to_state_dict,
    model_grads_to_master_grads,
    param_grad_or_zeros,
    state_dict_to_master_params,
    unflatten_master_params,
    zero_grad,
    zero_master_grads,
)


class Network(nn.Module):
    """A float16 convolution between float32 layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.torso = nn.Sequential(nn.Conv1d(1, 2, 3), nn.SiLU())
        self.last = nn.Linear(8, 1)

    def convert_to_fp16(self):
        self.torso.apply(convert_module_to_f16)

    def convert_to_fp32(self):
        self.torso.apply(convert_module_to_f32)

    def forward(self, x):
        h = self.torso(self.first(x)[:, None].to(self.torso[0].weight.dtype))
        return self.last(h.flatten(1).float())


def network() -> Network:
    th.manual_seed(0)
    return Network()


def loss_of(model, step: int) -> th.Tensor:
    generator = th.Generator().manual_seed(step)
    return (model(th.randn(5, 6, generator=generator)) - 1).square().mean()


class TestConversion:
    @pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
    @pytest.mark.parametrize("bias", [True, False])
    def test_convolutions(self, layer, bias):
        module = layer(2, 3, 1, bias=bias)
        before = copy.deepcopy(module.state_dict())
        convert_module_to_f16(module)
        assert {p.dtype for p in module.parameters()} == {th.float16}
        convert_module_to_f32(module)
        assert {p.dtype for p in module.parameters()} == {th.float32}
        for name, value in module.state_dict().items():
            assert th.equal(value, before[name].half().float())

    @pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.SiLU()])
    def test_others_stay(self, module):
        convert_module_to_f16(module)
        assert all(p.dtype == th.float32 for p in module.parameters())


class TestMasters:
    def masters(self):
        model = network()
        model.convert_to_fp16()
        groups = get_param_groups_and_shapes(model.named_parameters())
        return model, groups, make_master_params(groups)

    def test_two_flat_groups_vectors_and_the_rest(self):
        _, groups, masters = self.masters()
        assert [[name for name, _ in named] for named, _ in groups] == [
            ["first.bias", "torso.0.bias", "last.bias"],
            ["first.weight", "torso.0.weight", "last.weight"],
        ]
        assert [tuple(m.shape) for m in masters] == [(6 + 2 + 1,), (1, 36 + 6 + 8)]
        assert all(m.dtype == th.float32 and m.requires_grad for m in masters)

    def test_there_and_back(self):
        model, groups, masters = self.masters()
        for (named, _), master in zip(groups, masters):
            parts = unflatten_master_params(named, master)
            for (_, param), part in zip(named, parts, strict=True):
                assert th.equal(param.float(), part)
        with th.no_grad():
            for master in masters:
                master.mul_(2)
        before = [p.detach().clone() for p in model.parameters()]
        master_params_to_model_params(groups, masters)
        for param, old in zip(model.parameters(), before):
            assert param.dtype == old.dtype
            th.testing.assert_close(param.detach(), 2 * old)

    def test_gradients(self):
        model, groups, masters = self.masters()
        loss_of(model, 0).backward()
        model.last.bias.grad = None
        model_grads_to_master_grads(groups, masters)
        expected = th.cat([model.first.bias.grad, model.torso[0].bias.grad.float(), th.zeros(1)])
        assert th.equal(masters[0].grad, expected)
        assert masters[1].grad.shape == masters[1].shape
        assert th.equal(param_grad_or_zeros(model.last.bias), th.zeros(1))
        zero_master_grads(masters)
        assert all(m.grad is None for m in masters)
        zero_grad(model.parameters())
        assert not model.first.bias.grad.any()
        assert model.last.bias.grad is None

    @pytest.mark.parametrize("use_fp16", [True, False])
    def test_state_dicts(self, use_fp16):
        model, groups, masters = self.masters()
        if not use_fp16:
            model = network()
            groups, masters = None, [p.detach() + 1 for p in model.parameters()]
        state = master_params_to_state_dict(model, groups, masters, use_fp16)
        assert list(state) == list(model.state_dict())
        assert all(value.dtype == th.float32 for value in state.values())
        if not use_fp16:
            assert th.equal(state["last.bias"], model.last.bias + 1)
        back = state_dict_to_master_params(model, state, use_fp16)
        assert all(th.equal(a, b) for a, b in zip(back, masters, strict=True))


def train(use_fp16: bool, steps: int = 20, **options) -> tuple[MixedPrecisionTrainer, list[float]]:
    trainer = MixedPrecisionTrainer(model=network(), use_fp16=use_fp16, **options)
    opt = th.optim.AdamW(trainer.master_params, lr=1e-2, foreach=False)
    losses = []
    for step in range(steps):
        trainer.zero_grad()
        loss = loss_of(trainer.model, step)
        trainer.backward(loss)
        assert trainer.optimize(opt)
        losses.append(loss.item())
    return trainer, losses


class TestTrainer:
    def test_without_float16_it_is_plain_training(self):
        trainer, losses = train(False)
        model = network()
        opt = th.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for step, loss in enumerate(losses):
            opt.zero_grad()
            ours = loss_of(model, step)
            ours.backward()
            opt.step()
            assert ours.item() == loss
        assert trainer.lg_loss_scale == 20

    def test_with_float16_it_is_nearly_the_same(self):
        _, plain = train(False)
        trainer, half = train(True, initial_lg_loss_scale=8.0, fp16_scale_growth=0.5)
        assert half == pytest.approx(plain, rel=2e-2)
        assert half != plain
        assert half[-1] < half[0]
        assert trainer.lg_loss_scale == 8 + 20 * 0.5
        assert trainer.model.torso[0].weight.dtype == th.float16
        state = trainer.master_params_to_state_dict(trainer.master_params)
        for name, value in trainer.model.state_dict().items():
            assert th.equal(state[name].to(value.dtype), value)
        back = trainer.state_dict_to_master_params(state)
        assert all(th.equal(a, b) for a, b in zip(back, trainer.master_params))

    def test_an_overflow_skips_the_step_and_halves_the_scale(self):
        trainer, _ = train(True, 2, initial_lg_loss_scale=8.0, fp16_scale_growth=0.0)
        opt = th.optim.AdamW(trainer.master_params, lr=1e-2)
        before = [m.detach().clone() for m in trainer.master_params]
        for scale in (7.0, 6.0):
            trainer.zero_grad()
            trainer.backward(loss_of(trainer.model, 3) * float("inf"))
            assert not trainer.optimize(opt)
            assert trainer.lg_loss_scale == scale
        assert all(th.equal(a, b) for a, b in zip(before, trainer.master_params))

    @pytest.mark.parametrize(
        ("value", "bad"), [(1.0, False), (0.0, False), (float("inf"), True), (float("nan"), True)]
    )
    def test_check_overflow(self, value, bad):
        assert check_overflow(value) is bad
        assert check_overflow(-value) is bad

    def test_it_converts_the_networks_here(self):
        from loop_util import TINY

        model = TINY.build()
        trainer = fp16_util.MixedPrecisionTrainer(model=model, use_fp16=True)
        assert {p.dtype for p in model.parameters()} == {th.float16, th.float32}
        assert sum(m.numel() for m in trainer.master_params) == sum(
            p.numel() for p in model.parameters()
        )
