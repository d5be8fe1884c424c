"""The README says what the result files say."""

import pytest

from experiments.readme import ROOT, filled


def test_the_figures_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "run: python -m experiments.readme"
    assert "](experiments/results/demo.png)" in text
    assert (ROOT / "experiments" / "results" / "demo.png").exists()


def test_every_command_is_named():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| for | `NAME` |") :].partition("\n\n")[0]
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py") if _is_command(path)}
    commands |= {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    assert not {name for name in commands if f"`{name}`" not in table}


def _is_command(path):
    return "__main__" in path.read_text()


def test_blocks_and_functions_belong_together():
    text = (ROOT / "README.md").read_text()
    stale = text.replace("M parameters write", "M parameters sing")
    assert filled(stale) == text
    with pytest.raises(ValueError, match="blocks"):
        filled(text.replace("<!-- loop -->", "<!-- lop -->"))
    with pytest.raises(ValueError, match="does not end with <!-- /loop -->"):
        filled(text.replace("<!-- /loop -->", ""))
