"""The processes whose examples count together, and everything that they send each other.

A backward pass over several ranks is a conversation: whatever is exchanged begins with a header, in
which each rank says what it is about to do. Ranks that are about to do different things, or of
which one has raised an error, thus all find out and raise, and none waits for another.
"""

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycoherence.errors import RanksError

Group = Any
"""A `torch.distributed.ProcessGroup` or a `torch.distributed.device_mesh.DeviceMesh`."""

_WIDTH = 16
_RUNS, _HAS_RAISED, _HAS_LEFT = range(3)
_SAME_LAYERS = (
    "let no branch of the model depend on the data of a rank, and open the same block on each"
)
_PATIENCE = timedelta(seconds=10)
"""The time that a rank that has raised an error gives the others to take notice of it."""


class Ranks:
    """The processes of a group, as this one sees them.

    All methods that send are called by all ranks, in the same order. They use a process group of
    their own, so that what a wrapper of the model sends at the same time does not mix with it.

    Attributes:
        size: How many there are, `R`.
        rank: The place of this process among them, in the order of their global ranks.
    """

    def __init__(self, members: Sequence[int], timeout: timedelta | None) -> None:
        self.members = sorted(members)
        self.size, self.rank = len(members), self.members.index(dist.get_rank())
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        # Headers lie on the host, so that no rank waits for its GPU to read them.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        # Torch holds it until the user ends all groups; later, it would end while threads run.
        self._made = weakref.ref(_new_group(self.members, backend, timeout))
        self._is_lost = False
        self._is_over = True

    @property
    def _group(self) -> Any:
        found = self._made()
        if found is None:
            raise RanksError("the process groups have been ended inside the block")
        return found

    def __repr__(self) -> str:
        return f"Ranks(size={self.size}, rank={self.rank})"

    # What ranks are about to do.

    def begin(self) -> None:
        """Begin a conversation, which ends when all leave, or know that one has failed."""
        self._is_over = False

    def end(self) -> None:
        """Take note that the conversation is over on all ranks."""
        self._is_over = True

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Begin a conversation that goes on behind the block; an error in it ends it for all."""
        self.begin()
        try:
            yield
        except BaseException:
            self.fail()
            raise

    @contextmanager
    def conversation(self) -> Iterator[None]:
        """Send in the block; an error in it is told to the others, and so is its end.

        Inside another one it is a part of that.
        """
        is_part = not self._is_over
        self.begin()
        try:
            yield
        except BaseException:
            if not is_part:
                self.fail()
            raise
        self.leave()
        self._is_over = not is_part

    def step(
        self, what: str, numbers: Sequence[int] = (), advice: str = _SAME_LAYERS
    ) -> list[list[int]]:
        """Say what comes next, and some numbers; those of all ranks.

        Args:
            what: The words, which have to be the same on all ranks.
            numbers: Whole numbers, few of them.
            advice: The mend to name if the words differ.

        Raises:
            RanksError: Another rank says something else, has raised an error or has left its block.
        """
        found = self._headers(_RUNS, what, numbers)
        self._expect_alike(found, _RUNS)
        differing = [rank for rank, header in enumerate(found) if header[1] != found[0][1]]
        if differing:
            self.end()
            said = self.texts(what)
            # Names of parameters may be many: what is the same on all ranks is left out.
            letters = enumerate(zip(*said, strict=False))
            same = max(0, next((i for i, each in letters if len({*each}) > 1), 0) - 40)
            cut = [("..." if same else "") + one[same : same + 160] for one in said]
            lines = "\n".join(f"  rank {rank}: {one}" for rank, one in enumerate(cut))
            raise RanksError(
                "expected all ranks to run the same layers with the same statistics in the same "
                f"order, got different ones:\n{lines}\nWhat to do: {advice}."
            )
        return [header[2 : 2 + len(numbers)] for header in found]

    def leave(self) -> None:
        """Say that the conversation ends here.

        Raises:
            RanksError: Another rank goes on, or has raised an error.
        """
        if not self._is_over:
            self._expect_alike(self._headers(_HAS_LEFT, ""), _HAS_LEFT)
            self.end()

    def fail(self) -> None:
        """Tell the others that this rank has raised an error, and wait a little for them."""
        if self._is_over:
            return
        self.end()
        try:
            self._headers(_HAS_RAISED, "", patience=_PATIENCE)
        except RuntimeError:
            self._is_lost = True  # what it said may be taken for an answer to a later question

    def _expect_alike(self, headers: Sequence[Sequence[int]], mine: int) -> None:
        for rank, (status, *_) in enumerate(headers):
            if status == _HAS_RAISED:
                self.end()
                raise RanksError(
                    f"rank {rank} of {self.size} has raised an error, which its own message tells; "
                    "the others stop here, since their results would lack its examples"
                )
            if status != mine:
                self.end()
                behind = rank if status == _HAS_LEFT else self.rank
                raise RanksError(
                    f"rank {behind} of {self.size} has left its block, and others run a backward "
                    "pass in theirs; run the same passes on all ranks, with an empty batch where "
                    "there are no examples"
                )

    def _headers(
        self,
        status: int,
        what: str,
        numbers: Sequence[int] = (),
        patience: timedelta | None = None,
    ) -> list[list[int]]:
        if self._is_lost:
            raise RanksError(
                "a rank has raised an error before, which the others have not taken notice of; "
                "start the processes again"
            )
        values = [status, digest(what), *numbers]
        mine = torch.tensor(values + [0] * (_WIDTH - len(values)), dtype=torch.int64)
        found = mine.new_empty(self.size, _WIDTH)
        work = dist.all_gather(list(found), mine, group=self._group, async_op=True)
        assert work is not None
        work.wait() if patience is None else work.wait(patience)
        return found.tolist()

    def texts(self, text: str) -> list[str]:
        """The words of all ranks, for people."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, text, group=self._group)
        return found

    # Numbers.

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, in their order, of which each has as many as `sizes` says.

        Numbers received: those of the other ranks.
        """
        x = x.contiguous()
        found = x.new_empty(sum(sizes), *x.shape[1:])
        parts = list(found.split(list(sizes)))
        if len(set(sizes)) == 1:
            dist.all_gather(parts, x, group=self._group)
            return found
        parts[self.rank].copy_(x)
        work = [
            dist.broadcast(part, group=self._group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts)
            if part.numel()
        ]
        for one in work:
            assert one is not None
            one.wait()
        return found

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send part `r` to rank `r`, and get what each rank has sent to this one.

        Numbers received: those that the other ranks send to this one.

        Args:
            parts: One for each rank.
            shapes: Those of what comes, one for each rank.
        """
        sent = torch.cat([part.reshape(-1) for part in parts])
        counts = [torch.Size(shape).numel() for shape in shapes]
        got = sent.new_empty(sum(counts))
        own = [part.numel() for part in parts]
        dist.all_to_all_single(got, sent, counts, own, group=self._group)
        return [part.view(*shape) for part, shape in zip(got.split(counts), shapes, strict=True)]

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same on each.

        Numbers received: `2 (R - 1) / R` of the tensor's.
        """
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self._group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all ranks of each number; NaN where one has it."""
        found = self.gather(x.unsqueeze(0), [1] * self.size)
        return found.amax(0)

    def sum_slice(self, x: Tensor) -> Tensor:
        """This rank's slice of the sum of a tensor over all ranks, flat.

        Numbers received: `(R - 1) / R` of the tensor's.
        """
        if self.size == 1:
            return x.reshape(-1)
        parts = x.reshape(-1).tensor_split(self.size)
        got = self.swap(parts, [parts[self.rank].shape] * self.size)
        return torch.stack(got).sum(0)

    def from_rank(self, rank: int, x: Tensor) -> Tensor:
        """A tensor as one rank has it.

        Numbers received: those of the tensor, by all ranks but that one.
        """
        x = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, group=self._group, group_src=rank)
        return x


def digest(text: str) -> int:
    """A whole number that tells texts apart, the same in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _new_group(members: Sequence[int], backend: str, timeout: timedelta | None) -> Any:
    """A process group that its members make without the other processes.

    Torch has `new_group(use_local_synchronization=True)` for that, which names it by how many
    groups this process is in. Ranks may differ in this, and then wait under different names.
    """
    from torch.distributed import distributed_c10d  # some builds of torch are without it

    kind: Any = dist.Backend(backend)
    made, _ = distributed_c10d._new_process_group_helper(
        len(members),
        members.index(dist.get_rank()),
        list(members),
        kind,
        distributed_c10d._world.pg_map[dist.group.WORLD][1],  # pyright: ignore
        f"pycoherence_{digest(repr(members))}",  # pyright: ignore[reportArgumentType]
        timeout=distributed_c10d._get_default_timeout(kind) if timeout is None else timeout,
    )
    distributed_c10d._world.pg_group_ranks[made] = {rank: i for i, rank in enumerate(members)}
    return made


def check_group(group: Any) -> Group | None:
    """The value, if `ranks_of` can take it.

    Raises:
        TypeError: It is neither a process group, a mesh nor `None`.
    """
    if group is not None:
        _members(group)
    return group


def ranks_of(group: Group | None) -> Ranks | None:
    """The ranks of a group; none if it is `None`.

    The processes of the group call it together when it sees a group for the first time.

    Raises:
        TypeError: It is neither a process group nor a mesh.
        RuntimeError: There are no process groups, or this process is not in it.
    """
    if check_group(group) is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group= needs torch.distributed; call torch.distributed.init_process_group() first, or "
            "leave group out in a single process"
        )
    members = _members(group)
    if dist.get_rank() not in members:
        raise RuntimeError(
            f"expected a group with this process, of rank {dist.get_rank()}, in it, got one of "
            f"ranks {members}"
        )
    world: Any = dist.group.WORLD
    key = tuple(sorted(members))
    known = _known.get(key)
    if known is None or known[0]() is not world:
        _known[key] = known = weakref.ref(world), Ranks(members, _timeout(group))
    return known[1]


_known: "dict[tuple[int, ...], tuple[weakref.ref[Any], Ranks]]" = {}
"""By members, the world to which they belonged, and what was made for them."""


def _members(group: Group) -> list[int]:
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return dist.get_process_group_ranks(group)
    if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(
            "this process is not in the group that group= has got; open the block on its members "
            "alone"
        )
    # A mesh is told by its attribute: to import its class takes a while.
    mesh = getattr(group, "mesh", None)
    if isinstance(mesh, Tensor):
        return mesh.flatten().tolist()
    raise TypeError(
        "expected group to be a torch.distributed.ProcessGroup, a DeviceMesh or None, got "
        f"{group!r}"
    )


def _timeout(group: Group) -> timedelta | None:
    """The timeout of a group, which torch does not tell; its default if it cannot be found."""
    known: Any = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
    for device in ("cpu", "cuda"):
        try:
            return known._get_backend(torch.device(device)).options._timeout
        except (AttributeError, RuntimeError):
            continue
    return None
