"""The graph of a pass, and the proof that it depends on nothing that may change unseen."""

import gc
import operator
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pycoherence.capture import modules_of
from pycoherence.errors import UnsupportedError
from pycoherence.replay.known import KnownNumbers, Refused
from pycoherence.replay.passes import Pass, Tree
from pycoherence.replay.state import Place, PythonState
from pycoherence.robust import Centre


def tensors_of(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """All parameters and buffers by name, each once; as torch tells them, in less time."""
    seen = set[int]()
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in modules_of(model):
        ahead = path + "." if path else ""
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                parameters[ahead + name] = p
        for name, b in module._buffers.items():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                buffers[ahead + name] = b
    return parameters, buffers


class Inputs:
    """The tensors that a pass starts from, in the order of a graph's inputs.

    Args:
        model: Its parameters and buffers come first.
        centre: The part of a rule that is carried from batch to batch.
        batch: The leaves of a batch that are tensors.
        scale: The scale of the loss, if it is an input.
    """

    def __init__(
        self, model: nn.Module, centre: Mapping[str, Tensor], batch: Sequence[Tensor], scale: Any
    ) -> None:
        self.parameters, self.buffers = tensors_of(model)
        self.centre = dict(centre)
        self.batch = list(batch)
        self.scale: list[Tensor] = [] if scale is None else [scale]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.parameters.values()
        yield from self.buffers.values()
        yield from self.centre.values()
        yield from self.batch
        yield from self.scale


@dataclass(frozen=True)
class Constant:
    """A tensor from outside in a graph.

    Attributes:
        tensor: The tensor.
        place: The place where Python finds it; `None` for one that the user has listed.
        like: Its shape, strides, dtype and device.
        version: How often it had been written into.
        is_read: Whether its numbers were read.
        is_input: Whether it is an input of the graph as well.
    """

    tensor: Tensor
    place: Place | None
    like: tuple[Any, ...]
    version: int
    is_read: bool
    is_input: bool

    @property
    def is_unwritten(self) -> bool:
        """Whether nobody has written into it, or may have."""
        return self.is_input or self.tensor._version == self.version

    @property
    def holds(self) -> bool:
        """Whether the graph may still use it."""
        if self.place is not None and self.place.get() is not self.tensor:
            return False
        if self.is_read and self.tensor._version != self.version:
            return False
        return like(self.tensor) == self.like


class Trace:
    """A pass as a graph.

    Attributes:
        module: The graph, from `Inputs` to the tensors of a `Tree`.
        constants: The tensors from outside that it holds, or whose numbers it depends on.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        form: Tree,
        constants: list[Constant],
    ) -> None:
        self.module, self.constants, self._form = module, constants, form

    @property
    def holds(self) -> bool:
        """Whether all constants are as they were."""
        return all(constant.holds for constant in self.constants)

    def tree(self, results: Sequence[Tensor]) -> Tree:
        """All that the pass found, from the results of the graph."""
        return _filled(self._form, results)


class _Place:
    """The place of a tensor among the results of a graph."""

    __slots__ = ("at",)

    def __init__(self, at: int) -> None:
        self.at = at


def _filled(form: Any, results: Sequence[Tensor]) -> Any:
    """A form with the tensors at the places in it."""
    kind = type(form)
    if kind is _Place:
        return results[form.at]
    if kind is dict:
        return {name: _filled(x, results) for name, x in form.items()}
    return [_filled(x, results) for x in form] if kind is list else form


def _form_of(tree: Any, places: Iterator[int]) -> Any:
    """A tree with places for its tensors, in the order of `tensors_in`."""
    if isinstance(tree, Tensor):
        return _Place(next(places))
    if isinstance(tree, dict):
        return {name: _form_of(x, places) for name, x in tree.items()}
    return [_form_of(x, places) for x in tree] if isinstance(tree, list) else tree


def like(x: Tensor) -> tuple[Any, ...]:
    """All of a tensor but its numbers."""
    return x.shape, x.stride(), x.dtype, x.device, x.layout


def tensors_in(tree: Tree) -> list[tuple[str, Tensor]]:
    """The tensors of a tree, and where they are."""
    return [(_words(path), x) for path, x in leaves_of(tree) if isinstance(x, Tensor)]


def leaves_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All that is in a tree, and the keys that lead to each."""
    if isinstance(tree, (dict, list)):
        for key, x in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves_of(x, (*path, key))
    else:
        yield path, tree


def _words(path: tuple[Any, ...]) -> str:
    keys = list(map(str, path))
    if keys[0] == "outputs":
        return f"{keys[2]} of {keys[1]!r}"
    if keys[0] == "gradients":
        return f"the gradient of {keys[1]!r}"
    if len(keys) > 1:
        return f"{keys[0]} of {keys[1]!r}"
    return f"the {keys[0]}"


def trace(
    this: Pass,
    state: PythonState,
    inputs: Inputs,
    batch: Any,
    centre: Centre | None,
    scale: float | None,
    constants: Iterable[Tensor],
) -> Trace:
    """Make a graph of a pass.

    Args:
        this: The pass.
        state: All that Python keeps beside its inputs.
        inputs: The tensors it starts from.
        batch: A nested batch; the tensors in it are those of `inputs`.
        centre: The part of its rule that is carried from batch to batch.
        scale: The scale of the loss, if it is no input.
        constants: Tensors from outside that the user has listed.

    Raises:
        UnsupportedError: A replay of the graph would not be what the pass is.
    """
    made = _make(this, state, inputs, batch, centre, scale)
    if made.mode() is not None:
        gc.collect()
    if made.mode() is not None:
        raise UnsupportedError(
            "pc.compile: something has kept a tensor of the pass, such as a list, a cache or a "
            "hook, which would get none in a replay and now holds one without numbers. What to do: "
            "build it anew, and return what is of interest, or use pc.collect."
        )
    fixed = _constants(made, state, inputs, constants)
    return Trace(made.module, made.form, fixed)


class _Made(NamedTuple):
    """A graph, and what was met while it was made."""

    module: fx.GraphModule
    form: Tree
    literal: set[int]
    sources: dict[int, Tensor]
    mode: "weakref.ref[FakeTensorMode]"


def _make(
    this: Pass,
    state: PythonState,
    inputs: Inputs,
    batch: Any,
    centre: Centre | None,
    scale: float | None,
) -> _Made:
    known = KnownNumbers()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found: list[Tree] = []
    flat, spec = tree_flatten(batch)

    used: list[_Given] = []
    stands: dict[int, Tensor] = {}

    def step(*tensors: Tensor) -> list[Tensor]:
        given = _Given(inputs, tensors, flat, spec)
        used.append(given)  # so that nothing else gets their ids
        stands.update({id(p): inputs.parameters[name] for name, p in given.parameters.items()})
        stands.update({id(b): inputs.buffers[name] for name, b in given.buffers.items()})
        found[:] = [_run(this, given, centre, scale)]
        return [x for _, x in tensors_in(found[0])]

    fakes = [_fake(mode, x) for x in inputs]
    buffers = {id(x) for x in inputs.buffers.values()}
    for fake, x in zip(fakes, inputs, strict=True):
        if id(x) in buffers:
            known.know(fake, x)
    devices = {x.device for x in inputs if x.device.type == "cuda"}
    with (
        torch.random.fork_rng(list(devices)),
        torch.autograd.set_multithreading_enabled(False),
        _unchanged(this.model, state, stands),
    ):
        try:
            with mode, known:
                module = make_fx(step, tracing_mode="real")(*fakes)
        except Exception as error:
            _refuse_reads(known)
            raise _untraceable(error) from error
    _refuse_reads(known)
    _tidy(module)
    form = _form_of(found[0], count())
    literal = {id(x) for x in _held(module) if id(x) in known.made}
    return _Made(module, form, literal, known.sources, weakref.ref(mode))


class _Given:
    """The inputs of a graph that is being made, as the pass takes them."""

    def __init__(self, inputs: Inputs, given: Sequence[Tensor], flat: list[Any], spec: Any) -> None:
        each = iter(given)
        self.parameters = {
            name: nn.Parameter(next(each).detach(), requires_grad=p.requires_grad)
            for name, p in inputs.parameters.items()
        }
        self.buffers = {name: next(each) for name in inputs.buffers}
        self.centre = {name: next(each) for name in inputs.centre}
        leaves = [next(each) if isinstance(x, Tensor) else x for x in flat]
        self.batch = tree_unflatten(leaves, spec)
        self.scale = next(each, None)


class _Whole(nn.Module):
    """A model whose pass is run with other tensors for its parameters and buffers."""

    def __init__(self, this: Pass) -> None:
        super().__init__()
        self.model = this.model
        self._pass = this

    def forward(self, given: _Given, scale: float | None) -> Tree:
        found = self._pass.run(given.batch, scale if given.scale is None else given.scale)
        now = dict(self.model.named_buffers())
        moved = sorted(n for n, x in given.buffers.items() if now.get(n) is not x)
        if moved or len(now) != len(given.buffers):
            raise Refused(
                f"the pass puts other tensors in the place of the buffers {', '.join(moved)}, "
                "which a replay would not do. What to do: write into them (buffer.copy_(...))"
            )
        return found


def _run(this: Pass, given: _Given, centre: Centre | None, scale: float | None) -> Tree:
    tensors = {f"model.{n}": x for n, x in {**given.parameters, **given.buffers}.items()}
    before = None if centre is None else centre.value
    try:
        if centre is not None:
            centre.value = given.centre
        found = torch.func.functional_call(_Whole(this), tensors, (given, scale))
        carried = {} if centre is None else centre.value
    finally:
        if centre is not None and before is not None:
            centre.value = before
    return {**found, "centre": carried}


def _fake(mode: FakeTensorMode, x: Tensor) -> FakeTensor:
    """A tensor without numbers that is like another one, and no view."""
    with mode:
        found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    assert isinstance(found, FakeTensor)
    return found


def _refuse_reads(known: KnownNumbers) -> None:
    if not known.reads:
        return
    function, line, is_ours = known.reads[0]
    if is_ours:
        raise UnsupportedError(
            f"pc.compile: at {line} the capture has to read numbers of the batch ({function}), "
            "such as to tell whose examples the rows are that they put in another order, and those "
            "of the next batch may be others. What to do: use pc.collect or pc.aggregate, which "
            "read them anew in each step."
        )
    raise UnsupportedError(
        f"pc.compile: {line} reads numbers of the batch or the parameters on the host "
        f"({function}), and those of the next batch may be others. What to do: write it without "
        "bool(), .item(), if on tensors and masks that pick elements (torch.where, products with a "
        "mask), or use pc.collect or pc.aggregate."
    )


def _untraceable(error: Exception) -> UnsupportedError:
    if isinstance(error, Refused):
        return UnsupportedError(f"pc.compile: {error}.")
    text = str(error).strip().partition("\n")[0][:400]
    return UnsupportedError(
        f"pc.compile cannot trace this pass: {type(error).__name__}: {text} What to do: use "
        "pc.collect or pc.aggregate, which run it as it is written."
    )


@contextmanager
def _unchanged(
    model: nn.Module, state: PythonState, stands: Mapping[int, Tensor]
) -> Iterator[None]:
    """Raise if the pass changes what Python keeps, which a replay would not do; put it back.

    Args:
        model: The model of the pass.
        state: The settings of the pass.
        stands: The parameters and buffers, by the `id` of what stands for each.
    """
    modules = [module for _, module in modules_of(model)]
    before = [dict(vars(module)) for module in modules]
    python, settings = random.getstate(), state.now()
    numpy = _numpy_state()
    try:
        yield
    finally:
        changed = list[str]()
        for (path, module), values in zip(modules_of(model), before, strict=True):
            now = vars(module)
            for name in {*values, *now}:
                if name in now and name in values and now[name] is values[name]:
                    continue
                both = name in now and name in values
                if not both or not _is_same(now[name], values[name], stands):
                    changed.append(f"{path}.{name}".lstrip("."))
                if name in values:
                    now[name] = values[name]
                else:
                    del now[name]
        draws = random.getstate() != python or _numpy_state() != numpy
        random.setstate(python)
    if changed:
        raise UnsupportedError(
            f"pc.compile: the pass sets attributes of modules ({', '.join(sorted(changed))}), "
            "which a replay would not do. What to do: keep numbers in buffers and write into them, "
            "use torch.nn.utils.parametrizations in place of hooks that set weights, return what "
            "is of interest, or use pc.collect."
        )
    if draws:
        raise UnsupportedError(
            "pc.compile: the pass draws numbers from Python's or NumPy's random, of which all "
            "replays would have the same. What to do: draw them with torch, or put them into the "
            "batch."
        )
    if state.now() != settings:
        raise UnsupportedError(
            "pc.compile: the pass changes numbers that Python keeps, such as a counter, which a "
            "replay would not do. What to do: keep them in a buffer of the model, or put them into "
            "the batch."
        )


def _is_same(now: Any, before: Any, stands: Mapping[int, Tensor]) -> bool:
    """Whether an attribute holds the same as before, or what stands for it: lists of weights do."""
    if now is before:
        return True
    if type(now) is weakref.ref and type(before) is weakref.ref:
        now, before = now(), before()
    if isinstance(now, Tensor):
        return stands.get(id(now)) is before
    if not (isinstance(now, (list, tuple)) and type(now) is type(before)):
        return False
    pairs = zip(now, before, strict=False)
    return len(now) == len(before) and all(_is_same(x, y, stands) for x, y in pairs)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, *rest = numpy.random.get_state()
    return name, keys.tobytes(), *rest


def _constants(
    made: _Made,
    state: PythonState,
    inputs: Inputs,
    listed: Iterable[Tensor],
) -> list[Constant]:
    """The tensors from outside that a graph holds, all of which it may hold."""
    in_graph = {id(x): x for x in _held(made.module) if id(x) not in made.literal}
    given = {id(x) for x in inputs}
    allowed = {id(x) for x in listed}
    found = list[Constant]()
    for key, x in {**in_graph, **made.sources}.items():
        facts = like(x), x._version, key in made.sources, key in given
        if key in given:
            if key in in_graph:
                _refuse_own(x, inputs)
            found.append(Constant(x, None, *facts))
            continue
        place = state.places(x)
        if place is None and key not in allowed:
            raise UnsupportedError(
                f"pc.compile: the pass uses a tensor {tuple(x.shape)} of {x.dtype} that is neither "
                "in the batch nor a parameter or buffer of the model, so that replays would not "
                "notice another one in its place. What to do: register it as a buffer, put it into "
                "the batch, or list it in constants= if it stays the same tensor."
            )
        found.append(Constant(x, place, *facts))
    return found


def _held(module: fx.GraphModule) -> Iterator[Tensor]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            x = getattr(module, node.target)
            if isinstance(x, FakeTensor):
                raise UnsupportedError(
                    "pc.compile: the pass uses a tensor of an earlier trace. What to do: build the "
                    "model, or what keeps that tensor, anew."
                )
            yield x


def _refuse_own(x: Tensor, inputs: Inputs) -> None:
    own = {**inputs.parameters, **inputs.buffers}
    name = next((name for name, p in own.items() if p is x), None)
    what = "a tensor of the batch" if name is None else repr(name)
    raise UnsupportedError(
        f"pc.compile: the pass uses {what} through another name than that of its module or batch, "
        "such as a list of parameters in Python. What to do: use nn.ParameterList or "
        "nn.ParameterDict, and take tensors of the batch from the batch."
    )


def _tidy(module: fx.GraphModule) -> None:
    """Drop what no result needs, and all that was known of the nodes while they were made."""
    graph = module.graph
    moved = any(torch.Tag.inplace_view in getattr(n.target, "tags", ()) for n in graph.nodes)
    for node in list(graph.nodes):
        node.meta.clear()
        if node.target is torch.ops.aten.detach.default and not moved:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(_is_impure)
    module.recompile()


def _is_impure(node: fx.Node) -> bool:
    """Whether a node does more than to give its result: it writes, or draws numbers."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr" or node.target is operator.getitem:
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags  # pyright: ignore


__all__ = ["Constant", "Inputs", "Trace", "leaves_of", "like", "tensors_in", "trace"]
