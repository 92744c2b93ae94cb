"""The C++ engine, for normalization and for recurrent networks; the rest of the packaging is in pyproject.toml.

It is optional: without a compiler the installation succeeds, and training runs on the PyTorch engine.
"""

import sys

from setuptools import Extension, setup

# No fused multiply-add: results are the same on every instruction set.
FLAGS = (
    []
    if sys.platform == "win32"
    else [
        "-std=c++17",
        "-O2",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # GCC says so of its own header for AVX-512
    ]
)

native = Extension(
    "streamnorm.ops._native",
    sources=["src/streamnorm/ops/native.cpp"],
    depends=[f"src/streamnorm/ops/{name}.h" for name in ("native_kernels", "dlpack", "kept_memory", "threads")],
    extra_compile_args=FLAGS,
    language="c++",
    optional=True,
    py_limited_api=True,
)

# Its matrix products and exponentials want the fused multiply-add.
recurrent = Extension(
    "streamnorm.ops._recurrent",
    sources=["src/streamnorm/ops/recurrent.cpp"],
    depends=["src/streamnorm/ops/recurrent_kernels.h", "src/streamnorm/ops/threads.h"],
    extra_compile_args=[flag.replace("contract=off", "contract=fast") for flag in FLAGS],
    language="c++",
    optional=True,
    py_limited_api=True,
)

setup(
    ext_modules=[native, recurrent],
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": True}},
)
