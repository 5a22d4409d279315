"""The record of a backward pass."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from pycoherence import scalars
from pycoherence.capture import (
    Capture,
    Factors,
    OnUnsupported,
    Request,
    Results,
    expect_unchanged,
    like_parameter,
)
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.statistics import (
    Batch,
    Coherence,
    ParameterRecord,
    Statistic,
    can_tell_sum,
    provider,
    sum_sq_norm,
)

LossReduction = Literal["mean", "sum"]

_NOT_RUN = "no backward pass has run on this batch of {}; call loss.backward() in the block first"


def check_loss_reduction(value: str) -> None:
    """Raise `ValueError` unless it is one of `LossReduction`."""
    if value not in get_args(LossReduction):
        raise ValueError(f"expected loss_reduction to be 'mean' or 'sum', got {value!r}")


def check_on_unsupported(value: Any, *, skip: bool = True) -> OnUnsupported:
    """The value, if it is one of `OnUnsupported`; raise `ValueError` otherwise.

    Args:
        value: To check.
        skip: Whether a parameter may be left out.
    """
    allowed = [name for name in get_args(OnUnsupported) if skip or name != "skip"]
    if value not in allowed:
        raise ValueError(f"expected on_unsupported to be one of {allowed}, got {value!r}")
    return value


class Record:
    """The statistics of one backward pass; what `pycoherence.collect` gives.

    Results can be read as soon as `backward()` has run in the block. They are scaled so that `g_b`
    is the gradient of example b's own loss, as `loss_reduction` says. Each is there if its
    statistic was asked for, and otherwise raises an `AttributeError` that names it. Moments and
    sums of signs have the shape of a parameter and are in `by_parameter` alone. `weighted_sum` adds
    up the gradients themselves, with a weight for each example.
    """

    def __init__(
        self,
        results: Results,
        request: Request,
        statistics: Sequence[Statistic],
        loss_reduction: LossReduction,
        local: "Record | None" = None,
    ) -> None:
        self._local = local
        self._results = results
        self._outputs = dict(request.outputs)
        self._keeps = request.factors
        self._statistics = statistics
        self._loss_reduction = loss_reduction
        self._factors_used = False

    def __repr__(self) -> str:
        size, n = self._results.batch_size, len(self._results.parameters)
        return f"Record(batch_size={size}, parameters={n}, loss_reduction={self._loss_reduction!r})"

    @property
    def batch_size(self) -> int:
        """`B`, the number of examples; of groups, if several rows make one.

        Raises:
            RuntimeError: No parameter has been used yet.
        """
        size = self._results.batch_size
        if size is None:
            raise RuntimeError(
                "no parameter of the model was used in the block with gradients enabled; run "
                "model(x) and loss.backward() inside it"
            )
        return size

    @property
    def local(self) -> "Record":
        """The record of the examples of this process with `group`; without it, this very record."""
        return self if self._local is None else self._local

    @property
    def is_measured(self) -> bool:
        """Whether a backward pass has run to its end, so that results can be read."""
        return bool(self._results.outputs) and not self._results.failed

    @property
    def skipped(self) -> list[str]:
        """Parameters that are not measured, since `on_unsupported="skip"` left them out."""
        return list(self._results.skipped)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Parameters whose gradients were made example by example, and where."""
        return dict(self._results.fallbacks)

    @property
    def loss(self) -> Tensor:
        """The loss of the batch, without its graph; of a step of `pycoherence.compile`.

        Raises:
            AttributeError: The record is of a block, in which the loss is in your hands.
        """
        if self._results.loss is None:
            raise AttributeError(
                "the record of a block does not have the loss, on which you call backward(); that "
                "of a step of pc.compile does"
            )
        return self._results.loss

    @property
    def sq_norms(self) -> Tensor:
        """Squared norms over all tracked parameters, `[B]`; needs `SqNorms`."""
        return self._total("sq_norms")

    @property
    def gram(self) -> Tensor:
        """Dot products over all tracked parameters, `[B, B]`; needs `Gram`."""
        return self._total("gram")

    @property
    def dots(self) -> Tensor:
        """Dot products with the direction over all tracked parameters, `[B]`; needs `Dots`."""
        return self._total("dots")

    @property
    def by_parameter(self) -> Mapping[str, ParameterRecord]:
        """The statistics of each tracked parameter, by name; zeros where it did not take part."""
        batch = self._batch()
        return {
            name: ParameterRecord(
                self._results.parameters[name].shape, raw, self._statistics, batch
            )
            for name, raw in self._raw().items()
        }

    @property
    def first_moment(self) -> NoReturn:
        """Not here but in `by_parameter[name].first_moment`, of the parameter's shape."""
        self._refuse_total("first_moment")

    @property
    def second_moment(self) -> NoReturn:
        """Not here but in `by_parameter[name].second_moment`, of the parameter's shape."""
        self._refuse_total("second_moment")

    @property
    def sign_sum(self) -> NoReturn:
        """Not here but in `by_parameter[name].sign_sum`, of the parameter's shape."""
        self._refuse_total("sign_sum")

    def coherence(self) -> Coherence:
        r"""The coherence of the batch at the weights of this pass; needs `SqNorms`.

        .. math:: m = \lVert \sum_b g_b \rVert^2 / \sum_b \lVert g_b \rVert^2

        Returns:
            A `Coherence`, with parts by parameter and by module.

        Raises:
            RuntimeError: No backward pass has run.
            AttributeError: `SqNorms` was not asked for.

        Source: Chatterjee and Zielinski 2022, arXiv:2203.10036.
        """
        norms, batch, found = provider(self._statistics, "sq_norms"), self._batch(), self._raw()
        if not all(can_tell_sum(raw) for raw in found.values()):
            raise AttributeError(
                "the pass of pc.weighted_sum does not measure the coherence; use pc.collect(..., "
                "keep_factors=True), whose record has coherence() and weighted_sum(coef)"
            )
        # One look at each device's numbers, since every look waits for it.
        sums = on_host(sum_sq_norm(raw) for raw in found.values())
        totals = on_host(
            norms.read("sq_norms", raw, batch).double().sum() for raw in found.values()
        )
        parts = zip(found, sums, totals, strict=True)
        return Coherence.of({name: (s * batch.share**2, q) for name, s, q in parts}, batch.size)

    def scalars(self) -> dict[str, float]:
        """A few numbers about the batch, for any logger.

        Returns:
            `batch_size`; with `SqNorms` `norm/mean`, `norm/median` (the lower one), `norm/q90` (the
            value at rank `0.9 (B - 1)`, rounded up) and `norm/max`, `coherence/m`,
            `coherence/unbiased_alpha`, `gradient/sq_norm` and `gradient/variance` (unbiased, of
            `pycoherence.metrics`) and `noise_scale`; with `Gram` `cosine/mean`, of two different
            examples; with `Dots` `dots/mean` and `dots/negative`, the share of examples below zero.
            NaN for what the batch is too small to tell, and for norms if one is NaN.

        Raises:
            RuntimeError: No backward pass has run.

        Example:
            >>> import torch, pycoherence as pc
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
            >>> with pc.collect(model, pc.SqNorms()) as record:
            ...     model(x).mean().backward()
            >>> found = record.scalars()
            >>> found["norm/mean"], found["norm/max"], found["noise_scale"]
            (2.5, 4.0, 0.28571428571428575)
        """
        return pooled_scalars([self])

    def weighted_sum(self, coef: Tensor) -> dict[str, Tensor]:
        r"""A weighted sum of the per-example gradients, without a second backward pass.

        .. math:: w = \sum_b c_b g_b

        It takes the factors that `collect(..., keep_factors=True)` kept, which are freed: a second
        call raises.

        Args:
            coef: `[B]`, floating, on the model's device. An example whose coefficient is exactly
                zero is left out, even if its gradient is not finite.

        Returns:
            For each tracked parameter a tensor of its shape, in float32 (float64 for float64
            models); zeros where it did not take part.

        Raises:
            RuntimeError: The factors were not kept, or are used up; no backward pass has run; an
                activation or gradient has been changed in place since.
            ValueError: The shape is not `[B]`.
            TypeError: The dtype or device does not fit.

        Cost: That of the ordinary weight gradients, beside those that filled `.grad`, which
        `pycoherence.weighted_sum` leaves out.

        Source: Bu et al. 2023, arXiv:2210.00038.
        """
        if self._local is not None:
            raise RuntimeError(
                "a record over the examples of several processes adds nothing up, since to read "
                "one never communicates; give record.local.weighted_sum(coef) the weights of this "
                "process's examples and add the results up with torch.distributed.all_reduce, or "
                "call pc.weighted_sum(..., group=group) on all of them"
            )
        batch, factors = self._batch(), self._kept()
        parameters = self._results.parameters
        self.check_coef(coef)
        expect_unchanged(factors, "call weighted_sum before such changes")
        share, total = coef.detach() * batch.share, dict[str, Tensor]()
        for name, p in parameters.items():
            if name in self._results.skipped:
                continue
            dtype = accumulate_dtype(p.dtype)
            if name in factors:
                total[name] = factors.pop(name).weighted_sum(share.to(p.device, dtype))
            else:
                total[name] = p.zeros(dtype)
        self._factors_used = True
        return total

    def check_coef(self, coef: Tensor) -> None:
        """Raise `TypeError` or `ValueError` unless there is a weight for each example."""
        device = next(iter(self._results.parameters.values())).device
        _check_coef(coef, self.batch_size, device)

    def _has(self, result: str) -> bool:
        return any(result in one.results for one in self._statistics)

    def _kept(self) -> dict[str, Factors]:
        if not self._keeps:
            raise RuntimeError(
                "the factors of the gradients were not kept; use pc.collect(..., keep_factors=True)"
            )
        if self._factors_used:
            raise RuntimeError(
                "the factors have been used and freed by a call before, which each pass allows "
                "once; run a new block, or call pc.weighted_sum for each sum"
            )
        self._expect_complete()
        if not self._results.factors:
            raise RuntimeError(_NOT_RUN.format(self.batch_size))
        return self._results.factors

    def _batch(self) -> Batch:
        size = self.batch_size
        share = size if self._loss_reduction == "mean" else 1
        return Batch(size, share / self._results.loss_scale)

    def _total(self, result: str) -> Tensor:
        statistic, batch = provider(self._statistics, result), self._batch()
        # One at a time, since a Gram matrix for each parameter may be much to hold.
        found = list(self._raw().values())
        whole = statistic.read_total(result, found, batch)
        if whole is not None:
            return whole
        parts = (statistic.read(result, raw, batch) for raw in found)
        total = next(parts)
        for part in parts:
            total += part.to(total.device)
        return total

    def _refuse_total(self, result: str) -> NoReturn:
        provider(self._statistics, result)  # raises if it was not asked for
        raise AttributeError(
            f"{result} has the shape of a parameter, so that there is no total; read "
            f"record.by_parameter[name].{result}"
        )

    def _raw(self) -> dict[str, dict[str, Tensor]]:
        """The outputs of the loss as it is, by parameter; zeros for those that took no part."""
        size, results = self.batch_size, self._results
        self._expect_complete()
        if not results.outputs:
            raise RuntimeError(_NOT_RUN.format(size))
        raw: dict[str, dict[str, Tensor]] = {}
        for name, info in results.parameters.items():
            if name in results.skipped:
                continue
            found: dict[str, Tensor] | None = results.outputs.get(name)
            if found is None:
                dtype = accumulate_dtype(info.dtype)
                found = {
                    output: info.zeros(dtype)
                    if shape is like_parameter
                    else torch.zeros(shape(size, info.shape), dtype=dtype, device=info.device)
                    for output, shape in self._outputs.items()
                }
                found["sum_norms"] = torch.zeros(1)
            elif name in results.sum_norms:
                found = {**found, "sum_norms": results.sum_norms[name]}
            raw[name] = found
        return raw

    def _expect_complete(self) -> None:
        if self._results.failed:
            raise RuntimeError(
                f"a backward pass on this batch of {self.batch_size} raised an error before its "
                "end, so that its statistics are not complete; run forward and backward pass in a "
                "new block"
            )


def record_of(
    capture: Capture,
    request: Request,
    statistics: Sequence[Statistic],
    loss_reduction: LossReduction,
) -> Record:
    """The record that a capture fills, of the examples of all processes if it has several."""
    own = Record(capture.results, request, statistics, loss_reduction)
    if capture.across is None:
        return own
    return Record(capture.whole, request, statistics, loss_reduction, own)


def pooled_scalars(records: Sequence[Record]) -> dict[str, float]:
    """The numbers of `Record.scalars`, of several batches at the same weights together.

    Args:
        records: With the same statistics, one or more.
    """
    found: dict[str, float] = {"batch_size": sum(record.batch_size for record in records)}
    first = records[0]
    if first._has("sq_norms"):
        found |= scalars.of_norms([record.sq_norms for record in records])
        if all(can_tell_sum(raw) for raw in first._raw().values()):
            found |= scalars.of_coherences([record.coherence() for record in records])
    if first._has("gram"):
        found |= scalars.of_grams([record.gram for record in records])
    if first._has("dots"):
        found |= scalars.of_dots([record.dots for record in records])
    return found


def on_host(numbers: Iterable[Tensor]) -> list[float]:
    """Tensors of no dimension as floats, after one wait for each device."""
    found = list(numbers)
    first = {x.device: x for x in found}
    if len(first) != 1:
        return [x.item() for x in found]
    return torch.stack(found).tolist()


def _check_coef(coef: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(coef, Tensor) or not coef.is_floating_point() or coef.device != device:
        got = f"{coef.dtype} on {coef.device}" if isinstance(coef, Tensor) else repr(coef)
        raise TypeError(f"expected a floating tensor of coefficients on {device}, got {got}")
    if tuple(coef.shape) != (size,):
        raise ValueError(
            f"expected one coefficient for each of {size} examples, got shape {tuple(coef.shape)}"
        )
