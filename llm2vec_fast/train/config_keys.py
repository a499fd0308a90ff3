"""Names of official config files that are not fields here: each with the reason, shown to the user.

Sources: transformers.TrainingArguments of 4.40 and 5.23, and the argument classes of the official
run_mntp.py, run_simcse.py and run_supervised.py. A value that would change the result is refused.
"""

from __future__ import annotations

# Another name of a field.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "dtype": "torch_dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}

# Names that say something about a field: `config.py` turns them into it.
TRANSLATED = ("kind", "bf16", "fp16", "use_cpu", "eval_strategy")

_WHY = {
    "this command trains": "do_train do_predict",
    "evaluation runs where validation data or eval_file is given": "do_eval",
    "evaluation forms its own batches and scores": (
        "per_device_eval_batch_size per_gpu_eval_batch_size prediction_loss_only eval_delay "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object eval_on_start "
        "include_for_metrics include_inputs_for_metrics batch_eval_metrics label_names "
        "use_legacy_prediction_loop bf16_full_eval fp16_full_eval jit_mode_eval "
        "metric_for_best_model greater_is_better"
    ),
    "the engine chooses its own kernel: `llm2vec-fast doctor` shows it": "attn_implementation",
    "the engine brings its own kernels": (
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo use_liger_kernel "
        "liger_kernel_config use_ipex tpu_num_cores tpu_metrics_debug use_mps_device use_cache "
        "tf32 fp16_opt_level half_precision_backend fp16_backend torch_empty_cache_steps past_index"
    ),
    "weights are read by the engine itself": "low_cpu_mem_usage trust_remote_code",
    "tokenizer.json is always read with the fast tokenizer": "use_fast_tokenizer",
    "the hub's own login and cache are used: HF_TOKEN, HF_HOME": "cache_dir token use_auth_token",
    "batches are packed, there is no padding": (
        "pad_to_max_length group_by_length length_column_name train_sampling_strategy"
    ),
    "data is tokenised once, without worker processes": (
        "overwrite_cache preprocessing_num_workers streaming dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
        "dispatch_batches split_batches accelerator_config"
    ),
    "the last, incomplete batch of an epoch is left out": "dataloader_drop_last",
    "seed orders the data too": "data_seed",
    "tokens_per_batch bounds the memory instead": "auto_find_batch_size",
    "recompute has no options": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "same seed, same run: the loop is deterministic as far as its kernels are": "full_determinism",
    "the run logs every logging_steps steps, tokens included, to the terminal or as JSON lines": (
        "logging_dir logging_strategy logging_first_step logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node report_to run_name project experiment_id "
        "trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics "
        "include_tokens_per_second include_num_input_tokens_seen"
    ),
    "checkpoints are safetensors and hold all that a run needs to resume": (
        "save_only_model save_safetensors save_on_each_node enable_jit_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint"
    ),
    "nothing is uploaded: use `hf upload` on the output": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push "
        "hub_revision push_to_hub_model_id push_to_hub_organization push_to_hub_token"
    ),
    "torchrun and the engine settle how ranks work together": (
        "local_rank _n_gpu ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph mp_parameters ray_scope "
        "average_tokens_across_devices fsdp_config fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap parallelism_config"
    ),
}
IGNORED = {key: why for why, keys in _WHY.items() for key in keys.split()}

_OTHER_MODEL = "the configuration and tokenizer of model_name_or_path are used"
_ADAMW = "the optimiser is AdamW"
# key: (values that ask for nothing else than what happens anyway, why others are refused)
REFUSED = {
    "loss_class": (("HardNegativeNLLLoss",), "it is the one loss of the contrastive trainings"),
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
        f"{_ADAMW}, fused where torch can",
    ),
    "optim_args": ((), f"{_ADAMW} of adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": ((), _ADAMW),
    "adafactor": ((False,), _ADAMW),
    "lr_scheduler_kwargs": (({},), "the schedules have no further options"),
    "label_smoothing_factor": ((0,), "the losses are those of the paper"),
    "neftune_noise_alpha": ((), "embeddings get no noise"),
    "load_best_model_at_end": ((False,), "the last step is what a run gives"),
    "deepspeed": ((), "to share a large base among GPUs set fsdp to true"),
    "debug": (("", []), "a loss that is not finite stops the run by itself"),
    "model_revision": (("main",), "download that revision and give its directory"),
    "tokenizer_name": ((), _OTHER_MODEL),
    "config_name": ((), _OTHER_MODEL),
    "config_overrides": ((), _OTHER_MODEL),
    "model_type": ((), "training starts from a model, never from scratch"),
}
