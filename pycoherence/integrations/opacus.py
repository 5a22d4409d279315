"""Opacus: its privacy engine with one backward pass, and faster norms for its ghost clipping."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus import PrivacyEngine as OpacusEngine
from opacus.grad_sample import AbstractGradSampleHooks, AbstractGradSampleModule
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import (
    DistributedDPOptimizerFastGradientClipping,
)
from opacus.utils.module_utils import trainable_modules
from opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from opacus.validators.module_validator import ModuleValidator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pycoherence.aggregate import aggregate
from pycoherence.capture import mark_examples
from pycoherence.errors import UnsupportedError
from pycoherence.integrations._opacus_norms import Registration, register
from pycoherence.record import LossReduction
from pycoherence.robust import NormClip

__all__ = ["PrivacyEngine", "Registration", "register"]

_EXACT_HERE = (nn.MultiheadAttention, nn.LSTM, nn.GRU)
"""Layers that Opacus replaces by its own, and that need no replacement here."""


class PrivacyEngine(OpacusEngine):
    r"""Opacus' `PrivacyEngine`, whose gradients are clipped within one backward pass.

    .. math:: \frac{1}{n} \Big( \sum_b g_b \min\Big(1, \frac{C}{\lVert g_b \rVert + 10^{-6}}\Big)
        + \mathcal{N}(0, \sigma^2 C^2 I) \Big)

    The loop is that of Opacus' default mode, and so are the results but for rounding: Opacus' own
    data loader draws the batches, its optimizer adds the noise, from the same generator in the same
    order, and its accountant counts. Only gradients come from `pycoherence.aggregate`, so that the
    gradients of single examples are never stored, and tied weights, LoRA, `nn.MultiheadAttention`,
    `nn.LSTM` and any other layer that pycoherence knows need no replacement.

    `make_private` and the other methods take what Opacus' take, and refuse what cannot be right:

    - `grad_sample_mode` other than `"hooks"`, whose place this takes;
    - `clipping="adaptive"`; `pycoherence.AdaptiveClip` adapts without Opacus, and `"per_layer"`
      works here;
    - models in torch's `DistributedDataParallel` or FSDP, which would average gradients before the
      noise: wrap them by `opacus.distributed.DifferentiallyPrivateDistributedDataParallel`;
    - layers that mix examples, such as BatchNorm in training mode, and buffers that the forward
      pass of a training batch changes, since they would keep what examples say without noise.

    Forward passes that count are those of the returned model (with `wrap_model=False`, of your own)
    in training mode with gradients enabled; run those that no backward pass follows under
    `torch.no_grad()`. The loss is the mean, or the sum, over the batch, as `loss_reduction` says;
    `pycoherence.aggregate` says what a gradient `g_b` then is. `BatchMemoryManager` works; so do
    several backward passes before a step, where Opacus allows them: without Poisson sampling.

    Args:
        accountant: `"prv"`, `"rdp"` or `"gdp"`.
        secure_mode: Opacus' secure mode, which needs the package torchcsprng.

    Raises:
        ValueError: From `make_private`, an option that is refused.
        opacus.validators.errors.UnsupportedModuleError: From `make_private`, a layer is refused.
        UnsupportedError: In training, the model is refused by `pycoherence.aggregate`, or it has
            changed a buffer.

    Cost: That of `pycoherence.NormClip`.

    Source: Yousefpour et al. 2021, arXiv:2109.12298, for Opacus.

    Example:
        >>> import torch, warnings
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from pycoherence.integrations.opacus import PrivacyEngine
        >>> data = TensorDataset(torch.randn(64, 5), torch.randint(2, (64,)))
        >>> model = torch.nn.Linear(5, 2)
        >>> warnings.filterwarnings("ignore", message="Secure RNG turned off|Optimal order")
        >>> engine = PrivacyEngine(accountant="rdp")
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(data, batch_size=16),
        ...     noise_multiplier=1.0,
        ...     max_grad_norm=1.0,
        ... )
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> 1 < engine.get_epsilon(delta=1e-3) < 10
        True
    """

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clipping: str = "flat",
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **options: Any,
    ) -> Any:
        """Make model, optimizer and data loader private, as Opacus does.

        Args:
            module: The model; see Opacus for this and the other arguments.
            optimizer: Its optimizer.
            clipping: `"flat"`, or `"per_layer"` with one `max_grad_norm` for each parameter.
            grad_sample_mode: `"hooks"`.
            wrap_model: Whether to return a wrapper of the model; otherwise use the model itself.
            options: `data_loader`, `noise_multiplier`, `max_grad_norm`, and Opacus' others.

        Returns:
            The model, or with `wrap_model=False` an object whose `cleanup()` takes the hooks off;
            the optimizer; the data loader.

        Raises:
            ValueError: See the class.
            opacus.validators.errors.UnsupportedModuleError: See the class.
        """
        _check(module, clipping, grad_sample_mode)
        made: Any = super().make_private(
            module=module,
            optimizer=optimizer,
            clipping=clipping,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            **options,
        )
        blocks, private, _ = made
        blocks.bind(private)
        return made

    def validate(self, *, module: nn.Module, optimizer: Any, data_loader: Any) -> None:
        """Raise `UnsupportedModuleError` if a layer cannot be trained with privacy.

        Args:
            module: The model.
            optimizer: Not looked at.
            data_loader: Not looked at.
        """
        errors = _unsupported(module)
        if errors:
            raise UnsupportedModuleError(errors)

    def is_compatible(self, *, module: nn.Module, optimizer: Any, data_loader: Any) -> bool:
        """Whether all layers can be trained with privacy.

        Args:
            module: The model.
            optimizer: Not looked at.
            data_loader: Not looked at.
        """
        return not _unsupported(module)

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        max_grad_norm: Any = 1.0,
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> Any:
        if isinstance(module, AbstractGradSampleModule):
            same = isinstance(module, _Model) and (
                (module.batch_first, module.loss_reduction) == (batch_first, loss_reduction)
            )
            if not same:
                raise ValueError(
                    "expected a plain module, or one that this engine made private with the same "
                    f"options, got {type(module).__name__}; call module.to_standard_module()"
                )
            return module
        self.validate(module=module, optimizer=None, data_loader=None)
        kind = _Model if wrap_model else _Blocks
        return kind(module, batch_first=batch_first, loss_reduction=loss_reduction)

    def _prepare_optimizer(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: Any,
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        **options: Any,
    ) -> DPOptimizer:
        if isinstance(optimizer, DPOptimizer):
            optimizer = optimizer.original_optimizer
        norms = None
        if clipping == "per_layer":
            norms = [float(norm) for norm in max_grad_norm]
            max_grad_norm = _total(norms)
        private = (_DistributedOnePass if distributed else _OnePass)(
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            generator=self.secure_rng if self.secure_mode else noise_generator,
            secure_mode=self.secure_mode,
            **options,
        )
        private.max_grad_norms = norms
        return private


def _total(norms: Sequence[float]) -> float:
    """The norm of all limits, by which one example may move the sum."""
    return torch.tensor(norms).norm().item()


def _check(module: nn.Module, clipping: str, grad_sample_mode: str) -> None:
    if grad_sample_mode != "hooks":
        raise ValueError(
            "expected grad_sample_mode='hooks', in whose place this engine clips in one backward "
            f"pass, got {grad_sample_mode!r}; use opacus.PrivacyEngine for the others"
        )
    if clipping not in ("flat", "per_layer"):
        raise ValueError(
            f"expected clipping to be 'flat' or 'per_layer', got {clipping!r}; pc.AdaptiveClip "
            "adapts a threshold without Opacus, and opacus.PrivacyEngine with it"
        )
    if isinstance(module, (DistributedDataParallel, FSDPModule)):
        raise ValueError(
            "expected a model that nothing averages before the noise is added, got one in "
            "DistributedDataParallel or FSDP; wrap it by "
            "opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or use pc.aggregate "
            "with group="
        )
    if not isinstance(module, AbstractGradSampleModule) and module in _private:
        raise ValueError(
            "the model was made private before; call cleanup() of what make_private returned first"
        )


def _unsupported(module: nn.Module) -> list[Any]:
    errors: list[Any] = []
    if not module.training:
        errors.append(IllegalModuleConfigurationError("Model needs to be in training mode"))
    for _, layer in trainable_modules(module):
        check = ModuleValidator.VALIDATORS.get(type(layer))
        if check is not None and type(layer) not in _EXACT_HERE:
            errors += check(layer)
    return errors


@dataclass(frozen=True)
class _Clip(NormClip):
    """Opacus' clipping, which adds a little to the norms."""

    def multipliers(self, norms: Tensor, limit: Any) -> Tensor:
        """See `Clipping.multipliers`."""
        return (limit / (norms + 1e-6)).clamp(max=1)


class _UntilBackward(aggregate):
    """A block that ends with its backward pass, though it is left later."""

    _rests = True

    @property
    def has_run(self) -> bool:
        """Whether a backward pass has begun."""
        return self._capture is not None and self._capture.passes.seen


_private: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose forward passes open blocks."""


class _Opener:
    """The hook of a model; copies of the model have one that does nothing."""

    def __init__(self, blocks: "_Blocks | None" = None) -> None:
        self._blocks = None if blocks is None else weakref.ref(blocks)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        blocks = None if self._blocks is None else self._blocks()
        if blocks is not None:
            blocks.before(module, args, kwargs)

    def __reduce__(self) -> Any:
        return _Opener, ()


class _Blocks(AbstractGradSampleHooks):
    """Opens a block in each forward pass of a model, and keeps the clipped sums that it gives."""

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._reset(m)

    def _reset(self, m: nn.Module) -> None:
        _private.add(m)
        self._allowed = True
        self._passes = 0
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._block: _UntilBackward | None = None
        self._buffers_then: dict[str, int] = {}
        self._optimizer: Any = None
        self._handle = m.register_forward_pre_hook(_Opener(self), with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a plain model, with no part in the training."""
        return {**self.__dict__, "_optimizer": None, "_block": None, "_sums": {}, "_handle": None}

    def bind(self, optimizer: "_OnePass") -> None:
        """Clip as an optimizer says, and let it take the sums."""
        self._optimizer, optimizer.blocks = optimizer, self
        self.discard()

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a block before a forward pass in which gradients are made."""
        self._close_after_backward()
        if not module.training or not torch.is_grad_enabled():
            return
        if self._block is None:
            self._open()
        if not self.batch_first:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.dim() > 1:
                    mark_examples(x, dim=1)

    def _open(self) -> None:
        for p in self._optimizer.params:
            p.grad = None  # a gradient that was not clipped does not count
        reduction: LossReduction = "mean" if self.loss_reduction == "mean" else "sum"
        block = _UntilBackward(self._module, self._rule(), loss_reduction=reduction)
        block.__enter__()
        self._block = block
        self._buffers_then = self._buffers_now()

    def _rule(self) -> _Clip:
        """The rule whose mean is the sum of the clipped gradients."""
        optimizer = self._optimizer
        held = {id(p) for p in optimizer.params}
        trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        if optimizer.max_grad_norms is not None:
            if _total(optimizer.max_grad_norms) != optimizer.max_grad_norm:
                raise ValueError(
                    "expected max_grad_norm to stay that of all limits with clipping='per_layer', "
                    f"got {optimizer.max_grad_norm}: its noise would be for other limits"
                )
            norms = dict(zip(map(id, optimizer.params), optimizer.max_grad_norms, strict=True))
            limits = {name: norms.get(id(p), 1.0) for name, p in trained.items()}
            return _Clip(limits, per="parameter", expected_batch_size=1)
        mine = [name for name, p in trained.items() if id(p) in held]
        if len(mine) == len(trained):
            return _Clip(optimizer.max_grad_norm, expected_batch_size=1)
        groups: Mapping[str, Sequence[str]] = {"optimizer": mine, "rest": ["*"]}
        return _Clip(optimizer.max_grad_norm, per=groups, expected_batch_size=1)

    def _close_after_backward(self) -> None:
        """Close the block, but for one whose backward pass is still to come."""
        if self._block is not None and self._block.has_run:
            self._close()

    def _close(self) -> None:
        """Close the block, and take the sums of a backward pass that has run."""
        block, self._block = self._block, None
        if block is None:
            return
        if not block.record.is_measured:
            block.__exit__(RuntimeError, None, None)  # no backward pass came to its end
            return
        block.__exit__(None, None, None)
        now = self._buffers_now()
        changed = [name for name, version in self._buffers_then.items() if now[name] != version]
        if changed:
            raise UnsupportedError(
                f"{', '.join(changed)}: the forward pass changes this buffer, which then tells "
                "about the examples without noise. What to do: keep it as it is in training."
            )
        self._passes += 1
        for p in self._optimizer.params:
            if p.grad is not None:
                self._sums[p] = self._sums[p] + p.grad if p in self._sums else p.grad
                p.grad = None

    def _buffers_now(self) -> dict[str, int]:
        return {name: buffer._version for name, buffer in self._module.named_buffers()}

    def take(self) -> tuple[int, dict[nn.Parameter, Tensor]]:
        """The number of backward passes since the last time, and the clipped sums over all.

        Raises:
            ValueError: There was none, or there were several under Poisson sampling.
        """
        self._close()
        if not self._passes:
            raise ValueError(
                "expected a backward pass before optimizer.step(), got none: call loss.backward() "
                "on a forward pass of the model that make_private returned, in training mode"
            )
        if self._passes > 1 and not self._allowed:
            raise ValueError(
                f"expected one backward pass before optimizer.step(), got {self._passes}: batches "
                "of Poisson sampling cannot be added up; use BatchMemoryManager for large ones"
            )
        found = self._passes, self._sums
        self._passes, self._sums = 0, {}
        return found

    def discard(self) -> None:
        """Forget the backward passes that have run; a forward pass that waits for one stays."""
        self._close_after_backward()
        self._passes, self._sums = 0, {}

    def forbid_grad_accumulation(self) -> None:
        """See Opacus."""
        self._allowed = False

    def allow_grad_accumulation(self) -> None:
        """See Opacus."""
        self._allowed = True

    def remove_hooks(self) -> None:
        """See Opacus."""
        if self._handle is not None:
            self._handle.remove()
        _private.discard(self._module)
        if self._block is not None:
            self._block.__exit__(RuntimeError, None, None)
            self._block = None


class _Model(_Blocks, AbstractGradSampleModule):
    """The same, as a model that runs the one inside."""

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
    ) -> None:
        AbstractGradSampleModule.__init__(
            self, m, batch_first=batch_first, loss_reduction=loss_reduction
        )
        self._reset(m)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the model."""
        return self._module(*args, **kwargs)


class _OnePass(DPOptimizerFastGradientClipping):
    """An optimizer of Opacus that takes the clipped sums of `_Blocks`.

    Attributes:
        max_grad_norms: A limit for each parameter; `None` for one over all.
        blocks: The source of the sums.
    """

    max_grad_norms: list[float] | None = None
    blocks: _Blocks
    _passes = 1

    @property
    def accumulated_iterations(self) -> int:
        """The number of backward passes in the step, by which Opacus divides and counts."""
        return self._passes

    def accumulate(self) -> None:
        """Add the clipped sums to those of the step."""
        held: list[Any] = self.params
        if any(getattr(p.summed_grad, "_processed", False) for p in held):
            raise ValueError(
                "expected optimizer.zero_grad() since the last optimizer.step(), which has used "
                "the gradients up; call it before the next backward pass"
            )
        self._passes, sums = self.blocks.take()
        for p in held:
            part = sums[p] if p in sums else torch.zeros_like(p)
            p.summed_grad = part if p.summed_grad is None else p.summed_grad + part

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the gradients, as Opacus does."""
        self.blocks.discard()
        super().zero_grad(set_to_none)


class _DistributedOnePass(_OnePass, DistributedDPOptimizerFastGradientClipping):
    """The same for several processes, whose sums Opacus adds up."""
