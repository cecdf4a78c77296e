"""The plug-in that lets `AutoModelForCausalLM.from_pretrained` read compressed checkpoints.

To Transformers it is a quantizer: config.json keeps its `model_type` and carries a `quantization_config`, the experts
are replaced while the model is on the meta device, and the ordinary loader fills in the tensors. This module is
imported while Transformers itself is (see `moe_compress._plugin`), hence the imports inside the methods.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from moe_compress.errors import UserError
from moe_compress.modeling.config import QUANT_METHOD, SharedCoreConfig
from moe_compress.modeling.tensors import Layout

register_quantization_config(QUANT_METHOD)(SharedCoreConfig)


@register_quantizer(QUANT_METHOD)
class SharedCoreQuantizer(HfQuantizer):
    """Replaces experts before the weights are read, and checks afterwards that every factor was read."""

    quantization_config: SharedCoreConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[Any] = []
        if not self.pre_quantized:
            raise UserError(
                "shared_core is no option for loading an original model; compress it with moe-compress compress"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Swap every experts module for an empty `SharedCoreExperts`, on the meta device.

        Raises:
            UserError: the config and the model do not name the same experts modules, or the model is sharded over its
                experts' features (tensor or expert parallelism).
        """
        from moe_compress.modeling.experts import SharedCoreExperts
        from moe_compress.modeling.find import find_experts

        distributed = getattr(model.config, "distributed_config", None)
        for size in ("tp_size", "ep_size"):
            if (getattr(distributed, size, None) or 1) > 1:
                raise UserError(f"{size} > 1: shared cores cannot be split by tensor or expert parallelism; use FSDP")
        experts = {facts.name: facts.module for facts in find_experts(model)}
        layers = layers_by_module_name(self.quantization_config, list(experts), model.base_model_prefix)
        for name, original in experts.items():
            replacement = SharedCoreExperts(original, layers[name], self.quantization_config.parameterization)
            model.set_submodule(name, replacement)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Drop what would merge or rename experts on load and split them on save (DESIGN 4.2, trap 2)."""
        from moe_compress.modeling.conversions import without_experts

        self._conversions = list(weight_conversions)
        return without_experts(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check that nothing was left unread, and make the model an ordinary, trainable one (DESIGN 4.2, trap 3).

        Raises:
            UserError: a tensor of a shared core was not in the checkpoint.
        """
        from transformers import PreTrainedModel

        from moe_compress.modeling.conversions import DENSE_CONVERSIONS, expert_parameter_names, rewrites_experts
        from moe_compress.modeling.experts import set_empty_cores_aside

        names = expert_parameter_names(model)
        missing = [name for name in names if not _was_read(model.get_parameter(name))]
        if missing:
            raise UserError(
                f"{model.config.name_or_path}: {len(missing)} tensors of the experts are missing from the checkpoint "
                f"or have another shape there, such as {', '.join(missing[:3])}; get the checkpoint again"
            )
        needed = [c for c in self._conversions if c.was_used() or rewrites_experts(c, names)]
        setattr(model, DENSE_CONVERSIONS, needed)
        set_empty_cores_aside(model)
        # With a quantizer attached save_pretrained ignores its state_dict argument and the Trainer refuses to train.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Compressed models are saved by `save_pretrained` like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary floating-point parameters."""
        return True


def _was_read(parameter: Any) -> bool:
    # The loader marks each parameter that it takes from the checkpoint; one still on meta was offloaded to disk.
    return parameter.device.type == "meta" or getattr(parameter, "_is_hf_initialized", False)


def layers_by_module_name(config: SharedCoreConfig, names: list[str], prefix: str) -> dict[str, dict[str, Layout]]:
    """The config's layers under the names they have in the model being loaded.

    `AutoModel` loads what `AutoModelForCausalLM` saved, and the other way round; then one side lacks the base model's
    prefix.

    Raises:
        UserError: the config names a layer that the model has not, or lacks one that it has.
    """
    candidates = [config.layers]
    if prefix:
        candidates.append({name.removeprefix(f"{prefix}."): value for name, value in config.layers.items()})
        candidates.append({f"{prefix}.{name}": value for name, value in config.layers.items()})
    for layers in candidates:
        if set(layers) == set(names):
            return layers
    closest = max(candidates, key=lambda layers: len(set(layers) & set(names)))
    lacking, unknown = sorted(set(names) - set(closest)), sorted(set(closest) - set(names))
    parts = [f"lacks {', '.join(lacking[:3])}"] if lacking else []
    parts += [f"names {', '.join(unknown[:3])}, which the model has not"] if unknown else []
    raise UserError(f"quantization_config {' and '.join(parts)}; config.json and the model do not belong together")
