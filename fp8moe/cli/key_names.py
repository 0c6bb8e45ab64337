"""Names that people type and that are no keys here: the key of each, for the error of an unknown key or option.

The names are those of transformers' TrainingArguments and configurations, of Megatron-LM's arguments and of
torchtitan's configuration. A name is looked up whole, then by its last part (`training.local_batch_size`), in lower
case, its hyphens as underscores. Refused: to accept them as second names of the keys; a setting with two names would
have two values.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from fp8moe.errors import ConfigError

# Key here: what others call it.
_NAMES = {
    "steps": "max_steps train_iters num_steps num_train_steps total_steps iterations train_steps",
    "seq_len": "seq_length sequence_length context_length block_size max_seq_length",
    "seed": "random_seed data_seed",
    "run_dir": "output_dir save out_dir work_dir dump_folder logdir",
    "resume": "load resume_from_checkpoint load_checkpoint resume_from",
    "init_from": "model_name_or_path pretrained_model_name_or_path pretrained initial_load_path init_ckpt",
    "name": "run_name experiment_name exp_name wandb_exp_name",
    "recompute": "recompute_activations recompute_granularity recompute_modules recompute_method "
    "gradient_checkpointing activation_checkpointing activation_checkpoint activation_checkpoint.mode",
    "profile": "enable_profiling use_pytorch_profiler profiling",
    "batch.sequences": "batch_size global_batch_size train_batch_size total_batch_size gbs bs",
    "batch.micro_batch": "micro_batch_size mbs per_device_train_batch_size local_batch_size microbatch_size "
    "device_batch_size train_micro_batch_size_per_gpu per_device_batch_size",
    "batch.ramp_from": "rampup_batch_size",
    "optimizer.schedule.peak": "lr learning_rate max_lr peak_lr lr_max base_lr",
    "optimizer.schedule.warmup_steps": "warmup_iters lr_warmup_iters warmup lr_warmup_steps num_warmup_steps",
    "optimizer.schedule.phases": "lr_decay_style lr_wsd_decay_style decay_type lr_decay_iters lr_decay_steps "
    "decay_ratio min_lr min_lr_factor",
    "lr_schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optimizer.kind": "optim optimizer_name optimizer_type optimizer.name",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_norm": "max_norm max_grad_norm clip_grad grad_clip gradient_clipping gradient_clip_val",
    "optimizer.sharding": "zero zero_stage zero_optimization use_distributed_optimizer distributed_optimizer fsdp "
    "data_parallel_shard_degree deepspeed",
    "optimizer.moments": "exp_avg_dtype exp_avg_sq_dtype",
    "parallel.pp": "pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel_degree pp_size",
    "parallel.dp": "data_parallel_size dp_size data_parallel_replicate_degree ddp",
    "parallel.ep": "expert_parallel_size expert_model_parallel_size expert_parallel_degree ep_size",
    "parallel.cp": "context_parallel_size context_parallel_degree cp_size ulysses_sequence_parallel_size",
    "parallel.schedule": "pipeline_schedule pipeline_parallel_schedule pp_schedule",
    "parallel.layout": "pipeline_model_parallel_layout pipeline_parallel_split_points",
    "parallel.dispatcher": "moe_token_dispatcher_type token_dispatcher expert_parallel_comm_backend",
    "parallel.capacity_factor": "moe_expert_capacity_factor expert_capacity moe_capacity_factor",
    "parallel.timeout": "distributed_timeout_minutes ddp_timeout train_timeout_seconds",
    "parallel.startup_timeout": "init_timeout_seconds",
    "precision": "dtype torch_dtype mixed_precision params_dtype fp8_format fp8_recipe fp8 bf16 fp32",
    "epochs": "num_epochs num_train_epochs max_epochs",
    "data.paths": "data_path train_data_path dataset dataset_path dataset_name train_file train_data",
    "data.weights": "data_weights mixture blend",
    "data.validation_paths": "valid_data_path validation_file eval_dataset val_data",
    "data.validation_share": "split validation_split_percentage val_split eval_ratio",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name tokenizer_type hf_assets_path",
    "data.document_mask": "reset_attention_mask attn_mask_type block_causal",
    "data.packing": "sample_packing pack_sequences packing_strategy",
    "data.fim_tokens": "fim_prefix_token fim_suffix_token fim_middle_token",
    "data.prefetch": "num_workers dataloader_num_workers prefetch_factor dataloader_prefetch_factor",
    "data.cache_dir": "data_cache_path",
    "checkpoint.every": "save_interval save_steps checkpoint_interval ckpt_interval checkpoint.interval save_every",
    "checkpoint.keep": "save_total_limit keep_latest_k max_checkpoints max_to_keep",
    "checkpoint.background": "async_save async_mode async_checkpoint",
    "checkpoint.path": "checkpoint_dir ckpt_dir save_dir checkpoint.folder",
    "validation.every": "eval_interval eval_steps eval_every val_interval validation.freq eval_freq",
    "validation.samples": "eval_iters eval_samples max_eval_samples",
    "logging.every": "log_interval logging_steps log_freq log_every",
    "logging.wandb": "report_to use_wandb enable_wandb",
    "logging.wandb_project": "project project_name",
    "model.dim": "hidden_size d_model n_embd embed_dim embedding_dim hidden_dim",
    "model.num_layers": "num_hidden_layers n_layer n_layers layers",
    "model.dense_hidden": "intermediate_size ffn_hidden_size ffn_dim inter_dim d_ff",
    "model.num_dense_layers": "first_k_dense_replace n_dense_layers moe_layer_freq",
    "model.dense_layers": "mlp_only_layers",
    "model.vocab_size": "padded_vocab_size",
    "model.max_seq_len": "max_position_embeddings n_positions max_sequence_length",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon layer_norm_eps norm_epsilon",
    "model.init_std": "initializer_range init_method_std",
    "model.mtp_depth": "mtp_num_layers num_nextn_predict_layers num_mtp_modules",
    "model.mtp_weight": "mtp_loss_scaling_factor mtp_loss_weight",
    "model.attention.num_heads": "num_attention_heads n_head n_heads heads",
    "model.attention.num_kv_heads": "num_key_value_heads num_query_groups n_kv_heads",
    "model.attention.head_dim": "kv_channels",
    "model.attention.nope_dim": "qk_nope_head_dim qk_head_dim",
    "model.attention.rope_dim": "qk_rope_head_dim qk_pos_emb_head_dim",
    "model.attention.v_dim": "v_head_dim",
    "model.attention.rope_theta": "rotary_base rope_base",
    "model.attention.yarn": "rope_scaling rope_factor",
    "model.attention.window": "sliding_window window_size",
    "model.attention.backend": "attn_implementation attention_backend use_flash_attn flash_attention",
    "model.attention.qkv_bias": "attention_bias add_qkv_bias",
    "model.attention.qk_norm": "qk_layernorm use_qk_norm",
    "model.experts.num_experts": "n_routed_experts num_local_experts num_moe_experts n_experts",
    "model.experts.hidden": "moe_intermediate_size moe_ffn_hidden_size moe_inter_dim moe_hidden_dim",
    "model.experts.num_shared": "n_shared_experts num_shared_experts moe_shared_expert_intermediate_size",
    "model.router.topk": "num_experts_per_tok top_k moe_router_topk num_active_experts n_activated_experts",
    "model.router.num_groups": "n_group moe_router_num_groups n_expert_groups num_expert_groups",
    "model.router.top_groups": "topk_group moe_router_group_topk n_limited_groups num_limited_groups",
    "model.router.score": "scoring_func moe_router_score_function score_func",
    "model.router.normalize_topk": "norm_topk_prob route_norm",
    "model.router.route_scale": "routed_scaling_factor moe_router_topk_scaling_factor",
    "model.router.aux_loss_alpha": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef",
    "model.router.bias_gamma": "moe_router_bias_update_rate load_balance_coeff bias_update_speed",
    "model.router.force_balance": "moe_router_force_load_balancing debug_force_load_balance",
}
# What is no setting: what others call it, under the whole advice.
_ADVICE = {
    "a step accumulates batch.sequences / (dp x batch.micro_batch) micro-batches: use batch.micro_batch=...": (
        "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches num_microbatches"
    ),
    "no matrix is split over ranks here: use parallel.ep=..., parallel.pp=..., or parallel.cp=... for long sequences": (
        "tp tp_size tensor_parallel_size tensor_model_parallel_size tensor_parallel_degree sequence_parallel"
    ),
    "the launcher starts the processes: use fp8moe train --nproc N, or torchrun": (
        "world_size nproc nproc_per_node num_gpus gpus n_gpus nnodes num_nodes devices num_processes"
    ),
    "a run has a number of steps, of batch.sequences x seq_len tokens each: use steps=...": (
        "train_samples train_tokens token_budget"
    ),
}
ALIASES = {name: key for key, names in _NAMES.items() for name in names.split()}
ADVICE = {name: advice for advice, names in _ADVICE.items() for name in names.split()}
_SAY_THE_VALUE = ("fp8", "bf16", "fp32")  # --bf16 is precision=bf16
# Keys that take other values than those of the same meaning elsewhere: zero_stage=1, report_to=wandb, split=949,50,1.
_OTHER_VALUES = {
    *("precision", "recompute", "lr_schedule", "optimizer.kind", "optimizer.sharding", "optimizer.schedule.phases"),
    *("optimizer.moments", "parallel.schedule", "parallel.layout", "parallel.dispatcher", "parallel.timeout"),
    *("data.paths", "data.weights", "data.validation_paths", "data.validation_share", "data.tokenizer"),
    *("data.packing", "data.fim_tokens", "data.prefetch"),
    *("data.document_mask", "batch.ramp_from", "logging.wandb", "model.num_dense_layers", "model.attention.yarn"),
    *("model.attention.backend", "model.attention.qk_norm", "model.experts.num_shared", "model.router.score"),
}


def advice_for(name: str, value: str | None = None) -> str | None:
    """What to do in place of setting `name`, which is no key: "use optimizer.schedule.peak=3e-4"; None: unknown.

    value: what was to be given to it, as typed; None: "..." stands for it.
    """
    plain = name.lower().replace("-", "_")
    for word in (plain, plain.rpartition(".")[2]):
        if word in ADVICE:
            return ADVICE[word]
        if word in ALIASES:
            key = ALIASES[word]
            given = word if word in _SAY_THE_VALUE else "..." if value is None or key in _OTHER_VALUES else value
            return f"use {key}={given}"
    return None


def unknown_key(key: str, known: Sequence[str], value: str | None = None) -> ConfigError:
    """The error for a key that does not exist: the key that another program's name means, or the nearest of `known`."""
    if (advice := advice_for(key, value)) is not None:
        return ConfigError(f"{key} is not a key: {advice}")
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last][:1]  # a right name in the wrong group
    near = near or get_close_matches(key, known, 1, 0.5)
    instead = (
        f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known[:12])}; fp8moe keys lists all"
    )
    return ConfigError(f"unknown key {key}: {instead}")


def setting_for(option: str, value: str | None, known: Sequence[str]) -> str | None:
    """What to write for a setting that was typed as an option (`--steps 20`); None where `option` means no setting."""
    name = option.lstrip("-").replace("-", "_")
    if (advice := advice_for(name, value)) is not None:
        return advice.replace("use ", "write ", 1) if advice.startswith("use ") else advice
    keys = [key for key in known if key == name] or [key for key in known if key.rpartition(".")[2] == name]
    return f"write {keys[0]}={'...' if value is None else value}" if keys else None
