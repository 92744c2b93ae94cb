"""The C++ engine, for normalization and for recurrent networks; the rest of the packaging is in pyproject.toml.

It is optional: without a compiler the installation succeeds, and training runs on the PyTorch engine.
"""

import glob
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

SOURCE = "src/streamnorm/csrc"


def extension(name: str, folder: str, flags: list[str]) -> Extension:
    return Extension(
        f"streamnorm.ops.{name}",
        sources=[f"{SOURCE}/{folder}/module.cpp"],
        depends=[*glob.glob(f"{SOURCE}/common/*.h"), *glob.glob(f"{SOURCE}/{folder}/*.h")],
        include_dirs=[SOURCE],
        extra_compile_args=flags,
        language="c++",
        optional=True,
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension("_native", "norm", FLAGS),
        # Its matrix products and exponentials want the fused multiply-add.
        extension("_recurrent", "recurrent", [flag.replace("contract=off", "contract=fast") for flag in FLAGS]),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": True}},
)
