"""Build the C kernels; if that fails, the package installs with the reason and uses its reference path.

Everything else about the package is in pyproject.toml.
"""

import glob
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
C = "src/gradcentral/kernels/c"


class PlatformWheel(bdist_wheel):
    """Tag the wheel for the platform alone: the library is called through ctypes and uses no Python headers."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


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
            # One thread: /openmp would bring Microsoft's runtime into a process that has torch's, which is Intel's.
            attempts, base = [[]], ["/O2"]
        else:
            # The search path of the Python that builds the library would point into another machine's folders.
            self.compiler.linker_so = [flag for flag in self.compiler.linker_so if "-rpath" not in flag]
            # Vectorized square roots need -fno-math-errno. -ffast-math is not used: NaN and Inf must stay in their row.
            base = ["-O2", "-g0", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden"]
        reason = Path(self.get_ext_fullpath(ext.name)).with_name("not_built.txt")
        reason.unlink(missing_ok=True)
        for position, flags in enumerate(attempts):
            # The linker does not get the OpenMP flag: the library takes the functions of the runtime that torch has
            # loaded. A second runtime in the process would start threads of its own, which compete with torch's.
            ext.extra_compile_args = base + flags
            try:
                super().build_extension(ext)
                self.check_runtime(ext)
                return
            except Exception:
                if position == len(attempts) - 1:
                    reason.parent.mkdir(parents=True, exist_ok=True)
                    reason.write_text(self.reason(), encoding="utf-8")  # for kernels/native.py
                    raise

    def check_runtime(self, ext: Extension) -> None:
        """Refuse a library that needs clang's OpenMP runtime on Linux, where torch has GCC's."""
        library = Path(self.get_ext_fullpath(ext.name))
        if sys.platform == "linux" and b"__kmpc_" in library.read_bytes():
            library.unlink()  # otherwise the next attempt would find it newer than its sources, and keep it
            raise CompileError("compiled for another OpenMP runtime than torch's")

    def reason(self) -> str:
        """Return why the compilation failed, as the end of a sentence."""
        program = (getattr(self.compiler, "compiler", None) or [getattr(self.compiler, "cc", "cl")])[0]
        if shutil.which(program) is None:
            return f"no C compiler was found ({program})"
        return f"the C compiler {program} failed (pip install -v shows its messages)"


def readme() -> str:
    """Return README.md with absolute links, because a package index shows the page without the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert repository is not None
    text = re.sub(r"(!\[[^]]*\])\((?!https?:)([^)#]+)\)", rf"\1({repository[1]}/raw/main/\2)", text)
    return re.sub(r"(?<!!)(\[[^]]*\])\((?!https?:|#)([^)]+)\)", rf"\1({repository[1]}/blob/main/\2)", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildNative},
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
