"""Two packages from one tree: `cola_fast` (the library) and `cola_kernels` (Triton kernels, under kernels/).

`kernels/` is only a folder. A top-level package called `kernels` would shadow Hugging Face's library of that name,
which transformers and bitsandbytes import, so it has no __init__.py and the package list below is explicit.
"""

from pathlib import Path

from setuptools import setup

demo = ["accelerate>=1.0", "gguf>=0.10"]  # transformers reads GGUF files with both
bitsandbytes = ["bitsandbytes>=0.46"]
peers = ["peft>=0.19", "trl>=0.20", "accelerate>=1.0"]
liger = ["liger-kernel>=0.8; platform_system == 'Linux'"]
zstd = ["zstandard>=0.22"]
loggers = ["tensorboard>=2.14", "trackio>=0.2"]
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1.0", "ruff>=0.9"]
tests = ["pytest>=8", "pytest-xdist>=3", "ruff>=0.9", "mypy>=1.13", "types-PyYAML", "types-tqdm"]

ROOMS = ("chain", "commands", "data", "layers", "layers.weights", "methods", "training")

setup(
    name="cola_fast",
    version="0.1.0",
    description="Fast, crash-safe fine-tuning with a chain of LoRA links (COLA), on fused kernels.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["cola_fast", *(f"cola_fast.{room}" for room in ROOMS), "cola_kernels"],
    package_dir={"cola_kernels": "kernels/cola_kernels"},
    package_data={
        "cola_fast": ["py.typed"],
        "cola_fast.commands": ["demo.yaml"],
        "cola_kernels": ["py.typed", "tables/*.json"],
    },
    install_requires=[
        "torch>=2.7",
        "triton>=3.3; platform_system == 'Linux'",
        "transformers>=5.17",
        "datasets>=3.0",
        "safetensors>=0.4.3",
        "filelock>=3.12",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.7",
    ],
    extras_require={
        "bitsandbytes": bitsandbytes,
        "demo": demo,
        "docs": docs,
        "liger": liger,
        "peers": peers,
        "loggers": loggers,
        "tests": tests + demo + bitsandbytes + liger + peers + zstd,
        "zstd": zstd,
    },
    entry_points={"console_scripts": ["cola = cola_fast.cli:main"]},
)
