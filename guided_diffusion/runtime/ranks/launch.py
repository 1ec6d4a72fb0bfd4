"""How this process was started: by mpiexec, torchrun, Slurm's srun, or alone.

The launchers' environment variables say so; no library is needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from guided_diffusion.runtime.errors import UserError

# (number of ranks, rank), set by mpiexec of Open MPI and of MVAPICH.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Step numbers from here on are reserved by Slurm: the batch script, salloc's shell and the like.
SLURM_SPECIAL_STEPS = 0xFFFFFFF0

# Ports for Slurm jobs, below the range from which Linux assigns ports.
SLURM_FIRST_PORT = 15000
SLURM_NUM_PORTS = 15000


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process.

    `world_size` is None if only the MPI library knows it. `address` is the host and port of rank 0,
    None if the ranks have yet to agree on one.
    """

    kind: str  # "alone", "mpi", "torchrun" or "slurm"
    rank: int = 0
    world_size: int | None = 1
    address: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if self.world_size is not None and not 0 <= self.rank < self.world_size:
            raise UserError(
                f"the environment says rank {self.rank} of {self.world_size} ({self.kind}): left "
                "over from another launcher? Start from a fresh shell"
            )


def find_launch(env: Mapping[str, str]) -> Launch:
    """Read the launchers' variables from `env` (os.environ).

    The innermost launcher counts: torchrun or mpiexec may run inside a Slurm step. A process in a
    batch script or an interactive shell under Slurm also sees Slurm's variables, but no step of
    several tasks: it is alone.

    :raises UserError: if the variables are inconsistent or cannot be parsed.
    """
    if all(env.get(name) for name in TORCHRUN_VARIABLES):
        address = env["MASTER_ADDR"], _get_int(env, "MASTER_PORT")
        return Launch("torchrun", _get_int(env, "RANK"), _get_int(env, "WORLD_SIZE"), address)
    for size, rank in MPI_VARIABLES:
        if env.get(size):
            return Launch("mpi", _get_int(env, rank), _get_int(env, size))
    # PMI variables are set by mpiexec of MPICH and Intel MPI, which also count the ranks per node,
    # and by srun --mpi=pmi2, where Slurm's own variables are more informative.
    in_slurm = bool(env.get("SLURM_JOB_ID"))
    if env.get("PMI_SIZE") and (env.get("MPI_LOCALNRANKS") or not in_slurm):
        return Launch("mpi", _get_int(env, "PMI_RANK"), _get_int(env, "PMI_SIZE"))
    if env.get("PMIX_RANK") and not in_slurm:
        return Launch("mpi", _get_int(env, "PMIX_RANK"), None)
    if env.get("SLURM_STEP_ID") and _get_int(env, "SLURM_STEP_ID") < SLURM_SPECIAL_STEPS:
        return _find_slurm_step(env)
    return Launch("alone")


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand Slurm's "gpu[01-03,7],login1" or "rack[1-2]node[1-4]" to a list of host names.

    :raises ValueError: if a range is not of numbers.
    """
    hosts = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", nodelist):
        hosts += _expand_brackets(part)
    return hosts


def _expand_brackets(part: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    head, tails = part[: match.start()], _expand_brackets(part[match.end() :])
    names = []
    for item in match[1].split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{head}{number:0{len(first)}d}{tail}" for tail in tails]
    return names


def _find_slurm_step(env: Mapping[str, str]) -> Launch:
    size = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world_size = _get_int(env, size, 1)
    if world_size == 1:
        return Launch("slurm")
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or ""
    try:
        hosts = expand_nodelist(nodelist)
    except ValueError:
        hosts = []
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if len(hosts) == 1 else "".join(hosts[:1]))
    if not host:
        raise UserError(
            f"cannot parse Slurm's list of nodes {nodelist!r}: set MASTER_ADDR to the host name "
            "of the first node"
        )
    # Two jobs, or two steps of one job, may share a node: each gets its own port.
    number = 64 * _get_int(env, "SLURM_JOB_ID", 0) + _get_int(env, "SLURM_STEP_ID")
    port = _get_int(env, "MASTER_PORT", SLURM_FIRST_PORT + number % SLURM_NUM_PORTS)
    return Launch("slurm", _get_int(env, "SLURM_PROCID"), world_size, (host, port))


def _get_int(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {text!r}, which is not an integer"
        ) from None
