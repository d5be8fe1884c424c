"""What tasks of one answer a row refuse."""

import pytest

from model.build import build_model
from model.presets import encoder_decoder_tiny
from train.tasks.classification import Classification
from train.tasks.regression import Regression


@pytest.mark.parametrize("task", [Classification(), Regression()])
def test_a_model_of_two_sides_reads_no_row(task):
    with pytest.raises(ValueError, match="reads a row as one text"):
        task.terms(build_model(encoder_decoder_tiny()), 0.0)
