"""How the reference MoE is made: byte-level BPE, an OLMoE of 64 experts, and one run of the Transformers Trainer."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moe_compress.data.documents import text_documents
from moe_compress.data.packing import joined
from moe_compress.reference.data import Split, stdlib_documents

END_OF_TEXT = "<|endoftext|>"


@dataclass
class ReferenceRecipe:
    """Every number of the recipe. The defaults made the model that ships with the package."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_experts: int = 64
    num_experts_per_tok: int = 8
    sequence_length: int = 512
    batch_size: int = 8
    max_steps: int = 4000
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    load_balancing: float = 0.01
    save_steps: int = 500
    seed: int = 42

    def model_config(self) -> OlmoeConfig:
        """The OLMoE configuration of this recipe (token 0 is end-of-text and padding)."""
        return OlmoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            max_position_embeddings=2 * self.sequence_length,
            router_aux_loss_coef=self.load_balancing,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )


def train_tokenizer(vocab_size: int, split: Split = "train") -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the documents of one split; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_documents(split), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def packed_ids(tokenizer: Any, split: Split, length: int, seed: int = 42) -> torch.Tensor:
    """All documents of a split, shuffled, joined by end-of-text and cut to rows: int64 `[rows, length]`."""
    documents = list(stdlib_documents(split))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = joined(text_documents((documents[i] for i in order), tokenizer), length)
    return torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64)).view(-1, length)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of `E * sum_e f_e p_e` (Switch Transformer, eq. 4), 1 when balanced.

    Layer by layer on purpose: the loss in Transformers pools all layers, so that an expert dead in one layer
    can be made up for by a busy one in another.

    Args:
        router_logits: one `[tokens, experts]` tensor per MoE layer.
        top_k: experts per token.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        load = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0).mean(0) / top_k
        losses.append(logits.shape[-1] * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


class _ReferenceTrainer(Trainer):
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Checkpoints hold one matrix per expert. The Trainer would load them without the conversion that
        # `from_pretrained` applies, find no name that fits the experts, warn, and go on with random ones.
        state = OlmoeForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict()
        target: Any = model or self.model
        target.load_state_dict(state)

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_router_logits=True)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        config = model.config
        if model.training:
            balance = load_balancing_loss(outputs.router_logits, config.num_experts_per_tok)
            loss = loss + config.router_aux_loss_coef * balance
        return (loss, outputs) if return_outputs else loss


def train_reference(output_dir: Path, recipe: ReferenceRecipe | None = None) -> Path:
    """Train tokenizer and model and write them, in bf16, to `output_dir`; a killed run resumes where it was.

    Returns:
        `output_dir`, which appears only when the training is complete.
    """
    recipe = recipe or ReferenceRecipe()
    work = output_dir.with_name(output_dir.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    if (work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    else:
        tokenizer = train_tokenizer(recipe.vocab_size)
        tokenizer.save_pretrained(work)
    set_seed(recipe.seed)
    model: Any = OlmoeForCausalLM(recipe.model_config())
    trainer = _ReferenceTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=recipe.max_steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            lr_scheduler_type="linear",
            weight_decay=recipe.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            seed=recipe.seed,
            use_cpu=not torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=recipe.save_steps,
            save_steps=recipe.save_steps,
            save_total_limit=1,
            logging_steps=50,
            report_to=[],
        ),
        train_dataset=_Rows(packed_ids(tokenizer, "train", recipe.sequence_length, recipe.seed)),
        eval_dataset=_Rows(packed_ids(tokenizer, "validation", recipe.sequence_length, recipe.seed)),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    os.replace(partial, output_dir)
    return output_dir
