"""The C library's allocator: memory of large tensors is used again instead of given back."""

import ctypes
import logging

_log = logging.getLogger(__name__)

# From glibc's malloc.h. Without mmap, blocks come from the heap; without trimming, the heap's top
# stays with the process. One without the other would leave one of the two ways back to the kernel.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def tune_allocator() -> bool:
    """Let this process use the memory of freed tensors for the next ones.

    By default glibc takes every block of more than 32 MB from the system and gives it back when it
    is freed; each large activation then costs a page fault for every 4 KB. Afterwards the process
    holds on to its peak memory until it ends. It is a setting of the whole process: the command
    line makes it (`--no-tune-allocator` refuses), importing treeify never does.

    Returns:
        Whether it could be set; False where the C library is not glibc (macOS, Windows, musl).

    Source: mallopt(3).
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        _log.debug("no glibc: the allocator stays as it is")
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
