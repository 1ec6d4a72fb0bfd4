"""The precision of a comparison: the same for all its runs, on whichever machine each is made."""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.networks.precision import choose_for
from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.messages import say
from guided_diffusion.segmentation.evaluation.efficiency_tables import results_by_folder


def flags(precision: str, output: str) -> list[str]:
    """The flags of training and evaluation; prints why, where the processor decides.

    [] on a GPU where nothing names a precision: there the flags of each method decide.

    :param precision: the flag of the comparison.
    :param output: its folder, whose finished runs decide otherwise; older versions knew float32.
    :raises UserError: for fp16 on a CPU.
    """
    device = dist_util.dev()
    earlier = next(iter(results_by_folder(output).values()), None)
    began = earlier.get("precision", "" if device.type == "cuda" else "fp32") if earlier else ""
    if precision in AUTO and not began and device.type == "cuda":
        return []
    chosen, note = choose_for(device, precision, began)
    if note:
        say(note)
    return ["--precision", chosen]


def without(commands: Sequence[str]) -> list[str]:
    """Commands as versions without the flag wrote them, whose runs are float32."""
    return [command.replace(" --precision fp32", "") for command in commands]
