"""What the processor at hand can do, as far as exactness and speed depend on it."""

from functools import lru_cache
from pathlib import Path

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
_AVX2 = frozenset({"avx2", "avx_vnni"})


@lru_cache(maxsize=1)
def adds_products_in_32_bits(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether u8 x s8 products are summed exactly: an x86 processor with VNNI, in 256 or 512 bits.

    Others add pairs of products in 16 bits, which saturate. Where the system does not say (only Linux does, in a
    file), the answer is no: the slower kernels are exact everywhere.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    return flags >= _AVX512 or flags >= _AVX2
