"""The C library's allocator, which decides how fast large buffers are on a CPU."""

import ctypes

# mallopt's parameters, from glibc's malloc.h, and the values that keep memory
_KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    XLA allocates the temporary buffers of a program anew at every call. Above 32 MB glibc maps fresh pages
    each time, and so do the arenas of its threads, which unmap what is freed; touching fresh pages costs a
    4M-weight training step up to a quarter of its time. Meant for programs that train or measure, at their
    start, before other threads run; it changes the whole process, which then never shrinks.

    Returns:
      Whether it took effect: False where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(bool(mallopt(*setting)) for setting in _KEEP.values())
