"""What the first token of all calibration texts tells of the model at hand: whether its weights are those of then."""

from dataclasses import replace

import pytest
import torch
from joint_operators import joint_of, operator_of
from small_models import VOCABULARY, model_of

from cachemedic.token.cache import SketchCache
from cachemedic.token.first_token import check_weights
from cachemedic.token.lowest_layer import lowest_layer


def knowing_its_first(name, token):
    """An operator whose calibration texts all began with a token; its higher layers do not matter here."""
    operator = operator_of(name)
    joint = joint_of(name)
    lowest = lowest_layer(model_of(name), torch.tensor([[token]]), torch.zeros(1, 1).long())[0, 0]
    first = torch.cat([lowest, torch.ones(joint.dim - len(lowest))])
    operator.set_joint(replace(joint, first=first))
    return operator


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("token", [1, VOCABULARY - 1])  # one that begins texts, and one that has to be searched for
def test_weights_of_another_training_are_refused(name, token):
    operator = knowing_its_first(name, token)
    SketchCache(model_of(name), operator)
    with pytest.raises(ValueError, match="calibrated on other weights than those of this"):
        SketchCache(model_of(name, seed=1), operator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_number_format_is_not_another_training(dtype):
    check_weights(model_of("llama").to(dtype), knowing_its_first("llama", 5).calibrated)


def test_texts_that_began_with_different_tokens_tell_nothing():
    check_weights(model_of("llama", seed=1), joint_of("llama"))


@pytest.mark.parametrize("marks", [(VOCABULARY, VOCABULARY + 7), (None, None)])
def test_marks_of_a_text_that_the_vocabulary_lacks_are_no_tokens(marks):
    """As a GPT-2 of a small vocabulary has them."""
    model = model_of("gpt2")
    model.config.bos_token_id, model.config.eos_token_id = marks
    check_weights(model, knowing_its_first("gpt2", 5).calibrated)
