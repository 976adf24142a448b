"""On which nodes the ranks that share experts lie, and the groups of an exchange by nodes.

Letters: W ranks that share one set of experts.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from magnetar.models.moe.all_to_all import Peers
from magnetar.models.moe.config import MoEConfig

NODE_VARIABLE = "MAGNETAR_NODE"


class _Nodes(NamedTuple):
    """See Peers."""

    nodes: tuple[int, ...]
    inside: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None


# By the group of the ranks, with whose end they end, and whether rows travel by nodes.
_found: WeakKeyDictionary[dist.ProcessGroup, dict[bool, _Nodes]] = WeakKeyDictionary()


def node_name() -> str:
    """What this rank's node is called: MAGNETAR_NODE, or what shares a host and its network."""
    if NODE_VARIABLE in os.environ:
        return os.environ[NODE_VARIABLE]
    network = Path("/proc/self/ns/net")  # containers of one host have one each
    return f"{socket.gethostname()} {os.readlink(network) if network.exists() else ''}"


def expert_groups(world_size: int, ep_size: int, placement: str) -> list[list[int]]:
    """The ranks that share each set of experts, in the order of their experts."""
    if placement == "across_nodes":
        step = world_size // ep_size
        return [list(range(first, world_size, step)) for first in range(step)]
    return [list(range(first, first + ep_size)) for first in range(0, world_size, ep_size)]


def place_of_rank(rank: int, world_size: int, ep_size: int, placement: str) -> int:
    """Which part of the experts a rank has."""
    if placement == "across_nodes":
        return rank // (world_size // ep_size)
    return rank % ep_size


def rows_by_node(nodes: Sequence[int]) -> list[list[int]] | None:
    """(W,) -> places of the ranks of each node; None if an exchange by nodes is not possible.

    It is where there are several nodes with several ranks, as many on each and side by side.
    """
    num_nodes = len(set(nodes))
    per_node = len(nodes) // num_nodes
    places = [list(range(i * per_node, (i + 1) * per_node)) for i in range(num_nodes)]
    if num_nodes == 1 or per_node == 1 or per_node * num_nodes != len(nodes):
        return None
    if any(len({nodes[place] for place in of_node}) > 1 for of_node in places):
        return None
    return places


def peers_of(group: dist.ProcessGroup, moe: MoEConfig) -> Peers:
    """Those with whom this rank shares experts; all ranks of the job call it together."""
    by_nodes = moe.exchange != "flat"
    known = _found.setdefault(group, {})
    if by_nodes not in known:
        known[by_nodes] = _find(moe, by_nodes)
    return Peers(group, group.rank(), *known[by_nodes])


def _find(moe: MoEConfig, by_nodes: bool) -> _Nodes:
    world_size, own_rank = dist.get_world_size(), dist.get_rank()
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, node_name())
    node_of = [names.index(name) for name in names]
    found = None
    for ranks in expert_groups(world_size, moe.ep_size, moe.placement):
        nodes = tuple(node_of[rank] for rank in ranks)
        if own_rank in ranks:
            found = (found or _Nodes(nodes))._replace(nodes=nodes)
        places = rows_by_node(nodes) if by_nodes else None
        if places is None:
            continue
        # Every rank makes every group, also those that it does not belong to.
        for key, lists in (("inside", places), ("across", list(zip(*places, strict=True)))):
            for members in lists:
                of_group = [ranks[place] for place in members]
                made = dist.new_group(of_group)
                if own_rank in of_group:
                    assert found is not None
                    found = found._replace(**{key: made})
    assert found is not None
    return found
