"""`pip install -e .` installs the core; extras add what one kind of user needs. Tested pins: requirements.txt."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.6,<2.14",  # torch 2.10 is the last with CUDA 12 wheels: such users install "torch<2.11" first
    "diffusers>=0.36,<0.43",
    "transformers>=4.57,<6",
    "accelerate>=1.2",
    "pot>=0.9.5",
    "einops>=0.8",
    # decord publishes x86-64 wheels only; elsewhere vdot.video decodes with PyAV
    'decord>=0.6; platform_machine == "x86_64" or platform_machine == "AMD64"',
    "av>=14,<19",
    "imageio>=2.36",
    "imageio-ffmpeg>=0.6",
    "omegaconf>=2.3",
    "opencv-python-headless>=4.10,<5",
    "safetensors>=0.5",
    "sentencepiece>=0.2,<0.2.3",  # 0.2.3 wants protobuf 7
    "protobuf>=5,<7",
    "ftfy>=6.2",
    "numpy>=1.26",
    "pillow>=10",
    "psutil>=5.9",
    "tqdm>=4.66",
]

EXTRAS = {
    "train": ["wandb>=0.19", "peft>=0.15", "matplotlib>=3.8"],
    "demo": ["gradio>=5,<7"],
    # what mediapipe 0.10.21 needs: its own pins do not fit, so it is installed beside, with --no-deps
    "annotate": ["absl-py>=2.1", "attrs>=23", "flatbuffers>=24", "matplotlib>=3.8"],
    "eval": ["scipy>=1.12", "scikit-image>=0.24", "matplotlib>=3.8"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.13",
        "geomloss>=0.2.6",
        "matplotlib>=3.8",
        # for the interpreter that tests the kernels on a CPU; older ones fail there with numpy 2.4
        'triton>=3.7,<3.10; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
}

setup(
    name="vdot",
    version="0.1.0",
    description="VDOT: four-step unified video creation on Wan2.1-VACE, distilled with optimal transport",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vdot", "vdot.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)
