"""Packaging of distinit-plugin: the package, the ``distinit`` command, and every shipped YAML file."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = {}
exec((HERE / "distinit_plugin" / "version.py").read_text(encoding="utf-8"), VERSION)

# The YAML files live in configs/ at the top, where people look for them, and travel inside the wheel as
# distinit_plugin/shipped/configs, where distinit_plugin.config.load finds them.
SHIPPED = "distinit_plugin.shipped.configs"

PARQUET = ["pyarrow>=15"]
# torch.onnx writes with the first two; the third computes what was written.
ONNX = ["onnx>=1.16", "onnxscript>=0.2", "onnxruntime>=1.18"]
# What PySlowFast imports at its start; PySlowFast itself is a checkout (PYSLOWFAST_ROOT).
SLOWFAST = ["pytorchvideo==0.1.5", "pandas>=2", "psutil>=5", "scipy>=1.10", "tensorboard>=2.16"]
# OpenCV's TV-L1 is among its contributed modules.
FLOW = ["opencv-contrib-python-headless>=4.10"]

setup(
    name="distinit-plugin",
    version=VERSION["__version__"],
    description="Video networks from frozen image teachers (DistInit) and flow teachers (D3D), without video labels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["distinit_plugin", "distinit_plugin.*"]), SHIPPED],
    package_dir={SHIPPED: "configs"},
    package_data={
        SHIPPED: ["**/*.yaml", "*.md"],
        "distinit_plugin": ["py.typed", "analysis/published.csv", "analysis/assets/*"],
    },
    entry_points={"console_scripts": ["distinit = distinit_plugin.cli:main"]},
    install_requires=[
        # torch 2.13.0's CPU build and torchvision do not import together.
        "torch>=2.6,!=2.13.0",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pillow>=10",
        "av>=18",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.10",
        "yacs>=0.1.8",
        "pyyaml>=6",
        "simplejson>=3.19",
        "rich>=13",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "timm": ["timm>=1.0"],
        "pytorchvideo": ["pytorchvideo==0.1.5"],
        "tensorboard": ["tensorboard>=2.16"],
        "safetensors": ["safetensors>=0.4"],
        "parquet": PARQUET,
        "onnx": ONNX,
        "flow": FLOW,
        "slowfast": [*SLOWFAST, *FLOW],
        "all": ["timm>=1.0", "pytorchvideo==0.1.5", "tensorboard>=2.16", "safetensors>=0.4", *PARQUET, *ONNX, *FLOW],
        "dev": [
            "timm>=1.0",
            "pytorchvideo==0.1.5",
            "tensorboard>=2.16",
            "safetensors>=0.4",
            *PARQUET,
            *ONNX,
            *FLOW,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            # Exact: a newer linter finds new things, and a clone must stay clean.
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML",
            "build>=1.2",
            "setuptools>=77",
            "wheel",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
