"""The C library's allocator, which decides how fast large buffers are on a CPU."""

import ctypes

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    XLA allocates the temporary buffers of a program anew at every call. Above 32 MB glibc maps fresh pages
    each time, and touching them costs a 4M-weight training step about a quarter of its time. Meant for
    programs that train or measure, at their start; it changes the whole process, which then never shrinks.

    Returns:
      Whether it took effect: False where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
