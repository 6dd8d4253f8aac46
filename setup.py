"""The one thing pyproject.toml cannot say: a C library that an installation goes without where nothing compiles it."""

from setuptools import Extension, setup

# not a module of Python's: portllm/algebra/kernel.py opens it by ctypes, and numpy computes where there is none
setup(
    ext_modules=[
        Extension(
            "portllm.algebra._sums",
            sources=["portllm/algebra/_sums.c"],
            depends=["portllm/algebra/_sums_tile.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wno-psabi"],
            optional=True,
        )
    ]
)
