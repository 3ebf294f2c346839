"""Build the C kernels; if that fails, the package installs with the reason and uses its reference path."""

import glob
import os
import platform
import shutil
import sys
from pathlib import Path

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
        reason = Path(self.get_ext_fullpath(ext.name)).with_name("not_built.txt")
        reason.unlink(missing_ok=True)
        for position, flags in enumerate(attempts):
            ext.extra_compile_args = base + flags
            ext.extra_link_args = [flag for flag in flags if flag == openmp]
            try:
                super().build_extension(ext)
                return
            except Exception:
                if position == len(attempts) - 1:
                    reason.parent.mkdir(parents=True, exist_ok=True)
                    reason.write_text(self.reason(), encoding="utf-8")  # for kernels/native.py
                    raise

    def reason(self) -> str:
        """Return why the compilation failed, as the end of a sentence."""
        program = (getattr(self.compiler, "compiler", None) or [getattr(self.compiler, "cc", "cl")])[0]
        if shutil.which(program) is None:
            return f"no C compiler was found ({program})"
        return f"the C compiler {program} failed (pip install -v shows its messages)"


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
