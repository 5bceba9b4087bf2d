"""Installs the two operators for other people's networks: `from cc_attention import CrissCrossAttention`.

The scripts (train.py, evaluate.py) and what only they use run from the checkout.
"""

from setuptools import setup

setup(
    name="ccnet",
    version="0.1.0",
    description="Criss-cross attention and in-place activated batch norm, as in CCNet",
    license="MIT",
    python_requires=">=3.10",
    packages=["cc_attention", "libs"],
    install_requires=["torch>=2.10"],
)
