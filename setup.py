from setuptools import find_packages, setup

setup(
    name="guided-diffusion",
    version="0.1.0",
    description="Diffusion pretraining for few-label radiograph segmentation",
    license="MIT",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "blobfile>=2.1",
        "mpi4py>=4.1",
        "pillow>=10.3",
        "tqdm>=4.66",
        "monai>=1.4",
        "pydicom>=3.0",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6"],
        "mpi": ["mpich>=5.0"],
        "dicom": ["pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.3", "pylibjpeg-libjpeg>=2.1"],
        "baseline": ["segmentation-models-pytorch>=0.4"],
        "wandb": ["wandb"],
    },
)
