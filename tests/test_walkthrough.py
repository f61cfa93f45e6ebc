"""walkthrough.ipynb: its cells run, in order and without Jupyter; its outputs are saved in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "walkthrough.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_was_run_from_top_to_bottom_and_saved():
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds  # the curve, the coloured table
    assert not any(str(Path.home()) in str(output) for output in outputs)


def test_the_cells_are_short_and_define_nothing_that_a_script_has():
    assert max(len(code.split("\n")) for code in CODE) <= 25
    assert sum("def " in code for code in CODE) <= 6


@pytest.mark.slow
@pytest.mark.engine
def test_all_cells_run(tmp_path):
    """With one step of training in place of ten; the cells' own assertions count."""
    program = "\n".join(CODE)
    smaller = program.replace("GROUP = 10, 2, 8", "GROUP = 1, 1, 8")
    assert smaller != program
    smaller = smaller.replace("Picture(figure)", "assert b'PNG' in Picture(figure)._repr_png_()")
    (tmp_path / "cells.py").write_text(smaller)
    command = [sys.executable, str(tmp_path / "cells.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("finite difference", "the right trace that was least likely", "step  1: reward"):
        assert said in done.stdout
