"""TorchScale itself, without the two packages that it imports for what is off here."""

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tests.convert.conversions import Refusal, refusal

REASON = "not installed; to run this: pip install --no-deps torchscale==0.3.0"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """A function of a command line: the one message with which it ends, with status 2."""
    return partial(refusal, capsys)


@pytest.fixture(scope="module")
def torchscale() -> Iterator[None]:
    """TorchScale can be imported, and works on a CPU."""
    stand_ins = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": lambda x, *_: x},
        "fairscale": {},
        "fairscale.nn": {
            "checkpoint_wrapper": lambda module: module,
            "wrap": lambda module: module,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in stand_ins.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            patch.setitem(sys.modules, name, module)
        pytest.importorskip("torchscale", reason=REASON)
        # Its statistics take a histogram of integers, which CPUs refuse.
        histc = torch.histc
        patch.setattr(torch, "histc", lambda x, *args, **keys: histc(x.float(), *args, **keys))
        yield


@pytest.fixture
def one_rank(torchscale: None) -> Iterator[None]:
    """A process group of this process alone."""
    from torchscale.component.xmoe import global_groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for function in (global_groups.get_moe_group, global_groups.get_all2all_group):
        vars(function).clear()  # the groups that it has kept are gone
