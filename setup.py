"""What pyproject.toml cannot say: a wheel has `recipes/` inside of the package.

As a package of its own it would make an editable install more than a line of a path file.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes into the package, unless an install is editable."""

    def run(self) -> None:
        """Build as usual, then add the recipes."""
        super().run()
        if not self.editable_mode:
            self.copy_tree("recipes", str(Path(self.build_lib, "treeify", "recipes")))


setup(cmdclass={"build_py": BuildWithRecipes})
