"""Remembers what the host does for an op, to do it again without deciding anything.

Which kernels an op launches, with which arguments and on which memory, follows from the shapes,
strides and dtypes of its arguments. To find it out takes Python longer than small layers take a
GPU. A tape holds what was found: tensors to allocate, and compiled kernels with their arguments;
only pointers are new each time.
"""

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from pycoherence.ops.core.workspace import workspace

# Calls that are remembered, by all that decides what they do; batches of many lengths have a tape
# for each. The oldest are forgotten first.
_MOST = 1 << 12

_tapes: dict[tuple[Any, ...], "_Tape | _Mark"] = {}
_recorder = threading.local()

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Mark(Enum):
    """A call that has no tape."""

    SEEN = "once: it takes long to record, and pays from the third time on"
    OPEN = "something else than allocations and launches was done"


class _Tape(NamedTuple):
    """All that a call did.

    Attributes:
        sizes: Shape, strides and dtype of each tensor that it allocated.
        launches: Compiled kernels, their three numbers of programs, and what gives their arguments
            from the pointers of all tensors: those of the call, and those allocated.
        outputs: Gives the result from these tensors.
    """

    sizes: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    launches: list[tuple[Any, tuple[int, ...], Callable[[list[int]], tuple[Any, ...]]]]
    outputs: Callable[[list[Tensor]], Any]

    def play(self, given: list[Tensor], gpu: int) -> Any:
        """Do the same for tensors that are like those of the call."""
        device = given[0].device
        tensors = given + [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype in self.sizes
        ]
        pointers = [x.data_ptr() for x in tensors]
        stream = driver.active.get_current_stream(gpu)
        for kernel, (x, y, z), arguments in self.launches:
            function, packed = kernel.function, kernel.packed_metadata
            args = arguments(pointers)
            kernel.run(x, y, z, stream, function, packed, None, None, None, *args)
        return self.outputs(tensors)


class _Recorder(TorchDispatchMode):
    """Watches what a call allocates and launches.

    Attributes:
        complete: Whether that is all it did: no kernel of torch has run.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.complete = True
        self._given = len(given)
        self._roots = list(given)
        # Tensors live while they are known by their identity.
        self._known = {id(x): (i, x) for i, x in enumerate(given)}
        self._launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._known[id(found)] = len(self._roots), found
            self._roots.append(found)
        elif func.is_view and id(args[0]) in self._known:
            source, _ = self._known[id(args[0])]
            for x in found if isinstance(found, (list, tuple)) else (found,):
                self._known[id(x)] = source, x
        else:
            self.complete = False
        return found

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Note a launch, with all arguments of the kernel."""
        self._launches.append((kernel, (*grid, 1, 1)[:3], args))

    def tape(self, outputs: Any) -> _Tape | None:
        """The tape, if the call did nothing else."""
        launches = [
            (kernel, grid, self._function(args, self._pointer))
            for kernel, grid, args in self._launches
        ]
        result = self._function(outputs, self._tensor)
        made = self._roots[self._given :]
        if not self.complete or any(kernel is None for kernel, _, _ in launches):
            return None
        return _Tape([(tuple(x.shape), x.stride(), x.dtype) for x in made], launches, result)

    def _function(self, value: Any, of_tensor: Callable[[Tensor, dict[str, Any]], str]) -> Any:
        """A function of a list, all written out, that gives nested tuples like `value`."""
        names: dict[str, Any] = {"descriptor": _descriptor_at}
        return eval(f"lambda of: {self._written(value, of_tensor, names)}", names)

    def _written(
        self, x: Any, of_tensor: Callable[[Tensor, dict[str, Any]], str], names: dict[str, Any]
    ) -> str:
        if isinstance(x, Tensor):
            return of_tensor(x, names)
        if isinstance(x, (tuple, list)):
            return "(" + "".join(f"{self._written(y, of_tensor, names)}, " for y in x) + ")"
        name = f"c{len(names)}"
        if isinstance(x, TensorDescriptor):
            names[name] = _descriptor_of(x, None)  # it would keep the tensor
            return f"descriptor({name}, {of_tensor(x.base, names)})"
        names[name] = x
        return name

    def _source(self, x: Tensor) -> tuple[int, Tensor]:
        source, _ = self._known.get(id(x), (None, None))
        if source is None:
            self.complete = False
            return 0, x
        return source, self._roots[source]

    def _pointer(self, x: Tensor, names: dict[str, Any]) -> str:
        source, root = self._source(x)
        offset = x.storage_offset() * x.itemsize - root.storage_offset() * root.itemsize
        return f"of[{source}] + {offset}" if offset else f"of[{source}]"

    def _tensor(self, x: Tensor, names: dict[str, Any]) -> str:
        source, root = self._source(x)
        if x is root:
            return f"of[{source}]"
        names[f"c{len(names)}"] = tuple(x.shape), x.stride(), x.storage_offset()
        # An output is part of an allocated tensor, whose offset is zero.
        self.complete = self.complete and source >= self._given and x.dtype == root.dtype
        return f"of[{source}].as_strided(*c{len(names) - 1})"


class _At(NamedTuple):
    """All that a descriptor needs to know of a tensor."""

    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


def _descriptor_at(x: TensorDescriptor, pointer: int) -> TensorDescriptor:
    return _descriptor_of(x, _At(pointer))


def _descriptor_of(x: TensorDescriptor, base: Any) -> TensorDescriptor:
    """The same descriptor of something else, past the checks of a new one."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(x.__dict__, base=base)
    return found


def launched(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Let the tape that is recorded know of a launch."""
    now = getattr(_recorder, "now", None)
    if now is not None:
        now.launched(kernel, grid, args)


def taped(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call a function of tensors on a GPU, or do again what it did for tensors like these.

    Args:
        function: Launches kernels. It decides by shapes, strides, dtypes and alignment of tensors,
            by other arguments, the precision of products and the workspace, and by nothing else.
        args: Tensors, values that can be hashed, and lists and tuples of these.
    """
    tensors: list[Tensor] = []
    key = function, _key_of(args, tensors)
    gpu = gpu_of(tensors[0])
    if gpu is None or getattr(_recorder, "now", None) is not None or _watched():
        return function(*args)
    same = [id(x) for x in tensors]
    how = torch.backends.cuda.matmul.fp32_precision
    key = *key, gpu, *map(same.index, same), how, workspace(tensors[0].device)
    tape = _tapes.get(key)
    if tape is None:
        while len(_tapes) >= _MOST:
            _tapes.pop(next(iter(_tapes), None), None)
        _tapes[key] = _Mark.SEEN
        return function(*args)
    if tape is _Mark.SEEN:
        return _record(function, args, tensors, key)
    if tape is _Mark.OPEN:
        return function(*args)
    if driver.active.get_current_device() == gpu:
        return tape.play(tensors, gpu)
    with torch.cuda.device(gpu):
        return tape.play(tensors, gpu)


def _record(
    function: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor], key: Any
) -> Any:
    with _Recorder(tensors) as recorder:
        _recorder.now = recorder
        try:
            outputs = function(*args)
        finally:
            _recorder.now = None
    _tapes[key] = recorder.tape(outputs) or _Mark.OPEN
    return outputs


def _key_of(x: Any, tensors: list[Tensor]) -> Any:
    """The part of arguments that decides what is done; all tensors are appended to `tensors`."""
    kind = type(x)
    if kind is tuple or kind is list:
        return tuple([_key_of(y, tensors) for y in x])
    if isinstance(x, Tensor):
        tensors.append(x)
        return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
    return x


def gpu_of(x: Tensor) -> int | None:
    """The index of the GPU that holds a tensor."""
    return x.device.index if x.is_cuda else None


def _watched() -> bool:
    """Whether somebody, such as a profiler, wants to know of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
