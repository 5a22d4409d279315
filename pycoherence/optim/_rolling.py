"""Steps along a combination of the last three gradients."""

# torch's stubs do not export the operations on lists.
# pyright: reportPrivateImportUsage=false

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _default_to_fused_or_foreach


class Rolling(Optimizer):
    """The constructor and the step of RM3, M3 and RA3; each says how three gradients become one.

    Each parameter counts the gradients of its own: one that was added late, or had none for a
    while, waits for three.

    State of a parameter, where it holds that many gradients: `previous`, the last one, and `older`,
    the one before.
    """

    rolls: ClassVar[bool]
    """Whether a step keeps the two latest gradients for the next, or starts afresh."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        r"""An optimizer with the state of no parameter yet.

        Args:
            params: Parameters or groups of them, as any torch optimizer takes.
            lr: Learning rate :math:`\eta`.
            momentum: Refused unless it is 0: it causes instability with RM3, and M3 and RA3 are to
                be compared with that.
            weight_decay: :math:`\lambda` of an L2 penalty, which joins each gradient before the
                three are combined.
            maximize: Go up instead of down.
            foreach: Update all parameters together by `torch._foreach_*`; torch decides if `None`.

        Raises:
            ValueError: `lr` or `weight_decay` is negative, or there is a momentum.
            TypeError: A parameter is complex.
        """
        # No default: OneCycleLR and its kin would cycle a momentum that they find there.
        self._refuse_momentum(momentum)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __init_subclass__(cls) -> None:
        """Give the class a constructor of its own name, which Python's errors about it show."""
        shared = Rolling.__init__
        code = shared.__code__
        if getattr(cls.__init__, "__code__", None) is not code:  # a user's class has another one
            return
        own = FunctionType(code, shared.__globals__, "__init__", closure=shared.__closure__)
        functools.update_wrapper(own, shared)
        own.__kwdefaults__, own.__qualname__ = shared.__kwdefaults__, f"{cls.__name__}.__init__"
        cls.__init__ = own

    def combine(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The direction of a step, a new tensor, from three gradients of one parameter."""
        raise NotImplementedError

    def foreach_combine(
        self, a: list[Tensor], b: list[Tensor], c: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """`combine` for several parameters of one device and dtype."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; their first step comes with their third gradient.

        Args:
            param_group: `{"params": ...}`, with options of its own.

        Raises:
            ValueError: A negative `lr` or `weight_decay`, or a momentum.
            TypeError: A parameter is complex.
        """
        options = self.defaults | param_group
        self._refuse_momentum(options.get("momentum", 0.0))
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"expected lr to be one number, got shape {tuple(lr.shape)}")
        for name in ("lr", "weight_decay"):
            if not options[name] >= 0:
                raise ValueError(f"expected {name} >= 0, got {options[name]}")
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            del self.param_groups[-1]
            raise TypeError(
                f"{type(self).__name__}: expected real parameters, got complex ones, whose "
                "gradients have no order; give it torch.view_as_real of them"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take in the gradients, and make a step with those parameters that have three.

        Args:
            closure: Computes the loss anew, with its gradients, and returns it.

        Returns:
            The result of the closure.

        Raises:
            RuntimeError: A gradient is sparse; no parameter has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(p.grad.layout is not torch.strided for params in todo for p in params):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, most of whose numbers "
                "would have a median of zero; build the embedding with sparse=False"
            )
        for group, params in zip(self.param_groups, todo, strict=True):
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, differentiable=False)
            if foreach:
                self._step_together(group, params)
            else:
                self._step_one_by_one(group, params)
        return loss

    def _step_one_by_one(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, weight_decay = float(group["lr"]), group["weight_decay"]
        for p in params:
            assert p.grad is not None
            grad = -p.grad if group["maximize"] else p.grad
            if weight_decay != 0:
                grad = grad.add(p, alpha=weight_decay)
            state = self.state[p]
            if "older" not in state:
                _take_in(state, grad)
                continue
            p.add_(self.combine(state["older"], state["previous"], grad), alpha=-lr)
            if self.rolls:
                state["older"].copy_(grad)
                _swap(state)
            else:
                state.clear()

    def _step_together(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, weight_decay = float(group["lr"]), group["weight_decay"]
        buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            buckets.setdefault((p.device, p.dtype), []).append(p)
        for bucket in buckets.values():
            grads = [p.grad for p in bucket if p.grad is not None]
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            if weight_decay != 0:
                grads = torch._foreach_add(grads, bucket, alpha=weight_decay)
            ready: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
            for p, grad in zip(bucket, grads, strict=True):
                state = self.state[p]
                if "older" in state:
                    ready.append((p, grad, state))
                else:
                    _take_in(state, grad)
            if not ready:
                continue
            targets, current = [p for p, _, _ in ready], [grad for _, grad, _ in ready]
            states = [state for _, _, state in ready]
            older = [state["older"] for state in states]
            previous = [state["previous"] for state in states]
            torch._foreach_add_(targets, self.foreach_combine(older, previous, current), alpha=-lr)
            if self.rolls:
                torch._foreach_copy_(older, current)
            for state in states:
                if self.rolls:
                    _swap(state)
                else:
                    state.clear()

    @classmethod
    def _refuse_momentum(cls, momentum: float) -> None:
        if momentum != 0:
            raise ValueError(
                f"{cls.__name__}: expected momentum 0, got {momentum}. Momentum causes instability "
                "with RM3 (arXiv:2003.07422), and M3 and RA3 are there to be compared with it"
            )


def _take_in(state: dict[str, Tensor], grad: Tensor) -> None:
    """Keep the first or second gradient; a copy, since `.grad` may be filled again in place."""
    if "previous" in state:
        state["older"] = state["previous"]
    state["previous"] = grad.clone()


def _swap(state: dict[str, Tensor]) -> None:
    state["older"], state["previous"] = state["previous"], state["older"]
