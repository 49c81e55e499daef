"""GPU kernels reach what lies far away in tensors that are too large for 32 bits, and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest

from nemoc.codegen.plan import Arg, Site
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.target import gpu_target
from support.far_away import Numbers, assert_within_tensors
from support.regions import region

EXPERTS, FEATURES = 512, 5120
GROUPED = ("experts", "experts in NVFP4", "experts in spread NVFP4")


def experts_in_nvfp4(spread: str) -> str:
    return f"""
        input %x: bf16[2*B, 2048]
        input %packed: u8[{EXPERTS}, {FEATURES}, 1024]
        input %scales: f8e4m3[{EXPERTS}, {FEATURES}, 128]
        input %scale: f32[{EXPERTS}]
        input %offsets: i32[{EXPERTS + 1}] < 2*B + 1
        %w = dequantize_nvfp4(%packed, %scales, %scale) {{spread={spread}}} : f32[{EXPERTS}, {FEATURES}, 2048]
        %c = cast(%x) {{dtype=f32}} : f32[2*B, 2048]
        %y = grouped_linear(%c, %w, %offsets) : f32[2*B, {FEATURES}]
        return %y
    """


REGIONS = {
    "experts": f"""
        input %x: bf16[2*B, 1024]
        input %w: bf16[{EXPERTS}, {FEATURES}, 1024]
        input %offsets: i32[{EXPERTS + 1}] < 2*B + 1
        %y = grouped_linear(%x, %w, %offsets) : f32[2*B, {FEATURES}]
        return %y
    """,
    "experts in NVFP4": experts_in_nvfp4("false"),
    "experts in spread NVFP4": experts_in_nvfp4("true"),
    "a cache written": """
        input %x: f32[B, 1, 1024]
        input %cache: bf16[B, C, 8, 128]
        input %lengths: i32[B] < C
        %c = cast(%x) {dtype=bf16} : bf16[B, 1, 1024]
        %r = reshape(%c) {shape=[B, 1, 8, 128]} : bf16[B, 1, 8, 128]
        %next = cache_write(%cache, %r, %lengths) : bf16[B, C, 8, 128]
        return %next
    """,
    "a cache copied": """
        input %cache: bf16[B, C, 8, 128]
        %y = cast(%cache) {dtype=f32} : f32[B, C, 8, 128]
        return %y
    """,
    "states copied": """
        input %state: f32[B, 128, 64, 128]
        %y = cast(%state) {dtype=bf16} : bf16[B, 128, 64, 128]
        return %y
    """,
    "a cache seen by one token": """
        input %q: f32[B, 1, 64, 128]
        input %k: bf16[B, C, 2, 128]
        input %v: bf16[B, C, 2, 128]
        input %lengths: i32[B] < C
        %y = attention(%q, %k, %v, %lengths) {scale=0.1} : f32[B, 1, 64, 128]
        return %y
    """,
}

BATCH = 8192


def contents(name: str, capacity: int) -> Callable[[Numbers], Numbers]:
    """What elements of an operand hold: as many rows for each expert, caches that are full but for a token."""
    if name == "offsets":
        return lambda at: at * (2 * BATCH // EXPERTS)
    return lambda at: np.full(at.shape, capacity - 1)


@pytest.mark.parametrize("name", REGIONS)
def test_the_last_program_with_work_stays_within_its_tensors(name: str) -> None:
    op = region(REGIONS[name])
    site, names = Site.dense(op), {"offsets", "lengths"}
    capacity = 1 << (22 if "written" in name else 14)
    integers = {
        Arg("operand", number): contents(value.name, capacity)
        for number, value in enumerate(op.body.inputs)
        if value.name in names
    }

    def last(programs: int) -> int:
        # There is a program for each expert whose last tile might have rows to spare: 32 rows are two whole tiles.
        filled = 2 * BATCH // 16
        return (programs * filled // (filled + EXPERTS) if name in GROUPED else programs) - 1

    sizes = {"B": BATCH, "C": capacity}
    assert_within_tensors(site, emit(site, gpu_target("cuda:sm_90")), sizes, last, integers)


@pytest.mark.parametrize(
    "name,batch,rows",
    [
        ("experts in NVFP4", 1, 1),
        ("experts in NVFP4", 2, 2),
        ("experts in spread NVFP4", 1, 2),
        ("experts in spread NVFP4", 2, 4),
    ],
)
def test_few_rows_reach_the_last_expert(name: str, batch: int, rows: int) -> None:
    op = region(REGIONS[name])
    (offsets,) = (i for i, value in enumerate(op.body.inputs) if value.name == "offsets")
    integers = {Arg("operand", offsets): lambda at: np.where(at == EXPERTS, 2 * batch, 0)}

    def last(programs: int) -> int:
        return programs // rows - 1  # there is a program for each row, were each another expert's

    plan = emit(Site.dense(op), gpu_target("cuda:sm_90"))
    assert_within_tensors(Site.dense(op), plan, {"B": batch}, last, integers)
