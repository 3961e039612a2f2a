"""Which packages there are. ``passes`` and ``kernels`` are folders of the checkout that belong into
``gpdfx``: links say so there, and here it is said for clones and archives without links.

``kernels`` has no ``__init__.py``: on a path that holds the checkout it gives way to the package
``kernels`` that transformers looks for.
"""

from setuptools import find_packages, setup

BESIDE = ("passes", "kernels")
packages = find_packages(include=["gpdfx*"], exclude=[f"gpdfx.{name}*" for name in BESIDE])
for name in BESIDE:
    packages += [f"gpdfx.{name}", *(f"gpdfx.{name}.{inner}" for inner in find_packages(name))]

setup(packages=packages, package_dir={f"gpdfx.{name}": name for name in BESIDE})
