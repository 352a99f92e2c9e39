"""Runs docs/notebook.ipynb and writes its outputs into it:

python tests/write_notebook.py
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebook.ipynb"


def executed(folder: str | os.PathLike[str]) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run from its place in a tree in folder, where it also leaves its files."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    place = Path(folder) / "docs"
    place.mkdir()
    (place.parent / "tests").symlink_to(ROOT / "tests")
    client = NotebookClient(book, record_timing=False, kernel_name="python3", resources={"metadata": {"path": place}})
    # Progress bars, and the warning that they miss a widget, differ from run to run.
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress"}
    client.execute(env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)})
    # Of the kernel, only the language: the name of an environment and its Python are of one machine.
    book.metadata = nbformat.from_dict({"language_info": {"name": "python"}})
    return book


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        nbformat.write(executed(folder), NOTEBOOK)
