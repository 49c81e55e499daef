"""Finding the change by which a pass broke its word.

A pass asks its context before each change (`PassContext.allows`), so it can be stopped after the first k. Its graph
is right after none and wrong after all of them: halving finds a k such that it is right after k − 1 and wrong
after k.
"""

import dataclasses
from dataclasses import dataclass, field

from nemoc.passes.check import Divergence, NumericCheck
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.pipeline import PassError, PassRun, run_pass
from nemoc.passes.reproducer import Reproducer


@dataclass(frozen=True)
class Culprit:
    """What broke a pipeline.

    Attributes:
        run: the guilty pass, with the graphs before and after the guilty change. `before` is what the pass was given
            where the change cannot be told or is too little by itself.
        divergence: how the second graph parts from the first.
        remark: what the pass said of the change; none where it makes changes that it does not ask for.
        change: the change in words: `change 17 of 42 (step/%y: scale-by-one)`.
        reproducer: shows the divergence again.
    """

    run: PassRun
    divergence: Divergence
    remark: Remark | None
    change: str
    reproducer: Reproducer


class CulpritFound(PassError):
    """A pass broke its word; the message names the change that did it."""

    def __init__(self, culprit: Culprit) -> None:
        run = culprit.run
        super().__init__(
            f"{run.place}, {culprit.change}: declares {run.pass_.effect.value} but changes "
            f"{culprit.divergence}; reproduce with --pipeline '{run.reproduces}'"
        )
        self.culprit = culprit


@dataclass(frozen=True)
class Bisect:
    """A check for `run_pipeline` that finds the guilty change of the first pass that breaks its word.

    Every pass is held to its own word, in order. That is stricter than holding the last graph against the first: errors
    of several passes cannot hide each other.

    Attributes:
        check: how passes are checked.
    """

    check: NumericCheck = field(default_factory=NumericCheck)

    def __call__(self, run: PassRun, ctx: PassContext) -> None:
        """Check one pass.

        Raises:
            CulpritFound: the pass broke its word.
            PassError: stopped half-way, the pass raised or made an invalid graph.
        """
        found = self.check.divergence(run, ctx)
        if found is not None:
            raise CulpritFound(self._culprit(run, ctx, found))

    def _culprit(self, run: PassRun, ctx: PassContext, found: Divergence) -> Culprit:
        bad, changes = _stopped(run, ctx, None)
        total = len(changes)
        good, _ = _stopped(run, ctx, 0)
        if self.check.divergence(good, ctx) is not None:
            words = (
                f"before the first of {total} changes" if total else "as a whole: it counts none"
            )
            return self._report(run, ctx, found, None, words)
        low, high = 0, total
        while high - low > 1:
            middle = (low + high) // 2
            stopped, made = _stopped(run, ctx, middle)
            if self.check.divergence(stopped, ctx) is None:
                low, good = middle, stopped
            else:
                high, bad, changes = middle, stopped, made
        remark = changes[-1]
        what = f"of {total} ({remark.site}: {remark.message})"
        alone = dataclasses.replace(bad, before=good.after)
        parted = self.check.divergence(alone, ctx)
        if parted is not None:
            return self._report(alone, ctx, parted, remark, f"change {high} {what}")
        parted = self.check.divergence(bad, ctx) or found
        return self._report(bad, ctx, parted, remark, f"the changes up to {high} {what}")

    def _report(
        self,
        run: PassRun,
        ctx: PassContext,
        found: Divergence,
        remark: Remark | None,
        change: str,
    ) -> Culprit:
        return Culprit(run, found, remark, change, self.check.reproduce(run, ctx, found, change))


def _stopped(run: PassRun, ctx: PassContext, limit: int | None) -> tuple[PassRun, list[Remark]]:
    """The pass once more, stopped after some changes, and which it made."""
    fresh = PassContext(ctx.target, ctx.parameters, ctx.input_scales, limit=limit)
    return run_pass(run.before, run.passes, run.position, fresh), fresh.changes
