"""The whole pipeline from Python: compress the reference MoE, cache its logits, distil, evaluate, load the result.

    python examples/distillation_example.py [RUN_DIRECTORY [key=value ...]]

Everything it needs comes with the package: the model is the reference MoE, the text the standard library of Python.
Interrupt it and start it again: every stage goes on where it was. A longer training is a matter of settings, such as
`distillation.stages.1.steps=300 distillation.dataset.max_samples=1600`, in another run directory; the commands
`moe-compress compress`, `teacher-logits`, `distill` and `evaluate` do the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compress import UserError, settings
from moe_compress.compression import compress
from moe_compress.config import StageConfig
from moe_compress.distillation import TeacherCache, distill, generate_teacher_logits
from moe_compress.evaluation import evaluate_run
from moe_compress.run import Run


def main(directory: str = "runs/example", *overrides: str) -> None:
    # Settings are dataclasses, made from a preset and overrides as on the command line, and may be changed in code.
    config = settings.compose(["model=reference", "distillation.dataset.max_samples=160"])
    config.compression.target_ratio = 0.25
    config.evaluation.limit = 20
    config.distillation.training.save_steps = 20
    config.distillation.stages = [
        StageConfig(name="factors", trainable=[r"\.experts\."], steps=20, learning_rate=1e-3, warmup_steps=5),
        StageConfig(name="everything", trainable=[".*"], steps=20, learning_rate=5e-4, warmup_steps=5),
    ]
    config = settings.compose(overrides, base=config)  # what the caller gives wins

    # A run freezes its settings in a directory, where every stage finds what the one before left.
    run = Run.create(Path(directory), config)
    compress(run)
    generate_teacher_logits(run)

    # What the student will be taught: the text, and the teacher's most probable next tokens at every place of it.
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint(0))
    cache = TeacherCache(run.teacher_logits_dir)
    record = cache[0]
    place = 40
    before = tokenizer.decode(record["input_ids"][place - 12 : place + 1])
    guesses = zip(record["indices"][place, :4], record["log_probs"][place, :4], strict=True)
    print(f"after {before!r} the teacher expects:")
    for token, log_prob in guesses:
        print(f"    {float(torch.tensor(float(log_prob)).exp()):6.1%}  {tokenizer.decode([int(token)])!r}")

    distill(run)
    evaluate_run(run)

    # The student is an ordinary checkpoint; importing moe_compress has taught Transformers to read it.
    student = AutoModelForCausalLM.from_pretrained(run.student())
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    text = student.generate(**prompt, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
