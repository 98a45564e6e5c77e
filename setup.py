"""Packaging: `engine/` is imported as `mam2.engine`, `kernels/` as `mam2.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "mam2/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION

# The upper bounds exclude major versions that nobody has tried; tests/fresh_venv.py tries the newest that they admit.
ENGINE = [
    "av>=17.1,<20",  # decoding on the CPU; the wheel carries FFmpeg; 16.0 to 17.0 end the process at some real files
    "tyro>=0.9,<2",
    "safetensors>=0.4,<1",
    "tensorboard>=2.15,<3",
    "matplotlib>=3.8,<4",
    "pillow>=10",
    "tqdm>=4.66,<5",
    "tomli>=2; python_version < '3.11'",
]
DALI_CUDA13 = "nvidia-dali-cuda130>=2.1.1,<3; sys_platform == 'linux'"
DALI_CUDA12 = "nvidia-dali-cuda120>=2.1.1,<3; sys_platform == 'linux'"
XFORMERS = "xformers>=0.0.35,<0.1; sys_platform == 'linux'"  # its wheel loads beside a CUDA 12 torch only

FLOW = ["opencv-python-headless>=4.8,<6"]
ADAPTERS = ["peft>=0.17,<1"]
HUB = ["huggingface_hub>=0.30,<3"]
ONNX = ["onnx>=1.17,<2", "onnxscript>=0.3,<1"]

setup(
    name="mam2",
    version=VERSION[1],
    description="Masked appearance-motion modeling: self-supervised video pre-training with fused Triton kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="self-supervised video pre-training masked-autoencoder VideoMAE Triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    packages=[
        "mam2",
        "mam2.kernels",
        "mam2.engine",
        *(f"mam2.engine.{name}" for name in find_packages("engine")),
    ],
    package_dir={"mam2": "mam2", "mam2.engine": "engine", "mam2.kernels": "kernels"},
    package_data={
        "mam2.engine": ["py.typed", "recipes/*.toml", "recipes/*/*.toml"],
        "mam2.kernels": ["py.typed", "launch_table.json"],
    },
    install_requires=["torch>=2.10,<3", "numpy>=1.26,<3", "einops>=0.8,<1"],
    extras_require={
        "engine": ENGINE,  # everything the verbs need; decodes with PyAV
        "cpu": [*ENGINE, DALI_CUDA13],  # DALI's wheel runs on a CPU too; it needs no CUDA driver to import
        "cuda13": [*ENGINE, DALI_CUDA13],
        "cuda12": [*ENGINE, XFORMERS, DALI_CUDA12],
        "flow": FLOW,  # loss.motion_target flow
        "adapters": ADAPTERS,  # adapters.rank of mam2 finetune; brings transformers and accelerate
        "hub": HUB,  # checkpoints by name (hub:OWNER/NAME), mam2 export --push
        "onnx": ONNX,  # mam2 export --to onnx
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],  # `make docs`
        "dev": [
            *ONNX,
            *FLOW,
            *HUB,
            *ADAPTERS,
            "onnxruntime>=1.20",  # runs what was exported
            "pyarrow>=15",  # embeddings as Parquet
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "expecttest>=0.2",  # torch.library.opcheck imports it
            "transformers>=4.56,<6",  # a peer: VideoMAE and Chameleon's VQ-VAE are compared with ours
            "liger-kernel>=0.6; sys_platform == 'linux'",  # peers of linear_cross_entropy, for `make bench`
            "cut-cross-entropy>=25.1; sys_platform == 'linux'",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    entry_points={"console_scripts": ["mam2 = mam2.engine.cli:main"]},
)
