"""Noting when threads begin and end their work, for whoever wants to know how long each launch takes."""

from nemoc.codegen.tvm.target import CpuTarget

MARK = "nemoc_mark"
"""`(times, at) -> int32`: notes what time it is.

    times    int64[...]: nanoseconds of the system's monotonic clock; null where nobody wants to know
    at       which element is written
    returns  0
"""

_MONOTONIC, _MONOTONIC_OF_APPLE = 1, 6
"""Numbers of the monotonic clock."""


def mark_source(target: CpuTarget) -> str:
    """The function's text, for platforms of 64 bits, whose `timespec` is two numbers of 64 bits."""
    clock = _MONOTONIC_OF_APPLE if "apple" in target.triple else _MONOTONIC
    return f"""\
target triple = "{target.triple}"

declare i32 @clock_gettime(i32, ptr)

define hidden i32 @{MARK}(ptr %times, i32 %at) nounwind {{
  %wanted = icmp ne ptr %times, null
  br i1 %wanted, label %note, label %done

note:
  %now = alloca [2 x i64]
  %failed = call i32 @clock_gettime(i32 {clock}, ptr %now)
  %below = getelementptr i64, ptr %now, i32 1
  %seconds = load i64, ptr %now
  %rest = load i64, ptr %below
  %whole = mul i64 %seconds, 1000000000
  %time = add i64 %whole, %rest
  %place = getelementptr i64, ptr %times, i32 %at
  store i64 %time, ptr %place
  br label %done

done:
  ret i32 0
}}
"""
