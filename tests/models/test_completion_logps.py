"""Log-probabilities of completions: logits at once, TRL's fused head and a loop over tokens agree."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Cohere2Config, LlamaConfig, OPTConfig
from trl.trainer.utils import add_fused_lm_head

from prefopt.models import heads as lm_heads
from prefopt.models.heads import TOKEN_STATISTICS, completion_logps
from prefopt.models.prefix import sharing as prefix_sharing
from prefopt.models.prefix.layout import Rows, pack

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL, intermediate_size=24, initializer_range=0.3),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, init_std=0.3),
    "cohere2": lambda: Cohere2Config(
        **SMALL, intermediate_size=24, num_key_value_heads=1, logit_scale=0.5, initializer_range=0.3
    ),
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 0], [3, 4, 5, 9, 0, 0], [8, 9, 10, 11, 12, 13], [8, 9, 30, 0, 0, 0]])
PROMPTS = torch.tensor([0, 0, 1, 1])
MASK = (IDS > 0).long()
COMPLETIONS = MASK * (torch.arange(6) >= torch.tensor([3, 3, 2, 2])[:, None])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_statistics_equal_a_loop(kind, shared, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    expected = {name: [] for name in TOKEN_STATISTICS}
    for ids, real, completion in zip(IDS, MASK, COMPLETIONS, strict=True):
        logits = model(input_ids=ids[real.bool()][None]).logits[0]
        places = [t for t in range(len(logits)) if completion[t]]
        tokens = [(logits[t - 1], int(ids[t])) for t in places]
        expected["log_probs"].append(sum(z[y] - z.logsumexp(-1) for z, y in tokens))
        expected["entropy"].append(sum(-(z.softmax(-1) * z.log_softmax(-1)).sum() for z, _ in tokens))
        expected["mean_logits"].append(sum(z.mean() for z, _ in tokens))
        expected["is_top1"].append(torch.tensor(float(sum(int(z.argmax()) == y for z, y in tokens))))
    expected = {name: torch.stack(values) for name, values in expected.items()}
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (expected["log_probs"] * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    add_fused_lm_head(model, outputs=TOKEN_STATISTICS)
    prefix_sharing.enable(model)
    rows = Rows(IDS, MASK, COMPLETIONS, PROMPTS, pack(IDS, MASK, PROMPTS) if shared else None)
    fused = model.forward
    for limit, is_fused in ((lm_heads.DENSE_LOGITS, False), (0, True)):
        monkeypatch.setattr(lm_heads, "DENSE_LOGITS", limit)
        calls = []
        model.forward = lambda *args, calls=calls, **kwargs: calls.append(kwargs) or fused(*args, **kwargs)
        model.zero_grad()
        sums = completion_logps(model, rows)
        assert [call.get("fused_lm_head", False) for call in calls] == [is_fused]
        assert set(sums) == set(TOKEN_STATISTICS)
        for name, values in expected.items():
            torch.testing.assert_close(sums[name], values.detach().float(), rtol=0, atol=1e-5, msg=name)
        assert not any(sums[name].requires_grad for name in ("mean_logits", "is_top1"))
        (sums["log_probs"] * weights).sum().backward()
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_copy_of_a_model_with_the_fused_head_is_read_itself():
    """Its own forward is that of the model it was copied from: a reference made so would follow the policy."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    add_fused_lm_head(model, outputs=TOKEN_STATISTICS)
    reference = copy.deepcopy(model)
    rows = Rows(IDS, MASK, COMPLETIONS, PROMPTS)
    before = completion_logps(model, rows)["log_probs"]
    tokens = lm_heads.token_logps(model, rows)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(completion_logps(model, rows)["log_probs"], before, atol=0.1)
    torch.testing.assert_close(completion_logps(reference, rows)["log_probs"], before, rtol=0, atol=1e-5)
    torch.testing.assert_close(lm_heads.token_logps(reference, rows)[0], tokens, rtol=0, atol=1e-5)
