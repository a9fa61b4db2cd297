# Qwen3 30B-A3B on two nodes of eight GPUs.
NPROC_PER_NODE=8 \
NNODES=$WORLD_SIZE \
NODE_RANK=$RANK \
megatron sft \
    --load Qwen3-30B-A3B-Base-mcore \
    --dataset conversations.jsonl --split_dataset_ratio 0.01 --packing true --max_length 8192 \
    --pipeline_model_parallel_size 2 --expert_model_parallel_size 8 --sequence_parallel true \
    --moe_permute_fusion true --moe_grouped_gemm true --moe_shared_expert_overlap true --moe_aux_loss_coeff 1e-3 \
    --micro_batch_size 1 --global_batch_size 16 --max_epochs 3 \
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 \
    --attention_backend flash --cross_entropy_loss_fusion true \
    --finetune true --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 \
    --save megatron_output/Qwen3-30B-A3B-Base --save_interval 200 --eval_interval 200 \
    --num_workers 8 --dataset_num_proc 8 \
    --no_save_optim true --no_save_rng true
