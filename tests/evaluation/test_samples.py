"""Text samples: greedy is the argmax, sampling follows its seed."""

from __future__ import annotations

import torch

from moe_compress.evaluation.samples import write_samples

from .conftest import make_model


@torch.no_grad()
def test_greedy_text_is_the_argmax(tokenizer):
    model = make_model()
    ids = tokenizer("def name", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + 6 and (ids.shape[1] == start or ids[0, -1] != 0):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    greedy, sampled = write_samples(model, tokenizer, ["def name \n"], 6, seed=1)
    assert greedy["text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert (greedy["prompt"], greedy["decoding"], sampled["decoding"]) == ("def name", "greedy", "temperature 0.3")


def test_sampling_depends_on_its_seed_alone(tokenizer):
    model = make_model()

    def sampled(seed: int) -> str:
        torch.rand(3)  # the state of the generator before must not matter, nor be changed
        before = torch.get_rng_state()
        text = write_samples(model, tokenizer, ["def name"], 12, seed)[1]["text"]
        assert torch.equal(before, torch.get_rng_state())
        return text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(5)}) > 1
