"""The lesson to run, assets/lesson.ipynb: it runs, and what is stored of it can be read."""

import re

import pytest
from conftest import ROOT

for package in ("ipykernel", "matplotlib"):
    pytest.importorskip(package)
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

PATH = ROOT / "assets" / "lesson.ipynb"
STEPS = "steps = 2400"  # the line that a short run changes; from few steps follow few images
MACHINE = r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|private|work|workspace|mnt|Users)/"


def lesson():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    return {output.output_type for output in cell.outputs}


def test_it_runs_from_its_own_folder(monkeypatch):
    """With four steps of each training. It makes what is stored: text, pictures, or nothing."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = lesson()
    (cell,) = (cell for cell in code(notebook) if STEPS in cell.source)
    cell.source = cell.source.replace(STEPS, "steps = 4")
    where = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()  # a cell may raise
    again, stored = ([kinds(cell) for cell in code(x)] for x in (notebook, lesson()))
    assert again == stored


def test_what_is_stored_is_whole_and_names_no_machine():
    notebook, text = lesson(), PATH.read_text(encoding="utf-8")
    assert len(notebook.cells) <= 25 and len(text) < 1_000_000
    for cell in code(notebook):
        assert bool(cell.outputs) == bool(re.search(r"\b(?:print|show)\(", cell.source))
        assert kinds(cell) <= {"stream", "display_data"}  # no error
        assert all(output.get("name") != "stderr" for output in cell.outputs)  # nor a warning
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(MACHINE, without_pictures)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))  # it was run once, from top to bottom
