"""What the families call their attention projections and heads; pure lists, read by ``roles.py``."""

import re

QUERY_KEY_VALUE = frozenset(
    [
        "qkv",
        "qkvs",
        "wqkv",
        "to_qkv",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "kv_proj",
        "query_proj",
        "key_proj",
        "value_proj",
        "q_lin",
        "k_lin",
        "v_lin",
        "wq",
        "wk",
        "wv",
        "to_q",
        "to_k",
        "to_v",
        "to_kv",
        "to_query",
        "to_key",
        "to_value",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj",
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "q_attn",
        "in_proj_qkv",
        "linear_q",
        "linear_k",
        "linear_v",
        "project_q",
        "project_k",
        "project_v",
        "projection_query",
        "projection_key",
        "projection_value",
        "q_head",
        "k_head",
        "v_head",
        "queries",
        "keys_values",
        "queries_keys_values",
    ]
)
"""Names that mean a query, key or value projection wherever they stand."""
SHORT_QUERY_KEY_VALUE = frozenset(
    [
        "q",
        "k",
        "v",
        "kv",
        "qk",
        "qv",
        "query",
        "key",
        "value",
        "in_proj",
        "w_q",
        "w_k",
        "w_v",
        "query_global",
        "key_global",
        "value_global",
        "v_gate",
    ]
)
"""Names that mean one inside an attention block, or beside each other."""
OUTPUT = frozenset(
    [
        "o",
        "proj",
        "dense",
        "out_proj",
        "o_proj",
        "c_proj",
        "out_lin",
        "out",
        "wo",
        "to_out",
        "final",
        "output",
        "linear_out",
        "attention_out",
        "post_proj",
        "projection",
    ]
)
"""Names of the output projection, in the block of a query, key or value projection."""
ATTENTION = re.compile(r"att(?!_mlp)|xca|mhsa|mha", re.IGNORECASE)
NOT_PROJECTION = re.compile(r"mlp|ffn|feed_forward|rel_pos|pos_embed", re.IGNORECASE)
WRAPPERS = frozenset({"linear", "conv", "convolution", "c", "ln", "base_layer"})
"""Names of the one layer inside a projection that is itself a small module (``attn.qkv.linear``)."""
HEADS = frozenset(
    [
        "head",
        "heads",
        "head_dist",
        "classifier",
        "classification_head",
        "cls_head",
        "fc",
        "score",
        "qa_outputs",
        "pre_classifier",
    ]
)
OWN_HEADS = HEADS | frozenset(
    [
        "linear",
        "lin",
        "out",
        "output",
        "output_layer",
        "proj",
        "projection",
        "projector",
        "projection_head",
        "decoder",
        "decoder_head",
        "predictor",
        "prediction_head",
        "regressor",
        "regression_head",
        "logits",
        "to_logits",
        "logit_layer",
        "last_layer",
        "final",
        "final_layer",
        "mlp",
        "mlp_head",
    ]
)
"""Names of heads that stand directly in a LightningModule."""
OWN_SCALES = frozenset(
    ["logit_scale", "logit_bias", "temperature", "log_temperature", "log_vars", "log_sigma"]
)
"""Names of trained numbers that stand directly in a LightningModule."""
