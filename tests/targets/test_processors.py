"""What a processor can do, read from the system; and what of an artefact's options it needs."""

from pathlib import Path

import pytest

from isogrid.targets.onnx_runtime_session import STATIC_OPTIONS, WEIGHT_ONLY_OPTIONS, options_here
from isogrid.targets.processors import adds_products_in_32_bits

AVX512 = "avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx avx2", False),
        (AVX512, False),
        (f"{AVX512} avx512_vnni", True),
        ("fma avx2 avx_vnni", True),
        # A virtual machine may hide a part of what an instruction needs.
        ("avx2 avx512_vnni", False),
    ],
)
def test_vnni_is_what_the_flags_say(flags: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: A\nflags\t\t: fpu sse {flags} ht\nbugs\t\t: avx_vnni\n")
    assert adds_products_in_32_bits.__wrapped__(file) is expected


def test_where_the_system_does_not_say_the_answer_is_the_safe_one(tmp_path: Path) -> None:
    assert adds_products_in_32_bits.__wrapped__(tmp_path / "none") is False


def test_only_what_speed_pays_for_exactness_is_dropped() -> None:
    options = {**STATIC_OPTIONS, **WEIGHT_ONLY_OPTIONS, "session.other": "1"}
    assert options_here(options, vnni=False) == options
    assert options_here(options, vnni=True) == {**WEIGHT_ONLY_OPTIONS, "session.other": "1"}
