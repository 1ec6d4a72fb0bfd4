"""Which precision is the default: by the processor's units, by flags, and by how a run began."""

import pytest
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.networks import precision
from guided_diffusion.networks.precision import (
    choose,
    choose_for,
    computes_bf16_faster,  # the function itself: conftest replaces the module's
    default_on,
    in_precision,
)
from guided_diffusion.runtime.errors import UserError

SAYS_DEFAULT = (
    "precision bf16: this processor computes it faster than fp32; --precision fp32 to change"
)


@pytest.fixture
def amx(monkeypatch):
    """A processor with AMX, which torch uses."""
    monkeypatch.setattr(th.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(th.cpu, "_init_amx", lambda: True, raising=False)
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return monkeypatch


class TestCapability:
    def test_matrix_units_that_torch_uses(self, amx):
        assert computes_bf16_faster()

    @pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_init_amx"])
    def test_none_or_not_granted_or_unknown_to_torch(self, amx, name):
        amx.setattr(th.cpu, name, lambda: False)
        assert not computes_bf16_faster()
        amx.delattr(th.cpu, name)
        assert not computes_bf16_faster()

    def test_a_build_without_onednn(self, amx):
        amx.setattr(th.backends.mkldnn, "is_available", lambda: False)
        assert not computes_bf16_faster()

    @pytest.mark.parametrize(
        ("allowed", "uses"),
        [("avx2", False), ("AVX512_CORE_BF16", False), ("ALL", True), ("AVX512_CORE_AMX", True)],
    )
    def test_instructions_that_the_user_forbids(self, amx, allowed, uses):
        amx.setenv("ONEDNN_MAX_CPU_ISA", allowed)
        assert computes_bf16_faster() == uses

    @pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
    def test_instructions_that_torch_is_told_not_to_use(self, amx, capability):
        """ATEN_CPU_CAPABILITY: torch's attention then fails in bfloat16 on processors with AMX."""
        amx.setattr(th.backends.cpu, "get_cpu_capability", lambda: capability)
        assert not computes_bf16_faster()

    def test_the_default_is_of_the_device(self, bf16_units):
        assert default_on("cpu") == "bf16"
        assert default_on("cuda") == "fp32"

    def test_without_units(self):
        assert default_on("cpu") == "fp32"


@pytest.fixture
def on(monkeypatch):
    """Chooses as on a device with or without bfloat16 units."""

    def set_device(kind: str, units: bool) -> None:
        monkeypatch.setattr(dist_util, "dev", lambda: th.device(kind))
        monkeypatch.setattr(precision, "computes_bf16_faster", lambda: units)

    return set_device


@pytest.mark.parametrize(
    ("kind", "units", "flags", "chosen"),
    [
        ("cpu", True, {}, "bf16"),
        ("cpu", False, {}, "fp32"),
        ("cuda", True, {}, "fp32"),
        ("cpu", True, {"precision": "auto"}, "bf16"),
        ("cpu", True, {"precision": "fp32"}, "fp32"),
        ("cpu", False, {"precision": "bf16"}, "bf16"),
        ("cuda", False, {"use_fp16": True}, "fp16"),
        ("cuda", False, {"use_fp16": True, "precision": "fp32"}, "fp32"),
        ("cpu", True, {"use_fp16": True}, "bf16"),
        ("cpu", False, {"use_fp16": True}, "fp32"),
        # a resumed run keeps its own
        ("cpu", True, {"began": "fp32"}, "fp32"),
        ("cpu", False, {"began": "bf16"}, "bf16"),
        ("cuda", False, {"began": "bf16"}, "bf16"),
        ("cuda", False, {"began": "bf16", "use_fp16": True}, "bf16"),
        ("cpu", True, {"began": "bf16", "precision": "fp32"}, "fp32"),
        ("cuda", False, {"began": "fp16"}, "fp16"),
        ("cpu", True, {"began": "fp16"}, "fp16"),  # which a Stepper computes in fp32
        # unless use_fp16 is given otherwise than before
        ("cuda", False, {"began": "fp32", "use_fp16": True, "use_fp16_changed": True}, "fp16"),
        ("cuda", False, {"began": "fp16", "use_fp16_changed": True}, "fp32"),
        ("cpu", True, {"began": "fp32", "use_fp16": True, "use_fp16_changed": True}, "fp32"),
        ("cpu", False, {"began": "bf16", "use_fp16_changed": True}, "bf16"),
    ],
)
def test_a_training(on, kind, units, flags, chosen):
    on(kind, units)
    assert choose(**{"precision": "", **flags}).precision == chosen


@pytest.mark.parametrize(
    ("units", "flags", "note"),
    [
        (True, {}, SAYS_DEFAULT),
        (False, {}, ""),
        (True, {"precision": "bf16"}, ""),
        (True, {"precision": "fp32"}, ""),
        (True, {"began": "bf16"}, "precision bf16, in which this began"),
        (
            False,
            {"began": "bf16"},
            "precision bf16, in which this began: this processor gains little or nothing from it",
        ),
        (
            False,
            {"precision": "bf16"},
            "precision bf16: this processor gains little or nothing from it",
        ),
        (False, {"use_fp16": True}, "float16 needs CUDA: training in float32 on the CPU"),
        (True, {"use_fp16": True}, "float16 needs CUDA: training in bfloat16 on the CPU"),
        (True, {"precision": "fp16"}, "float16 needs CUDA: training in float32 on the CPU"),
        (True, {"began": "fp16"}, "float16 needs CUDA: training in float32 on the CPU"),
        (True, {"use_fp16": True, "precision": "fp32"}, ""),
    ],
)
def test_what_a_training_says(on, units, flags, note):
    on("cpu", units)
    assert choose(**{"precision": "", **flags}).note == note


def test_ranks_agree_on_what_all_of_them_compute_fast(monkeypatch, bf16_units):
    asked = []

    def one_other_is_slower(value: int) -> int:
        asked.append(value)
        return 1

    monkeypatch.setattr(dist_util, "agree_max", one_other_is_slower)
    assert choose("").precision == "fp32"
    assert asked == [0]


def test_prediction(bf16_units):
    assert choose_for("cpu", "") == ("bf16", SAYS_DEFAULT)
    assert choose_for("cpu", "fp32") == ("fp32", "")
    assert choose_for("cuda", "auto") == ("fp32", "")
    assert choose_for("cuda", "fp16") == ("fp16", "")
    assert choose_for("cpu", "", began="fp32") == ("fp32", "")
    assert choose_for("cpu", "", default="fp32") == ("fp32", "")
    with pytest.raises(UserError, match="--precision fp16 needs a GPU of CUDA: use bf16 or fp32"):
        choose_for("cpu", "fp16")
    with pytest.raises(UserError, match="--precision fp8: choose one of fp32, fp16, bf16"):
        choose_for("cpu", "fp8")


def test_only_the_network_computes_in_it():
    network, seen = th.nn.Linear(4, 4), []
    network.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    x = th.zeros(1, 4)
    assert in_precision(network, "fp32", "cpu") is network
    in_precision(network, "bf16", "cpu")(x)
    network(x)
    assert seen == [th.bfloat16, th.float32]
    assert not th.is_autocast_enabled("cpu")
