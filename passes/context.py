"""What a pass may know besides the graph: plain data, handed in by whoever runs the pipeline."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim
from nemoc.ir.params import ParameterSource


@dataclass(frozen=True)
class TargetInfo:
    """The facts about a target that rewrites depend on.

    Attributes:
        name: as the user writes it: `reference`, `cpu`, `cpu:znver3`, ...
        linear_interleave: rows per block in which matrix kernels want weights stored; 1 leaves weights as on disk.
        packed_weights: whether kernels unpack quantized weights as they read them; else they are stored unpacked.
        spread_nvfp4: whether kernels decode NVFP4 in fewer instructions if `spread_codes` has ordered its bits.
        memory_bandwidth: bytes per second from main memory.
        launch_cost: seconds to start a kernel, or to pass a barrier between phases.
        on_chip_memory: bytes that one core or multiprocessor keeps near.
        threads: threads (or multiprocessors) that share the work.
    """

    name: str = "reference"
    linear_interleave: int = 1
    packed_weights: bool = False
    spread_nvfp4: bool = False
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
        message: one line: what was done, or why it was not.
        saved: arithmetic and traffic that the change saves (or would have saved), in closed form.
        launches: kernel launches that it saves per step.
        refused: the change was not made.
    """

    pass_name: str
    site: str
    message: str
    saved: Cost = field(default_factory=Cost)
    launches: Dim = 0
    refused: bool = False


@dataclass(frozen=True)
class PassContext:
    """What passes are handed.

    A pass asks `allows` before each change. So every change has a remark, changes are counted, and whoever runs
    the pass can stop it after the first few: `nemoc bisect` finds the guilty one that way.

    Attributes:
        target: facts about the target.
        parameters: the weights' data; none when only the structure is at hand.
        input_scales: static NVFP4 scales of activations, by the name of the weight that they are multiplied by; none
            where each row has its own.
        remarks: what passes did and refused, in order.
        limit: the most changes allowed; None: any number.
        changes: those of the remarks that were allowed changes.
    """

    target: TargetInfo = field(default_factory=TargetInfo)
    parameters: ParameterSource | None = None
    input_scales: Mapping[str, float] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    limit: int | None = None
    changes: list[Remark] = field(default_factory=list, init=False)

    def allows(self, remark: Remark) -> bool:
        """Whether a pass may make one more change, which is then counted and noted.

        A pass that is told no leaves the site as it is and goes on. What it returns is valid, and means the same,
        after any number of changes.
        """
        if len(self.changes) == self.limit:
            return False
        self.changes.append(remark)
        self.remarks.append(remark)
        return True

    def refuses(self, remark: Remark) -> None:
        """Note a change that a pass decided against; the message says why."""
        self.remarks.append(dataclasses.replace(remark, refused=True))
