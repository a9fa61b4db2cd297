# Qwen2.5 14B on eight GPUs, on packed conversations.
NPROC_PER_NODE=8 \
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
megatron sft \
    --model Qwen/Qwen2.5-14B \
    --dataset conversations.jsonl --split_dataset_ratio 0.01 --packing true --max_length 8192 \
    --tensor_model_parallel_size 4 --sequence_parallel true \
    --micro_batch_size 1 --global_batch_size 16 --train_iters 2000 \
    --recompute_granularity selective --attention_backend flash --cross_entropy_loss_fusion true \
    --finetune true --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 \
    --save megatron_output/Qwen2.5-14B --save_interval 200 --eval_interval 200 --eval_iters 50 \
    --num_workers 8 --dataset_num_proc 8 --load_from_cache_file true \
    --no_save_optim true --no_save_rng true
