"""The backward passes of a block: what they may miss is refused, and what they give is complete."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pycoherence.capture.across import Across
from pycoherence.capture.errors import unsupported
from pycoherence.capture.facts import tensors
from pycoherence.capture.groups import Misfit
from pycoherence.capture.model import modules_of, trained_parameters
from pycoherence.capture.request import Request, scale_of
from pycoherence.capture.results import Results
from pycoherence.capture.running import BackwardPass
from pycoherence.capture.torch_internals import (
    CustomNode,
    counted_gradients,
    graph_below,
    is_distribution,
    is_post_backward,
    is_reentrant_checkpoint,
    leaves_below,
    run_engine,
)
from pycoherence.capture.uses import LayerCall, Use
from pycoherence.errors import UnsupportedError
from pycoherence.sites import of_rows

BACKWARD = frozenset((Tensor.backward, torch.autograd.backward, torch.autograd.grad))
"""Functions that start a backward pass."""


class BackwardPasses:
    """Runs and guards the backward passes over what one capture has seen.

    Args:
        model: Whose passes they are.
        parameters: Those that are tracked.
        request: The quantities to measure.
        results: The results to fill.
        around: Gives what a backward pass that makes gradients of parameters runs inside.
        across: The part of the block that several processes take together.

    Attributes:
        seen: Whether one over a captured call has begun.
        reruns: Whether layers may be run again in one.
        is_single: Whether a batch of one example has met parameters, as far as is known.
        leaves: The tensors at which the gradients of the parameters arrive, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        request: Request,
        results: Results,
        around: Callable[[], AbstractContextManager[None]],
        across: Across | None = None,
    ) -> None:
        self.seen = False
        self.reruns = False
        self.is_single = False
        self._model = model
        self._parameters = parameters
        self.leaves: Mapping[str, Tensor] = parameters
        self._request = request
        self._results = results
        self._around = around
        self._across = across
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._skipped: set[str] = set()
        self._asked: set[str] = set()
        self._done: set[int] = set()
        self._finished: set[str] = set()
        self._expected: set[str] = set()
        self._scale_is_read = False
        self._pass: BackwardPass | None = None

    @property
    def running(self) -> bool:
        """Whether a backward pass is running that was found to miss nothing."""
        return self._pass is not None

    def running_pass(self, call: int) -> BackwardPass:
        """Do as `UseSink.running_pass` says.

        Raises:
            RuntimeError: None is running.
        """
        if self._pass is None or call not in self._pass.calls:
            raise RuntimeError(
                "this backward pass was not started by loss.backward() inside the block of its "
                "forward pass, so that a gradient that bypasses the capture would not be noticed; "
                "call loss.backward() there"
            )
        return self._pass

    def learn(self, leaves: Mapping[str, Tensor]) -> None:
        """Expect the gradients of some parameters at leaves that take their places."""
        self.leaves = {**self.leaves, **leaves}
        self._names |= {id(leaf): name for name, leaf in leaves.items()}

    def skip(self, name: str) -> None:
        """Let the gradients of a parameter bypass the capture."""
        for p in (self._parameters[name], self.leaves[name]):
            self._names.pop(id(p), None)
        self._skipped.add(name)

    def run(
        self,
        mode: TorchFunctionMode,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names_of: Callable[[Tensor], Iterable[str]],
    ) -> Any:
        """Call a function that starts a backward pass, and guard it."""
        accumulate = func is not torch.autograd.grad
        if accumulate and kwargs.get("inputs") is not None:
            raise RuntimeError(
                "backward(inputs=...) would leave the statistics out, which need the gradients of "
                "all parameters; call loss.backward(), or torch.autograd.grad for other gradients"
            )
        if not accumulate:
            self._check_inputs(args[1] if len(args) > 1 else kwargs.get("inputs"), names_of)
        if self.running:
            return self.guarded(mode, func, args, kwargs)
        measures = accumulate or self._reaches(args, kwargs, names_of)
        if measures:
            self._read_scale(tensors(args[0] if args else list(kwargs.values())))
        # A gradient that is made after the pass has no part in torch.autograd.grad.
        makes = accumulate or self._request.gradients
        if self._across is not None and measures:
            self._across.meet()
        with self._around() if makes else nullcontext():
            return self.guarded(mode, func, args, kwargs)

    def guarded(
        self,
        mode: TorchFunctionMode,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        keep: bool = False,
    ) -> Any:
        """Call a function that starts a backward pass, after a check that it will miss nothing."""
        roots = tensors(args[0] if args else list(kwargs.values()))
        accumulate = func is not torch.autograd.grad
        with (
            self._pass_of(roots, accumulate=accumulate, keep=keep) as this,
            self._single(this) if this.single else nullcontext(),
        ):
            inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
            asks = not accumulate and not keep and self._asks_for_all(this, inputs)
            if this.names & self._asked and (accumulate or asks):
                self._take_back()
            if not asks or kwargs.get("is_grads_batched"):
                return self._call(this, mode, func, args, kwargs)
            # `torch.autograd.grad` of all parameters measures; a later pass may take its place.
            self._asked |= this.names
            this.keep = True
            try:
                return self._call(this, mode, func, args, kwargs)
            except BaseException:
                self._take_back()
                raise

    def _call(
        self,
        this: BackwardPass,
        mode: TorchFunctionMode,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        together = self._across if this.keep and not this.is_inner else None
        if together is not None:
            together.expect_same(sorted(this.names))
        found = run_engine(func, args, kwargs, mode) if self.reruns else func(*args, **kwargs)
        if together is not None:
            together.finish()
        return found

    def _reaches(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names_of: Callable[[Tensor], Iterable[str]],
    ) -> bool:
        """Whether `torch.autograd.grad` asks for gradients of parameters."""
        inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
        return any(True for x in tensors(inputs) for _ in names_of(x))

    def _asks_for_all(self, this: BackwardPass, inputs: Any) -> bool:
        """Whether all parameters that take part are asked for, for the first time."""
        known = {id(x) for x in tensors(inputs)}
        wanted = all(id(self.leaves[name]) in known for name in this.names)
        flat = isinstance(inputs, (Tensor, list, tuple))
        first = not self._finished & this.names and self._request.gradients
        return wanted and flat and bool(this.names) and first

    def _take_back(self) -> None:
        """Forget what `torch.autograd.grad` has measured."""
        for name in self._asked:
            self._results.forget(name)
            if self._across is not None:
                self._across.whole.forget(name)
        self._asked.clear()

    def _check_inputs(self, inputs: Any, names_of: Callable[[Tensor], Iterable[str]]) -> None:
        """Refuse `torch.autograd.grad` of parameters where it cannot be exact."""
        names = [name for x in tensors(inputs) for name in names_of(x)]
        if names and self.running:
            raise unsupported(
                names,
                None,
                "its gradient is taken inside a backward pass, bypassing the capture",
                "leave functions that do so out of the block",
            )
        if names and not self._request.gradients:
            raise RuntimeError(
                f"torch.autograd.grad cannot give the gradients of {', '.join(names)}, which are "
                "made of all layers together after the backward pass; call loss.backward()"
            )

    def _read_scale(self, roots: Iterable[Tensor]) -> None:
        """Read the scale of the loss, which a scaler changes after the step."""
        results = self._results
        now = scale_of(self._request.loss_scale, list(roots))
        if self._scale_is_read and now != results.loss_scale:
            raise UnsupportedError(
                f"the scale of the loss was {results.loss_scale} in a backward pass of this block, "
                f"and is {now} now. What to do: call scaler.update() after the block."
            )
        results.loss_scale, self._scale_is_read = now, True

    @contextmanager
    def _pass_of(
        self, roots: Iterable[Tensor], *, accumulate: bool, keep: bool
    ) -> Iterator[BackwardPass]:
        """Be in a backward pass from `roots`, after a check that it will miss nothing.

        Raises:
            UnsupportedError: A gradient would reach, or has reached, a tracked parameter and bypass
                the captured calls.
            RuntimeError: It would measure a second time, or the parameters have changed.
        """
        self._expect_same_model()
        roots = list(roots)
        single = self.is_single and self._results.batch_size in (None, 1)
        calls = {} if single else self._find_calls(roots, accumulate)
        outer = self._pass
        measures = self._request, self._results
        keep = accumulate or keep
        this = BackwardPass(calls, *measures, self._across, accumulate=accumulate, keep=keep)
        this.is_inner = outer is not None
        if single:
            leaves = {id(x) for root in roots for x in leaves_below(root)}
            this.names = {self._names[key] for key in leaves if key in self._names}
            this.single = bool(this.names)
        if accumulate:
            self._expect_first(this, outer)
        self.seen |= bool(this.names)
        self._pass = this
        try:
            with self._counted(this) if outer is None else nullcontext():
                yield this
        except BaseException:
            if accumulate:
                self._fail()
            raise
        finally:
            self._pass = outer

    @contextmanager
    def _single(self, this: BackwardPass) -> Iterator[None]:
        """Measure the gradients of a batch of one example, which need no captured call."""
        try:
            self._request.grouping.groups(1)
        except Misfit as error:
            raise UnsupportedError(
                f"the batch has 1 row, {error.why}. What to do: {error.fix}."
            ) from None
        self._results.batch_size = 1

        def hook(name: str, g: Tensor) -> Tensor | None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                use = Use(name, of_rows(g.detach().unsqueeze(0)), g.dtype)
                (found,) = this.measure((use,))
                if self._request.aggregate is not None and found is not None:
                    return found
                return None if self._request.gradients else torch.zeros_like(g)

        handles = [
            self.leaves[name].register_hook(functools.partial(hook, name)) for name in this.names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _counted(self, this: BackwardPass) -> Iterator[None]:
        """Notice gradients that bypass the capture, from passes that are not seen."""
        self._expected = set(this.names if this.accumulate else ())
        with counted_gradients(self.leaves) as counts:
            yield
        past = [
            name
            for name, n in counts.items()
            if name not in self._skipped and n > (name in self._expected)
        ]
        if past:
            self._fail()
            raise unsupported(
                past,
                None,
                "a gradient reached it from a backward pass inside this one, bypassing the capture",
                "leave functions that run layers again in their backward, such as reversible "
                "layers, out of the block; for activation checkpointing give use_reentrant=False",
            )

    def _fail(self) -> None:
        """Let no one read what is not complete."""
        self._results.failed = True
        if self._across is not None:
            self._across.whole.failed = True

    def _expect_same_model(self) -> None:
        modules, then = modules_of(self._model), self._parameters
        every = [p for _, m in modules for p in m._parameters.values() if p is not None]
        trained = dict.fromkeys([id(p) for p in every if p.requires_grad])  # each once
        if list(trained) != list(map(id, then.values())):
            now = trained_parameters(modules)
            changed = sorted(n for n in {*now, *then} if now.get(n) is not then.get(n))
            if changed:  # and not only in another order
                raise RuntimeError(
                    "parameters were replaced, frozen or unfrozen inside the block: "
                    f"{', '.join(changed)}; do so before it"
                )

    def _find_calls(self, roots: Iterable[Tensor], accumulate: bool) -> dict[int, list[str]]:
        """The captured calls below `roots`, by number, and the parameters of each."""
        calls: dict[int, list[str]] = {}
        for node, leaves in graph_below(roots):
            custom = isinstance(node, CustomNode)
            if custom:
                call = getattr(node, "call", None)
                if isinstance(call, LayerCall) and call.sink is self:
                    calls[call.number] = call.names
                    continue
                self.reruns = self.reruns or not (is_distribution(node) or is_post_backward(node))
            past: list[str] = []
            if leaves:
                past = [self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names]
            if past or (custom and is_reentrant_checkpoint(node) and not accumulate):
                raise unsupported(
                    past,
                    None,
                    f"a gradient would reach it through {node.name()}, bypassing the capture",
                    "run the whole forward pass inside the block, write the layer with functions "
                    "of torch.nn.functional, without custom autograd.Function, torch.compile or "
                    "scripted code, say where the examples are with pc.mark_examples if no input "
                    "of the pass comes from outside the block, give activation checkpointing "
                    "use_reentrant=False, or freeze the parameter with requires_grad_(False)",
                )
        return calls

    def _expect_first(self, this: BackwardPass, outer: BackwardPass | None) -> None:
        twice = self._finished & this.names
        if outer is not None and (twice or (this.names and not outer.accumulate)):
            raise unsupported(
                sorted(twice or this.names),
                None,
                "layers that are run again in a backward pass inside this one use it, and so do "
                "others"
                if twice
                else "a gradient would be added to it in a backward pass inside "
                "this one, which only asks for others",
                "checkpoint with use_reentrant=False, or leave it out of the block",
            )
        if twice or self._done.intersection(this.calls):
            raise RuntimeError(
                "expected one backward pass over a forward pass, got a second, whose statistics "
                "would add up as if of other examples; sum the losses before one backward(), or "
                "use a block for each"
            )
        once = not self._request.gradients
        if once and outer is None and this.calls and self._done:
            raise RuntimeError(
                "expected one backward pass in the block, whose gradients are made of all layers "
                "together, got a second; sum the losses before one backward(), or use a block for "
                "each"
            )
        self._done.update(this.calls)
        self._finished |= this.names
        self._expected |= this.names
