"""What `evaluate` leaves for the report beside the scores: text samples and speed, made once per state of the run."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compress.evaluation.layer_forms import cut_to_aligned_ranks, random_layer, same_bytes_layouts
from moe_compress.evaluation.machine import describe_machine, placement
from moe_compress.evaluation.measure import load
from moe_compress.evaluation.model_speed import model_speed
from moe_compress.evaluation.results import Key, jsonable, weights_of
from moe_compress.evaluation.samples import write_samples
from moe_compress.evaluation.speed import layer_speed
from moe_compress.evaluation.variants import OURS, SVD
from moe_compress.files import fingerprint, write_json
from moe_compress.modeling import (
    experts_per_token,
    find_experts,
    find_shared_cores,
    fold_in_memory,
    load_tokenizer,
    resolve_model_path,
)

if TYPE_CHECKING:
    from moe_compress.run import Run

_HELD_OUT_PROMPT_TOKENS = 48


def last_step(paths: Mapping[Key, Path], model: str) -> Key | None:
    """The key of the last measured checkpoint of a label."""
    return max((key for key in paths if key[0] == model), default=None)


def write_sample_file(run: Run, paths: Mapping[Key, Path]) -> None:
    """Write `RUN/evals/samples.json`: the same prompts continued by teacher, zero-shot, distilled and SVD models.

    Args:
        run: the run.
        paths: the measured models by (label, step).
    """
    evaluation = run.config.evaluation
    chosen: dict[str, Path] = {"teacher": paths["teacher", 0]}
    for label, zero_shot, distilled in (("student", "zero-shot", "distilled"), ("svd", "", "SVD, distilled")):
        if zero_shot and (label, 0) in paths:
            chosen[zero_shot] = paths[label, 0]
        last = last_step(paths, label)
        if last is not None and last[1] > 0:
            chosen[distilled] = paths[last]
    made_from = fingerprint(
        {
            "models": {name: weights_of(path) or str(path) for name, path in chosen.items()},
            "prompt": evaluation.prompt,
            "tokens": evaluation.generate_tokens,
            "text": vars(evaluation.perplexity),
            "seed": run.config.seed,
        }
    )
    target = run.evals_dir / "samples.json"
    if _made_from(target) == made_from:
        return
    tokenizer = load_tokenizer(paths["teacher", 0], trust_remote_code=run.config.model.trust_remote_code)
    prompts = [prompt for prompt in (evaluation.prompt, _held_out_prompt(run, tokenizer)) if prompt]
    samples = []
    for name, path in chosen.items():
        model = load(path, run.config)
        written = write_samples(model, tokenizer, prompts, evaluation.generate_tokens, run.config.seed)
        samples += [{"model": name, **sample} for sample in written]
        del model
        gc.collect()
    write_json(target, {"made_from": made_from, "samples": samples})


def measure_speed(run: Run, paths: Mapping[Key, Path]) -> None:
    """Write `RUN/evals/speed.json`: the first MoE layer and the whole model, original, shared core and SVD interleaved.

    Where the run has no SVD baseline, its layer is made of random factors of the same bytes, and said to be. The
    original is `model.name`, whose layers the others have, also where the run has another teacher.
    """
    student, svd = last_step(paths, "student"), last_step(paths, "svd")
    assert student is not None
    machine = describe_machine()
    original = resolve_model_path(run.config.model.name, run.config.model.revision)
    used = {"original": original, "student": paths[student]} | ({"svd": paths[svd]} if svd else {})
    made_from = fingerprint([{name: str(path) for name, path in used.items()}, machine, run.config.model.dtype])
    target = run.evals_dir / "speed.json"
    if _made_from(target) == made_from:
        return
    placed = placement(run.config)  # once: after a first model another GPU has the most free memory
    models = {name: load(path, run.config, placed) for name, path in used.items()}
    compressed = {OURS: models["student"]} | ({SVD: models["svd"]} if svd else {})
    for model in compressed.values():
        fold_in_memory(model)
    if svd:
        cut_to_aligned_ranks(compressed[SVD])
    facts = find_experts(models["original"])[0]
    layers = {name: find_shared_cores(model)[facts.name] for name, model in compressed.items()}
    if not svd:
        layers[SVD] = random_layer(facts.module, same_bytes_layouts(layers[OURS])[SVD], run.config.seed)
    top_k = experts_per_token(models["original"], facts.name)
    speed = {
        "made_from": made_from,
        "machine": machine,
        "device": str(models["original"].device),
        "dtype": str(models["original"].dtype).removeprefix("torch."),
        "svd_values": "baseline" if svd else "random",
        "layer": {
            "module": facts.name,
            "experts": facts.num_experts,
            "top_k": top_k,
            "hidden_size": facts.hidden_size,
            "intermediate_size": facts.intermediate_size,
            "layouts": {name: layer.layout for name, layer in layers.items()},
            "rows": layer_speed(facts.module, layers, top_k=top_k, seed=run.config.seed),
        },
        "model": model_speed(models["original"], compressed, seed=run.config.seed),
    }
    write_json(target, jsonable(speed))


def _held_out_prompt(run: Run, tokenizer: Any) -> str:
    """The beginning of the held-out text, up to the end of a line."""
    from moe_compress.evaluation.perplexity import held_out_rows

    text = tokenizer.decode(held_out_rows(run.config, tokenizer)[0, :_HELD_OUT_PROMPT_TOKENS], skip_special_tokens=True)
    return text[: text.rfind("\n") + 1] or text


def _made_from(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError):
        return None
