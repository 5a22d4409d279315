"""Statistics and robust gradients by replay of a traced pass."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from pycoherence.aggregate import report_of
from pycoherence.capture import (
    LossFn,
    OnUnsupported,
    check_not_sharded,
    check_scale,
    current,
    expect_not_compiling,
    modules_of,
    set_aside,
    tracked_parameters,
)
from pycoherence.errors import UnsupportedError, VerificationError
from pycoherence.record import LossReduction, Record
from pycoherence.replay import (
    Backend,
    Inputs,
    Pass,
    PythonState,
    Replay,
    Tree,
    ambient,
    choices_of,
    differences,
    like,
    results_of,
    trace,
)
from pycoherence.robust import (
    MDA,
    SMEA,
    Bulyan,
    FromWeighting,
    NonFinite,
    Report,
    Rule,
    WeightRule,
)
from pycoherence.sites import is_dtensor
from pycoherence.statistics import Statistic, combine


class Aggregated:
    """The result of a compiled step with a rule.

    Attributes:
        record: The record of the statistics, as that of `pycoherence.aggregate`.
        report: The report of the rule.
        loss: The loss, without its graph.
    """

    def __init__(self, record: Record, report: Report) -> None:
        self.record, self.report, self.loss = record, report, record.loss

    def __repr__(self) -> str:
        return f"Aggregated(record={self.record!r}, report={self.report!r})"


class CompiledStep:
    """A step of `pycoherence.compile`: call it with a batch."""

    def __init__(
        self,
        this: Pass,
        loss_reduction: Any,
        backend: Backend,
        loss_scale: "float | torch.amp.GradScaler",
        check: int,
        max_traces: int,
        constants: Sequence[Tensor],
    ) -> None:
        self._pass, self._loss_reduction, self._backend = this, loss_reduction, backend
        self._loss_scale, self._check = loss_scale, check
        self._max_traces, self._constants = max_traces, tuple(constants)
        self._centre = this.rule.carries if isinstance(this.rule, WeightRule) else None
        self._state = PythonState(this.model, (this.loss_fn, this.rule, *this.statistics))
        self._replays: list[Replay] = []

    def __repr__(self) -> str:
        return f"CompiledStep({type(self._pass.model).__name__}, traces={self.traces})"

    @property
    def traces(self) -> int:
        """How many traces it has made."""
        return len(self._replays)

    def __call__(self, batch: Any) -> Any:
        """Run forward and backward pass on a batch, and fill `.grad`.

        Args:
            batch: The second argument of `loss_fn`: tensors, or tuples, lists and dicts of them.

        Returns:
            A `Record` with `loss`; with a rule an `Aggregated`, which has `record`, `report` and
            `loss`.

        Raises:
            UnsupportedError: A replay would not be what the pass is; see `pycoherence.compile`.
            VerificationError: A replay was not what the pass is.
            RuntimeError: A block is open, or there are more than `max_traces` traces.
        """
        _expect_free()
        _expect_new_step(self._pass.rule)
        number = self._number()
        flat, spec = tree_flatten(batch)
        replay, expected = self._find(flat, spec, number), None
        if replay is None:
            if self._check:
                expected = self._eager(batch, number)
            # The first pass may have made what later ones use, such as lazy parameters.
            replay = self._find(flat, spec, number) or self._new(batch, flat, spec, number)
        elif self._check > 1 and (replay.calls + 1) % self._check == 0:
            expected = self._eager(batch, number)
        inputs = self._inputs(flat, number)
        kept = None if expected is None else [x.clone() for x in inputs.buffers.values()]
        try:
            tree = replay(inputs)
            if expected is not None and kept is not None:
                found = {**tree, "buffers": inputs.buffers}
                self._compare(expected, found, zip(inputs.buffers.values(), kept, strict=True))
        except BaseException:
            self._replays.remove(replay)  # it is not known to be right
            raise
        return self._give(tree, number, inputs)

    def _number(self) -> float:
        scale = self._loss_scale
        return scale.get_scale() if isinstance(scale, torch.amp.GradScaler) else scale

    @property
    def _is_scaled(self) -> bool:
        return self._loss_scale != 1.0

    def _scale(self, number: float) -> Tensor | float | None:
        """The scale of the loss: an input of the graph, unless a rule computes with it."""
        if not self._is_scaled:
            return None
        if not self._pass.scale_is_input:
            return number
        device = next(self._pass.model.parameters()).device
        return torch.tensor(number, dtype=torch.float64, device=device)

    def _inputs(self, flat: list[Any], number: float) -> Inputs:
        scale = self._scale(number)
        centre = {} if self._centre is None else self._centre.value
        batch = [x for x in flat if isinstance(x, Tensor)]
        return Inputs(self._pass.model, centre, batch, scale if isinstance(scale, Tensor) else None)

    def _find(self, flat: list[Any], spec: Any, number: float) -> Replay | None:
        key = self._key(flat, spec, number)
        for i, replay in enumerate(self._replays):
            if replay.key == key and replay.trace.holds:
                if i:  # the next batch will most likely be like this one
                    self._replays.insert(0, self._replays.pop(i))
                return replay
        return None

    def _key(
        self, flat: list[Any], spec: Any, number: float, keep: list[Any] | None = None
    ) -> tuple[Any, ...]:
        """All that a trace depends on, beside its constants."""
        seen: dict[int, int] = {}
        leaves = [_leaf(x, seen) for x in flat]
        tensors: list[Any] = []
        for _, module in modules_of(self._pass.model):
            for name, x in (*module._parameters.items(), *module._buffers.items()):
                place = None if x is None else seen.setdefault(id(x), len(seen))
                about = None if x is None else (like(x), x.requires_grad, type(x))
                tensors.append((name, place, about))
        centre = {} if self._centre is None else self._centre.value
        return (
            spec,
            leaves,
            tensors,
            [(name, like(x)) for name, x in centre.items()],
            number if self._is_scaled and not self._pass.scale_is_input else None,
            ambient(),
            self._state.now(keep),
        )

    def _new(self, batch: Any, flat: list[Any], spec: Any, number: float) -> Replay:
        if len(self._replays) >= self._max_traces:
            raise RuntimeError(
                f"expected at most max_traces={self._max_traces} kinds of batches and settings, "
                "got another one, for which a new trace would be made; give batches one shape "
                "(drop_last=True, padding), keep numbers that change in tensors, or raise "
                "max_traces"
            )
        _check_model(self._pass.model)
        keep: list[Any] = []
        key = self._key(flat, spec, number, keep)
        inputs, scale = self._inputs(flat, number), self._scale(number)
        fixed = scale if isinstance(scale, float) else None
        found = trace(self._pass, self._state, inputs, batch, self._centre, fixed, self._constants)
        replay = Replay(key, found, self._backend, keep)
        self._replays.insert(0, replay)
        return replay

    def _eager(self, batch: Any, number: float) -> Tree:
        """All that the pass finds as it is written; nothing is left of it."""
        model, centre = self._pass.model, self._centre
        parameters = list(tracked_parameters(model).values())
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        buffers = [(b, b._version, b.clone()) for b in model.buffers()]
        carried = {} if centre is None else centre.value
        tensors = [x for x in tree_flatten(batch)[0] if isinstance(x, Tensor)]
        versions = [x._version for x in (*tensors, *parameters)]
        try:
            with torch.random.fork_rng(list(devices)), set_aside(parameters):
                tree = self._pass.run(batch, self._scale(number))
            now = {} if centre is None else centre.value
            after = {name: b.clone() for name, b in model.named_buffers()}
        finally:
            for b, version, before in buffers:
                if b._version != version:
                    b.copy_(before)
            if centre is not None:
                centre.value = carried
        if [x._version for x in (*tensors, *parameters)] != versions:
            raise UnsupportedError(
                "pc.compile: the pass writes into tensors of the batch, or into parameters, which "
                "a second pass would find changed. What to do: work on copies (x.clone()), and "
                "change parameters between the steps."
            )
        return {**tree, "centre": now, "buffers": after}

    def _compare(
        self, expected: Tree, found: Tree, buffers: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        wrong = differences(expected, found, exact=self._backend is None)
        if not wrong:
            return
        for buffer, before in buffers:
            buffer.copy_(before)
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise VerificationError(
            f"pc.compile: a replay of the pass gave other numbers than the pass itself, in "
            f"{', '.join(wrong[:5])}{more}. Likely causes: the pass depends on something that "
            "changes in each step and that Python keeps, or it draws numbers from a generator of "
            "its own. What to do: put what changes into the batch or into buffers, or use "
            "pc.collect."
        )

    @torch.no_grad()
    def _give(self, tree: Tree, number: float, inputs: Inputs) -> Any:
        this, parameters = self._pass, inputs.parameters
        for name, g in tree["gradients"].items():
            _fill(parameters[name], g)
        if self._centre is not None:
            self._centre.value = tree["centre"]
        results = results_of(tree, number if self._is_scaled else 1.0)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        request = combine(this.statistics, trained)
        record = Record(results, request, this.statistics, self._loss_reduction)
        if this.rule is None:
            return record
        return Aggregated(record, report_of(this.rule, results, choices_of(tree)))


def _fill(p: nn.Parameter, g: Tensor) -> None:
    """Give a parameter its gradient as `backward()` does: set or added, and its hooks run."""
    if p._backward_hooks or p._post_accumulate_grad_hooks:
        torch.autograd.backward([p], [g])
    elif p.grad is None:
        p.grad = g
    else:
        p.grad += g


def _expect_free() -> None:
    expect_not_compiling()
    if current() is not None:
        raise RuntimeError(
            "a compiled step runs a block of its own, and blocks cannot be nested; call it outside "
            "of collect and aggregate"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("expected to be outside of torch.inference_mode, which has no gradients")


def _leaf(x: Any, seen: dict[int, int]) -> Any:
    """All that a trace depends on of a part of a batch."""
    if not isinstance(x, Tensor):
        if isinstance(x, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            return type(x), x
        raise UnsupportedError(
            f"pc.compile: the batch holds a {type(x).__name__}, of which it is not known when a "
            "trace holds for another one. What to do: give it a batch of tensors, numbers and "
            "strings, in tuples, lists and dicts."
        )
    if type(x) is not Tensor or x.layout != torch.strided or x.is_nested:
        kind = type(x).__name__ if type(x) is not Tensor else "tensor that is not dense"
        raise UnsupportedError(
            f"pc.compile: the batch holds a {kind}. What to do: give it plain dense tensors."
        )
    if x.requires_grad:
        raise UnsupportedError(
            "pc.compile: a tensor of the batch requires a gradient, which replays would not fill. "
            "What to do: detach() it, or use pc.collect."
        )
    # A tensor that is there twice is one input.
    return like(x), seen.setdefault(id(x), len(seen)), x.is_conj() or x.is_neg()


def _check_model(model: nn.Module) -> None:
    tracked_parameters(model)  # refuses other wrappers
    for path, module in modules_of(model):
        if isinstance(module, DistributedDataParallel):
            where = f"module {path!r}" if path else "the model"
            raise UnsupportedError(
                f"pc.compile: {where} is a DistributedDataParallel, whose hooks average gradients "
                "and do not run in a replay. What to do: compile its .module and average .grad, "
                "or use pc.collect(..., group=...)."
            )
    check_not_sharded(
        model,
        "its hooks gather parameters and reduce gradients, and do not run in a replay of "
        "pc.compile. What to do: use pc.collect or pc.aggregate, with group= if need be.",
    )
    for name, p in model.named_parameters():
        if is_dtensor(p):
            raise UnsupportedError(
                f"pc.compile: {name!r} is a DTensor, whose messages a trace does not hold. What "
                "to do: use pc.collect or pc.aggregate."
            )


def _expect_new_step(rule: Rule | None) -> None:
    """Refuse to end a step that blocks with `last=False` have begun."""
    if isinstance(rule, WeightRule) and rule.largest_part:
        raise UnsupportedError(
            f"pc.compile: {rule} has seen batches with last=False, whose noise is that of a step "
            "of several batches, and a compiled step is one alone. What to do: give the last of "
            "them to pc.aggregate too."
        )


def _check_rule(rule: Rule, nonfinite: NonFinite) -> None:
    """Refuse a rule of which a replay would not do all."""
    carried = rule.carries if isinstance(rule, WeightRule) else None
    for part in _parts(rule):
        name = type(part).__name__
        for where, x in {**vars(part), **part.states}.items():
            if x is not carried and not isinstance(x, Rule) and hasattr(x, "state_dict"):
                raise UnsupportedError(
                    f"pc.compile: {name} keeps a state in {where!r} from batch to batch, which "
                    "replays would not move. What to do: use pc.aggregate."
                )
        if getattr(part, "generator", None) is not None:
            raise UnsupportedError(
                f"pc.compile: {name} has a generator of its own, which replays would not draw "
                "from. What to do: leave it out, so that numbers are drawn from torch's own, or "
                "use pc.aggregate."
            )
        if isinstance(part, FromWeighting):
            raise UnsupportedError(
                f"pc.compile: {name} gives its function a matrix whose size numbers tell, and the "
                "function may keep a state; a replay runs no Python. What to do: use pc.aggregate."
            )
        if isinstance(part, (MDA, SMEA)) or (isinstance(part, Bulyan) and nonfinite == "drop"):
            dropping = ' with nonfinite="drop"' if isinstance(part, Bulyan) else ""
            raise UnsupportedError(
                f"pc.compile: {name}{dropping} reads numbers on the host to choose examples, and a "
                "replay runs no Python. What to do: use pc.aggregate, or a rule that does not, "
                "such as pc.Krum."
            )


def _parts(rule: Rule) -> Iterator[Rule]:
    """A rule, and those inside it."""
    yield rule
    for x in vars(rule).values():
        if isinstance(x, Rule):
            yield from _parts(x)


def _check_count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral):
        raise TypeError(f"expected {name} to be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} to be {least} or more, got {value}")
    return int(value)


def compile(
    model: nn.Module,
    loss_fn: LossFn,
    *statistics: Statistic,
    rule: Rule | None = None,
    backend: Backend = None,
    loss_reduction: LossReduction = "mean",
    group_size: int = 1,
    on_unsupported: OnUnsupported = "auto",
    nonfinite: NonFinite = "nan",
    loss_scale: "float | torch.amp.GradScaler" = 1.0,
    check: bool | int = True,
    max_traces: int = 8,
    constants: Sequence[Tensor] = (),
) -> CompiledStep:
    r"""Make a step that measures, and fills `.grad`, in less time than a block.

    .. math:: \texttt{step}(x) = \texttt{loss\_fn(model, x).backward()} \ \text{in a block}

    bit for bit, without the time that Python takes to follow examples. The first batch of a kind
    runs in a block, and in a trace of torch operators, forward and backward. Later ones run these
    alone. Nothing of the capture is written anew for it: what it does to tensors is what is traced.

    All that a trace depends on is compared at each call, and another trace is made if some of it
    is another: shapes, strides, dtypes and devices of the batch, of parameters and of buffers, the
    parameters that require gradients, `training` and all other plain attributes of the modules,
    all that `loss_fn` takes from around it, autocast and the other switches of torch, the workspace
    and the backend of the ops. A pass is refused that reads numbers of the batch on the host, sets
    attributes, or keeps tensors. docs/compile.md has the rest.

    A step is one batch on one process: what `pycoherence.aggregate` takes as `last`, `outvoted`,
    `grad_scale` and `group`, and both verbs as `group_by`, is for blocks.

    Scaling: That of `pycoherence.collect` and `pycoherence.aggregate`.

    Args:
        model: Any module of this process alone.
        loss_fn: `loss_fn(model, batch)` gives the loss of the batch, a scalar tensor.
        statistics: The statistics to measure, each kind once; one or more if there is no rule.
        rule: Such as `pc.Winsorized(2)`: `.grad` gets what it gives in `pycoherence.aggregate`.
        backend: The compiler of the graph: `None` for none, a name that `torch.compile` takes, such
            as `"inductor"` or `"cudagraphs"`, or a function of a graph and its inputs. With one,
            results may differ by roundings.
        loss_reduction: How `loss_fn` joins per-example losses.
        group_size: How many consecutive rows make one example, as in `pycoherence.collect`.
        on_unsupported: The treatment of a parameter that is used in a way that is not known, as in
            `pycoherence.collect`.
        nonfinite: The treatment of gradients that are not finite by the rule, as in
            `pycoherence.aggregate`.
        loss_scale: The number that the step multiplies the loss by before its backward pass, or the
            `torch.amp.GradScaler` that knows it. Results are divided by it, and `.grad` is not.
        check: Whether the first replay of each trace is compared with the block: `.grad`, the loss,
            all statistics and buffers. A number `n` above 1 compares each n-th replay as well.
        max_traces: How many kinds of batches and settings there may be.
        constants: Tensors that the pass uses, and that are neither in the batch, the model, nor
            seen from `loss_fn`. They may change in place, and no other takes their places.

    Returns:
        A function `step(batch)`. It gives a `Record` that has `loss` too; with a rule, what has
        `record`, `report` and `loss`.

    Raises:
        ValueError: See `pycoherence.collect` and `pycoherence.aggregate`.
        TypeError: An argument is of another kind.
        UnsupportedError: The model is wrapped by DistributedDataParallel or sharded by FSDP2; the
            rule draws from a generator of its own, keeps another state than the centre of
            `CenteredClip` (`AdaptiveClip`), or runs Python on numbers (`FromWeighting`, `MDA`,
            `SMEA`, `Bulyan` with `nonfinite="drop"`); from a step, a replay would not be what the
            pass is, or as in `pycoherence.collect`.
        VerificationError: From a step, a replay gave other numbers than the block; `.grad` is as it
            was.
        RuntimeError: From a step, more than `max_traces` traces, or a block is open.

    Cost: For each kind of batch a block, a trace, which takes some ten times as long, and a replay;
    then the operators alone. `Krum` and its like take their products in float64 too. Memory as that
    of the block.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> step = pc.compile(
        ...     model, lambda model, x: model(x).sum(), pc.SqNorms(), loss_reduction="sum"
        ... )
        >>> record = step(torch.eye(3))
        >>> record.sq_norms, step(2 * torch.eye(3)).sq_norms, step.traces
        (tensor([1., 1., 1.]), tensor([4., 4., 4.]), 1)
        >>> model.weight.grad
        tensor([[3., 3., 3.]])
    """
    if not callable(loss_fn):
        raise TypeError(
            f"expected loss_fn to be a function of the model and a batch, got {loss_fn!r}"
        )
    if not isinstance(loss_scale, torch.amp.GradScaler):
        loss_scale = check_scale(loss_scale)
    for x in constants:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected constants to be tensors, got {type(x).__name__}")
    _check_model(model)
    options = {
        "loss_reduction": loss_reduction,
        "group_size": group_size,
        "on_unsupported": on_unsupported,
        "nonfinite": nonfinite,
    }
    this = Pass(model, loss_fn, statistics, rule, options)
    this.block(1.0)  # so that what does not fit raises here
    if rule is not None:
        _check_rule(rule, nonfinite)
    every = _check_count("check", check, 0)
    most = _check_count("max_traces", max_traces, 1)
    return CompiledStep(this, loss_reduction, backend, loss_scale, every, most, constants)
