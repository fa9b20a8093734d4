"""Package metadata; the settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).parent / "README.md"

setup(
    name="asyncagent",
    version="0.1.0",
    description="An asyncio IMPALA trainer for one machine: actors, dynamic batching, V-trace",
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="asyncagent authors",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["asyncagent", "asyncagent.*"]),
    package_data={"asyncagent": ["py.typed", "**/*.json"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        # Actor hosts: small typed headers, compression of observations, sockets with CURVE.
        "lz4>=4.3",
        "msgspec>=0.19",
        "numpy>=2.0",
        "optree>=0.15",
        "pyzmq>=26",
        "rich>=13.7",
        "tensorboard>=2.18",
        "torch>=2.11",
        "tyro>=0.9",
        "uvloop>=0.21",
        "zstandard>=0.23",
    ],
    extras_require={
        # Other machines have no envpool wheels: there, atari_backend=ale plays the same games.
        "atari": ["envpool>=1.2; platform_machine in 'x86_64 AMD64 aarch64 arm64'"],
        "ale": ["ale-py>=0.12", "gymnasium>=1.1"],
        # The maps of the battle scenarios are in envpool's assets, the others in vizdoom.
        "doom": ["vizdoom>=1.3.1", "envpool-assets>=0.3"],
        "gym": ["gymnasium>=1.1"],
        "plot": ["matplotlib>=3.9"],
        "ray": ["ray>=2.48"],
        "video": ["av>=14", "pillow>=10"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "mypy>=1.15",
            "py-spy>=0.4",
            "pytest>=8.3",
            "ruff>=0.9",
            "scipy>=1.14",
        ],
    },
    entry_points={"console_scripts": ["asyncagent = asyncagent.__main__:run_and_exit"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
