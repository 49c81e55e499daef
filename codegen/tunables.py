"""What a lowering can do in several ways, all of them right: tile sizes, unrolling, how work is divided.

An emitter asks its site for each choice as it comes to it (`site.choices.pick(ROWS)`), and gets the tunable's default
unless a schedule says otherwise. So the tunables of an emitter are declared where they are used and nowhere else; which
ones a site has is known by emitting it once. What a choice must not be in the light of others is refused by
`site.choices.require(...)`, as a predicate that the emitter states.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nemoc.ir.errors import NemocError

Setting = int | str
"""The value of a tunable."""

Schedule = Mapping[str, Setting]
"""Settings by the names of their tunables; what it leaves out has its default."""


class IllegalSchedule(NemocError):
    """A schedule asks for something that its lowering cannot do."""


@dataclass(frozen=True)
class Tunable:
    """One choice of a lowering.

    Attributes:
        name: within its kernel.
        default: what is taken where nothing was tuned.
        values: what can be chosen, in ascending order where they are numbers; the default is one of them.
        keeps_bits: whether every value adds in the order in which the default does, so that no bit of a result depends
            on the choice.
    """

    name: str
    default: Setting
    values: tuple[Setting, ...]
    keeps_bits: bool = True

    def __post_init__(self) -> None:
        assert self.default in self.values and len(set(self.values)) == len(self.values), self


class Choices:
    """What an emitter has asked for, and what it was given.

    Args:
        schedule: the settings that differ from defaults.

    Attributes:
        asked: the tunables that the emitter has come to, by name, in that order.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self._schedule = dict(schedule or {})
        self.asked: dict[str, Tunable] = {}

    def pick(self, tunable: Tunable) -> Setting:
        """The setting of a tunable.

        What is asked for under one name, such as by the products of a region, is one tunable, which the schedule sets
        for all of them; the defaults may differ.

        Raises:
            IllegalSchedule: the schedule has a value that the tunable does not.
        """
        known = self.asked.setdefault(tunable.name, tunable)
        assert known.values == tunable.values, f"two tunables are called {tunable.name}"
        setting = self._schedule.get(tunable.name, tunable.default)
        if setting not in tunable.values:
            raise IllegalSchedule(
                f"{tunable.name} is {setting!r}, expected one of {', '.join(map(str, tunable.values))}"
            )
        return setting

    def require(self, holds: bool, reason: str) -> None:
        """Refuse a schedule.

        Raises:
            IllegalSchedule: the condition does not hold.
        """
        if not holds:
            raise IllegalSchedule(reason)

    def forget(self) -> None:
        """Start anew, as where another skeleton is tried."""
        self.asked.clear()

    def assert_used(self) -> None:
        """Check that the schedule has nothing that was not asked for.

        Raises:
            IllegalSchedule: it has.
        """
        if unused := sorted(self._schedule.keys() - self.asked.keys()):
            known = ", ".join(self.asked) or "none"
            raise IllegalSchedule(f"no tunable is called {unused[0]!r}, expected one of {known}")
