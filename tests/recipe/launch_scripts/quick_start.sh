#!/bin/sh
# Qwen2.5 7B on two GPUs: convert, train, convert back.
MODEL=Qwen/Qwen2.5-7B-Instruct
CONVERTED=Qwen2.5-7B-Instruct-mcore

swift export --model $MODEL --to_mcore true --torch_dtype bfloat16 --output_dir $CONVERTED --test_convert_precision true

export PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True'
NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --load ${CONVERTED} --finetune true \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
              'swift/self-cognition#500' \
    --tensor_model_parallel_size 2 --sequence_parallel true \
    --micro_batch_size 16 --global_batch_size 16 --max_epochs 1 \
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 \
    --save megatron_output/Qwen2.5-7B-Instruct --save_interval 100 \
    --max_length 2048 --system 'You are a helpful assistant.' \
    --num_workers 4 --dataset_num_proc 4 \
    --no_save_optim true --no_save_rng true \
    --model_author swift --model_name swift-robot 2>&1 | tee train.log

swift export --mcore_model megatron_output/Qwen2.5-7B-Instruct/v0 --to_hf true --torch_dtype bfloat16 \
    --output_dir megatron_output/Qwen2.5-7B-Instruct/v0-hf
