"""Order statistics of the values that one coordinate has in the examples of a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _sort(values: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Each column in order, those that are left out behind the others, and how many are not."""
    return values.masked_fill(~finite, torch.inf).sort(dim=0).values, finite.sum(0)


def _at(ordered: Tensor, rank: Tensor) -> Tensor:
    """From each column of `[B, N]` the values of rank `[..., N]`, counted from 0."""
    return ordered.gather(0, rank.clamp(0, len(ordered) - 1).view(-1, ordered.shape[1]))


def _between(ordered: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Mean of each column over the ranks from `start` `[N]` to before `stop` `[N]`."""
    rank = torch.arange(len(ordered), device=ordered.device).unsqueeze(1)
    inside = (rank >= start) & (rank < stop)
    return ordered.masked_fill(~inside, 0).sum(0) / (stop - start)


def _middle(ordered: Tensor, count: Tensor) -> Tensor:
    # Halves before the sum, which could leave the range of the dtype.
    return 0.5 * _at(ordered, (count - 1) // 2)[0] + 0.5 * _at(ordered, count // 2)[0]


def _inner(ordered: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ranks of all but the `k` lowest and highest."""
    return torch.full_like(count, k), count - k


def _inner_mean(ordered: Tensor, count: Tensor, k: int) -> Tensor:
    return _between(ordered, *_inner(ordered, count, k))


def _winsorized_mean(values: Tensor, finite: Tensor, k: float) -> Tensor:
    ordered, count = _sort(values, finite)
    low, high = ordered[int(k)], _at(ordered, count - 1 - int(k))[0]
    return _between(ordered.clamp(low, high), torch.zeros_like(count), count)


def _trimmed_mean(values: Tensor, finite: Tensor, k: float) -> Tensor:
    return _inner_mean(*_sort(values, finite), int(k))


def _median(values: Tensor, finite: Tensor, k: float) -> Tensor:
    return _middle(*_sort(values, finite))


def _lower_median(values: Tensor, finite: Tensor, k: float) -> Tensor:
    ordered, count = _sort(values, finite)
    return _at(ordered, (count - 1) // 2)[0]


def _median_of_means(values: Tensor, finite: Tensor, k: float) -> Tensor:
    totals = [group.sum(0) for group in values.masked_fill(~finite, 0).tensor_split(int(k))]
    sizes = torch.stack([group.sum(0) for group in finite.tensor_split(int(k))])
    return _median(torch.stack(totals) / sizes, sizes > 0, 0)


def _sign_agreement(values: Tensor, finite: Tensor, k: float) -> Tensor:
    kept, count = values.masked_fill(~finite, 0), finite.sum(0)
    agrees = kept.sign().sum(0).abs() / count >= k
    return (kept.sum(0) / count).masked_fill(~agrees, 0)


def _nearest(ordered: Tensor, count: Tensor, centre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ranks of all but `k` values, those nearest the centre; the lower of two equally far.

    In order they are a window. It moves up by one as long as the value above it is nearer than
    its lowest, that is, as long as the middle of the two lies below the centre. The middle of two
    values that the centre itself is the middle of compares equal, whatever was rounded.
    """
    width = count - k
    first = torch.arange(k, device=ordered.device).unsqueeze(1)
    middle = 0.5 * ordered[:k] + 0.5 * _at(ordered, first + width)
    start = (middle < centre).sum(0)
    return start, start + width


def _near_trimmed(ordered: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _nearest(ordered, count, _inner_mean(ordered, count, k), k)


def _near_median(ordered: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _nearest(ordered, count, _middle(ordered, count), k)


def _phocas(values: Tensor, finite: Tensor, k: float) -> Tensor:
    ordered, count = _sort(values, finite)
    return _between(ordered, *_near_trimmed(ordered, count, int(k)))


def _meamed(values: Tensor, finite: Tensor, k: float) -> Tensor:
    ordered, count = _sort(values, finite)
    return _between(ordered, *_near_median(ordered, count, int(k)))


@dataclass(frozen=True)
class Rule:
    """How the values of a coordinate become one.

    Attributes:
        aggregate: From values `[B, N]`, which of them are finite `[B, N]`, and `k`: `[N]`, of the
            finite ones. Its result where these are fewer than `least` does not matter.
        most: The largest `k`, from the size of the batch.
        fewest: The smallest `k`.
        least: Number of values that the rule needs, from `k`.
        whole: Whether `k` is a whole number.
        kept: From values in order, how many are finite, and `k`: the rank of the first that the
            rule leaves as it is, and that behind the last, `[N]` both; `None` for a rule that
            clips none and cuts none away.
    """

    aggregate: Callable[[Tensor, Tensor, float], Tensor]
    most: Callable[[int], int]
    fewest: int = 0
    least: Callable[[float], float] = lambda k: 1
    whole: bool = True
    kept: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None


def _below_half(batch: int) -> int:
    return (batch - 1) // 2


def _twice_and_one(k: float) -> float:
    return 2 * k + 1


RULES = {
    "winsorized_mean": Rule(_winsorized_mean, _below_half, least=_twice_and_one, kept=_inner),
    "trimmed_mean": Rule(_trimmed_mean, _below_half, least=_twice_and_one, kept=_inner),
    "median": Rule(_median, lambda batch: 0),
    "lower_median": Rule(_lower_median, lambda batch: 0),
    "median_of_means": Rule(_median_of_means, lambda batch: batch, fewest=1),
    "sign_agreement": Rule(_sign_agreement, lambda batch: 1, whole=False),
    "phocas": Rule(_phocas, _below_half, least=_twice_and_one, kept=_near_trimmed),
    "meamed": Rule(_meamed, lambda batch: batch - 1, least=lambda k: k + 1, kept=_near_median),
}


def check_rule(op: str, batch: int, rule: str, k: float) -> None:
    """Check the name of a rule, and that `k` is one for a batch of this size; any is for none."""
    if rule not in RULES:
        raise ValueError(f"{op}: expected a rule among {', '.join(RULES)}, got {rule!r}")
    if batch == 0:
        return
    kind, low, high = RULES[rule], RULES[rule].fewest, RULES[rule].most(batch)
    if not low <= k <= high or (kind.whole and k != int(k)):
        number = "a whole number" if kind.whole else "a number"
        raise ValueError(
            f"{op}: expected k of {rule} to be {number} from {low} to {high} for a batch of "
            f"{batch}, got {k}"
        )


def aggregate(values: Tensor, rule: str, k: float, drop: bool) -> Tensor:
    """Apply a rule to each column.

    Args:
        values: `[B, N]`, `B` positive.
        rule: Name of the rule.
        k: Its number.
        drop: Whether values that are not finite are left out; they make the result NaN otherwise.

    Returns:
        `[N]`, of the same dtype; NaN where too few values are left for the rule.
    """
    finite = values.isfinite()
    least = RULES[rule].least(k) if drop else len(values)
    found = RULES[rule].aggregate(values, finite, k)
    return found.masked_fill(finite.sum(0) < least, torch.nan)


def outvoted(values: Tensor, rule: str, k: float, drop: bool) -> Tensor:
    """The values that a rule clips or cuts away: those beyond what it leaves as it is.

    A value that equals one which is left is none of them.

    Args:
        values: `[B, N]`, `B` positive.
        rule: Name of a rule with `kept`.
        k: Its number.
        drop: The argument of `aggregate`; a value that is left out counts as cut away.

    Returns:
        `[B, N]`, one or zero; NaN in a column for which there is no result.
    """
    kind, finite = RULES[rule], values.isfinite()
    assert kind.kept is not None
    ordered, count = _sort(values, finite)
    start, stop = kind.kept(ordered, count, int(k))
    low, high = (_at(ordered, rank)[0] for rank in (start, stop - 1))
    found = ((values < low) | (values > high) | ~finite).to(values.dtype)
    return found.masked_fill(count < (kind.least(k) if drop else len(values)), torch.nan)
