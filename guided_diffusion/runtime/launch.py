"""How this process was started: by mpiexec, torchrun, Slurm's srun, or alone.

Found from the environment variables of the launchers; nothing is imported for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from guided_diffusion.runtime.errors import UserError

# (number of ranks, rank) as set by mpiexec of Open MPI and of MVAPICH.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Step numbers from here on are Slurm's own: the batch script, salloc's shell and the like.
SLURM_SPECIAL_STEPS = 0xFFFFFFF0

# Ports for Slurm jobs lie below the range that Linux hands out by itself.
SLURM_FIRST_PORT = 15000
SLURM_NUM_PORTS = 15000


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process.

    `world_size` is None where only the MPI library knows it; `address` is where rank 0 is to be
    met, None where that is still to be agreed upon.
    """

    kind: str  # "alone", "mpi", "torchrun" or "slurm"
    rank: int = 0
    world_size: int | None = 1
    address: tuple[str, int] | None = None


def find_launch(env: Mapping[str, str]) -> Launch:
    """Read the launchers' variables from `env` (os.environ).

    The innermost launcher counts: torchrun or mpiexec may run inside a Slurm step. A process of a
    batch script or of an interactive shell under Slurm sees Slurm's variables too, but no step of
    several tasks: it is alone.
    """
    if all(env.get(name) for name in TORCHRUN_VARIABLES):
        address = env["MASTER_ADDR"], _integer(env, "MASTER_PORT")
        return _launch("torchrun", _integer(env, "RANK"), _integer(env, "WORLD_SIZE"), address)
    for size, rank in MPI_VARIABLES:
        if env.get(size):
            return _launch("mpi", _integer(env, rank), _integer(env, size))
    # PMI variables come from mpiexec of MPICH and Intel MPI, which count the node's ranks too, but
    # also from srun --mpi=pmi2, where Slurm's own variables say more.
    in_slurm = bool(env.get("SLURM_JOB_ID"))
    if env.get("PMI_SIZE") and (env.get("MPI_LOCALNRANKS") or not in_slurm):
        return _launch("mpi", _integer(env, "PMI_RANK"), _integer(env, "PMI_SIZE"))
    if env.get("PMIX_RANK") and not in_slurm:
        return _launch("mpi", _integer(env, "PMIX_RANK"), None)
    if env.get("SLURM_STEP_ID") and _integer(env, "SLURM_STEP_ID") < SLURM_SPECIAL_STEPS:
        return _find_step(env)
    return Launch("alone")


def expand_nodelist(nodelist: str) -> list[str]:
    """The host names that Slurm writes as "gpu[01-03,7],login1" or "rack[1-2]node[1-4]"."""
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


def _find_step(env: Mapping[str, str]) -> Launch:
    size = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world_size = _integer(env, size, 1)
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
            f"Slurm's list of nodes {nodelist!r} cannot be read: set MASTER_ADDR to the host name "
            "of the first node"
        )
    # Two jobs, or two steps of one job, may share a node: each has a port of its own.
    number = 64 * _integer(env, "SLURM_JOB_ID", 0) + _integer(env, "SLURM_STEP_ID")
    port = _integer(env, "MASTER_PORT", SLURM_FIRST_PORT + number % SLURM_NUM_PORTS)
    return _launch("slurm", _integer(env, "SLURM_PROCID"), world_size, (host, port))


def _launch(
    kind: str, rank: int, world_size: int | None, address: tuple[str, int] | None = None
) -> Launch:
    if world_size is not None and not 0 <= rank < world_size:
        raise UserError(
            f"the environment says rank {rank} of {world_size} ({kind}): left over from another "
            "launcher? Start from a fresh shell"
        )
    return Launch(kind, rank, world_size, address)


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {text!r}, which is no whole number"
        ) from None
