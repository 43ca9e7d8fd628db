"""docs/architectures.md says what is so: some architectures are built and asked again."""

import pytest
from toy_project import ROOT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from architectures import WrongResultError, line_of, operators, small_model
from cachemedic.repair.folded import FoldedOperator

PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines()
SOME = (
    "llama gpt2 qwen2 gemma3_text mistral mamba jamba deepseek_v3 gpt_oss phi3 falcon bart roberta mllama gpt_bigcode"
).split()


@pytest.mark.parametrize("model_type", SOME)
def test_a_line_is_what_is_found_now(model_type):
    assert str(line_of(model_type)) in PAGE, "run `python tools/architectures.py`"


def test_every_architecture_has_a_line_and_nothing_is_wrong():
    text = "\n".join(PAGE)
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert text.count(f"\n| {model_type} |") == 1, model_type
    assert "| **" not in text.partition("| architecture |")[2]


def test_a_wrong_result_is_seen(monkeypatch):
    monkeypatch.setattr(FoldedOperator, "fold_output", lambda self, layer, output, gates: output)
    with pytest.raises(WrongResultError, match="logits off by"):
        operators(small_model("llama"))
