"""Compile what the Triton engine would launch, for a Hopper GPU that need not be there; prints a line per kernel.

Run by ``test_triton.py`` in a process of its own, since Triton's interpreter and compiler exclude each other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import gpu

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
done: set[tuple[Any, ...]] = set()


def compile_instead(
    name: str, grid: tuple[int, ...], cut: gpu.Cut | None, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """In the place of ``gpu._launch``: specialize the arguments as Triton does, and compile."""
    kernel = getattr(gpu._kernels(), name)
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (key, value) in enumerate(zip(kernel.arg_names, arguments)):
        if value is None or (not isinstance(value, Tensor) and value == 1):
            signature[key], constexprs[i,] = "constexpr", value
        else:
            signature[key] = NAMES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    for i, key in enumerate(kernel.arg_names):
        if i >= len(arguments):
            signature[key], constexprs[i,] = "constexpr", constants[key]
    known = (name, tuple(signature.items()), str(constexprs), str(attributes))
    if known in done:
        return
    done.add(known)
    warps = 4 if cut is None else cut.warps
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    check_order(name, compiled.asm["ptx"])
    loads = sorted(set(re.findall(r"ld\.global\.(?:v\d\.)?b\d+", compiled.asm["ptx"])))
    print(name, f"warps {warps}, shared {compiled.metadata.shared}", *loads)


def check_order(name: str, ptx: str) -> None:
    """All warps must have read a stream before one of them writes it, which the interpreter cannot see.

    Counts are the only integers of 64 bits that a kernel for float32 writes, and with the samples the only ones it
    reads; in ``commit_streams`` the samples are read first of all and written last.
    """
    loads = [match.start() for match in re.finditer(r"ld\.global(\.v\d)?\.b64", ptx)]
    stores = [match.start() for match in re.finditer(r"st\.global(\.v\d)?\.b64", ptx)]
    if not stores or (".f64" in ptx and name != "commit_streams"):
        return
    write = stores[-1] if name == "commit_streams" else stores[0]
    read = stores[-2] if name == "commit_streams" else max(at for at in loads if at < write)
    assert "bar.sync" in ptx[read:write], f"{name} writes a stream that a slow warp may still read"


def step(layer: sn.Norm, x: Tensor) -> None:
    """Forward, backward, commit."""
    x = x.requires_grad_()
    y = layer(x)
    y.backward(torch.empty_like(y))
    sn.commit(layer)


def main() -> None:
    """Each way, layout and dtype at least once."""
    gpu.INTERPRETED = True  # this engine takes CPU tensors; nothing is interpreted, since nothing is launched
    gpu._missing = lambda: None  # type: ignore[assignment]
    gpu._processors = lambda device: 132  # type: ignore[assignment]
    gpu._launch = compile_instead
    last = torch.channels_last
    past: dict[str, Any] = {"alpha": (1, 0, 0), "beta": (1, 0, 0)}
    with ops.force("triton"):
        step(sn.StreamingNorm2d(64), torch.empty(48, 64, 28, 28))
        step(sn.StreamingNorm2d(64, p=2), torch.empty(48, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=last))
        step(sn.StreamingNorm2d(64, **past), torch.empty(48, 64, 28, 28, dtype=torch.float16))
        step(sn.StreamingNorm2d(256, p=1.2, center="zero"), torch.empty(16, 256, 14, 14))
        step(sn.StreamingNorm1d(256, affine=False), torch.empty(1, 256))
        step(sn.StreamingNorm2d(8, ref="layer", dtype=torch.float64), torch.empty(2, 8, 7, 7, dtype=torch.float64))


if __name__ == "__main__":
    main()
