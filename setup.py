"""The wheel takes the pages of docs/ along, for `bnfix help`; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithPages(build_py):
    """Copies the pages into the package, but for the log of experiments."""

    def run(self) -> None:
        """Build the package, then add the pages; an editable installation has them beside it."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "bnfix" / "docs"
        self.mkpath(str(folder))
        pages = [page for page in sorted(Path("docs").glob("*.md")) if page.stem != "LOG"]
        if not pages:
            raise FileNotFoundError("docs/: no pages; build from a whole checkout or the sdist.")
        for page in pages:
            self.copy_file(str(page), str(folder / page.name))


setup(cmdclass={"build_py": WithPages})
