"""The model card of a compressed checkpoint: README.md with the metadata that the Hugging Face hub reads.

`compress` writes it into the zero-shot checkpoint, the distillation copies it along, and `report` replaces it by one
with what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from moe_compress.files import file_in_progress

CARD = "README.md"
TAGS = ("moe-compress", "mixture-of-experts", "compressed")
# What the card of the original says and stays true of the compressed model.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model", "pipeline_tag")


def read_metadata(directory: Path) -> dict[str, Any]:
    """The metadata of a card (the YAML between two lines of dashes); empty where there is none that can be read."""
    try:
        head, begin, rest = (directory / CARD).read_text(encoding="utf-8").partition("---\n")
        metadata = yaml.safe_load(rest.partition("\n---")[0]) if begin and not head.strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def inherited(original: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The metadata of a compressed model from those of its original.

    Args:
        original: metadata of the original's card.
        model: the original's name; it becomes `base_model` if it is the id of a hub repository.
    """
    metadata = {key: original[key] for key in _INHERITED if key in original and key != "base_model"}
    if _is_hub_id(model):
        metadata["base_model"] = model
    return metadata


def model_card(
    compression: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    title: str,
    sections: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
) -> str:
    """The text of a card; the same arguments give the same text.

    Args:
        compression: what `compression.json` holds.
        metadata: license, language and base model, see `inherited`.
        title: heading.
        sections: Markdown to add: what was measured.
        results: the same for the metadata.
    """
    kept = {key: metadata[key] for key in _INHERITED if key in metadata}
    kept.setdefault("pipeline_tag", "text-generation")
    data = ModelCardData(
        **kept,
        library_name="transformers",
        tags=[*TAGS, *(["shared-core"] if _cores(compression) != {0} else [])],
        model_name=title,
        eval_results=list(results) or None,
        ignore_metadata_errors=True,
    )
    return (
        "\n\n".join(
            [
                f"---\n{data.to_yaml()}\n---",
                f"# {title}",
                _what(compression, metadata),
                _LOADING,
                _sizes(compression["totals"]),
                *(section.strip("\n") for section in sections),
            ]
        )
        + "\n"
    )


def write_card(directory: Path, text: str) -> bool:
    """Replace the card of a checkpoint, whole or not at all; returns whether there was anything to do.

    Nothing but the card is touched, and a checkpoint that was deleted meanwhile is not made again.
    """
    path = directory / CARD
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return False
        with file_in_progress(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except FileNotFoundError:
        return False
    return True


_LOADING = """## Use

```python
import moe_compress  # registers the loader; without it Transformers refuses this checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""


def _what(compression: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    original = metadata.get("base_model") or Path(str(compression["model"])).name
    cores = _cores(compression)
    form = "low-rank factors of its own"
    if cores != {0}:
        sharing = "all experts" if max(cores) == 1 else "a group of experts"
        form += f"{', some' if 0 in cores else ''} beside a core shared by {sharing}"
    if any(own.get("basis") for own in _projections(compression)):
        form += ", some on a basis of the inputs that all experts of the layer share"
    data = "what the experts see on calibration text" if compression["calibrated"] else "the weights alone"
    return (
        f"`{original}` ({compression['architecture']}), its experts compressed by moe-compress: in "
        f"{len(compression['layers'])} MoE layers each expert became {form}, fitted by {compression['method']} on "
        f"{data}. All other weights are those of the original, unless a section on distillation below says otherwise."
    )


def _cores(compression: Mapping[str, Any]) -> set[int]:
    """The numbers of cores that occur among the projections."""
    return {own["cores"] for own in _projections(compression)}


def _projections(compression: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [own for layer in compression["layers"].values() for own in layer["projections"].values()]


def _sizes(totals: Mapping[str, Any]) -> str:
    rows = [
        ("expert bytes", "expert_bytes"),
        ("bytes", "bytes"),
        ("parameters", "parameters"),
        ("active parameters per token", "active_parameters"),
        ("FLOPs per token", "flops_per_token"),
    ]
    lines = ["## Size", "", "| | original | this model | kept |", "| :--- | ---: | ---: | ---: |"]
    for name, key in rows:
        before, after = totals.get(f"{key}_before"), totals.get(f"{key}_after")
        if before and after:
            lines.append(f"| {name} | {before:,} | {after:,} | {100 * after / before:.1f} % |")
    return "\n".join(lines)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
