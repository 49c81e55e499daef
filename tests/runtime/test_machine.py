"""Machines: the names of LLVM and Linux meet, and what is missing is said."""

from nemoc.codegen.threads import usable_processors
from nemoc.runtime import Machine
from nemoc.runtime.machine import core_count


def test_names_of_llvm_become_those_of_linux() -> None:
    given = [
        "64bit",
        "sse4.2",
        "avx2",
        "fma",
        "bmi",
        "avx512vnni",
        "avx512f",
        "lzcnt",
        "fast-gather",
    ]
    machine = Machine.of("x86_64", given)
    assert machine.features == ("abm", "avx2", "avx512_vnni", "avx512f", "bmi1", "fma", "sse4_2")


def test_a_machine_says_what_it_lacks() -> None:
    small, large = Machine.of("x86_64", ["avx2"]), Machine.of("x86_64", ["avx2", "avx512f"])
    assert large.lacks(small) == ""
    assert small.lacks(large) == "a processor with avx512f"
    assert small.lacks(Machine.of("aarch64", [])) == "an aarch64 processor, this is x86_64"
    assert Machine.of("x86_64", []).lacks(large) == ""  # a system that does not say


def test_the_host_can_run_what_is_built_for_it() -> None:
    host = Machine.host()
    assert host.lacks(host) == ""
    assert 1 <= core_count() <= len(usable_processors())
