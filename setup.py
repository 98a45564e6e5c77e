"""Packaging: `engine/` is imported as `mam2.engine`, `kernels/` as `mam2.kernels` (mam2 is a namespace package)."""

from pathlib import Path

from setuptools import find_packages, setup

ENGINE = [
    "av>=16",  # decoding on the CPU; the wheel carries FFmpeg
    "tyro>=0.9",
    "safetensors>=0.4",
    "tensorboard>=2.15",
    "matplotlib>=3.8",
    "tqdm>=4.66",
    "tomli>=2; python_version < '3.11'",
]
DALI_CUDA13 = "nvidia-dali-cuda130>=2.1.1; sys_platform == 'linux'"
DALI_CUDA12 = "nvidia-dali-cuda120>=2.1.1; sys_platform == 'linux'"
XFORMERS = "xformers>=0.0.35; sys_platform == 'linux'"  # its wheels are for CUDA 12 only

ONNX = ["onnx>=1.17", "onnxscript>=0.3"]

setup(
    name="mam2",
    version="0.1.0",
    description="Masked appearance-motion modeling: self-supervised video pre-training with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "mam2.kernels",
        "mam2.engine",
        *(f"mam2.engine.{name}" for name in find_packages("engine")),
    ],
    package_dir={"mam2.engine": "engine", "mam2.kernels": "kernels"},
    package_data={"mam2.engine": ["recipes/*.toml", "recipes/*/*.toml"], "mam2.kernels": ["launch_table.json"]},
    install_requires=["torch>=2.10", "numpy>=1.26", "einops>=0.8"],
    extras_require={
        "engine": ENGINE,
        "cpu": [*ENGINE, DALI_CUDA13],  # DALI's wheel runs on a CPU too; it needs no CUDA driver to import
        "cuda13": [*ENGINE, DALI_CUDA13],
        "cuda12": [*ENGINE, XFORMERS, DALI_CUDA12],
        "flow": ["opencv-python-headless>=4.8"],  # loss.motion_target flow
        "onnx": ONNX,  # mam2 export --to onnx
        "dev": [
            *ONNX,
            "onnxruntime>=1.20",  # runs what was exported
            "opencv-python-headless>=4.8",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "expecttest>=0.2",  # torch.library.opcheck imports it
            "transformers>=4.56",  # a peer: VideoMAE and Chameleon's VQ-VAE are compared with ours
            "liger-kernel>=0.6; sys_platform == 'linux'",  # peers of linear_cross_entropy, for `make bench`
            "cut-cross-entropy>=25.1; sys_platform == 'linux'",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    entry_points={"console_scripts": ["mam2 = mam2.engine.cli:main"]},
)
