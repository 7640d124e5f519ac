"""Packaging. Four trees make one package: lsys, with kernels as lsys.kernels, parallel as lsys.parallel, and so on.

In the source tree links (lsys/kernels -> ../kernels) show every tool that one package; what is installed comes from the trees themselves,
so that no bare `kernels` can be imported.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

TREES = {"lsys.kernels": "kernels", "lsys.parallel": "parallel", "lsys.launch": "launch"}


def packages() -> list[str]:
    linked = [name.removeprefix("lsys.") for name in TREES]
    found = [
        "lsys",
        *(f"lsys.{name}" for name in find_packages("lsys", exclude=[*linked, *(f"{name}.*" for name in linked)])),
    ]
    for package, folder in TREES.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


setup(
    name="lsys",
    version=re.search(r'__version__ = "(.+)"', Path("lsys/__init__.py").read_text())[1],
    description="Pretraining of language models on very long, very uneven sequences, over Megatron-core",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=packages(),
    package_dir=TREES,
    package_data={"lsys.launch": ["*.sh"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        "matplotlib",
        "megatron-core==0.16.1",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
        "tokenizers",
        "tyro",
    ],
    extras_require={
        "data": ["pyarrow"],
        "trace": ["HolisticTraceAnalysis>=0.5", "pandas<3"],  # it breaks with pandas 3
        "triton": ["triton>=3.6; platform_system == 'Linux'"],
        "dev": [
            "hypothesis",
            "import-linter",
            "mypy",
            "pip>=23.3",  # its dry runs fetch no wheels
            "pyarrow",
            "pytest",
            "ruff",
            "triton>=3.6; platform_system == 'Linux'",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["lsys = lsys.__main__:main"]},
)
