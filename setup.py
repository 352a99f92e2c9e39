"""Build the extensions from csrc/: sedetect._C in C++, and sedetect._cuda for Hopper GPUs where nvcc is found.

pip install --no-build-isolation .

sedetect._C is built with pybind11 and ninja against the torch that is installed. sedetect._cuda needs nvcc (that of
CUDA_HOME, on PATH, or in /usr/local/cuda) but neither a GPU nor torch built with CUDA. It is left out where
TORCH_CUDA_ARCH_LIST is set and does not name 9.0.

Where there is no C++ compiler (that of CXX, or the one Python was built with), no torch or no pybind11, both are left
out. That gives a pure-Python wheel, in which the torch and Triton backends serve.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup


def lacking() -> list[str]:
    """What an extension cannot be built without and is not there."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    modules = [name for name in ("torch", "pybind11") if find_spec(name) is None]
    return modules if shutil.which(compiler) else [f"a C++ compiler ({compiler})", *modules]


LACKING = lacking()
if LACKING:
    from setuptools.command.build_ext import build_ext as BuildExtension
else:
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

CUDA = Path("csrc/cuda")
OLDEST = (12, 5)  # CUDA with what tensor_map.h asks the runtime for
HOPPER = {"9.0", "9.0a", "Hopper"}


@cache
def find_nvcc() -> str | None:
    """The CUDA compiler; None where there is none, or where the architectures asked for leave Hopper out."""
    wanted = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if any(wanted) and not HOPPER & {name.removesuffix("+PTX") for name in wanted}:
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [shutil.which("nvcc", path=f"{home}/bin")] if home else [shutil.which("nvcc")]
    nvcc = next(filter(None, [*candidates, shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)
    if nvcc is None:
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    assert found is not None, version
    release = tuple(map(int, found.groups()))
    if release < OLDEST:
        print(f"{nvcc} is of CUDA {release[0]}.{release[1]}: sedetect._cuda needs 12.5 and is left out; set CUDA_HOME")
        return None
    return nvcc


class Build(BuildExtension):
    """torch's build for sedetect._C, and nvcc alone for sedetect._cuda: torch's refuses where it has no CUDA itself."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "sedetect._cuda":
            self.build_cuda(Path(self.get_ext_fullpath(ext.name)))
        else:
            super().build_extension(ext)

    def build_cuda(self, target: Path) -> None:
        nvcc, objects = find_nvcc(), Path(self.build_temp, "cuda")
        assert nvcc is not None  # there is no such extension without it
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        flags = ["-O3", "-std=c++17", "-lineinfo", "-gencode=arch=compute_90a,code=sm_90a"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
        included = (*CUDA.parent.glob("*.h"), *CUDA.glob("*.h"), *CUDA.glob("*.cuh"))
        headers = max(path.stat().st_mtime for path in (*included, Path("setup.py")))

        def compile(source: Path) -> str:
            made = objects / f"{source.stem}.o"
            if not made.exists() or made.stat().st_mtime < max(headers, source.stat().st_mtime):
                subprocess.run([nvcc, *flags, *includes, "-c", source, "-o", made], check=True)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile, sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])))
        # The runtime is linked in: it shares the device's primary context with the one that torch has loaded.
        subprocess.run([nvcc, "-shared", "-cudart=static", *made, "-o", target], check=True)


extensions = []
if LACKING:
    print(f"sedetect._C and sedetect._cuda are left out, for want of {' and '.join(LACKING)}: torch and Triton serve")
else:
    extensions.append(
        CppExtension(
            "sedetect._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            # -fopenmp when compiling only: the OpenMP runtime is the one torch has loaded, never a second one beside
            # it. -ffp-contract=off keeps the float32 sums of a row the same on every instruction set.
            extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-Wall"],
        )
    )
    if find_nvcc() is not None:
        extensions.append(Extension("sedetect._cuda", ["csrc/cuda/bindings.cpp"]))

setup(
    # find_packages passes over sedetect/kernels, a symlink to a folder without __init__.py.
    packages=[*find_packages(include=["sedetect", "sedetect.*"]), "sedetect.kernels"],
    package_data={"": ["py.typed", "*.pyi", "corpus/*", "template/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
