"""Two published models, written out: what configs/model/*.yaml must say, and what formulas are tested on."""

from tests.model.shapes import model_config

DSV3_671B = model_config(
    vocab_size=129280, dim=7168, num_layers=61, num_dense_layers=3, num_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    nope_dim=128, rope_dim=64, v_dim=128, dense_hidden=18432, expert_hidden=2048, num_experts=256, topk=8,
    num_shared_experts=1, num_groups=8, top_groups=4, route_scale=2.5, mtp_depth=1,
)  # fmt: skip
DSV2_LITE_16B = model_config(
    vocab_size=102400, dim=2048, num_layers=27, num_dense_layers=1, num_heads=16, kv_lora_rank=512, nope_dim=128,
    rope_dim=64, v_dim=128, dense_hidden=10944, expert_hidden=1408, num_experts=64, topk=6, num_shared_experts=2,
    score="softmax", normalize_topk=False,
)  # fmt: skip
