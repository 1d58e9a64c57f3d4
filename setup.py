"""eval_configs/ travels in the wheel as ksvd_sae/eval_configs/, which pyproject.toml cannot say."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ksvd_sae*"]), "ksvd_sae.eval_configs"],
    package_dir={"ksvd_sae.eval_configs": "eval_configs"},
)
