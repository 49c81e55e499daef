"""Claiming tasks, in LLVM's own language: TIR has no atomic operations."""

from nemoc.codegen.tvm.target import CpuTarget

CLAIM = "nemoc_claim"
"""`(claims, task, tasks, thread, threads) -> int32`: finds a thread one of a launch's tasks that nobody has yet.

    claims   int32[threads, LINE]: how many tasks of each thread's share were claimed, in the first of each line
    task     int32: the task that was found
    tasks    how many there are; a thread's share is a consecutive range of them
    returns  1, or 0 if none is left
"""

LINE = 32
"""Numbers of 32 bits in two lines of a cache, which processors load together: what different threads write lies so far
apart."""


def claim_source(target: CpuTarget) -> str:
    """The function's text: it goes through the shares that are not empty, from the thread's own on.

    All else that threads share is ordered by barriers, so counting orders nothing. A share that is used up is only
    looked at: those who find it so do not take its line out of each other's caches.
    """
    return f"""\
target triple = "{target.triple}"

define hidden i32 @{CLAIM}(ptr %claims, ptr %task, i32 %tasks, i32 %thread, i32 %threads) nounwind {{
  %some = icmp ugt i32 %tasks, 0
  br i1 %some, label %begin, label %none

begin:
  %each = udiv i32 %tasks, %threads
  %rest = urem i32 %tasks, %threads
  %few = icmp ult i32 %tasks, %threads
  %shares = select i1 %few, i32 %tasks, i32 %threads
  br label %look

look:
  %turn = phi i32 [ 0, %begin ], [ %next_turn, %next ]
  %number = add i32 %thread, %turn
  %owner = urem i32 %number, %shares
  %has_more = icmp ult i32 %owner, %rest
  %more = zext i1 %has_more to i32
  %count = add i32 %each, %more
  %line = mul i32 %owner, {LINE}
  %claimed = getelementptr i32, ptr %claims, i32 %line
  %seen = load atomic i32, ptr %claimed monotonic, align 4
  %open = icmp ult i32 %seen, %count
  br i1 %open, label %claim, label %next

claim:
  %place = atomicrmw add ptr %claimed, i32 1 monotonic
  %won = icmp ult i32 %place, %count
  br i1 %won, label %found, label %next

next:
  %next_turn = add i32 %turn, 1
  %goes_on = icmp ult i32 %next_turn, %shares
  br i1 %goes_on, label %look, label %none

found:
  %before = mul i32 %owner, %each
  %longer = select i1 %has_more, i32 %owner, i32 %rest
  %first = add i32 %before, %longer
  %at = add i32 %first, %place
  store i32 %at, ptr %task
  ret i32 1

none:
  ret i32 0
}}
"""
