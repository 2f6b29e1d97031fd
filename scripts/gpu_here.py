"""Whether CUDA's driver sees a GPU here. Otherwise says why not, and exits with 77.

usage: gpu_here.py WHAT     (what is skipped otherwise)

FSDP_CUDA_LIBRARY names the driver's library, where the system does not find it.
"""

import ctypes
import os
import sys


def problem():
    """What keeps GPUs from being used; None if there is one."""
    name = os.environ.get("FSDP_CUDA_LIBRARY", "libcuda.so.1")
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return f"CUDA's driver was not found: {error}"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code == 100 or (code == 0 and count.value == 0):
        return "CUDA's driver sees no GPU"
    return f"CUDA's driver fails with error {code}" if code else None


if __name__ == "__main__":
    found = problem()
    if found:
        print(f"skipped: {sys.argv[1]}: {found}")
        sys.exit(77)
