"""Lowering with schedules that were found by tuning."""

import dataclasses
from collections.abc import Callable

from nemoc.codegen.lower import Emit
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.tunables import Choices, IllegalSchedule, Schedule
from nemoc.ir.errors import NemocError

Lookup = Callable[[str, Site, Emit], Schedule]
"""The schedule of a kernel: by the name of its default plan, or by its site and backend; empty where there is none."""


def tuned(emit: Emit, lookup: Lookup) -> Emit:
    """A backend that takes the schedules of the kernels for which there are some.

    Args:
        emit: the backend.
        lookup: the schedules.
    """

    def emit_tuned(site: Site) -> Plan:
        default = emit(site)
        schedule = lookup(default.name, site, emit)
        if not schedule:
            return default
        choices = Choices(schedule)
        try:
            plan = emit(dataclasses.replace(site, choices=choices))
            choices.assert_used()
        except IllegalSchedule as error:
            raise NemocError(f"the schedule of {default.name}: {error}") from None
        return plan

    return emit_tuned
