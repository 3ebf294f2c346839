"""Build the C kernels if a compiler is found; without one, the package installs and uses its reference path."""

import glob
import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

C = "src/gradcentral/kernels/c"


class BuildNative(build_ext):
    """Build a plain shared library: one file for all Python and torch versions, with the best flags that compile."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)

    def build_extension(self, ext: Extension) -> None:
        openmp, clones = "-fopenmp", "-DGRADCENTRAL_CLONES"
        # From the best flags to those any compiler accepts: threads and one copy of the kernels per generation of
        # x86-64, then threads alone, then neither.
        attempts = [[openmp, clones], [openmp], ["-fopenmp-simd"], []]
        if platform.machine().lower() not in ("x86_64", "amd64"):
            attempts.remove([openmp, clones])
        if self.compiler.compiler_type == "msvc":
            attempts, base = [["/openmp"], []], ["/O2"]
        else:
            # Vectorized square roots need -fno-math-errno. -ffast-math is not used: NaN and Inf must stay in their row.
            base = ["-O2", "-g0", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden"]
        ext.extra_compile_args, ext.extra_link_args = [], []
        for position, flags in enumerate(attempts):
            ext.extra_compile_args = base + flags
            ext.extra_link_args = [flag for flag in flags if flag == openmp]
            try:
                super().build_extension(ext)
                return
            except Exception:
                if position == len(attempts) - 1:
                    raise


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "gradcentral.kernels._native",
            [f"{C}/gradcentral.c"],
            depends=sorted(glob.glob(f"{C}/*.h")),
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,
        )
    ],
)
