"""Where the ranks of a run meet: a store at MASTER_ADDR:MASTER_PORT, which rank 0 serves.

torch's own store listens on every network of the machine; this one listens only at MASTER_ADDR.
Without this, gloo would connect over whichever interface the host name resolves to; here it uses
the network of MASTER_ADDR. Under torchrun the store belongs to its agent, which listens on all
interfaces.
"""

import errno
import functools
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil
import torch.distributed as dist

from magnetar.data.errors import MachineError, UserError
from magnetar.engine.cluster.environment import launched_local_size, own_error

_SCHEME = "magnetar"
# A rank that was just killed may still hold the port for this long.
_SECONDS_FOR_THE_PORT = 10.0
# Ranks start together, but a machine may have to read every package from a slow disk first.
_TIME_TO_MEET = timedelta(minutes=10)
_BACKLOG = 4096
_WORLD_SIZE = "magnetar/world_size"  # key of the store


_store: dist.TCPStore | None = None  # this rank's connection; on rank 0 also the server


@functools.cache
def use_rendezvous() -> str:
    """The init_method with which torch.distributed uses this module.

    It reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which a launcher, or DeepSpeed for MPI,
    has set in the environment. Port 0 means any free port, for a single rank.
    """
    dist.register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://"


def another_connection(timeout: timedelta) -> dist.TCPStore:
    """A connection of its own to the ranks' store, since a wait on one blocks all its users.

    Args:
        timeout: limit for making the connection, and for every wait on it.

    Raises:
        torch.distributed.DistNetworkError: if rank 0, which serves the store, is gone.
    """
    assert _store is not None, "the ranks have not met"
    return dist.TCPStore(_store.host, _store.port, None, False, timeout, wait_for_workers=False)


def leave_rendezvous() -> None:
    """Release the store, which then ends with the process groups that use it."""
    global _store
    _store = None


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """The handler for torch.distributed: yields store, rank and world size."""
    global _store
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if rank == 0 and is_ours:
        _store = _serve(host, port, world_size)
    else:
        try:
            _store = dist.TCPStore(host, port, None, False, min(timeout, _TIME_TO_MEET))
        except dist.DistError as error:
            raise MachineError(
                f"rank {rank} on {socket.gethostname()} did not meet rank 0 at {host}:{port}: it "
                "has not started, or it cannot be reached (a firewall, another network): "
                f"{str(error).splitlines()[0]}"
            ) from None
        if is_ours:
            _require_own_place(_store, rank, world_size)
    _store.set_timeout(timeout)
    _choose_network(_store.host, _store.port)
    yield _store, rank, world_size
    raise RuntimeError("the ranks of this run cannot meet again")


def _serve(host: str, port: int, world_size: int) -> dist.TCPStore:
    """The store, when all ranks are there."""
    listener = _listening_socket(host, port, world_size)
    address, port = listener.getsockname()[:2]
    descriptor = listener.detach()  # it is the store's, which closes it
    try:
        store = dist.TCPStore(
            *(address, port, None, True, _TIME_TO_MEET), False, master_listen_fd=descriptor
        )
        store.set(_WORLD_SIZE, str(world_size))
        if world_size > 1:
            store.wait([_place(rank) for rank in range(1, world_size)], _TIME_TO_MEET)
        return store
    except dist.DistError as error:
        raise MachineError(
            f"not all {world_size} ranks reached {address}:{port} within "
            f"{_TIME_TO_MEET}: {str(error).splitlines()[0]}"
        ) from None


def _place(rank: int) -> str:
    return f"magnetar/rank_{rank}"


def _require_own_place(store: dist.TCPStore, rank: int, world_size: int) -> None:
    """Refuse a rank that another process has, or another number of ranks than rank 0's.

    Raises:
        UserError: naming the variable. Otherwise all ranks would wait for one that is not there.
    """
    theirs = int(store.get(_WORLD_SIZE))
    if theirs != world_size:
        raise own_error(
            f"WORLD_SIZE={world_size} on rank {rank} and {theirs} on rank 0: start all ranks with "
            "one launcher, or set one number"
        )
    if store.add(_place(rank), 1) > 1:
        raise own_error(
            f"RANK={rank} is that of another process, too: start all ranks with one launcher, or "
            f"give each its own from 0 to {world_size - 1}"
        )


def _listening_socket(host: str, port: int, world_size: int) -> socket.socket:
    """A socket that listens at one address of this machine.

    Raises:
        UserError: if the address cannot be reached from other machines, is not this machine's, or
            has another process listening at the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} is not known here ({error.strerror}): use an address of the "
            "machine of rank 0, which `hostname -I` prints there"
        ) from None
    is_alone = launched_local_size() == world_size
    give_up = time.monotonic() + _SECONDS_FOR_THE_PORT
    while True:
        problems: set[int | None] = set()
        for family, kind, protocol, _, place in found:
            if not is_alone and ip_address(place[0]).is_loopback:
                problems.add(errno.ENETUNREACH)
                continue
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                listener.listen(_BACKLOG)
                return listener
            except OSError as error:
                listener.close()
                problems.add(error.errno)
        if errno.EADDRINUSE in problems and time.monotonic() < give_up:
            time.sleep(0.2)
            continue
        raise UserError(_refused(host, port, problems))


def _refused(host: str, port: int, problems: set[int | None]) -> str:
    if errno.EADDRINUSE in problems:
        return (
            f"MASTER_PORT={port} is in use at {host}, by another run perhaps: choose another, with "
            "--master_port of the deepspeed launcher, say"
        )
    addresses = ", ".join(sorted(_interfaces()))
    if errno.ENETUNREACH in problems:
        return (
            f"MASTER_ADDR={host} is a loopback address, and the run has ranks on other "
            f"machines: use an address that they can reach, one of {addresses}"
        )
    if errno.EADDRNOTAVAIL in problems:
        return (
            f"MASTER_ADDR={host} is not an address of {socket.gethostname()}, where rank 0 has "
            f"started: use one of {addresses}, or name that machine first in the hostfile"
        )
    words = ", ".join(os.strerror(number or 0) for number in problems)
    return f"nothing can listen at MASTER_ADDR={host}, MASTER_PORT={port} ({words}): use others"


def _interfaces() -> dict[str, str]:
    """Address of this machine -> its network interface."""
    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def _choose_network(host: str, port: int) -> None:
    """Have gloo, and NCCL on one machine, listen on the network that leads to rank 0.

    By default gloo uses the interface of the host's name, which is often 127.0.1.1, and NCCL the
    first interface.
    """
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # a UDP socket: sends nothing, but the kernel chooses the route
        own = str(probe.getsockname()[0])
    interface = _interfaces().get(own)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if interface is not None and ip_address(own).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
