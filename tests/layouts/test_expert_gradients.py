"""The gradient of a model with experts and latent attention depends neither on the cut of a batch nor on the layout."""

import json
from pathlib import Path

from litgpt.model.config import Config
from tests.layouts import gradient_worker
from tests.processes import join_ranks, start_ranks

SHAPE = Config(
    **{
        **gradient_worker.SHAPE.to_dict(), "bias": False, "mlp_class_name": "LLaMAMoE", "n_expert": 6,
        "n_expert_per_token": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "shared_expert_size": 10,
        "shared_expert_gate": True, "expert_bias": True, "router_score": "sigmoid", "router_correction": True,
        "norm_topk_prob": True,
        "latent_attention": {
            "q_lora_rank": 8, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5
        },
    }
)  # fmt: skip


def worker(folder: Path) -> None:
    """One rank of the comparison, with this file's shape."""
    gradient_worker.SHAPE = SHAPE
    gradient_worker.worker(folder)


def test_gradient_is_the_same_for_every_cut_and_layout(tmp_path: Path) -> None:
    before, gradient_worker.SHAPE = gradient_worker.SHAPE, SHAPE
    try:
        gradient_worker.save_reference(tmp_path)
        worst = gradient_worker.compare_layouts(tmp_path, 0, 1)
    finally:
        gradient_worker.SHAPE = before
    assert join_ranks(start_ranks(worker, tmp_path, folder=tmp_path, ranks=2)) == [0, 0]
    worst |= json.loads((tmp_path / "2.json").read_text())
    assert len(worst) == 4 + 2 * 3
    assert max(worst.values()) < 1e-12, worst
