"""Numbers that are known while a pass is traced, since no input has a part in them."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

_MOST = 1 << 22
"""Elements up to which numbers are made a second time, to be known."""


class Refused(Exception):
    """Why a pass cannot be replayed, in words that stand alone."""


class Value(NamedTuple):
    """A tensor that is known.

    Attributes:
        numbers: Them, in memory of their own.
        sources: The `id` of each tensor from outside that they were made of.
    """

    numbers: Tensor
    sources: frozenset[int]


class Read(NamedTuple):
    """A function that needs numbers which are not known.

    Attributes:
        function: Its name.
        line: The line of the user's code that called it.
        is_ours: Whether the capture called it, on behalf of that line.
    """

    function: str
    line: str
    is_ours: bool


class KnownNumbers(TorchDispatchMode):
    """Makes what is made of constants alone a second time, with numbers.

    In a trace tensors have no numbers, and a function that reads some would end it. The capture
    reads the ids of examples, which it makes itself of nothing but shapes. They are the same in
    each replay, and so are numbers from outside that have not been changed since.

    Attributes:
        reads: Functions that needed other numbers; the trace depends on the batch then.
        sources: Tensors from outside whose numbers were read, by their `id`.
        outside: Tensors from outside that took part, by their `id`; the trace follows changes in
            place of their numbers, as far as none were read.
        made: The `id` of each tensor with numbers that the trace itself has made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.sources: dict[int, Tensor] = {}
        self.outside: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}
        self._values: dict[int, tuple[Any, Value]] = {}
        self._states: dict[torch.device, Tensor] = {}

    def know(self, fake: Tensor, source: Tensor) -> None:
        """Know the numbers of an input, which may be read as long as nobody changes them."""
        if _can_be_places(source):
            self.outside[id(source)] = source
            self._put(fake, Value(source.detach().clone(), frozenset((id(source),))))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        lifts = func in _LIFTS
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self._meet(x, literal=lifts)
        values = [self._get(x) for x in given]
        known = all(value is not None for value in values)
        if known and _is_determined(func) and all(x.numel() <= _MOST for x in given):
            return self._again(func, args, kwargs, [v for v in values if v is not None])
        if _draws(func, args, kwargs):
            self._draw(given, kwargs)
        if not known and _reads(func, args):
            self.reads.append(Read(str(func.overloadpacket), *_line()))
        found = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._forget_written(func, args, kwargs)
        return found

    def _draw(self, given: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        """Draw a number for each function that does, and notice when an earlier state comes back.

        Activation checkpointing draws the same numbers again, by a state that no graph holds.
        """
        if kwargs.get("generator") is not None:
            raise Refused(
                "the pass draws random numbers from a generator of its own, which replays would "
                "not do. What to do: draw from torch's own, which torch.manual_seed seeds"
            )
        device = given[0].device if given else torch.device(kwargs.get("device") or "cpu")
        with _disable_current_modes():
            state = _state_of(device)
            if not torch.equal(self._states.get(device, state), state):
                raise Refused(
                    "the pass draws random numbers again, from an earlier state of the generator, "
                    "as activation checkpointing of dropout does, which a replay would not do. "
                    "What to do: checkpoint layers without dropout, or use pc.collect"
                )
            torch.rand((), device=device)
            self._states[device] = _state_of(device)

    def _again(self, func: Any, args: Any, kwargs: Any, values: list[Value]) -> Any:
        """Call a function in the trace, and with numbers."""
        sources = frozenset[int]().union(*(value.sources for value in values))
        reads = _reads(func, args)
        with _disable_current_modes():
            numbers = func(*tree_map(self._numbers, args), **tree_map(self._numbers, kwargs))
        if reads:
            self.sources |= {key: self.outside[key] for key in sources}
            if not isinstance(numbers, Tensor):
                return numbers
            # How many there are is told by numbers, so that the trace gets the result itself.
            self.made[id(numbers)] = numbers
            found = torch.ops.aten.clone.default(numbers)
        else:
            found = func(*args, **kwargs)
        for fake, x in zip(tree_iter(found), tree_iter(numbers), strict=True):
            if isinstance(fake, Tensor) and self._get(fake) is None and x.numel() <= _MOST:
                self._put(fake, Value(x, sources))
        return found

    def _meet(self, x: Tensor, *, literal: bool) -> None:
        """Look at a tensor among the arguments of a function, and know it if it has numbers."""
        if isinstance(x, FakeTensor) or id(x) in self.outside or id(x) in self.made:
            return
        if literal:
            self.made[id(x)] = x
            with _disable_current_modes():
                self._put(x, Value(x.detach().clone(), frozenset()))
            return
        if x.requires_grad:
            raise Refused(
                f"the pass uses a tensor {tuple(x.shape)} that requires a gradient and is no "
                "parameter of the model under the name of its module, so that a replay would give "
                "it none. What to do: register it (nn.Parameter, nn.ParameterList), or detach() it"
            )
        self.outside[id(x)] = x
        if _can_be_places(x):
            with _disable_current_modes():
                self._put(x, Value(x.detach().clone(), frozenset((id(x),))))

    def _put(self, x: Tensor, value: Value) -> None:
        self._values[id(x)] = ref(x), value

    def _get(self, x: Tensor) -> Value | None:
        found = self._values.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def _numbers(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        value = self._get(x)
        assert value is not None
        return value.numbers

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """Know nothing any more that shares memory with what has been written."""
        written = set[int]()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for x in tree_iter(given):
                    value = self._get(x) if isinstance(x, Tensor) else None
                    if value is not None:
                        written.add(value.numbers.untyped_storage()._cdata)
        if written:
            self._values = {
                key: found
                for key, found in self._values.items()
                if found[1].numbers.untyped_storage()._cdata not in written
            }


_LIFTS = frozenset((torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default))
"""How torch brings in what is written down, such as `torch.tensor([1, 2])`."""

_READ = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


def _reads(func: Any, args: Any) -> bool:
    """Whether a function's result, or its size, takes numbers to tell."""
    if func is torch.ops.aten.index.Tensor:
        # Only masks pick as many elements as they have ones.
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not _READ.isdisjoint(func.tags)


def _state_of(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _can_be_places(x: Tensor) -> bool:
    """Whether numbers from outside may say where elements are; others are only computed with."""
    return not (x.is_floating_point() or x.is_complex()) and x.numel() <= _MOST


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function draws random numbers; attention does for its dropout alone."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def _is_determined(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded not in func.tags


def _line() -> tuple[str, bool]:
    """The innermost line of a user, and whether a rule of the capture came after it."""
    frame, is_ours = sys._getframe(2), False
    while frame is not None:
        name: str = frame.f_globals.get("__name__", "")
        home, file = name.partition(".")[0], frame.f_code.co_filename
        is_ours = is_ours or (home == "pycoherence" and name not in _WAY)
        if home not in ("torch", "pycoherence", "contextlib", "functools") and file[0] != "<":
            return f"{file}:{frame.f_lineno}", is_ours
        frame = frame.f_back
    return "no line that is known", is_ours


_WAY = frozenset(("pycoherence.capture.mode", "pycoherence.capture.blocks"))
"""Modules that each torch function of a user goes through."""
