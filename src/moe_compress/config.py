"""Every setting of the product: one dataclass per group, each field with its documentation (which is the `--help`).

`moe_compress.settings` composes them with Hydra; nothing here knows of files or of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help: str, choices: tuple[Any, ...] | None = None) -> Any:
    """A dataclass field with its documentation and, where the values are few, the allowed ones."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The model to compress, which is also the teacher."""

    name: str = setting("reference", "Hub id, local directory, or 'reference' for the MoE that ships with the package.")
    revision: str | None = setting(None, "Branch, tag or commit on the hub.")
    trust_remote_code: bool = setting(False, "Run model code that comes with the checkpoint.")
    dtype: str = setting("auto", "Type to compute in: auto (as stored), bfloat16, float16 or float32.")


@dataclass
class DatasetConfig:
    """A source of text: `stdlib` (the Python standard library), a local file or directory, or a hub id."""

    name: str = setting("stdlib", "'stdlib', a local .txt/.jsonl/.parquet file or directory, or a hub id.")
    config_name: str | None = setting(None, "Configuration of the data set on the hub.")
    split: str = setting("train", "Split to read; stdlib has train, validation and test.")
    streaming: bool = setting(False, "Read without downloading the whole data set.")
    max_samples: int | None = setting(None, "Packed sequences to use at most; null takes all.")
    max_length: int = setting(2048, "Tokens per packed sequence.")
    text_column: str = setting("text", "Column that holds the text.")
    messages_column: str | None = setting(
        None,
        "Column of conversations (lists of role and content), rendered by the tokenizer's chat template; null reads "
        "text_column.",
    )
    mask_prompts: bool = setting(True, "Of conversations, train on the assistant's turns alone.")
    packing: str = setting(
        "pack",
        "Documents to rows: pack (end to end; attention runs across them), isolate (end to end; attention and "
        "positions start anew at each), truncate (one a row, cut at max_length; no padding is kept).",
        ("pack", "isolate", "truncate"),
    )
    shuffle_buffer: int = setting(10000, "Documents held for shuffling a stream.")


@dataclass
class CalibrationConfig:
    """Text run through the teacher to weigh what each expert really sees (Gram matrices)."""

    enabled: bool = setting(True, "Fit on activations; false fits on the weights alone.")
    shrinkage: float = setting(0.1, "How far each expert's Gram matrix is moved towards the mean of its layer.")
    batch_size: int = setting(4, "Sequences per forward pass.")
    sequential: bool = setting(
        False, "Later layers see the outputs of the layers already compressed; fits one layer after another."
    )
    fisher: bool = setting(
        True,
        "Also weigh outputs by the Fisher information, so that errors count by what they do to predictions; takes a "
        "backward pass, the hidden states before every layer on disk, and compression.parameterization=delta.",
    )
    trials: int = setting(
        16,
        "Greedy ranks: layers, spread over the depth, that are compressed on trial, each alone, to measure what their "
        "errors really do to the predictions; 0 trusts the estimate.",
    )
    dataset: DatasetConfig = setting(lambda: DatasetConfig(max_samples=64), "Text to calibrate on.")


@dataclass
class CompressionConfig:
    """How experts become low-rank factors and what they share: a basis of the inputs, cores, or both."""

    method: str = setting(
        "closed_form",
        "Fit: closed_form (alternating core and truncated SVD), adam (gradient descent on the reconstruction).",
        ("closed_form", "adam"),
    )
    rank: int | None = setting(64, "Rank of the wrapper on each side; the folded delta has twice this rank.")
    target_ratio: float | None = setting(None, "Share of the expert bytes to keep; overrides rank.")
    target_bytes: int | None = setting(None, "Expert bytes to keep; overrides rank.")
    rank_multiple: int = setting(
        8, "Round delta ranks found from a budget down to a multiple of this (where above it)."
    )
    parameterization: str = setting(
        "delta", "What is stored and trained: delta (core + A B) or wrapper ((I+UV')C(I+UV')).", ("delta", "wrapper")
    )
    cores: int | str = setting(
        "auto",
        "Cores per layer and projection: 0 none (low-rank experts), 1 shared core, more for groups of experts "
        "with a core each; auto takes for each projection which of 0 and 1 fits best at the same bytes, groups also "
        "tries 2 and 4 from 16 experts on.",
    )
    input_basis: float | str = setting(
        "auto",
        "Size of a basis of the inputs of the up projection that all its deltas share, as a share of the inputs; 0 for "
        "none, auto takes for each layer which of 0, 1/4, 1/3, 1/2 and 2/3 fits best at the same bytes.",
    )
    allocation: str = setting(
        "greedy",
        "Ranks from a budget: greedy (where they lower the error most: with calibration.fisher that of the "
        "predictions, else that of the outputs, or of the weights where there is no calibration or a sequential one) "
        "or uniform (the same share of the bytes for every projection).",
        ("uniform", "greedy"),
    )
    alignment: str = setting(
        "weights", "Permute each expert's neurons towards the core before fitting.", ("none", "weights")
    )
    iterations: int = setting(5, "Alternations of the closed form.")
    num_steps: int = setting(1000, "Adam steps per projection.")
    lr: float = setting(1e-3, "Adam learning rate.")
    device: str = setting("auto", "Device to fit on: auto, cpu, cuda, cuda:1 ...")
    dtype: str = setting("auto", "Type of the stored cores and factors: auto (as the source), bfloat16, float32.")
    calibration: CalibrationConfig = setting(CalibrationConfig, "Activations to fit on.")


@dataclass
class GenerationConfig:
    """How the teacher's logits are written."""

    encoder: str = setting(
        "topk",
        "What is kept of each distribution: topk (the largest logits) or sample (random draws: unbiased, smaller).",
        ("topk", "sample"),
    )
    top_k: int = setting(64, "Logits kept per token, with encoder=topk.")
    samples: int = setting(50, "Draws per token, with encoder=sample.")
    sample_temperature: float = setting(
        1.0, "Temperature of the distribution that is drawn from; the loss must have this temperature, or 1."
    )
    batch_size: int = setting(32, "Sequences per teacher forward pass.")
    force_regenerate: bool = setting(False, "Make the cache again although it is complete.")
    worker_id: int = setting(0, "Which part of the data this process writes.")
    total_workers: int = setting(1, "Into how many parts the data is divided.")
    sequences_per_file: int = setting(512, "Sequences in one HDF5 file.")
    compression: str = setting("gzip", "HDF5 compression: gzip, lzf or none.", ("gzip", "lzf", "none"))


@dataclass
class TeacherConfig:
    """The teacher of the distillation."""

    model_path: str | None = setting(None, "Teacher checkpoint; null takes model.name.")
    use_cached_logits: bool = setting(True, "Read the teacher's logits from the cache; false runs the teacher live.")
    cache_dir: str | None = setting(None, "Cache directory, may be shared by runs; null takes RUN/teacher_logits.")
    device_map: str | None = setting(
        None,
        "How accelerate spreads a teacher that writes logits over GPUs, main memory and disk; null puts it on one "
        "device.",
        ("auto", "balanced", "balanced_low_0", "sequential"),
    )
    max_memory: dict[str, str] = setting(
        {}, "Memory per device for device_map, such as {0: 70GiB, cpu: 200GiB}; empty takes what is free."
    )
    offload_folder: str | None = setting(None, "Directory for the layers that device_map puts on disk.")
    fsdp: bool = setting(False, "Shard the teacher over the ranks of torchrun (FSDP2), live or writing logits.")
    generation: GenerationConfig = setting(GenerationConfig, "How the cache is made.")


@dataclass
class LossConfig:
    """(1 - alpha) * cross-entropy + alpha * temperature^2 * divergence, and terms that compare the layers."""

    alpha: float = setting(0.5, "Weight of the KL term, from 0 (cross-entropy only) to 1 (teacher only).")
    temperature: float = setting(2.0, "Temperature of both distributions in the KL term.")
    kl_reduction: str = setting("batchmean", "batchmean (mean over tokens) or sum.", ("batchmean", "sum"))
    tail: str = setting(
        "keep", "Mass outside the cached top-k: keep (as one more class) or ignore.", ("keep", "ignore")
    )
    divergence: str = setting(
        "forward_kl",
        "forward_kl (teacher || student), reverse_kl (student || teacher) or jsd (Jensen-Shannon).",
        ("forward_kl", "reverse_kl", "jsd"),
    )
    router_weight: float = setting(
        0.0, "Weight of the KL between the routers of teacher and student; needs a live teacher."
    )
    hidden_weight: float = setting(
        0.0, "Weight of the relative squared error of the MoE layers' outputs; needs a live teacher."
    )


@dataclass
class SpikeConfig:
    """What to do when a step's loss or gradient norm jumps above what the steps before it had."""

    action: str = setting(
        "none",
        "none, skip (leave this step's update out) or rollback (return to the last checkpoint, go on in other data).",
        ("none", "skip", "rollback"),
    )
    loss_factor: float = setting(2.0, "A spike is a loss above this many medians ...")
    grad_norm_factor: float = setting(10.0, "... or a gradient norm above this many medians.")
    window: int = setting(50, "Steps that the running medians are taken over; half of them must have been seen.")
    limit: int = setting(3, "Spikes in a row, or returns to one checkpoint, after which training stops.")


@dataclass
class TrainingConfig:
    """Optimization; the names are those of the Transformers Trainer."""

    num_train_epochs: float = setting(3, "Passes over the data, unless max_steps or stages say otherwise.")
    max_steps: int = setting(-1, "Optimizer steps in all; -1 goes by epochs.")
    per_device_train_batch_size: int = setting(2, "Sequences per device and forward pass.")
    gradient_accumulation_steps: int = setting(8, "Forward passes per optimizer step.")
    learning_rate: float = setting(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = setting("cosine", "Schedule, by its name in Transformers.")
    warmup_steps: int = setting(100, "Steps of linear warm-up.")
    adam_beta1: float = setting(0.9, "AdamW beta1.")
    adam_beta2: float = setting(0.999, "AdamW beta2.")
    weight_decay: float = setting(0.01, "AdamW weight decay.")
    max_grad_norm: float = setting(1.0, "Gradient clipping.")
    bf16: bool = setting(True, "Train under bf16 autocast.")
    gradient_checkpointing: bool = setting(False, "Recompute activations to save memory.")
    torch_compile: bool = setting(False, "Compile the student with torch.compile.")
    torch_compile_backend: str = setting(
        "inductor", "Backend of torch.compile.", ("inductor", "cudagraphs", "aot_eager", "eager")
    )
    deepspeed: str | None = setting(
        None, "zero2, zero3 or a DeepSpeed configuration file: train under DeepSpeed instead of DDP or FSDP."
    )
    balance_factors: bool = setting(
        False, "Give the two factors of each delta or wrapper the same norm before training; their product stays."
    )
    spikes: SpikeConfig = setting(SpikeConfig, "Spikes of the loss or of the gradient norm.")
    save_steps: int = setting(500, "Steps between checkpoints.")
    save_total_limit: int = setting(3, "Checkpoints kept (never dropping the zero-shot or one not yet evaluated).")
    logging_steps: int = setting(10, "Steps between log lines.")
    report_to: list[str] = setting([], "Trackers beside the JSON lines: wandb, tensorboard, trackio.")


@dataclass
class LrMultiplier:
    """Learning-rate multiplier of the parameters whose name matches; 0 freezes them."""

    pattern: str = setting("", "Regular expression, searched in the parameter's name.")
    lr_multiplier: float = setting(1.0, "Multiplier of the learning rate.")


@dataclass
class StageConfig:
    """One stage of the distillation; null means as in distillation.training and distillation.loss."""

    name: str = setting("", "Name in logs and tables.")
    trainable: list[str] = setting([".*"], "Regular expressions of the parameters that train in this stage.")
    kind: str = setting(
        "train",
        "train (end to end, on the loss) or blockwise (each MoE layer by itself, towards the teacher's layer).",
        ("train", "blockwise"),
    )
    steps: int = setting(0, "Optimizer steps of this stage.")
    tokens: int | None = setting(None, "Tokens of this stage, rounded up to whole steps; instead of steps.")
    learning_rate: float | None = setting(None, "Peak learning rate.")
    lr_scheduler_type: str | None = setting(None, "Schedule, by its name in Transformers.")
    warmup_steps: int | None = setting(None, "Steps of linear warm-up.")
    alpha: float | None = setting(None, "Weight of the KL term.")
    temperature: float | None = setting(None, "Temperature of the KL term.")


def _default_lr_multipliers() -> list[LrMultiplier]:
    return [
        LrMultiplier(r"\.experts\.", 1.0),
        LrMultiplier(r"(embed_tokens|lm_head)\.", 0.1),
        LrMultiplier(r"norm", 0.5),
        LrMultiplier(r"\.(gate|router)\.", 0.5),
    ]


@dataclass
class DistillationConfig:
    """Recovering quality from the original model."""

    teacher: TeacherConfig = setting(TeacherConfig, "The teacher and its cached logits.")
    dataset: DatasetConfig = setting(DatasetConfig, "Text to distil on.")
    loss: LossConfig = setting(LossConfig, "The blended loss.")
    training: TrainingConfig = setting(TrainingConfig, "Optimization.")
    parameter_lr_multipliers: list[LrMultiplier] = setting(
        _default_lr_multipliers, "Learning-rate multipliers; the first match wins."
    )
    default_lr_multiplier: float = setting(1.0, "Multiplier of the parameters that no pattern matches.")
    stages: list[StageConfig] = setting([], "Stages in order; empty means one stage that trains everything.")


@dataclass
class FsdpConfig:
    """Sharding of the student under torchrun (FSDP2)."""

    enabled: bool = setting(False, "Shard parameters, gradients and optimizer state over the ranks.")
    sharding_strategy: str = setting("FULL_SHARD", "FULL_SHARD or SHARD_GRAD_OP.", ("FULL_SHARD", "SHARD_GRAD_OP"))
    param_dtype: str = setting("bfloat16", "Type of the parameters in computation.")
    reduce_dtype: str = setting("float32", "Type in which gradients are reduced.")
    cpu_offload: bool = setting(False, "Keep sharded state in main memory.")


@dataclass
class EvaluationConfig:
    """What checkpoints are measured by."""

    tasks: dict[str, int] = setting({"wikitext": -1}, "lm_eval tasks and their few-shot examples (-1: task's own).")
    include_path: str | None = setting(None, "Directory of further lm_eval task YAMLs.")
    limit: int | None = setting(None, "Documents per task at most.")
    batch_size: str = setting("auto", "Sequences per forward pass of lm_eval, or auto.")
    perplexity: DatasetConfig = setting(
        lambda: DatasetConfig(split="test"), "Held-out text for perplexity and agreement with the teacher."
    )
    metric: str = setting("perplexity", "Metric that chooses RUN/best.")
    greater_is_better: bool = setting(False, "Whether a larger metric is better.")
    poll_seconds: float = setting(60.0, "Seconds between looks for new checkpoints.")
    order: str = setting(
        "arrival",
        "Which waiting checkpoint the watcher takes first: arrival (the earliest) or newest.",
        ("arrival", "newest"),
    )
    devices: list[str] = setting(
        [], "Devices of the evaluator, for watch one worker process each; empty takes the freest GPU, or the CPU."
    )
    gpus_per_model: int = setting(1, "GPUs that share one model.")
    baseline: bool = setting(
        False, "With `run` alone: also compress, distil and measure plain per-expert SVD at the same bytes."
    )
    loop_samples: int = setting(
        16, "Held-out beginnings continued at a low temperature to count texts that end in a loop; 0 leaves it out."
    )
    generate_tokens: int = setting(96, "Tokens of the texts that models write: samples in the report, loop check.")
    prompt: str = setting("def ", "Prompt of the text samples in the report.")


@dataclass
class OutputConfig:
    """Where runs are written."""

    base_dir: str = setting(
        "runs", "Directory of the runs; a run is base_dir/experiment_name unless run=PATH is given."
    )


@dataclass
class Config:
    """All settings of a run."""

    experiment_name: str = setting("moe-compress", "Name of the run.")
    wandb_project: str = setting("moe-compression", "Project for wandb, when distillation.training.report_to names it.")
    gpu_ids: list[int] = setting(
        [],
        "GPUs that stages may use, by their numbers on the machine whatever CUDA_VISIBLE_DEVICES says; empty means all "
        "that are visible.",
    )
    seed: int = setting(42, "Seed of every random choice.")
    run: str | None = setting(None, "Run directory; null is output.base_dir/experiment_name.")
    model: ModelConfig = setting(ModelConfig, "The model to compress.")
    output: OutputConfig = setting(OutputConfig, "Where runs are written.")
    compression: CompressionConfig = setting(CompressionConfig, "Factorization of the experts.")
    distillation: DistillationConfig = setting(DistillationConfig, "Recovery by distillation.")
    fsdp: FsdpConfig = setting(FsdpConfig, "Sharded training.")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "Measurement.")
