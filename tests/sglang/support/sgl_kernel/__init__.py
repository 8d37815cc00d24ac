"""Names of SGLang's CUDA kernels: importing one works, calling one says that there is none."""

from __future__ import annotations

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    kernel.__name__ = name
    return kernel
