"""Compile the sources side by side; all else stands in pyproject.toml."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildSideBySide(build_ext):
    """Compiles each source of an extension by itself, as many at once as there are processors."""

    def build_extensions(self) -> None:
        """Build each extension with a compiler that takes its sources at once."""
        in_turn = self.compiler.compile

        def side_by_side(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: in_turn([source], **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = side_by_side
        super().build_extensions()


setup(cmdclass={"build_ext": BuildSideBySide})
