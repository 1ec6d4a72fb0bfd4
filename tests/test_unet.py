"""The networks against numbers recorded from guided-diffusion, and the segmentation network."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from golden_util import GOLDEN, fill_parameters, relative, tensor

from guided_diffusion import unet
from guided_diffusion.unet import ConditionalUNetModel, SegmentationUNetModel, UNetModel

MODELS = json.loads((GOLDEN / "models.json").read_text())
NUMBERS = np.load(GOLDEN / "models.npz")
SMALL = {
    "image_size": 16,
    "in_channels": 1,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}


def build(name: str) -> th.nn.Module:
    case = MODELS[name]
    return fill_parameters(getattr(unet, case["cls"])(**case["kwargs"])).eval()


def inputs(name: str) -> tuple[th.Tensor, dict]:
    kwargs = MODELS[name]["kwargs"]
    size = kwargs["image_size"]
    extra = {}
    if kwargs.get("num_classes"):
        extra["y"] = th.arange(2) % kwargs["num_classes"]
    if MODELS[name]["cls"] == "SuperResModel":
        extra["low_res"] = tensor(f"{name}/low_res", 2, 3, 8, 8)
    return tensor(f"{name}/x", 2, kwargs["in_channels"], size, size), extra


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_has_the_recorded_names_and_shapes_in_order(name):
    own = [(key, list(value.shape)) for key, value in build(name).state_dict().items()]
    assert own == [(key, shape) for key, shape in MODELS[name]["state_dict"].items()]


@pytest.mark.parametrize("checkpointed", [False, True, "norms"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_recorded_ones(name, checkpointed):
    model = build(name)
    for module in model.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = checkpointed
    x, extra = inputs(name)
    x.requires_grad_(True)
    out = model(x, th.tensor([3.0, 741.0]), **extra)
    out.square().mean().backward()
    norm = th.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert relative(out.detach(), NUMBERS[f"{name}/out"]) < 1e-5
    assert relative(x.grad, NUMBERS[f"{name}/grad_x"]) < 1e-4
    assert relative(norm, NUMBERS[f"{name}/grad_norm"]) < 1e-4


def test_the_file_imports_only_what_the_original_package_has():
    allowed = {
        "fp16_util": {"convert_module_to_f16", "convert_module_to_f32"},
        "nn": {"checkpoint", "conv_nd", "linear", "avg_pool_nd", "zero_module", "normalization"}
        | {"timestep_embedding"},
    }
    for node in ast.walk(ast.parse(Path(unet.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert {alias.name for alias in node.names} <= allowed[node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in {"torch", "collections", "typing"}


@pytest.mark.parametrize("name", ["unet_paper", "unet_new_attention_order"])
def test_bfloat16_autocast_follows_float32(name):
    model, (x, extra) = build(name), inputs(name)
    timesteps = th.tensor([3.0, 741.0])
    with th.no_grad():
        exact = model(x, timesteps, **extra)
        with th.autocast("cpu", dtype=th.bfloat16):
            rough = model(x, timesteps, **extra).float()
    assert (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointed", [True, "norms"])
def test_checkpointing_draws_the_same_dropout_and_bears_frozen_parameters(frozen, checkpointed):
    grads = []
    for use_checkpoint in (False, checkpointed):
        model = fill_parameters(
            UNetModel(
                **SMALL,
                out_channels=1,
                channel_mult=(1, 2),
                dropout=0.3,
                use_checkpoint=use_checkpoint,
            )
        ).train()
        model.input_blocks.requires_grad_(not frozen)
        th.manual_seed(0)
        with th.autocast("cpu", dtype=th.bfloat16):
            out = model(tensor("x", 2, 1, 16, 16), th.tensor([1.0, 2.0]))
        out.float().square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(th.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("precision", [th.float32, th.bfloat16])
def test_recomputing_norms_keeps_less_and_gives_the_same_gradients(precision):
    """Whatever a block consists of: up, down, scale and shift, attention, another width."""
    arguments = {**SMALL, "model_channels": 32, "out_channels": 1, "channel_mult": (1, 2)}
    grads, kept = [], []
    for use_checkpoint in (False, "norms"):
        model = fill_parameters(UNetModel(**arguments, use_checkpoint=use_checkpoint)).train()
        outside: dict[int, int] = {}

        def count(saved, outside=outside):
            storage = saved.untyped_storage()
            outside[storage.data_ptr()] = storage.nbytes()
            return saved

        x = tensor("x", 2, 1, 16, 16)
        hooks = th.autograd.graph.saved_tensors_hooks(count, lambda saved: saved)
        with hooks, th.autocast("cpu", dtype=th.bfloat16, enabled=precision == th.bfloat16):
            out = model(x, th.tensor([1.0, 2.0]))
        for parameter in model.parameters():
            outside.pop(parameter.data_ptr(), None)
        out.float().square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        kept.append(sum(outside.values()))
    assert all(th.equal(a, b) for a, b in zip(*grads))
    assert kept[1] < 0.8 * kept[0]


def test_wrong_calls_say_what_is_wrong():
    model = UNetModel(**SMALL, out_channels=1, channel_mult=(1, 2))
    with pytest.raises(ValueError, match="classes y"):
        model(th.zeros(1, 1, 16, 16), th.zeros(1), y=th.zeros(1, dtype=th.long))
    with pytest.raises(ValueError, match="not a multiple"):
        unet.AttentionBlock(48, num_head_channels=32)
    with pytest.raises(ValueError, match="pool is one of"):
        unet.EncoderUNetModel(**SMALL, out_channels=2, pool="max")


class TestSegmentation:
    @pytest.mark.parametrize("mult", [(1,), (1, 2), (0.5, 1, 1.5, 2)])
    @pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 9)])
    def test_any_depth_and_any_size(self, mult, size):
        kwargs = {**SMALL, "num_head_channels": -1, "num_heads": 1}
        model = SegmentationUNetModel(**kwargs, out_channels=5, channel_mult=mult).eval()
        assert model(th.zeros(2, 1, *size)).shape == (2, 5, *size)
        assert model.depth == len(mult)

    def test_forward_uses_the_fixed_timestep(self):
        model = fill_parameters(
            SegmentationUNetModel(**SMALL, out_channels=3, channel_mult=(1, 2), timestep=7)
        ).eval()
        x = tensor("x", 2, 1, 16, 16)
        assert th.equal(model(x), model(x, th.full((2,), 7.0)))
        assert not th.equal(model(x), model(x, th.full((2,), 700.0)))

    def test_padding_leaves_divisible_sizes_alone_and_crops_back(self):
        model = fill_parameters(
            SegmentationUNetModel(**SMALL, out_channels=3, channel_mult=(1, 2, 2))
        ).eval()
        x = tensor("x", 1, 1, 13, 18)
        padded = th.nn.functional.pad(x, (0, 2, 0, 3), mode="replicate")
        assert th.equal(model(x), model(padded)[..., :13, :18])

    def test_load_pretrained_of_equal_depth_takes_all_but_the_output_layer(self):
        donor = fill_parameters(UNetModel(**SMALL, out_channels=2, channel_mult=(1, 2)))
        model = SegmentationUNetModel(**SMALL, out_channels=2, channel_mult=(1, 2))
        report = model.load_pretrained(donor.state_dict())
        assert report.fresh == report.dropped == ["out.2.weight", "out.2.bias"]
        theirs, ours = donor.state_dict(), model.state_dict()
        assert all(th.equal(theirs[name], ours[name]) for name in report.loaded)
        assert not ours["out.2.weight"].any()

    def test_depth_keeps_the_finest_levels_of_both_halves(self):
        mult = (1, 2, 3, 4)
        donor = fill_parameters(UNetModel(**SMALL, out_channels=2, channel_mult=mult))
        model = SegmentationUNetModel(**SMALL, out_channels=5, channel_mult=mult, depth=2)
        report = model.load_pretrained(donor.state_dict())
        theirs, ours = donor.state_dict(), model.state_dict()
        # the last two blocks of the finest level and the last of the second survive unchanged
        for here, there in [("output_blocks.3.0", "output_blocks.7.0")]:
            key = "in_layers.2.weight"
            assert th.equal(ours[f"{here}.{key}"], theirs[f"{there}.{key}"])
        fresh = {".".join(name.split(".")[:2]) for name in report.fresh}
        assert {"middle_block.0", "middle_block.1", "middle_block.2", "out.2"} <= fresh
        assert fresh <= {"middle_block.0", "middle_block.1", "middle_block.2", "out.2"} | {
            "output_blocks.0"
        }
        assert "input_blocks.5.0.in_layers.2.weight" in report.dropped
        assert not any(name in report.loaded for name in report.fresh)
        assert sorted(report.loaded + report.fresh) == sorted(ours)

    def test_a_checkpoint_of_which_nothing_fits_is_refused(self):
        donor = UNetModel(**{**SMALL, "model_channels": 64}, out_channels=2, channel_mult=(1, 2))
        model = SegmentationUNetModel(**SMALL, out_channels=2, channel_mult=(1, 2))
        with pytest.raises(ValueError, match=r"nothing of the checkpoint fits.*64.*32"):
            model.load_pretrained(donor.state_dict())
        with pytest.raises(ValueError, match="no tensor has a name"):
            model.load_pretrained({"conv1.weight": th.zeros(1)})

    @pytest.mark.parametrize("depth", [0, 3])
    def test_an_impossible_depth_is_refused(self, depth):
        with pytest.raises(ValueError, match=f"depth={depth} of a network of 2 levels"):
            SegmentationUNetModel(**SMALL, out_channels=2, channel_mult=(1, 2), depth=depth)


class TestCondition:
    @staticmethod
    def pretrained(**more):
        return fill_parameters(UNetModel(**SMALL, out_channels=2, channel_mult=(1, 2), **more))

    def test_super_resolution_is_the_special_case_of_an_enlarged_condition(self):
        arguments = {**SMALL, "out_channels": 1, "channel_mult": (1, 2)}
        special = fill_parameters(unet.SuperResModel(**arguments)).eval()
        general = fill_parameters(ConditionalUNetModel(**arguments, cond_channels=1)).eval()
        x, t, small = tensor("x", 2, 1, 16, 16), th.tensor([3.0, 40.0]), tensor("small", 2, 1, 8, 8)
        large = th.nn.functional.interpolate(small, 16, mode="bilinear")
        assert th.equal(special(x, t, small), general(x, t, large))

    @pytest.mark.parametrize("at", [0, 3])
    def test_widening_with_zeros_leaves_the_pretrained_output_unchanged(self, at):
        pretrained = self.pretrained().eval()
        kwargs = {**SMALL, "in_channels": 1 if at == 0 else 3, "out_channels": 2}
        network = ConditionalUNetModel(
            **kwargs, channel_mult=(1, 2), cond_channels=4 - kwargs["in_channels"]
        ).eval()
        report = network.load_widened(pretrained.state_dict(), at)
        assert report.fresh == report.dropped == []
        image, other, t = tensor("i", 2, 1, 16, 16), tensor("o", 2, 3, 16, 16), th.tensor([1, 30])
        noisy, cond = (image, other) if at == 0 else (other, image)
        expected = pretrained(image, t)
        assert relative(network(noisy, t, cond).detach(), expected.detach()) < 1e-5
        if at == 0:
            assert th.equal(network(noisy, t), network(noisy, t, th.zeros_like(cond)))
        # and it can learn to look
        network.zero_grad()
        network(noisy, t, cond).square().sum().backward()
        gradient = network.input_blocks[0][0].weight.grad
        assert all(gradient[:, channel].abs().max() > 0 for channel in range(4))

    def test_an_output_layer_of_other_channels_starts_fresh(self):
        kwargs = {**SMALL, "out_channels": 6, "channel_mult": (1, 2)}
        network = ConditionalUNetModel(**{**kwargs, "in_channels": 3}, cond_channels=1)
        report = network.load_widened(self.pretrained().state_dict(), 3)
        assert report.fresh == report.dropped == ["out.2.weight", "out.2.bias"]

    def test_a_checkpoint_of_which_nothing_fits_is_refused(self):
        network = ConditionalUNetModel(
            **{**SMALL, "model_channels": 64}, out_channels=1, channel_mult=(1, 2), cond_channels=1
        )
        state = {k: v for k, v in self.pretrained().state_dict().items() if "put_blocks" in k}
        with pytest.raises(ValueError, match="nothing of the checkpoint fits the network"):
            network.load_widened({k: v for k, v in state.items() if v.ndim == 4})


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("timestep", [None, 150.0])
def test_a_folded_network_computes_the_same(scale_shift, timestep):
    model = SegmentationUNetModel(
        **{**SMALL, "use_scale_shift_norm": scale_shift}, out_channels=3, timestep=7
    )
    fill_parameters(model).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = tensor("folded", 2, 1, 19, 21)
    folded = model.folded(timestep)
    with th.no_grad():
        expected = model(x, None if timestep is None else th.full((2,), timestep))
        assert relative(folded(x), expected) < 1e-5
        assert relative(model(x, th.full((2,), 900.0)), expected) > 1e-3  # time does matter
    assert all(th.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="folded into the weights"):
        folded(x, th.ones(2))
    with pytest.raises(ValueError, match="folded already"):
        folded.folded()


def test_doubling_is_nearest_neighbour_interpolation():
    x = tensor("doubled", 2, 3, 4, 5).requires_grad_()
    doubled = unet.Upsample(3, False)(x)
    expected = F.interpolate(x, scale_factor=2, mode="nearest")
    assert th.equal(doubled, expected)
    weights = th.linspace(-1, 1, doubled.numel()).view_as(doubled)
    ours, theirs = (th.autograd.grad((y * weights).sum(), x)[0] for y in (doubled, expected))
    th.testing.assert_close(ours, theirs)
