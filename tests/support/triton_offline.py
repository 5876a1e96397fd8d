"""Compile the Triton kernels for a Hopper GPU on a machine without one, exactly as the host code would launch them.

The host code runs on CPU tensors with its launch replaced, so tile sizes, flags and types are the shipped ones. The
bundled assembler then says how much shared memory and how many registers a program takes, and its listing shows the
instructions of the innermost loop.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headwater.kernels.backends.triton import launch
from headwater.kernels.backends.triton.tile_sizes import Config

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """`shared` bytes, `registers` per thread; of the loops with tensor-core instructions: spilled loads and stores.

    `narrow` counts the products of a stride or length with an index that are made in 32 bits.
    """

    shared: int
    registers: int
    stack: int
    wgmma: int
    narrow: int
    loops: int
    spills_in_loops: int


def captured(monkeypatch: Any, call: Callable[[], object]) -> list[tuple[Any, dict[str, Any], Config]]:
    """The launches that `call` would make on a GPU: kernel, arguments by name, tile configuration."""
    launches = []
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(
        launch, "launch", lambda kernel, _, args, chosen, q: launches.append((kernel, args, chosen))
    )
    call()
    return launches


def compiled(kernel: Any, args: dict[str, Any], chosen: Config) -> Compiled:
    """Compile one launch for compute capability 9.0."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, args[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned = True
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": chosen.warps, "num_stages": chosen.stages, "enable_fp_fusion": True},
    )
    return _examine(result)


def _examine(result: Any) -> Compiled:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        listing = _tool("nvdisasm", "-c", cubin)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    loops = [body for body in _loops(listing.splitlines()) if any("MMA" in line for line in body)]
    return Compiled(
        shared=result.metadata.shared,
        registers=registers,
        stack=stack,
        wgmma=result.asm["ptx"].count("wgmma.mma_async"),
        narrow=_narrow(result.asm["ttir"]),
        loops=len(loops),
        spills_in_loops=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for body in loops for line in body),
    )


def _narrow(ttir: str) -> int:
    """32-bit products whose one factor is a stride or a length, and whose other is no constant: they could overflow."""
    large = r"%\w+_(?:batch|head|row|column)|%queries|%keys|%plane"
    names = set(re.findall(rf"({large})(?=[ ,:)])", ttir))
    names |= {m[1] for m in re.finditer(rf"(%\S+) = tt.splat ({large}) : i32", ttir)}
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<[\dx]*x)?i32", ttir)
    return sum(any(x in names for x in pair) and not any("%c" in x for x in pair) for pair in products)


def _loops(lines: list[str]) -> list[list[str]]:
    """The lines between a label and a branch back to it, for the innermost such pairs."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*?`\((\.L\w+)\)", line)
        if found and labels.get(found[1], i) < i:
            spans.append((labels[found[1]], i))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return [lines[a : b + 1] for a, b in inner]


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run(
        [str(TOOLS / name), *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
