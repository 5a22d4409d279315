"""Compiles the Triton kernels that calls of the ops would run on GPUs which are not here.

    python tests/aot.py [--ops OP ...] [--targets 90 ...] [--out FILE]

A driver that knows a GPU and has none takes Triton's place for it, and the code of each op runs on
tensors of the device "meta" with every launch compiled instead: the same tiles, options and
specialised arguments as in a user's call. Code that looked at a number of a tensor, and so would
wait for the GPU, fails.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.aot_calls import KINDS, TOGETHER, calls

import pycoherence as pc
from pycoherence.ops.core.dispatch import kernel_of, unavailable
from pycoherence.triton_kernels.launch.together import together


class Target(NamedTuple):
    """A GPU.

    Attributes:
        processors: Number of streaming multiprocessors.
        shared: Bytes of shared memory that a program may have.
        product: The instruction that multiplies matrices at full speed, in PTX.
    """

    processors: int
    shared: int
    product: str


TARGETS = {
    80: Target(108, 163 * 1024, "mma.sync"),
    90: Target(132, 227 * 1024, "wgmma.mma_async"),
    100: Target(148, 227 * 1024, "tcgen05.mma"),
}
"""By compute capability: A100, H100, B200."""

REGISTERS = 65536
"""A processor has so many; a program has to find room."""

SPARE = 32
"""Bytes of stack that ptxas takes outside of loops to fit one program more on a processor."""

OUTSIDE = 128
"""Bytes of stack that more programs or a larger tile are worth if steps hardly touch them."""

FEW = 8
"""Instructions of a step that may."""

FULL = 254
"""Registers of a thread from which on it has no choice: what is on the stack then is spilled."""

Row = dict[str, Any]


class Driver:
    """A driver of a GPU that is not here, for what Triton asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiled(capability: int, tf32: bool) -> Iterator[list[tuple[str, Any]]]:
    """Launches inside are compiled for a GPU, and listed with the name of the kernel."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from pycoherence.triton_kernels.launch import device

    found, launch, gpu = list[tuple[str, Any]](), JITFunction.run, device.HOPPER

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = launch(self, *args, **{**options, "warmup": True})
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    device.HOPPER = device.Device(capability, TARGETS[capability].processors)
    try:
        with precise(tf32):
            yield found
    finally:
        JITFunction.run, device.HOPPER = launch, gpu


@contextmanager
def precise(tf32: bool) -> Iterator[None]:
    """Products of float32 are taken of TensorFloat-32, or of all digits."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def function_of(op: str) -> Any:
    """The op, or several `together`, from Triton kernels."""
    if op == TOGETHER:
        return together
    return kernel_of(op, "triton", pc.ops.specs[op].helper)


def compile_op(op: str, kind: str, capability: int) -> list[Row]:
    """A row for each kernel that the calls of an op need."""
    function = function_of(op)
    rows, known = [], set[str]()
    for label, args in calls(op, kind, capability):
        with compiled(capability, kind == "tf32") as launches:
            function(*args)
        for name, kernel in launches:
            if kernel.hash not in known:
                known.add(kernel.hash)
                what = {"op": op, "kind": kind, "capability": capability, "call": label}
                rows.append(what | {"kernel": name} | inspect(kernel))
    return rows


def inspect(kernel: Any) -> Row:
    """The means that a compiled kernel takes, and its products."""
    dots = re.findall(r"tt\.dot .*: tensor<(\w+)> \* tensor<(\w+)>", kernel.asm["ttir"])
    names = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", kernel.asm["ptx"])
    used, groups = _usage(kernel.asm["cubin"]), "wgmma.mma_async" in names
    return {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        **used,
        # It takes long to print instructions.
        "steps": steps_of(_dump(kernel.asm["cubin"], "-sass")) if groups or used["stack"] else [],
        "shared": kernel.metadata.shared,
        "dots": sorted({" * ".join(dot) for dot in dots}),
        "instructions": {name: names.count(name) for name in sorted(set(names))},
        "waits": waits(kernel.asm["ttgir"]),
    }


def waits(ttgir: str) -> list[int]:
    """By loop with asynchronous copies, how many may be on their way when a step goes on.

    Zero means that each step waits for its own: the loop is not pipelined.
    """
    found: list[int] = []
    blocks: list[tuple[bool, list[str]]] = []
    for line in map(str.strip, ttgir.splitlines()):
        closes = line.startswith("}")
        if closes and blocks:
            is_loop, body = blocks.pop()
            numbers = [int(n) for s in body for n in re.findall(r"ttg.async_wait .*num = (\d+)", s)]
            if is_loop and any("async_copy_global_to_local" in s for s in body) and numbers:
                found.append(max(numbers))
            elif not is_loop and blocks:
                blocks[-1][1].extend(body)
        if line.endswith("{"):
            blocks.append(("scf.for" in line, []))
        elif blocks and not closes:
            blocks[-1][1].append(line)
    return found


def steps_of(sass: str) -> list[dict[str, Any]]:
    """The steps of all innermost loops of products, in instructions.

    They are counted, and those that touch the stack. Products of a warp group are serialised if it
    waits for each of them.

    A step goes past what is left out by a branch that stays within the loop, such as the end of an
    example.
    """
    code = [
        (int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)
    ]
    targets = {at: int(m[1], 16) for at, text in code if (m := _BRANCH.search(text))}
    products = [at for at, text in code if _PRODUCT.search(text)]
    loops = {
        (to, at)
        for at, to in targets.items()
        if to < at and any(to <= product < at for product in products)
    }
    # Code that waits lies behind all loops, and jumps back into one.
    loops = {
        (first, last)
        for first, last in loops
        if not any(to < first <= at < last for to, at in loops)
    }
    inner = [
        (first, last)
        for first, last in sorted(loops)
        if not any((to, at) != (first, last) and first <= to and at <= last for to, at in loops)
    ]
    return [_step(code, targets, *loop) for loop in inner]


def _step(
    code: list[tuple[int, str]], targets: dict[int, int], first: int, last: int
) -> dict[str, Any]:
    step, skip = list[str](), first
    for at, text in code:
        if skip <= at <= last:
            step.append(text)
            taken = at < targets.get(at, at) <= last
            if taken and (text.startswith("@") or "UP" in text):
                skip = targets[at]
    groups = [text for text in step if "HGMMA" in text]
    return {
        "instructions": len(step),
        "spills": sum(bool(_LOCAL.search(text)) for text in step),
        "serialised": len(groups) > 1 and all("gsb0" in text for text in groups),
    }


_BRANCH = re.compile(r"\bBRA(?:\.U)? (?:!?UP\d, )?0x([0-9a-f]+)")
_PRODUCT = re.compile(r"\b(UTC)?[HDQI]G?MMA\b")
_LOCAL = re.compile(r"\b(LDL|STL)\b")


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dump(cubin, "--dump-resource-usage")))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def _dump(cubin: bytes, what: str) -> str:
    """Run the tool that comes with Triton on a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(row: Row) -> list[str]:
    """Why a kernel must not be as it is."""
    target, found = TARGETS[row["capability"]], []
    steps = row["steps"]
    chosen = row["registers"] < FULL
    outside = steps and chosen and all(step["spills"] <= FEW for step in steps)
    spare = OUTSIDE if outside else SPARE if chosen else 0
    if row["stack"] > spare:
        found.append(f"spills {row['stack']} bytes")
    if any(step["serialised"] for step in steps):
        found.append("each product waits for the one before")
    if row["registers"] * row["warps"] * 32 > REGISTERS:
        found.append(f"{row['registers']} registers in {row['warps']} warps")
    if row["shared"] > target.shared:
        found.append(f"{row['shared']} bytes of shared memory, {target.shared} are there")
    if row["stages"] > 2 and 0 in row["waits"]:
        found.append("a loop waits for the loads of its own step")
    # All digits of float32, and float64 in some versions of Triton, take ordinary cores.
    dots = [dot for dot in row["dots"] if not dot.endswith("f64")]
    if dots and row["kind"] != "float32":
        large = row["warps"] >= 4 and any(_rows(dot) >= 64 for dot in dots)
        half = row["kind"] in ("bfloat16", "float16")
        needed = target.product if large and half else "mma"
        if not any(needed in name for name in row["instructions"]):
            found.append(f"no {needed}")
    return found


def _rows(dot: str) -> int:
    return int(dot.partition("x")[0])


def written() -> list[str]:
    """The ops that have a Triton kernel, and several of them together."""
    ops = [op for op in pc.ops.specs if unavailable(op, "triton", "cuda") is None]
    return [*ops, TOGETHER]


def jobs(ops: Iterable[str], targets: Iterable[int]) -> list[tuple[str, str, int]]:
    """The jobs, each of one process."""
    return [(op, kind, capability) for op in ops for kind in KINDS for capability in targets]


def _run(job: tuple[str, str, int]) -> list[Row]:
    return compile_op(*job)


def table(rows: Iterable[Row]) -> str:
    """For people."""
    lines = []
    for row in rows:
        used = " ".join(f"{name}:{count}" for name, count in row["instructions"].items())
        lines.append(
            f"sm_{row['capability']:<4}{row['op']:<14} {row['kind']:<8} {row['kernel']:<20}"
            f"{row['warps']:>3} warps {row['registers']:>4} registers {row['stack']:>5} stack "
            f"{row['shared']:>7} shared  {used}  {row['call']}  {'; '.join(problems(row))}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for found in pool.map(_run, jobs(options.ops or written(), options.targets)):
            print(table(found), end="\n" if found else "", flush=True)
            rows += found
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
