"""The environment variables that DeepSpeed's launcher gives to the ranks on every machine."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepspeed.accelerator import get_accelerator
from deepspeed.launcher.runner import EXPORT_ENVS

from magnetar.engine.cluster.arguments import deepspeed_env

# Variables that change a run and are not handed on, unless .deepspeed_env names them.
_MATTER: tuple[str, ...] = ("CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "LD_")
_MATTER += ("MAGNETAR_", "OMP_", "TOKENIZERS_", "TORCH", "TRITON_")
_THE_LAUNCHERS_OWN = ("DS_ENV_FILE", "CUDA_VISIBLE_DEVICES")


class Exports(NamedTuple):
    """The variables that the launcher hands on to other machines.

    Attributes:
        variables: name -> value.
        files: files that some of them were read from.
        left_behind: names of variables that are set here, may matter, and are not handed on.
    """

    variables: dict[str, str]
    files: list[Path]
    left_behind: list[str]


def exports() -> Exports:
    """The variables that the launcher would hand on over ssh.

    Raises:
        UserError: if its file has a line that the launcher cannot read.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    prefixes = tuple(EXPORT_ENVS + get_accelerator().export_envs())
    variables = {
        name: text.strip() for name, text in environment.items() if name.startswith(prefixes)
    }
    named, files = deepspeed_env()
    variables |= named
    left_behind = [
        name
        for name in os.environ
        if name.startswith(_MATTER) and name not in variables and name not in _THE_LAUNCHERS_OWN
    ]
    return Exports(variables, files, sorted(left_behind))


def of_nodes(slots: Mapping[str, Sequence[int]], address: str, port: int) -> list[dict[str, str]]:
    """The variables that the launcher adds on each machine; a rank also has RANK and LOCAL_RANK."""
    num_ranks = sum(map(len, slots.values()))
    added, first = [], 0
    for index, numbers in enumerate(slots.values()):
        variables = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(num_ranks),
            "CROSS_RANK": str(index),
            "CROSS_SIZE": str(len(slots)),
            "LOCAL_SIZE": str(len(numbers)),
            "RANK": f"{first} to {first + len(numbers) - 1}",
        }
        devices = ",".join(map(str, numbers))
        added.append(variables | dict.fromkeys(get_accelerator().visible_devices_envs(), devices))
        first += len(numbers)
    return added
