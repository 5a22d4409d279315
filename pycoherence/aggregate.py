"""Robust gradients in place of the ordinary one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from math import prod
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor, nn

from pycoherence.capture import (
    Aggregate,
    Capture,
    Factors,
    FactorsAcross,
    GradScale,
    GroupBy,
    LossScale,
    OnUnsupported,
    Request,
    Results,
    check_batch_norm,
    check_grad_scale,
    check_grouping,
    check_loss_scale,
    expect_same_ranks,
    expect_unchanged,
    resting,
    scale_of,
    tracked_parameters,
    without_sync,
)
from pycoherence.errors import UnsupportedError
from pycoherence.ranks import Group, Ranks, check_group, ranks_of
from pycoherence.record import (
    LossReduction,
    Record,
    check_loss_reduction,
    check_on_unsupported,
    record_of,
)
from pycoherence.robust import (
    NETWORK,
    Choice,
    CoordinateRule,
    Done,
    GramRule,
    NonFinite,
    Report,
    Reweight,
    Rule,
    WeightRule,
    check_nonfinite,
    check_rule,
    decide,
    fill,
    groups_of,
    measure,
)
from pycoherence.sites import is_dtensor, placed, sq_norm
from pycoherence.statistics import Batch, Statistic, combine


class aggregate:
    r"""Fill `.grad` with a robust aggregate of the per-example gradients.

    .. math:: \texttt{.grad} \mathrel{+}= \operatorname{rule}(g_1, \dots, g_B) \ \text{(mean)}
        \qquad \texttt{.grad} \mathrel{+}= B \operatorname{rule}(g_1, \dots, g_B) \ \text{(sum)}

    where the mean of the `g_b` would be added, or their sum. The forward and backward pass run
    inside the block; any torch optimizer steps in it or after it. Nothing is left on the model.

    Rules over each coordinate (`Winsorized`, `TrimmedMean`, `Median`, `MedianOfMeans`,
    `SignAgreement`, `Phocas`, `MeaMed`) take the place of the weight gradients in the backward pass
    itself. All others, which look at whole examples, keep the inputs and output gradients of all
    layers, and fill `.grad` when `backward()` is about to return.

    Args:
        model: Any module. Parameters with `requires_grad=False` are left alone.
        rule: Such as `pc.Winsorized(2)`.
        statistics: The statistics to measure in the same pass, such as `pc.SqNorms()`, each kind
            once. They are those of the gradients before the rule, and `record` has them.
        loss_reduction: How the loss joins its per-example terms. With `"mean"` the mean of the
            `g_b` is the gradient, with `"sum"` their sum is.
        nonfinite: The treatment of gradients that are not finite. With `"nan"` they show: as NaN in
            the coordinates they touch, or everywhere for a rule over whole examples. With
            `"drop"` their examples are left out of these coordinates, or wholly, and the rule is
            applied to the others (NaN if these are too few for it). Over whole examples those whose
            squared norm overflows float32 count as not finite.
        group_size: How many consecutive rows of the batch make one example, as in
            `pycoherence.collect`.
        group_by: In place of `group_size`, the example of each row, as in `pycoherence.collect`.
        on_unsupported: The treatment of a parameter that is used in a way that is not known, as in
            `pycoherence.collect`; with `"skip"` it gets its ordinary gradient, and the report lists
            it.
        loss_scale: The number that the loss is multiplied by before `backward()`, or the
            `torch.amp.GradScaler` that does it, read when `backward()` runs, or a function that
            gives the number for the loss that `backward()` is called on.
            A rule sees gradients that are divided by it; those in `.grad` are multiplied by it
            again, as the scaler expects.
        grad_scale: The number, or the scaler, that those in `.grad` are multiplied by instead if
            the rule has `expected_batch_size`, such as 1 for a loss that is divided by the number
            of micro-batches: that size counts the examples of a step, and the sum over them is
            divided by nothing else. `None` for `loss_scale`.
        group: The processes over whose examples the rule is taken, a
            `torch.distributed.ProcessGroup` or a `DeviceMesh`; `None` for this process alone. All
            of them run the block. `.grad` is then the same on each, that of one process with all
            examples in the order of global ranks, and so is the report. A model wrapped by
            DistributedDataParallel or FSDP2 is wrapped over the same processes; the wrapper's own
            average completes a rule over coordinates.
        last: Whether the optimizer steps after this batch. If it does so after several, give
            `last=False` for all but the last of them: a rule with noise adds it in the last one
            alone, and a threshold that adapts moves there. Other rules do not ask.
        outvoted: Whether the report says in what share of the coordinates each example was clipped
            or cut away, for `Winsorized`, `TrimmedMean`, `Phocas` and `MeaMed`. It takes a further
            pass over the gradients, some coordinates at a time, by plain operations of torch.

    Returns:
        On entering, this object; its `report` says what the rule did, and its `record` has the
        statistics.

    Raises:
        ValueError: No parameter to track, an unknown option, `outvoted` with another rule,
            `on_unsupported="skip"` with `group`, two statistics of one kind, or, from `backward()`,
            a batch that is too small for the rule.
        TypeError: The rule is a class instead of an object, or something else; `group_size` is not
            an integer; `group_by` holds something else; `group` is neither a process group nor a
            mesh; or as in `pycoherence.collect`.
        RuntimeError: Two captures are nested, the object is used twice; on leaving, no backward
            pass of the model was seen in the block; from `backward()`, a second pass in the block
            with a rule over whole examples. With `group`, see `pycoherence.collect`.
        RanksError: See `pycoherence.collect`.
        UnsupportedError: See `pycoherence.collect`; from `backward()`, parameters have hooks on
            their gradients, with a rule over whole examples. In the block, a wrapper of the model
            reduces gradients in a way that the rule cannot use, such as DistributedDataParallel
            with a communication hook, or without `group` if the rule is over whole examples.

    Cost: See the rule. Statistics are measured as in `pycoherence.collect`; `SqNorms` makes the
    ordinary weight gradients too, of which the coherence is read. Norms and dot products that they
    have are not taken again for a rule over whole examples. With `group`, each process receives its
    slice of the gradients of others' examples, or their factors if these are fewer numbers;
    docs/distributed.md has the formulas.

    Source: Chatterjee 2020, arXiv:2002.10657, for robust gradients against memorisation; each
    rule names its own.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]])
        >>> with pc.aggregate(model, pc.Winsorized(1)) as agg:
        ...     model(x).mean().backward()
        >>> optimizer.step()
        >>> model.weight.grad
        tensor([[3.]])
        >>> agg.report.by_parameter["weight"].clipped
        0.4
    """

    _rests: ClassVar[bool] = False  # whether it ends with its backward pass, before it is left

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *statistics: Statistic,
        loss_reduction: LossReduction = "mean",
        nonfinite: NonFinite = "nan",
        group_size: int = 1,
        group_by: GroupBy | None = None,
        on_unsupported: OnUnsupported = "auto",
        loss_scale: LossScale = 1.0,
        grad_scale: GradScale | None = None,
        group: Group | None = None,
        last: bool = True,
        outvoted: bool = False,
    ) -> None:
        check_loss_reduction(loss_reduction)
        check_nonfinite(nonfinite)
        check_rule(rule)
        if outvoted:
            rule.check_outvoted()
        combine(statistics, tracked_parameters(model))  # so that what does not fit raises here
        self._model = model
        self._rule = rule
        self._statistics = statistics
        self._loss_reduction: LossReduction = loss_reduction
        self._drop = nonfinite == "drop"
        self._grouping = check_grouping(group_size, group_by)
        self._on_unsupported = check_on_unsupported(on_unsupported)
        self._loss_scale = check_loss_scale(loss_scale)
        self._grad_scale = None if grad_scale is None else check_grad_scale(grad_scale)
        self._group = check_group(group)
        self._last, self._outvoted = bool(last), bool(outvoted)
        if group is not None and on_unsupported == "skip":
            raise ValueError(
                'expected on_unsupported to be another value than "skip" together with group=, '
                "since gradients that no rule makes would differ between the processes"
            )
        self._stack = ExitStack()
        is_mean = loss_reduction == "mean"
        self._filler = _Filler(rule, is_mean, self._drop, self._last, self._grad_scale)
        self._capture: Capture | None = None
        self._record: Record | None = None

    def __repr__(self) -> str:
        return (
            f"aggregate({self._rule!r}, loss_reduction={self._loss_reduction!r}, "
            f"nonfinite={'drop' if self._drop else 'nan'!r}, {self._grouping})"
        )

    def __enter__(self) -> "aggregate":
        if self._capture is not None:
            raise RuntimeError("this aggregate has been used; make a new one for each batch")
        ranks = ranks_of(self._group)
        with nullcontext() if ranks is None else ranks.opening():
            self._open(ranks)
        return self

    def _open(self, ranks: Ranks | None) -> None:
        check_batch_norm(self._model)
        parameters = tracked_parameters(self._model)
        if isinstance(self._rule, WeightRule):
            self._rule.check_parameters(parameters)
        request = self._request(ranks, parameters)
        around = resting(self._filler.around) if self._rests else self._filler.around
        capture = Capture(self._model, parameters, request, around)
        # The rule takes the factors for itself, and frees them.
        seen = request._replace(factors=False)
        self._record = record_of(capture, seen, self._statistics, self._loss_reduction)
        self._filler.begin(capture, parameters, self._record)
        with ExitStack() as stack:
            if isinstance(self._rule, WeightRule) and capture.across is not None:
                expect_same_ranks(self._model, capture.across.ranks)
                stack.enter_context(without_sync(self._model))
            stack.enter_context(capture)
            self._stack = stack.pop_all()
        self._capture = capture

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._capture is None:
            return
        self._stack.__exit__(kind, error, trace)
        self._capture.forget()
        self._capture.leave(kind)
        if kind is None and not self._capture.passes.seen:
            raise RuntimeError(
                "no backward pass of this model was seen in the block, so that nothing was "
                "aggregated; run the forward pass of the model that aggregate was given, and "
                "loss.backward(), inside the block and in its thread"
            )

    def _request(self, ranks: Ranks | None, parameters: Mapping[str, nn.Parameter]) -> Request:
        request = combine(self._statistics, parameters)
        if isinstance(self._rule, CoordinateRule):
            name, k = self._rule.aggregate
            aggregate = Aggregate(name, k, self._drop, self._rule.counts, self._outvoted)
            request = request._replace(aggregate=aggregate)
        else:
            request = request._replace(factors=True, gradients=False)
        return request._replace(
            grouping=self._grouping,
            on_unsupported=self._on_unsupported,
            loss_scale=self._loss_scale,
            rule=_words(self._rule, self._drop, self._last, self._grad_scale)
            + ", outvoted" * self._outvoted,
            ranks=ranks,
            is_mean=self._loss_reduction == "mean",
        )

    @property
    def record(self) -> Record:
        """The record of the statistics, as `pycoherence.collect` gives it.

        Raises:
            RuntimeError: The block has not been entered.
        """
        if self._record is None:
            raise RuntimeError("the block has not been entered; its record is there once it is")
        return self._record

    @property
    def report(self) -> Report:
        """The report of the rule.

        Raises:
            RuntimeError: No backward pass has run to its end.
        """
        results = None if self._capture is None else self._capture.whole
        if results is None or results.batch_size is None or not self._filler.done:
            raise RuntimeError(
                "no backward pass has run to its end in the block; call loss.backward() in it first"
            )
        return report_of(self._rule, results, self._filler.choices)

    @property
    def capture(self) -> Capture:
        """The capture of the block."""
        if self._capture is None:
            raise RuntimeError("the block has not been entered")
        return self._capture

    @property
    def choices(self) -> Mapping[str, Choice]:
        """The choices of a rule over whole examples, by parameter."""
        return self._filler.choices


def report_of(rule: Rule, results: Results, choices: Mapping[str, Choice]) -> Report:
    """The report of a rule.

    Args:
        rule: Which.
        results: The results of a backward pass that has run to its end.
        choices: By parameter, those of a rule over whole examples.
    """
    size, skipped = results.batch_size, tuple(results.skipped)
    assert size is not None
    if isinstance(rule, WeightRule):
        by_name = {name: choice.decision for name, choice in choices.items()}
        whole = next(iter(by_name.values()), None) if rule.per == NETWORK else None
        return Report(size, by_name, whole, skipped)
    assert isinstance(rule, CoordinateRule)
    numbers = {name: prod(info.shape) for name, info in results.parameters.items()}
    nonzero = {n: results.aggregated[n] for n in results.parameters if n in results.aggregated}
    return rule.report(size, numbers, nonzero, results.outvoted, skipped)


class _Filler:
    """The work around a backward pass: checks before, and `.grad` after.

    Attributes:
        choices: The choices of a rule over whole examples, by parameter.
        by_group: The same, by the groups of the rule's `per`.
        done: Whether a backward pass has run.
    """

    def __init__(
        self, rule: Rule, is_mean: bool, drop: bool, last: bool, grad_scale: GradScale | None
    ) -> None:
        self._rule, self._is_mean, self._drop, self._last = rule, is_mean, drop, last
        self._grad_scale = grad_scale
        self.choices: dict[str, Choice] = {}
        self.by_group: dict[str, Choice] = {}
        self.done = False

    def begin(
        self, capture: Capture, parameters: Mapping[str, nn.Parameter], record: Record
    ) -> None:
        """Take what a block fills."""
        self._record = record
        self._results, self._parameters = capture.results, parameters
        self._whole, self._across = capture.whole, capture.across

    @contextmanager
    def around(self) -> Iterator[None]:
        """Run a backward pass inside."""
        results = self._results
        size = self._whole.batch_size
        if size:
            why = self._rule.check_batch(size)
            if why is not None:
                raise ValueError(
                    f"{self._rule} {why}, got {size}; take larger batches, leave out "
                    "a last smaller one (drop_last=True), or change the rule"
                )
        if isinstance(self._rule, WeightRule):
            _refuse_hooks(self._parameters)
        yield
        if isinstance(self._rule, WeightRule) and results.factors:
            self._fill(self._rule)
        self.done |= bool(results.aggregated) or bool(self.choices)

    @torch.no_grad()
    def _fill(self, rule: WeightRule) -> None:
        results = self._results
        means = self._means(rule)
        if rule.carries is not None:
            rule.carries.move(means)
        size, skipped = self._whole.batch_size, results.skipped
        assert size is not None
        parameters = {name: p for name, p in self._parameters.items() if name not in skipped}
        groups = list(groups_of(rule.per, parameters))
        examples = rule.examples(size)
        loss_scale = results.loss_scale
        if rule.expected is not None and self._grad_scale is not None:
            loss_scale = scale_of(self._grad_scale, ())
        scale = (1 if self._is_mean else examples or 1) * loss_scale
        divisor = examples if self._is_mean else 1
        # That of an example in `.grad`; an empty batch has none.
        part = loss_scale / divisor if divisor else 0.0
        gradients: dict[str, Tensor] = {}
        for name, p in parameters.items():
            noise = self._noise(rule, name, p, groups, part) if self._last else None
            mean = means.pop(name, None)
            if noise is not None and is_dtensor(mean):
                noise = placed(noise, p)
            scaled = None if mean is None else mean * scale
            terms = [term for term in (scaled, noise) if term is not None]
            if terms:
                gradients[name] = placed(sum(terms[1:], terms[0]).to(p.dtype), p)
        # A backward pass fills it in this way: added to what is there, in the parameter's layout.
        filled = [parameters[name] for name in gradients]
        torch.autograd.backward(filled, list(gradients.values()))
        done = Done(parameters, self.by_group, groups, size, part, self._last, self._decided)
        rule.end(done)

    def _noise(
        self, rule: WeightRule, name: str, p: Tensor, groups: Sequence[str], part: float
    ) -> Tensor | None:
        """The noise in `.grad` of one parameter."""
        noise = rule.noise(p, groups)
        if noise is None:
            return None
        # Those of a smaller batch have larger parts, and the noise has to hide any example.
        part = max(part, rule.largest_part)
        if not part:
            raise ValueError(
                f"an empty batch has no mean for the noise of {rule} to be added to; give the rule "
                "expected_batch_size=, which is right under Poisson sampling, or add up: "
                'loss_reduction="sum"'
            )
        if self._across is not None:
            # All draw, so that their generators stay in step, and one draw counts.
            self._across.ranks.step(f"noise of {name}")
        return self._decided(noise) * part

    def _decided(self, x: Tensor) -> Tensor:
        return x if self._across is None else self._across.decided(x)

    def _means(self, rule: WeightRule) -> dict[str, Tensor]:
        """The robust mean of each parameter that has one; the factors are freed."""
        results = self._results
        factors, size, across = results.factors, self._whole.batch_size, self._across
        assert size is not None
        expect_unchanged(factors, "leave what the layers pass on as it is until backward() returns")
        share = (size if self._is_mean else 1) / results.loss_scale
        centre = {} if rule.carries is None else rule.carries.value
        if across is not None:
            if centre:
                # Each rank moves its own, and they would never meet again.
                norms = [f"{name} {float(sq_norm(v)).hex()}" for name, v in centre.items()]
                across.ranks.step(f"a centre with the squared norms {', '.join(norms)}")
            for name, kept in factors.items():
                factors[name] = FactorsAcross(kept.site, kept.versions, across, name)
        choose = partial(self._choose, rule, batch=Batch(size, share))
        found = fill(rule, factors, results.parameters, share, self._drop, choose)
        self.choices, self.by_group = found.choices, found.by_group
        return found.means

    def _choose(
        self,
        rule: WeightRule,
        factors: Mapping[str, Factors],
        centre: Mapping[str, Tensor],
        group: str,
        batch: Batch,
    ) -> Choice:
        """The decision on some parameters together."""
        across, measured = self._across, self._whole.outputs
        if isinstance(rule, GramRule):
            return decide(
                rule,
                factors,
                centre,
                group,
                batch=batch,
                drop=self._drop,
                across=across,
                measured=measured,
            )
        assert isinstance(rule, Reweight)
        device = next(iter(factors.values())).device
        weights = rule.weigh(self._record, batch.size, device)
        if across is not None:
            weights = across.decided(weights)
        if self._drop:
            kept = measure(factors, batch, "sq_norms", None, across, measured).kept
            weights = torch.where(kept, weights, 0.0)
        return Choice(weights)


def _refuse_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    hooked = [
        name
        for name, p in parameters.items()
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    ]
    if hooked:
        raise UnsupportedError(
            f"{', '.join(hooked)}: the parameter has hooks on its gradient, which would run before "
            "a rule over whole examples has made one. What to do: remove the hooks, or use a rule "
            "over coordinates."
        )


def _words(rule: Rule, drop: bool, last: bool, grad_scale: GradScale | None) -> str:
    """The part of a rule on which several processes have to agree."""
    words = f"rule {_told(rule)}, nonfinite={'drop' if drop else 'nan'}"
    words = words if last else f"{words}, last=False"
    if grad_scale is None:
        return words
    # A scaler's number is that of `loss_scale`, which they agree on too.
    return f"{words}, grad_scale={grad_scale if isinstance(grad_scale, float) else 'of a scaler'}"


def _told(rule: Rule) -> str:
    plain = (bool, int, float, str, dict)
    found = {name: x for name, x in vars(rule).items() if isinstance(x, plain)}
    found |= {name: _told(x) for name, x in vars(rule).items() if isinstance(x, Rule)}
    return f"{type(rule).__name__} {found}"
