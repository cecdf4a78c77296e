"""Any model directories measured side by side, by the same code as the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moe_compress.config import Config
from moe_compress.distillation.fingerprints import teacher_fingerprint
from moe_compress.evaluation.evaluator import Target, failure, free_memory
from moe_compress.evaluation.harness import check_tasks
from moe_compress.evaluation.machine import choose_device
from moe_compress.evaluation.measure import evaluate_model
from moe_compress.evaluation.results import Record, append_result, lost_tasks, read_results, settings_fingerprint
from moe_compress.evaluation.teacher_pass import teacher_text
from moe_compress.files import fingerprint
from moe_compress.modeling import resolve_model_path


def evaluate_models(
    models: Sequence[str],
    config: Config,
    directory: Path,
    *,
    teacher: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Measure models, the teacher first; with one, compare the others with it on the same text.

    Args:
        models: `reference`, directories or hub ids: original, compressed or dense.
        config: the settings; `evaluation`, `seed`, `model.dtype` and `model.trust_remote_code` are read.
        directory: where results and the teacher's text are kept: what was measured with the same settings, all tasks
            included, and has not changed since, is not measured again.
        teacher: the model to compare with; without one each model reads the text by its own tokenizer.
        say: where to tell what is going on.

    Returns:
        One record per model, `model` being its name as given; of one that cannot be measured, with `error`.

    Raises:
        UserError: a model or device that does not exist, an unknown task, or a teacher that cannot be loaded.
    """
    check_tasks(config.evaluation)
    choose_device(config)
    names = list(dict.fromkeys([*([teacher] if teacher else []), *models]))
    targets = [Target(name, 0, resolve_model_path(name)) for name in names]
    settings = settings_fingerprint(config)
    theirs = teacher_text(targets[0].path, config, directory) if teacher else None
    whole = [record for record in read_results(directory) if "error" not in record and not lost_tasks(record)]
    known = {record.get("made_from"): record for record in whole}
    records = []
    for target in targets:
        text = theirs.path.name if theirs else None
        made_from = None
        try:
            made_from = fingerprint([teacher_fingerprint(target.path), settings, text, target.model == teacher])
            record = known.get(made_from)
            if record is None:
                say(f"evaluating {target.model}")
                score = theirs.score if theirs is not None and target.model == teacher else None
                record = evaluate_model(target.path, *target.key, config, theirs, score=score)
        except Exception as error:  # one model that cannot be measured must not stop the others
            record = failure(target, error, settings)
        if made_from not in known:
            record["made_from"] = made_from
            append_result(directory, record)
            free_memory()
        records.append({**record, "model": target.model, "path": str(target.path)})
    return records
