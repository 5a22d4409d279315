"""The mode that watches a forward pass for uses of tracked parameters."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pycoherence.capture._autocast import autocast_done, expect_no_autocast
from pycoherence.capture._backward import BACKWARD, run_backward
from pycoherence.capture._block import only_block
from pycoherence.capture._call import Call, Slot, Use
from pycoherence.capture._folds import Folds
from pycoherence.capture._general import general
from pycoherence.capture._kept import Kept
from pycoherence.capture._layouts import Layouts
from pycoherence.capture._loss_scale import Scaled
from pycoherence.capture._moves import FIRST
from pycoherence.capture._names import unsupported
from pycoherence.capture._origins import Origins, Own, Seen, tensors, unique
from pycoherence.capture._parallel import expect_no_sync
from pycoherence.capture._plan import Plan
from pycoherence.capture._probes import make_probes
from pycoherence.capture._registry import Handler, guards, handlers, spreaders
from pycoherence.capture._rerun import are_saved_otherwise, saved_as_they_are
from pycoherence.capture._rows import Rows
from pycoherence.capture._unknown import expect_unmeasured, refuse_unknown
from pycoherence.capture._watch import BackwardWatch


class Capture(TorchFunctionMode):
    """Routes each use of a tracked parameter through an autograd Function with probes.

    Args:
        model: Whose pass it is.
        parameters: Its `tracked_parameters`.
        plan: What to measure.
        around: Gives what a backward pass that makes gradients of parameters runs inside.

    Attributes:
        parameters: The tracked parameters, by name.
        batch: How many rows and examples the forward pass has.
        watch: What guards the backward passes.
        around: As given.
        probes: Of each parameter that has been used: output name to probe.
        folds: Which tensors have positions in their first dimension.
        layouts: Which tensors have the batch in their second dimension.
        kept: What the backward pass leaves behind beside the gradients of probes.
        asked: Parameters that were measured by `torch.autograd.grad`.
        scaled: What the loss is multiplied by.
        skipped: Parameters that are not measured, as `plan.on_unsupported` says.
        fallbacks: Why parameters had their gradients made example by example.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        around: Callable[["Capture"], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.batch = Rows(plan.group_size)
        self.watch = BackwardWatch(model, self.parameters, once=not plan.gradients)
        self.probes: dict[str, dict[str, Tensor]] = {}
        self.plan = plan
        self.kept = Kept()
        self.asked: set[str] = set()
        self.scaled = Scaled(plan.loss_scale)
        self.around = around
        self._want = plan.want
        self.skipped: list[str] = []
        self.fallbacks: dict[str, str] = {}
        modules = list(model.modules())
        self._origins = Origins(modules, self.parameters)
        self.folds = Folds()
        self.layouts = Layouts(model, modules)
        self._function: Callable[..., Any] | None = None
        self._used: list[str] = []
        self._calls = count()

    def __enter__(self) -> "Capture":
        self._block = only_block()
        self._block.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._block.__exit__(*exception)

    def forget(self) -> None:
        """Let go of the tensors of the forward pass."""
        self._origins.clear()
        self.folds = Folds()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD:
            return run_backward(self, func, args, kwargs)
        measured = torch.is_grad_enabled()
        result = self._run_forward(func, args, kwargs) if measured else func(*args, **kwargs)
        second = self.layouts.active and self.layouts.follow(func, args, kwargs, result)
        if measured and not second:
            self.folds.follow(func, args, result, self.batch.count)
        return result

    def run(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a torch function from a handler, as if the model did."""
        before = self._function, self._used
        result = self._run_forward(func, args, kwargs)
        self._function, self._used = before
        return result

    def _run_forward(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        seen = self._origins.look_at(args, kwargs)
        self._function, self._used = func, seen.names
        if func in guards:
            guards[func](self, *args, **kwargs)
        for known, takes in ((handlers, not seen.fixed), (spreaders, seen.alone)):
            if seen.names and takes and func in known:
                found = self._handle(known[func], args, kwargs)
                if found is not NotImplemented:
                    return found
        if seen.names and not seen.alone:
            return self._unknown(func, args, kwargs)
        if not seen.alone:
            result = func(*args, **kwargs)
            self._origins.spoil(func, args, kwargs)
            return result
        with saved_as_they_are():
            result = func(*args, **kwargs)
        self._origins.note(result, seen._replace(any=seen.any or func is torch.eye))
        return result

    def _unknown(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function of parameters and examples that has no handler."""
        result = func(*args, **kwargs)
        if not any(x.grad_fn is not None for x in tensors(result)):
            return result
        if self.plan.on_unsupported == "skip":
            self._skip()
            return result
        if self.plan.on_unsupported == "vmap":
            return self._handle(general, (func, *args), kwargs)
        return refuse_unknown(self.refuse)

    def _skip(self) -> None:
        """Measure the parameters in use no longer."""
        expect_unmeasured(self._used, self.probes, self.refuse)
        for name in unique(self._used):
            self.skipped.append(name)
            self._origins.forget(name)
            self.watch.forget(name)

    def _handle(self, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a handler; if it raises, the call has not happened."""
        batch_size, used = self.batch.size, set(self.probes)
        arguments: Any = (args, kwargs)
        if self._origins.any_made:
            # Gradients are taken to the parameters past the graph of what is made of them.
            arguments = tree_map(self._origins.alone, arguments)
        function = None if handler is general else self._function
        try:
            with autocast_done(function, arguments, self.cast) as (args, kwargs):
                return handler(self, *args, **kwargs)
        except BaseException:
            self.batch.size = batch_size
            self.probes = {name: probes for name, probes in self.probes.items() if name in used}
            raise

    def probes_of(self, name: str) -> Mapping[str, Tensor]:
        """The probes of a parameter, by output; fresh ones if it was not used."""
        assert self.batch_size is not None
        if name in self.probes:
            return self.probes[name]
        return make_probes(self.plan.outputs, self.batch_size, self.parameters[name])

    @property
    def batch_size(self) -> int | None:
        """Examples of the forward pass; `None` until a parameter has been used."""
        return self.batch.size

    def names_of(self, value: Any) -> tuple[str, ...]:
        """The tracked parameters that a tensor is, or is made of."""
        return self._origins.names_of(value)

    def is_alone(self, value: Any) -> bool:
        """Whether no example has a part in a tensor, as far as is known."""
        return self._origins.look_at(value).alone

    def make(self, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """What a function makes of a parameter, or of what is made of some, for a captured call."""
        return self.cast(self._origins.alone(self.share(function, value)), value.dtype)

    def share(
        self, function: Callable[[Tensor], Tensor], value: Tensor, own: Own | None = None
    ) -> Tensor:
        """As `make`, for the model; `own` makes it again should each example have a row of it."""
        made = self._origins.made(value)
        with saved_as_they_are():
            found = function(value if made is None else made.source)
        names = list(self._origins.names_of(value))
        self._origins.note(found, Seen(names, fixed=True, alone=True, any=True), own)
        return found

    def own(self, value: Tensor) -> Tensor | None:
        """What was shared as each example's own, if it can be so."""
        made = self._origins.made(value)
        return made.own() if made is not None and made.own is not None else None

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in another dtype; a parameter keeps gradients of its own dtype."""
        if value.dtype == dtype:
            return value
        if self._origins.names_of(value):
            return self._origins.cast(value, dtype)
        found = value.to(dtype)
        self.layouts.like(found, value)
        self.folds.follow(Tensor.to, (value,), found, self.batch.count)
        return found

    def call(self, batched: Tensor, /, **parameters: Tensor | None) -> Call:
        """Describe a call to its autograd Function, and make the probes.

        Args:
            batched: The input, `[B, ...]`.
            parameters: Its parameter arguments by name, in their order; `None` if absent.

        Raises:
            UnsupportedError: The call cannot be measured exactly.
        """
        names = [name for p in parameters.values() for name in self._origins.names_of(p)]
        if sorted(names) != sorted(self._used):
            self.refuse(
                "a parameter stands where this function takes its input",
                "freeze that parameter with requires_grad_(False), or detach it here",
            )
        expect_no_autocast(batched, self.refuse)
        if not self.plan.gradients:
            expect_no_sync(self.refuse)
        self.watch.reruns |= are_saved_otherwise()
        self.layouts.expect(batched, FIRST, self.refuse)
        fold = self.folds.of(batched)
        batch_size = self.batch.expect(batched, self._used, fold, self.refuse)
        return Call(
            self.watch,
            next(self._calls),
            tuple(self._slot(slot, p) for slot, p in parameters.items()),
            batch_size,
            fold * self.plan.group_size,
            self.plan,
            self._want,
            self.kept,
        )

    def _slot(self, slot: str, parameter: Tensor | None) -> Slot | None:
        if parameter is None or not parameter.requires_grad:
            return None
        uses = tuple(self._use(name) for name in self._origins.names_of(parameter))
        made = self._origins.made(parameter)
        return Slot(slot, parameter.dtype, uses, None if made is None else made.source)

    def _use(self, name: str) -> Use:
        parameter = self.parameters[name]
        if name not in self.probes:
            assert self.batch_size is not None
            self.probes[name] = make_probes(self.plan.outputs, self.batch_size, parameter)
        elif self.watch.seen and not self.watch.running:
            self.refuse(
                "expected one forward and backward pass in a block, got a second",
                "open the block inside the loop or closure, around one forward and backward pass",
            )
        return Use(name, parameter, self.probes[name])

    def refuse(self, why: str, fix: str) -> NoReturn:
        """Raise the `UnsupportedError` for the torch function being called."""
        raise unsupported(self._used, self._function, why, fix)
