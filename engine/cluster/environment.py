"""The variables by which a launcher tells a process its rank, checked before anything waits.

deepspeed, torchrun and slurm.sh set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Open
MPI and MPICH have names of their own, and DeepSpeed asks mpi4py there. A process that was started
by hand has none of them.
"""

import os
import re
import socket

from magnetar.data.errors import UserError

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_LAST_PORT = 2**16 - 1
_WAY_OUT = "start it with magnetar train, which sets it, or unset it"


def launched_rank() -> int:
    """This process's rank; 0 if it was started by hand."""
    names = ("RANK", *(rank for rank, _, _ in _OF_MPI))
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def launched_local_size() -> int:
    """Number of ranks on this machine by the environment; all ranks if it does not say."""
    found = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), None)
    return int(found or os.environ["WORLD_SIZE"])


def own_error(message: str) -> UserError:
    """An error that this rank prints itself: LOCAL_RANK would silence all but one of a machine."""
    os.environ.pop("LOCAL_RANK", None)
    return UserError(message, on_every_rank=False)


def launched_world_size() -> int:
    """Number of ranks; 1 if this process was started by hand.

    Raises:
        UserError: a variable is missing, is no number, or contradicts another.
    """
    try:
        world_size = _world_size()
        _check_what_others_read()
        return world_size
    except UserError as error:
        raise own_error(str(error)) from None


def _world_size() -> int:
    given = [name for name in _OF_A_RANK if name in os.environ]
    mpi = next((names for names in _OF_MPI if any(name in os.environ for name in names[:2])), None)
    outer = _number(mpi[1], 1) if mpi else _slurm_tasks()
    if "WORLD_SIZE" in given and outer > (world_size := _number("WORLD_SIZE", 1)):
        raise UserError(
            f"WORLD_SIZE={world_size}, and mpirun or srun has started {outer} ranks: unset what is "
            f"left of another run: {', '.join(given)}"
        )
    if len(given) == len(_OF_A_RANK) or (given and mpi is None):
        for name in (*_OF_A_RANK, "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"{name} is not set, and {given[0]}={os.environ[given[0]]} is: a launcher sets "
                    f"both: start it with magnetar train, or unset {', '.join(given)}"
                )
        world_size = _checked_places(*_OF_A_RANK)
        if world_size > 1 and outer == world_size:  # or all ranks may have the RANK of another run
            _require_same("RANK", mpi[0] if mpi else "SLURM_PROCID")
        _number("MASTER_PORT", int(world_size > 1), _LAST_PORT)
        _check_address(os.environ["MASTER_ADDR"])
        return world_size
    if mpi is not None:
        for ours, its in zip(_OF_A_RANK, mpi, strict=True):
            if ours in given and its in os.environ:
                _require_same(ours, its)
        if "MASTER_PORT" in os.environ:
            _number("MASTER_PORT", 1, _LAST_PORT)
        return _checked_places(*mpi)
    if outer > 1:
        raise UserError(
            f"srun has started {outer} tasks, and RANK is not set: start launchers/slurm.sh in "
            "place of magnetar.launchers.train, or give --ntasks 1"
        )
    for name in _LOCAL_SIZES:
        if name in os.environ:
            _number(name, 1, 1)
    return 1


def _check_what_others_read() -> None:
    """Refuse variables for which DeepSpeed and gloo would end with a traceback."""
    theirs, is_mpi = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE" in os.environ
    if theirs in os.environ and ("LOCAL_RANK" in os.environ or not is_mpi):
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if _number(theirs, 0) != int(local_rank):
            raise UserError(
                f"{theirs}={os.environ[theirs]} is left of another run, for this process is local "
                f"rank {local_rank}: unset it"
            )
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in (known := [interface for _, interface in socket.if_nameindex()]):
            raise UserError(
                f"GLOO_SOCKET_IFNAME names {name}, which is no network interface of this machine: "
                f"use one of {', '.join(known)}, or unset it"
            )


def _slurm_tasks() -> int:
    """Tasks of the Slurm step that this process belongs to; 1 outside a step."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return 1
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    return next((_number(name, 1) for name in names if name in os.environ), 1)


def require_device(num_devices: int) -> None:
    """Refuse a rank for which this machine shows no GPU.

    Raises:
        UserError: naming LOCAL_RANK and the GPUs.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if int(local_rank) >= num_devices:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
        raise own_error(
            f"LOCAL_RANK={local_rank} needs a GPU of its own, and this process sees {num_devices}"
            f"{seen}: start fewer ranks on this machine, or show each rank all of its GPUs"
        )


def refuse_other_launchers(command: str) -> None:
    """Refuse to start ranks from several processes of mpirun or srun at once.

    Raises:
        UserError: naming the variable.
    """
    for rank, size, _ in _OF_MPI:
        if rank in os.environ or size in os.environ:
            _number(size, 1)
    for name in (*(size for _, size, _ in _OF_MPI), "SLURM_STEP_NUM_TASKS"):
        is_step = name != "SLURM_STEP_NUM_TASKS" or "SLURM_STEP_ID" in os.environ
        if is_step and (count := os.environ.get(name, "1")) != "1":
            raise UserError(
                f"{name}={count}: mpirun or srun starts `{command}` {count} times, which itself "
                "starts the ranks: use launchers/mpi.sh or launchers/slurm.sh, or start it once"
            )


def _checked_places(rank: str, size: str, local_rank: str) -> int:
    """The number of ranks, once this rank's place among them and on its machine is checked."""
    world_size = local_size = _number(size, 1)
    _number(rank, 0, world_size - 1, size)
    than = size
    for name in _LOCAL_SIZES:
        if name in os.environ:
            if than != size:
                _require_same(name, than)
            local_size, than = _number(name, 1, world_size, size), name
    if local_rank in os.environ:
        _number(local_rank, 0, local_size - 1, than)
    return world_size


def _number(name: str, least: int, most: int = 2**31, than: str = "") -> int:
    """The whole number that a variable holds; `than` is the variable that `most` comes from."""
    if name not in os.environ:
        there = ", ".join(_set_beside(name))
        raise UserError(f"{name} is not set beside {there}: {_way_out(name)}")
    text = os.environ[name]
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        why = f", since {than}={os.environ[than]}" if than else ""
        shown = text if len(text) < 80 else f"{text[:80]}..."
        raise UserError(
            f"{name}={shown} must be a whole number from {least} to {most}{why}: {_way_out(name)}"
        )
    return int(text)


def _set_beside(name: str) -> list[str]:
    """The variables that are set of those that a launcher sets together with one."""
    kind = next((names for names in _OF_MPI if name in names), _OF_A_RANK)
    return [each for each in kind if each in os.environ]


def _way_out(name: str) -> str:
    if any(name in names for names in _OF_MPI):
        return f"unset {', '.join(_set_beside(name))}, or start it with mpirun, which sets all"
    return _WAY_OUT


def _require_same(name: str, other: str) -> None:
    if _number(name, 0) != _number(other, 0):
        raise UserError(
            f"{name}={os.environ[name]} and {other}={os.environ[other]} say the same, and differ: "
            "unset the one that is left of another run"
        )


def _check_address(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be asked for
        reason = getattr(error, "strerror", None) or "no name of a machine"
        raise UserError(
            f"MASTER_ADDR={address} is not known here ({reason}): use an address of the machine of "
            "rank 0, which `hostname -I` prints there"
        ) from None
