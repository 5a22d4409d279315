"""All private parts of torch that the capture relies on, each with its reason."""

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable, _make_grads
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction


def are_saved_otherwise() -> bool:
    """Whether tensors for the backward pass are not kept as they are, but perhaps made again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore
    return hooks(False) is not None


def saved_as_they_are() -> AbstractContextManager[Any]:
    """A context in which tensors for the backward pass are kept."""
    if not are_saved_otherwise():
        return nullcontext()
    # Kept with its graph, an output would hold itself.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)


@contextmanager
def active(mode: TorchFunctionMode) -> Iterator[None]:
    """Have a mode see torch functions again that it has stepped out of."""
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, wherever in it that is."""
    above = list[TorchFunctionMode]()
    while torch._C._len_torch_function_stack():
        top: TorchFunctionMode = torch._C._pop_torch_function_stack()  # pyright: ignore
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)


def run_engine(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode
) -> Any:
    """Carry out a function that starts a backward pass, with a mode active in the pass.

    Activation checkpointing runs layers again in the backward pass, where the mode has to see them.
    The functions that start a pass step out of it, since they ask modes themselves; so the engine
    is called as they would.
    """
    bound = signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    outputs, given, keep_graph, create_graph, *_ = _named(bound.arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    given = (given,) if given is None or isinstance(given, Tensor) else tuple(given)
    grads = _make_grads(outputs, given * (len(outputs) // len(given)), is_grads_batched=False)
    keep_graph = create_graph if keep_graph is None else keep_graph
    run = Variable._execution_engine.run_backward
    if func is not torch.autograd.grad:
        with active(mode):
            run(outputs, grads, keep_graph, create_graph, (), True, True)
        return None
    options = bound.arguments
    if options["is_grads_batched"]:
        raise RuntimeError("is_grads_batched=True and layers that are run again do not go together")
    inputs, unused = options["inputs"], options["allow_unused"]
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    zeros = options["materialize_grads"]
    unused = zeros if unused is None else unused
    with active(mode):
        found = run(outputs, grads, keep_graph, create_graph, inputs, unused, False)
    if not zeros:
        return found
    pairs = zip(found, inputs, strict=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)


def _named(options: dict[str, Any]) -> tuple[Any, ...]:
    names = (("self", "tensors", "outputs"), ("gradient", "grad_tensors", "grad_outputs"))
    ahead = [options[name] for group in names for name in group if name in options]
    return (*ahead, options["retain_graph"], options["create_graph"])


def graph_below(roots: Iterable[Tensor]) -> Iterator[tuple[Any, list[Any]]]:
    """Every node that a backward pass from `roots` may run, once, and the leaves that it fills."""
    seen: set[Any] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves: list[Any] = []
            for below, _ in node.next_functions:
                if type(below) is _FillLeaf:
                    leaves.append(below.variable)  # pyright: ignore
                elif below is not None:
                    stack.append(below)
            yield node, leaves


def leaves_below(root: Tensor) -> Iterator[Tensor]:
    """The leaves that a tensor was made of, each once, as its graph tells."""
    seen: set[Any] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node) is _FillLeaf:
            yield node.variable  # pyright: ignore[reportAttributeAccessIssue]
        else:
            stack += [below for below, _ in node.next_functions]


def untracked_views() -> AbstractContextManager[Any]:
    """A context in which a view is a tensor of its own.

    Autograd refuses changes in place to a view that a custom Function returns. A layer may return
    a view of what nothing else holds, such as the product of flattened rows; to write this down
    with `aten::_unsafe_view`, as torch does, takes as long as a small product.
    """
    return torch._C._ExcludeDispatchKeyGuard(_VIEWS)  # pyright: ignore


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The `apply` of a custom Function, without its look for what `torch.func` has left.

    That takes as long as a small layer. Without a transform that is active there is nothing to be
    found but a tensor that has outlived one, which is refused where it comes into the block.
    """
    fast = super(torch.autograd.Function, function).apply  # pyright: ignore

    def apply(*args: Any) -> Any:
        transforms = torch._C._are_functorch_transforms_active()  # pyright: ignore
        return function.apply(*args) if transforms else fast(*args)

    return apply


def is_in_custom_function() -> bool:
    """Whether the forward pass of a custom autograd Function is running; seen on the stack."""
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


_APPLY = torch.autograd.Function.apply.__func__.__code__


def is_in_pipeline() -> bool:
    """Whether a stage of `torch.distributed.pipelining` is running; seen on the stack."""
    if "torch.distributed.pipelining" not in sys.modules:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.pipelining.stage":
            return True
        frame = frame.f_back
    return False


def is_hooked(x: Tensor) -> bool:
    """Whether a tensor is the input or output of a module, wrapped for its backward hooks.

    FSDP2 wraps the inputs of a module in a custom Function of its own, which no mode sees either.
    """
    return type(x.grad_fn).__name__ == _HOOKED or is_post_backward(x.grad_fn)


_HOOKED = "BackwardHookFunctionBackward"


def is_distributed(x: Tensor) -> bool:
    """Whether a function of `DTensor` made a tensor, which no mode sees."""
    return is_distribution(x.grad_fn)


def is_distribution(node: Any) -> bool:
    """Whether a node distributes a tensor over ranks, or makes it local; it runs nothing else."""
    if type(node).__name__ not in _DISTRIBUTIONS:
        return False
    # Private, since a node is told from one of a user that has the same name.
    return node._forward_cls.__module__.startswith("torch.distributed.")


_DISTRIBUTIONS = frozenset(
    f"{name}Backward" for name in ("_FromTorchTensor", "_ToTorchTensor", "Redistribute")
)


def slice_of(x: Any) -> Tensor:
    """The tensor of this rank that a distributed one holds, without a function of the graph."""
    return x._local_tensor


def is_distributing() -> bool:
    """Whether such a function is running, whose work is on the tensor of one rank."""
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        # By its module, whose name says less of torch's inside than those of its classes.
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "forward" and module.startswith("torch.distributed.tensor._"):
            return True
        frame = frame.f_back
    return False


def before_distribution(node: Any, output: int) -> tuple[Any, int]:
    """The node, and which of its outputs, behind those that distribute tensors or hook modules."""
    while node is not None:
        if is_distribution(node):
            node, output = node.next_functions[0]
        elif type(node).__name__ == _HOOKED or is_post_backward(node):
            node, output = node.next_functions[output]
        else:
            break
    return node, output


def is_leaf_of(x: Tensor, node: Any) -> bool:
    """Whether a node fills the gradient of a tensor."""
    return type(node) is _FillLeaf and node.variable is x  # pyright: ignore


def note_of(node: Any) -> dict[int, Any]:
    """A place on a node of the graph for what is known of its outputs, by their number."""
    return node.metadata.setdefault(_COUNTER, {})


def is_post_backward(node: Any) -> bool:
    """Whether FSDP2 has put a node into the graph, by which its backward pass frees parameters."""
    return type(node).__name__ == "RegisterPostBackwardFunctionBackward"


def has_captured(root: Tensor) -> bool:
    """Whether a captured call is below a tensor, in its graph."""
    return any(hasattr(node, "call") for node, _ in graph_below([root]))


CustomNode: type[Any] = BackwardCFunction
"""Nodes that run code in Python."""


def kept_by(node: Any) -> Any:
    """Nested values that a node in Python keeps for its backward pass, saved or as attributes.

    Raises:
        RuntimeError: From torch, if what is saved is gone or has been changed.
    """
    return node.saved_tensors, vars(node)


def _fill_leaf() -> type:
    node = torch.empty(0, requires_grad=True).clone().grad_fn
    assert node is not None
    return type(node.next_functions[0][0])


_FillLeaf = _fill_leaf()


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether the node runs a forward and a backward pass of its own."""
    return isinstance(node, CheckpointFunction._backward_cls)


def is_in_vmap(x: Tensor) -> bool:
    """Whether a tensor stands for one of many, inside `torch.vmap`."""
    return torch._C._functorch.is_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def counted_gradients(parameters: Mapping[str, Tensor]) -> Iterator[Counter[str]]:
    """Count how often a gradient is added to each parameter while the block lasts."""
    met: list[Tensor] = []
    counts: Counter[str] = Counter()
    bare: list[Tensor] = []
    count = met.append
    try:
        for p in parameters.values():
            hooks = p._post_accumulate_grad_hooks
            if hooks is None:
                bare.append(p)
                # Torch does the same when it registers a hook, but takes longer.
                hooks = OrderedDict()
                setattr(p, "_post_accumulate_grad_hooks", hooks)  # noqa: B010
            hooks[_COUNTER] = count
        yield counts
        if met:
            names = {id(p): name for name, p in parameters.items()}
            counts.update([names[id(p)] for p in met])
    finally:
        for p in parameters.values():
            hooks = p._post_accumulate_grad_hooks
            if hooks is not None:
                hooks.pop(_COUNTER, None)
        for p in bare:
            if not p._post_accumulate_grad_hooks:
                setattr(p, "_post_accumulate_grad_hooks", None)  # noqa: B010


_COUNTER = "pycoherence"


@contextmanager
def set_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have parameters without gradients, and without hooks on them, while the block lasts."""
    met = list(parameters)
    before = [(p, p.grad, p._backward_hooks, p._post_accumulate_grad_hooks) for p in met]
    try:
        for p in met:
            p.grad = None
            # Torch takes hooks from what is set here, and would call them where they are left.
            setattr(p, "_backward_hooks", None)  # noqa: B010
            setattr(p, "_post_accumulate_grad_hooks", None)  # noqa: B010
        yield
    finally:
        for p, grad, hooks, later in before:
            p.grad = grad
            setattr(p, "_backward_hooks", hooks)  # noqa: B010
            setattr(p, "_post_accumulate_grad_hooks", later)  # noqa: B010


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no numbers, since what is done with it is being traced."""
    return type(x) is FakeTensor


def below_autograd() -> AbstractContextManager[Any]:
    """A context in which functions keep no graph and cast nothing, as a graph has written down."""
    stack = ExitStack()
    for guard in (
        torch.no_grad(),
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._DisableAutocast(),
    ):
        stack.enter_context(guard)  # pyright: ignore
    return stack


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward pass is running, if there is one."""
    return DistributedDataParallel._get_active_ddp_module()


def is_joined(ddp: DistributedDataParallel) -> bool:
    """Whether a wrapper is or has been in a `Join`, which torch keeps in it."""
    return ddp._join_config.enable


def has_comm_hook(ddp: DistributedDataParallel) -> bool:
    """Whether a user has said how a wrapper sends gradients."""
    return bool(ddp._comm_hooks)


class ShardedParameter:
    """A parameter that FSDP2 manages, over its record of it.

    Only this record knows both the DTensor that lasts and the leaf that takes its place while
    layers run: a module shows one of them at a time.
    """

    __slots__ = ("_group", "_record")

    def __init__(self, record: Any, group: Any) -> None:
        self._record, self._group = record, group

    @property
    def sharded(self) -> nn.Parameter:
        """The DTensor that the optimizer steps."""
        return self._record.sharded_param

    @property
    def whole(self) -> nn.Parameter | None:
        """The leaf in its place, which is made once, by the first all-gather."""
        return getattr(self._record, "_unsharded_param", None)

    @property
    def is_left(self) -> bool:
        """Whether a gradient is still at the leaf, though each pass should take it from there."""
        whole = self.whole
        return whole is not None and whole.grad is not None and self._group.reduce_grads

    @property
    def divides_otherwise(self) -> bool:
        """Whether its gradients are divided by another number than that of the ranks."""
        return self._group.gradient_divide_factor is not None

    @property
    def stand_ins(self) -> list[nn.Parameter]:
        """All that modules may hold in its place; one more with `reshard_after_forward=int`."""
        names = "_unsharded_param", "_sharded_post_forward_param"
        found = (getattr(self._record, name, None) for name in names)
        return [p for p in found if p is not None]


def fully_sharded(modules: Iterable[nn.Module]) -> list[ShardedParameter]:
    """The parameters that FSDP2 manages in some modules, each once."""
    # It takes seconds to import, and who has not done so has no such module.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = None if fsdp is None else getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return []
    # Modules that were given to `fully_shard` together share a state.
    found: list[Any] = [module for module in modules if isinstance(module, kind)]
    states = {id(state): state for state in (module._get_fsdp_state() for module in found)}
    groups: list[Any] = []
    for state in states.values():
        several = getattr(state, "_fsdp_param_groups", None)  # one in older torch
        groups += [state._fsdp_param_group] if several is None else several
    groups = [group for group in groups if group is not None]
    return [ShardedParameter(p, group) for group in groups for p in group.fsdp_params]
