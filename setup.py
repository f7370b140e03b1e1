"""Maps kernels/ to fastdistil.kernels; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["fastdistil", "fastdistil.engine", "fastdistil.integrations", "fastdistil.jobs", "fastdistil.kernels"],
    package_dir={"fastdistil.kernels": "kernels"},
    package_data={"fastdistil": ["py.typed"]},
)
