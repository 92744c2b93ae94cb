"""Compile what the Triton engine would launch, for a Hopper GPU that need not be there; prints a line per kernel.

Run by ``test_triton.py`` in a process of its own, since Triton's interpreter and compiler exclude each other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops.gpu import device, kernels
from streamnorm.recurrent.engines import gpu as recurrent_gpu

done: set[str] = set()


class Hopper:
    """In the place of Triton's driver: a GPU for which it compiles and on which nothing runs."""

    def get_current_target(self) -> GPUTarget:
        """What it is."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Never used."""
        return 0


def compile_layer_kernel(
    name: str, grid: tuple[int, ...], warps: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """In the place of ``device.launch``."""
    compile_instead(getattr(kernels, name), grid, arguments, constants, warps)


def compile_recurrent_kernel(
    name: str, cut: recurrent_gpu.Cut, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """In the place of ``recurrent.engines.gpu._launch``."""
    kernel = getattr(recurrent_gpu._kernels(), name)
    compile_instead(kernel, (cut.programs,), arguments, constants, cut.warps)


def compile_instead(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """Do what a launch does, up to the launch itself."""
    compiled = kernel.warmup(*arguments, **constants, grid=grid, num_warps=warps)
    if compiled.hash in done:
        return
    done.add(compiled.hash)
    name, ptx = kernel.__name__, compiled.asm["ptx"]
    check_order(name, ptx)
    check_rounding(name, ptx)
    check_registers(name, compiled.asm["cubin"])
    loads = sorted(set(re.findall(r"ld\.global\.(?:v\d\.)?b\d+", ptx)))
    print(name, f"warps {warps}, shared {compiled.metadata.shared}", *loads)


def check_order(name: str, ptx: str) -> None:
    """All warps must have read a stream before one of them writes it, which the interpreter cannot see.

    Counts are the only integers of 64 bits that a kernel for float32 writes, and with the samples the only ones it
    reads; in ``commit_streams`` the samples, and those seen, are read first of all and written last.
    """
    loads = [match.start() for match in re.finditer(r"ld\.global(\.v\d)?\.b64", ptx)]
    stores = [match.start() for match in re.finditer(r"st\.global(\.v\d)?\.b64", ptx)]
    if ".f64" in ptx and name != "commit_streams":
        return
    for write in stores[-2:] if name == "commit_streams" else stores:
        read = stores[-3] if name == "commit_streams" else max(at for at in loads if at < write)
        assert "bar.sync" in ptx[read:write], f"{name} writes a stream that a slow warp may still read"
    if name == "forward_step":  # the last counts are followed by the statistics, and these by the gates that read them
        read = ptx.index("ld.global", stores[-1])
        write = ptx.rindex("st.global", 0, read)
        assert write > stores[-1], f"{name} leaves no statistics"
        assert "bar.sync" in ptx[write:read], f"{name} reads statistics that a slow warp may still write"


def check_rounding(name: str, ptx: str) -> None:
    """Statistics come from divisions that round correctly, as the interpreter's do, whatever ``/`` compiles to.

    The first average since a weight update is the value itself only if a number divided by itself is 1.
    """
    if name in ("forward_whole", "combine_statistics", "backward_whole", "combine_gradients") and ".f64" not in ptx:
        assert "div.rn.f32" in ptx, f"{name} advances a stream by rough quotients"
    assert "sqrt.approx" not in ptx, f"{name} takes a rough root"


def check_registers(name: str, binary: bytes) -> None:
    """What a thread works on fits into its registers: else it would go through memory again and again."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert int(stack) <= 32, f"{name} spills registers: {usage}"


def step(layer: Any, x: Tensor) -> None:
    """Forward, backward, commit."""
    x = x.requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.empty_like(y))
    sn.commit(layer)


def main() -> None:
    """Each way, layout and dtype at least once, and each network."""
    device.INTERPRETED = True  # this engine takes CPU tensors; nothing is interpreted, since nothing is launched
    device.missing = lambda: None  # type: ignore[assignment]
    device.processors = lambda device: 132  # type: ignore[assignment]
    device.launch = compile_layer_kernel
    recurrent_gpu._launch = compile_recurrent_kernel
    triton.runtime.driver.set_active(Hopper())
    last = torch.channels_last
    past: dict[str, Any] = {"alpha": (1, 0, 0), "beta": (1, 0, 0)}
    with ops.force("triton"):
        step(sn.StreamingNorm2d(64), torch.empty(48, 64, 28, 28))
        step(sn.StreamingNorm2d(64, p=2), torch.empty(48, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=last))
        step(sn.StreamingNorm2d(64, **past), torch.empty(48, 64, 28, 28, dtype=torch.float16))
        step(sn.StreamingNorm2d(256, p=1.2, center="zero"), torch.empty(16, 256, 14, 14))
        step(sn.StreamingNorm1d(256, affine=False), torch.empty(1, 256))
        # Channels of several tiles, which take all warps that a program may have.
        step(sn.StreamingNorm2d(128, dtype=torch.float64), torch.empty(32, 128, 28, 28, dtype=torch.float64))
        step(sn.StreamingNorm1d(512), torch.empty(2000, 512))
        step(sn.StreamingNorm2d(8, ref="layer", dtype=torch.float64), torch.empty(2, 8, 7, 7, dtype=torch.float64))
        step(sn.GRU(64, 128), torch.empty(2, 32, 64))
        step(sn.LSTM(64, 37, p=2, window=100), torch.empty(2, 150, 64))
        step(sn.RNN(64, 128, p=1.5, center="zero", dtype=torch.float64), torch.empty(2, 1, 64, dtype=torch.float64))
        step(sn.RNN(64, 128, nonlinearity="relu"), torch.empty(1, 1, 64))


if __name__ == "__main__":
    main()
