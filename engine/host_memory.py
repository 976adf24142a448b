"""How the C library's allocator behaves where tensors are in host memory."""

import ctypes

# mallopt's parameters (malloc.h of glibc, whose largest threshold for mmap is 32 MiB).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_TOP_PAD_BYTES = 256 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have freed memory stay with this process.

    By default glibc hands large blocks back to the system, and each step fetches them again, page
    by page: most of what a small operator does is then to wait for zeroed pages. Another C library
    is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_TOP_PAD, _TOP_PAD_BYTES)
