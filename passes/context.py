"""What a pass may know besides the graph: plain data, handed in by whoever runs the pipeline."""

from dataclasses import dataclass, field

from nemoc.ir.cost import Cost
from nemoc.ir.params import ParameterSource


@dataclass(frozen=True)
class TargetInfo:
    """The facts about a target that rewrites depend on.

    Attributes:
        name: as the user writes it: `reference`, `cpu`, `cpu:znver3`, ...
        linear_interleave: rows per block in which matrix kernels want weights stored; 1 leaves weights as on disk.
        memory_bandwidth: bytes per second from main memory.
        launch_cost: seconds to start a kernel, or to pass a barrier between phases.
        on_chip_memory: bytes that one core or multiprocessor keeps near.
        threads: threads (or multiprocessors) that share the work.
    """

    name: str = "reference"
    linear_interleave: int = 1
    memory_bandwidth: float = 20e9
    launch_cost: float = 2e-6
    on_chip_memory: int = 1 << 20
    threads: int = 1

    @property
    def kind(self) -> str:
        """The target without its variant: `cpu` of `cpu:znver3`."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Remark:
    """What a pass did or refused at one site.

    Attributes:
        pass_name: who says it.
        site: the value it is about, as `graph/%value`.
        message: one line.
        saved: arithmetic and traffic that the change saves, in closed form.
    """

    pass_name: str
    site: str
    message: str
    saved: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class PassContext:
    """What passes are handed.

    Attributes:
        target: facts about the target.
        parameters: the weights' data; none when only the structure is at hand.
        remarks: passes append what they did.
    """

    target: TargetInfo = field(default_factory=TargetInfo)
    parameters: ParameterSource | None = None
    remarks: list[Remark] = field(default_factory=list)
