"""The stages that time parts of a model: which parts, at which sizes, against whom."""

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.gpu_parts import Parts
from benchmarks.gpu_peers import (
    AbsentError,
    MakePeer,
    Peer,
    Results,
    eager_scan,
    mamba_scan,
    mamba_update,
    product_with_decoded,
    product_with_widened,
    scaled_product,
    torch_attention,
    torch_product,
    transformers_moe,
)
from benchmarks.gpu_region import (
    DeviceRegion,
    Emit,
    Kernels,
    LoweredPart,
    Part,
    compile_parts,
    lower_part,
)
from benchmarks.gpu_results import OWN, Status
from benchmarks.gpu_session import Outcome, Session, Task, first_line
from benchmarks.gpu_values import Sizes
from nemoc.autotune.gpu_clock import Run
from nemoc.codegen.mixer import take_apart
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.regions import as_region
from nemoc.codegen.triton.conv_scan import default_scan_schedule, emit_conv_scan
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.target import gpu_target
from nemoc.ir import DType, Graph
from nemoc.ir.builder import Builder
from nemoc.ir.dims import B, L
from nemoc.ir.fusion import fuse
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import (
    Attention,
    Cast,
    DequantizeNvfp4,
    GroupedLinear,
    Linear,
    Mul,
    SsdScan,
    SsdUpdate,
)
from nemoc.ir.region import Fused
from nemoc.models import Model, ModelConfig
from nemoc.passes.check import relative_error
from nemoc.progress import Progress
from nemoc.runtime.cuda_device import Device

BOUND = 1e-2
"""‖found − expected‖ / ‖expected‖ of results of ours where activations are bf16."""

PEER_BOUND = 2e-2
"""The same of peers, who round to bf16 where the reference does not."""

FP8_BOUND = 3e-2
"""The same of results of ours that are rounded to E4M3 between two products: of sums that are off by 1e-3, as those of
matrix units are, one in fifty comes to be rounded the other way, by a sixteenth to an eighth. So results are off by
1.6e-2, which a test computes with such sums."""

ROUTED_BOUND = 0.15
"""The same where they round before a router chooses: of some tokens other experts, whose keys are nearly the same."""

NEVER = 1 << 30
"""More tokens, or sequences, than there ever are."""

Form = Callable[[Site, str], Plan]
"""A way of doing the sites of a part on a target."""

ErrorOf = Callable[[Results], float]
"""The largest relative error of some results of a part."""


def product_graph(name: str, width: int, features: int, few: bool, wide: bool) -> Graph:
    """x · wᵀ in bf16 as one region: [B, L, K] of a prefill, or [B, 1, K] of a decode.

    Args:
        name: of the graph.
        width, features: K and N.
        few: whether it is a decode's.
        wide: whether the result stays in float32, as logits do.
    """
    build = Builder(name)
    x = build.input("x", DType.BF16, (B, 1 if few else L, width))
    y = build(Linear(x, build.param("w", DType.BF16, (features, width))), "y")
    if wide:
        return build.finish([y])
    graph = build.finish([build(Cast(y, DType.BF16), "rounded")])
    return fuse(graph, graph.nodes, "linear")


def nvfp4_graph(name: str, width: int, features: int, wide: bool) -> Graph:
    """x · wᵀ of a decode as one region: x bf16 [B, 1, K], w in NVFP4, its codes spread as in a model for GPUs.

    Args:
        name: of the graph.
        width, features: K, a multiple of 16, and N.
        wide: whether the result stays in float32.
    """
    build = Builder(name)
    x = build.input("x", DType.BF16, (B, 1, width))
    codes = build.param("w.codes", DType.U8, (features, width // 2))
    scales = build.param("w.scales", DType.F8E4M3, (features, width // BLOCK))
    scale = build.param("w.scale", DType.F32, ())
    w = build(DequantizeNvfp4(codes, scales, scale, spread=True), "w")
    y = build(Linear(build(Cast(x, DType.F32), "x.f32"), w), "y")
    graph = build.finish([y if wide else build(Cast(y, DType.BF16), "rounded")])
    return fuse(graph, graph.nodes, "linear")


def fp8_graph(name: str, width: int, features: int, few: bool) -> Graph:
    """x · wᵀ in FP8 as one region, each with one scale: x [B, L, K] of a prefill, or [B, 1, K] of a decode.

    Args:
        name: of the graph.
        width, features: K and N.
        few: whether it is a decode's.
    """
    build = Builder(name)
    x = build.input("x", DType.F8E4M3, (B, 1 if few else L, width))
    w = build.param("w", DType.F8E4M3, (features, width))
    y = build(Linear(x, w), "y")
    for operand in ("x.scale", "w.scale"):
        y = build(Mul(y, build.param(operand, DType.F32, ())), f"by.{operand}")
    graph = build.finish([build(Cast(y, DType.BF16), "rounded")])
    return fuse(graph, graph.nodes, "linear")


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        part: what.
        sizes: how large.
        peers: who else is timed; none for all of the stage's.
    """

    part: str
    sizes: Sizes
    peers: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """Unique within a stage."""
        behind = f" behind {self.sizes.cached}" if self.sizes.cached else ""
        return f"{self.part} {self.sizes.batch} x {self.sizes.new}{behind}"


@dataclass(frozen=True)
class PartStage:
    """Parts of a model against peers.

    Attributes:
        name: what users call it.
        about: one line, with what is aimed at.
        cases: what is timed.
        parts: the graph of each part, by name.
        peers: those that it is compared with.
        forms: further ways in which our backend does a part, timed beside its own choice.
        bounds: the largest relative errors of our results, by part; `BOUND` of others.
        peer_bound: the largest relative error of peers' results.
        rows: check single tokens of single sequences instead of whole results (`DeviceRegion.expected_rows`).
        in_a_row: the part of a step of one token that is timed as one of many in a row, each with weights of its own,
            recorded and replayed at once: as layers follow each other in a model. Its seconds are one's share.
        quantize: the format of weights of parts, by name; of others they stay as they are.
    """

    name: str
    about: str
    cases: tuple[Case, ...]
    parts: Mapping[str, Callable[[Parts, str], Graph]]
    peers: Mapping[str, MakePeer] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    peer_bound: float = PEER_BOUND
    rows: bool = False
    in_a_row: bool = False
    quantize: Mapping[str, str] = field(default_factory=dict)

    def case_names(self) -> tuple[str, ...]:
        """In the order in which they are timed."""
        return tuple(case.name for case in self.cases)

    def lowered(self, parts: Parts, target: str) -> dict[str, LoweredPart]:
        """The launches of each part, and of each of its forms as `PART, FORM`."""
        found = {}
        for name, make in self.parts.items():
            corners = [case.sizes for case in self.cases if case.part == name]
            graph = make(self._origin(parts, name), name)
            found[name] = lower_part(Part(name, graph), corners, target)
            for form, planned in self.forms.items():
                part = Part(f"{name}, {form}", graph, _planned(planned, target))
                found[part.name] = lower_part(part, corners, target)
        return found

    def tasks(self, session: Session) -> Iterator[Task]:
        """One for each case; kernels are compiled when the first of them runs."""
        parts = session.parts
        lowered = self.lowered(parts, session.target)

        @functools.cache
        def kernels() -> Kernels:
            every = list(lowered.values())
            code = compile_parts(every, session.target, session.store, session.progress)
            return Kernels(code, session.device)

        for case in self.cases:
            own = [lowered[name] for name in (case.part, *self._forms_of(case.part))]
            in_a_row = self.in_a_row and case.sizes.new == 1
            how = ("in a row",) if in_a_row else ()
            digest = session.digest(*(one.digest(session.target) for one in own), *how)

            def measure(
                case: Case = case,
                own: Sequence[LoweredPart] = tuple(own),
                in_a_row: bool = in_a_row,
            ) -> list[Outcome]:
                values = self._origin(parts, case.part).values
                regions = [DeviceRegion(one, case.sizes, kernels(), values) for one in own]
                more = []
                if in_a_row:
                    (one,) = own
                    count = min(_MOST_IN_A_ROW, 1 + int(_IN_A_ROW / regions[0].bytes))
                    more = [
                        DeviceRegion(one, case.sizes, kernels(), regions[0]) for _ in range(count)
                    ]
                return self.measure(case, regions, parts.config, session, more)

            yield Task(case.name, digest, measure)

    def compile_ahead(
        self, model: Model, target: str, store: KernelStore, progress: Progress | None
    ) -> None:
        """All parts and forms, together."""
        lowered = self.lowered(Parts(model, target), target)
        compile_parts(list(lowered.values()), target, store, progress)

    def _origin(self, parts: Parts, part: str) -> Parts:
        """What a part is cut from: the model as it is, or quantized."""
        return parts.quantized(self.quantize[part]) if part in self.quantize else parts

    def _forms_of(self, part: str) -> list[str]:
        return [f"{part}, {form}" for form in self.forms]

    def measure(
        self,
        case: Case,
        regions: Sequence[DeviceRegion],
        config: ModelConfig,
        session: Session,
        more: Sequence[DeviceRegion] = (),
    ) -> list[Outcome]:
        """Check every contender of a case, and time those that are right.

        Args:
            case: the case.
            regions: our own choice, then the forms.
            config: of the model.
            session: has the clock and the device.
            more: further ones of our own choice, which are timed in a row with the first.
        """
        first = regions[0]
        error_of = _sampled(first) if self.rows else _complete(first)
        names = [OWN, *(f"{OWN}, {form}" for form in self.forms)]
        entrants: dict[str, Callable[[], Peer]] = {
            name: functools.partial(_own, region)
            for name, region in zip(names, regions, strict=True)
        }
        for name, make in self.peers.items():
            if case.peers is None or name in case.peers:
                entrants[name] = functools.partial(make, first, config)
        outcomes, runs = list[Outcome](), dict[str, Run]()
        for name, enter in entrants.items():
            own_bound = self.bounds.get(case.part, BOUND)
            bound = own_bound if name in names else self.peer_bound
            outcome, peer = _checked(name, enter, error_of, bound)
            run: Run | None = peer
            if peer is not None and more:
                others = [
                    self.peers[name](one, config) if name in self.peers else _own(one)
                    for one in more
                ]
                outcome, run = _recorded(outcome, [peer, *others], session.device)
            outcomes.append(outcome)
            if run is not None:
                runs[name] = run
        timed = session.time(runs)
        share = 1 + len(more)
        return [
            replace(
                o,
                seconds=tuple(one / share for one in timed.get(o.contender, ())),
                bytes=first.bytes,
                flops=first.flops,
            )
            for o in outcomes
        ]


_IN_A_ROW, _MOST_IN_A_ROW = 200e6, 256
"""Bytes of weights in a row, many times what caches hold, and how many parts there are at most."""


def _recorded(outcome: Outcome, runs: Sequence[Peer], device: Device) -> tuple[Outcome, Run | None]:
    """Runs one after the other, as one to be timed; and what the contender's outcome then is."""

    def every() -> None:
        for run in runs:
            run()

    try:
        every()  # whatever is done once is not recorded
        with device.active():
            return outcome, device.record(every)
    except Exception as why:  # not everybody's work can be recorded
        traceback.print_exc()
        return replace(outcome, status="failed", note=f"not recorded: {first_line(why)}"), None


def _planned(form: Form, target: str) -> Emit:
    return lambda site: form(site, target)


def _own(region: DeviceRegion) -> Peer:
    """Our kernels; what they have to write is poisoned before."""
    region.reset()

    def run() -> Results:
        region.run()
        return region.results()

    return run


def _checked(
    name: str, enter: Callable[[], Peer], error_of: ErrorOf, bound: float
) -> tuple[Outcome, Peer | None]:
    """How a contender's first run went, and what to time if its results are right."""
    try:
        run = enter()
        error = error_of(run())
    except AbsentError as why:
        return Outcome(name, "unavailable", str(why)), None
    except Exception as why:  # peers fail in ways of their own, and the others are to be timed
        traceback.print_exc()
        return Outcome(name, "failed", first_line(why)), None
    right = error <= bound
    note = "" if right else f"relative error {error:.2e}, expected at most {bound:g}"
    status: Status = "measured" if right else "wrong"
    outcome = Outcome(name, status, note, error=error, bound=bound)
    return outcome, run if right else None


def _complete(region: DeviceRegion) -> ErrorOf:
    """Against all results of a part."""
    expected = region.expected()
    return lambda found: max(_error(tensor, expected[name]) for name, tensor in found.items())


def _sampled(region: DeviceRegion, tokens: int = 32) -> ErrorOf:
    """Against the first and last tokens of the first and last sequence."""
    rows = sorted({0, region.sizes.batch - 1})
    starts = sorted({0, max(0, region.sizes.new - tokens)})
    places = [(r, s, min(s + tokens, region.sizes.new)) for r in rows for s in starts]
    expected = [region.expected_rows(*place) for place in places]

    def error_of(found: Results) -> float:
        return max(
            _error(tensor[row : row + 1, start:stop], exact[name])
            for (row, start, stop), exact in zip(places, expected, strict=True)
            for name, tensor in found.items()
        )

    return error_of


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(found.float(), expected.float())


def _scan_form(site: Site, target: str, shortest: int) -> Plan:
    """A plan whose recurrence takes the chunked form from that many tokens on."""
    gpu = gpu_target(target)
    if not _recurs(site):
        return emit(site, gpu)
    schedule = default_scan_schedule(take_apart(as_region(site)), gpu)
    forced = replace(schedule, shortest=shortest, crowd=NEVER)
    return emit_conv_scan(site, gpu, forced)


def _recurs(site: Site) -> bool:
    return isinstance(site.op, Fused) and any(
        isinstance(node.op, SsdScan) for node in site.op.body.nodes
    )


_FEW = (1, 4, 16, 64)
"""Sequences of a decode."""

_EACH_FEW = (1, 2, 4, 8, 16, 32, 64)
"""The same where the forms of a product are to be told from each other."""

_ROWS = (512, 2048, 8192, 32768)
"""Rows of the products of a prefill."""

_LENGTHS = (512, 2048, 8192)
"""Tokens of the one sequence of a prefill where there are many parts."""

_PROMPTS = (
    *((1, n) for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)),
    *((4, n) for n in (512, 2048, 8192)),
    *((16, n) for n in (512, 2048)),
    (64, 512),
)
"""Sequences and tokens of each in a prefill: at most 32 K tokens in all."""

_COMPILED = frozenset({(1, 2048), (1, 8192), (1, 32768), (16, 2048)})
"""Those at which torch.compile takes part: each takes it a good part of a minute."""


def _prompts(part: str, every: Sequence[str], compiled: str) -> Iterator[Case]:
    """The cases of a prefill; `compiled` is the peer that takes part in some only."""
    for batch, new in _PROMPTS:
        left_out = set() if (batch, new) in _COMPILED else {compiled}
        yield Case(part, Sizes(batch, new), frozenset(every) - left_out)


def _products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Dense products of a model by name: width and features."""
    hidden, inner = config.hidden_size, config.mamba_inner_size
    shared = config.moe_shared_expert_intermediate_size
    attended = config.num_attention_heads * config.head_dim
    return {
        "in_proj": (hidden, config.in_proj_rows),
        "out_proj": (inner, hidden),
        "shared up": (hidden, shared),
        "shared down": (shared, hidden),
        "q": (hidden, attended),
        "o": (attended, hidden),
        "head": (hidden, config.vocab_size),
    }


def matmul_stage(config: ModelConfig) -> PartStage:
    """Dense products of a model's shapes."""
    cases: list[Case] = []
    parts: dict[str, Callable[[Parts, str], Graph]] = {}
    for name, (width, features) in _products(config).items():
        head = name == "head"
        for few in (True,) if head else (True, False):
            part = f"{name}, decode" if few else name
            parts[part] = functools.partial(_product, width, features, few, head)
            cases += _rows_of(part, few)
    about = "dense products against cuBLAS (torch.mm); aim: within 10 %"
    peers = {"torch.mm": torch_product}
    return PartStage("matmul", about, tuple(cases), parts, peers, in_a_row=True)


def _rows_of(part: str, few: bool) -> list[Case]:
    """A dense product at all numbers of rows, of a decode if there are few."""
    sizes = [Sizes(n, 1) for n in _FEW] if few else [Sizes(1, n) for n in _ROWS]
    return [Case(part, size) for size in sizes]


def fp8_stage(config: ModelConfig) -> PartStage:
    """Dense products with both operands in FP8, of a model's shapes."""
    cases: list[Case] = []
    parts: dict[str, Callable[[Parts, str], Graph]] = {}
    for name, (width, features) in _products(config).items():
        if name == "head":
            continue  # stays as it is
        for few in (True, False):
            part = f"{name}, FP8, decode" if few else f"{name}, FP8"
            parts[part] = functools.partial(_fp8_product, width, features, few)
            cases += _rows_of(part, few)
    return PartStage(
        "fp8",
        "products of FP8 by FP8 against cuBLAS (torch._scaled_mm), and against cuBLAS with bf16; "
        "aim: within 10 % of the first",
        tuple(cases),
        parts,
        {"torch._scaled_mm": scaled_product, "torch.mm, bf16": product_with_widened},
        in_a_row=True,
    )


def _fp8_product(width: int, features: int, few: bool, parts: Parts, name: str) -> Graph:
    return fp8_graph(name, width, features, few)


def nvfp4_stage(config: ModelConfig) -> PartStage:
    """Dense products of a decode with weights in NVFP4, of a model's shapes, one expert's and k's or v's too."""
    hidden, expert = config.hidden_size, config.moe_intermediate_size
    shapes = {
        **_products(config),
        "k": (hidden, config.num_key_value_heads * config.head_dim),
        "expert up": (hidden, expert),
        "expert down": (expert, hidden),
    }
    parts = {
        name: functools.partial(_nvfp4_product, *shape, name == "head")
        for name, shape in shapes.items()
    }
    return PartStage(
        "nvfp4",
        "weights in NVFP4 against cuBLAS with bf16; share: of the roofs with bytes of NVFP4; "
        "aim: 2.5 times at batch 1, not slower up to 64",
        tuple(Case(name, Sizes(batch, 1)) for name in parts for batch in _EACH_FEW),
        parts,
        {"torch.mm, bf16": product_with_decoded},
        in_a_row=True,
    )


def _nvfp4_product(width: int, features: int, wide: bool, parts: Parts, name: str) -> Graph:
    return nvfp4_graph(name, width, features, wide)


def _product(width: int, features: int, few: bool, wide: bool, parts: Parts, name: str) -> Graph:
    return product_graph(name, width, features, few, wide)


def scan_stage() -> PartStage:
    """The recurrence of a prefill."""
    peers: dict[str, MakePeer] = {
        "mamba-ssm, torch conv": functools.partial(mamba_scan, compiled=False),
        "mamba-ssm, compiled conv": functools.partial(mamba_scan, compiled=True),
        "torch.compile": functools.partial(eager_scan, compiled=True),
    }
    return PartStage(
        "scan",
        "convolution, recurrence and gate of a prefill; aim: 1.5 times mamba-ssm from 2 K tokens, never slower",
        tuple(_prompts("scan", list(peers), "torch.compile")),
        {"scan": lambda parts, name: parts.around("prefill", SsdScan, name)},
        peers,
        {
            "chunked": functools.partial(_scan_form, shortest=1),
            "single": functools.partial(_scan_form, shortest=NEVER),
        },
    )


def update_stage() -> PartStage:
    """The recurrence of a decode."""
    return PartStage(
        "update",
        "convolution, recurrence and gate of a decode; aim: 80 % of the bandwidth of a copy",
        tuple(Case("update", Sizes(batch, 1)) for batch in (*_FEW, 256)),
        {"update": lambda parts, name: parts.around("decode", SsdUpdate, name)},
        {"mamba-ssm, compiled conv": mamba_update},
    )


def moe_stage() -> PartStage:
    """A whole layer of experts."""
    peers: dict[str, MakePeer] = {
        "transformers": functools.partial(transformers_moe, compiled=False),
        "torch.compile": functools.partial(transformers_moe, compiled=True),
    }
    few = (Case("moe, decode", Sizes(batch, 1)) for batch in _FEW)
    return PartStage(
        "moe",
        "norm, router, experts, shared expert and residual against transformers with grouped products",
        (*few, *_prompts("moe", list(peers), "torch.compile")),
        {
            "moe, decode": functools.partial(_experts, "decode"),
            "moe": functools.partial(_experts, "prefill"),
        },
        peers,
        peer_bound=ROUTED_BOUND,
    )


_FORMATS = {"nvfp4": True, "nvfp4-fp8-prompts": False, "fp8": True, "fp8-prompts": False}
"""Formats of experts, and whether a decode is another than that of the formats before."""


def quantized_moe_stage() -> PartStage:
    """A whole layer of experts with weights in NVFP4 and FP8."""
    cases: list[Case] = []
    parts: dict[str, Callable[[Parts, str], Graph]] = {}
    quantize: dict[str, str] = {}
    for name, decodes in _FORMATS.items():
        functions = ("decode", "prefill") if decodes else ("prefill",)
        for function in functions:
            few = function == "decode"
            part = f"moe, {name}, decode" if few else f"moe, {name}"
            quantize[part] = name
            parts[part] = functools.partial(_experts, function)
            sizes = (Sizes(n, 1) for n in _FEW) if few else (Sizes(1, n) for n in _LENGTHS)
            cases += (Case(part, size) for size in sizes)
    return PartStage(
        "moe-quantized",
        "a layer of experts in NVFP4 and FP8 against transformers with grouped products of bf16, "
        "whose weights are what those decode to",
        tuple(cases),
        parts,
        {"transformers, bf16": functools.partial(transformers_moe, compiled=False)},
        bounds={f"moe, {name}": FP8_BOUND for name in ("nvfp4-fp8-prompts", "fp8-prompts")},
        peer_bound=ROUTED_BOUND,
        quantize=quantize,
    )


def _experts(function: str, parts: Parts, name: str) -> Graph:
    return parts.layer(function, GroupedLinear, name)


def attention_stage() -> PartStage:
    """Attention over a cache."""
    behind = (512, 2048, 8192, 32768)
    few = (Case("attention, decode", Sizes(b, 1, n - 1)) for b in _FEW for n in behind)
    prompts = (Case("attention", Sizes(b, n)) for b, n in _PROMPTS)
    return PartStage(
        "attention",
        "attention over the cache against torch's with its flash backend",
        (*few, *prompts),
        {
            "attention, decode": lambda parts, name: parts.around("decode", Attention, name),
            "attention": lambda parts, name: parts.around("prefill", Attention, name),
        },
        {"torch flash": torch_attention},
        rows=True,
    )
