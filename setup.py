"""Build sedetect._C from csrc/ with pybind11 and ninja, against the torch that is installed.

pip install --no-build-isolation .
"""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

extension = CppExtension(
    "sedetect._C",
    sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    # -fopenmp when compiling only: the OpenMP runtime is the one torch has loaded, never a second one beside it.
    # -ffp-contract=off keeps the float32 sums of a row the same on every instruction set.
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-Wall"],
)

setup(
    # Listed by hand: sedetect/kernels is a symlink, which find_packages would walk twice or not at all.
    packages=["sedetect", "sedetect.cli", "sedetect.kernels", "sedetect.report"],
    package_data={"sedetect": ["corpus/*"], "sedetect.report": ["template/*"]},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
