"""The C library's allocator on a CPU."""

import ctypes

import pytest

from magnetar.engine.build import keep_freed_memory
from tests.ranks import run_on_ranks

SIZE = 20 * 2**20


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")
    names += ("fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def block_of_20_mib(keeps: bool) -> tuple[int, int]:
    """Bytes mapped for it alone, and bytes of the heap that are left when it is freed."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.mallinfo2.restype = Mallinfo
    if keeps:
        keep_freed_memory()
    before = library.mallinfo2()
    block = library.malloc(SIZE)
    mapped = library.mallinfo2().hblkhd - before.hblkhd
    library.free(block)
    return mapped, library.mallinfo2().arena - before.arena


@pytest.mark.needs("mallinfo2")
def test_a_freed_block_stays_with_the_process() -> None:
    target = "tests.engine.test_host_memory:block_of_20_mib"
    ((mapped, left),) = run_on_ranks(target, 1, True, fresh=True)
    assert mapped == 0
    assert left >= SIZE
    ((mapped, left),) = run_on_ranks(target, 1, False, fresh=True)
    assert mapped >= SIZE, "this C library keeps memory by itself"
    assert left < SIZE
