"""The recipes that formats of others hold: the best block of each, as large as the free one."""

import pytest

from experiments.ladder.rungs import formats_of, recipe_of
from experiments.ladder.scales import SCALES
from model.flops import parameter_count

CPU = SCALES["cpu"]


def test_each_place_gets_the_best_block_that_it_holds():
    held = {name: recipe_of(name, CPU) for name in ("for-hf", "for-gguf")}
    assert formats_of(held["for-hf"]) == ("HF nanochat",)
    assert formats_of(held["for-gguf"]) == ("HF qwen3", "GGUF qwen3")
    nanochat, qwen3 = (recipe.model for recipe in held.values())
    assert (nanochat.activation, qwen3.activation) == ("relu_squared", "swiglu")
    assert nanochat.qk_norm
    assert qwen3.qk_norm


@pytest.mark.parametrize("scale", SCALES)
def test_a_gated_layer_is_as_large_as_a_plain_one_and_fits_blocks_of_32(scale):
    gated = recipe_of("for-gguf", SCALES[scale]).model
    plain = recipe_of("for-hf", SCALES[scale]).model
    assert gated.ffn_width_ % 32 == 0
    assert parameter_count(gated) == pytest.approx(parameter_count(plain), rel=0.05)
