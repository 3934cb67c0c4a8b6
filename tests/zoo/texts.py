"""Hosts that read text: encoders."""

from __future__ import annotations

from zoo.row import SIZE, SPECIAL, VOCABULARY, Row, hf, text, whole

BERT = {**SIZE, "type_vocab_size": 2}
SMALL = {"vocab_size": VOCABULARY, **SPECIAL}


def _encoder(name: str, model: str, class_token: bool = True, **config: object) -> Row:
    return hf(name, "encoder", model, text, class_token=class_token, **config)


ROWS = (
    _encoder("bert", "BertForMaskedLM", **BERT),
    _encoder("roberta", "RobertaForSequenceClassification", **BERT),
    _encoder("xlm-roberta", "XLMRobertaForTokenClassification", **BERT),
    _encoder("electra", "ElectraForMaskedLM", **BERT, embedding_size=8),
    _encoder("ernie", "ErnieForMaskedLM", **BERT),
    _encoder("roformer", "RoFormerForMaskedLM", **BERT, embedding_size=16),
    _encoder("rembert", "RemBertForMaskedLM", **BERT, input_embedding_size=8,
             output_embedding_size=8),
    _encoder("big_bird", "BigBirdForMaskedLM", **BERT, attention_type="original_full"),
    _encoder("convbert", "ConvBertForMaskedLM", **BERT, embedding_size=16, conv_kernel_size=3,
             head_ratio=1),
    _encoder("squeezebert", "SqueezeBertForMaskedLM", **BERT, embedding_size=16),
    _encoder("mobilebert", "MobileBertForMaskedLM", **BERT, embedding_size=8,
             intra_bottleneck_size=8, num_feedforward_networks=2),
    _encoder("longformer", "LongformerForMaskedLM", **BERT, attention_window=4),
    _encoder("esm", "EsmForMaskedLM", **SIZE, mask_token_id=3, position_embedding_type="rotary",
             token_dropout=False),
    _encoder("mpnet", "MPNetForMaskedLM", **SIZE),
    _encoder("modernbert", "ModernBertForMaskedLM", **SIZE, cls_token_id=1, sep_token_id=2),
    _encoder("distilbert", "DistilBertForSequenceClassification", **SMALL, dim=16, n_heads=2,
             n_layers=2, hidden_dim=24, max_position_embeddings=64),
    _encoder("albert", "AlbertForMaskedLM", **BERT, embedding_size=8),
    _encoder("deberta", "DebertaForMaskedLM", **SIZE, relative_attention=True,
             pos_att_type=["c2p", "p2c"], max_relative_positions=8),
    _encoder("deberta-v2", "DebertaV2ForSequenceClassification", **SIZE, relative_attention=True,
             pos_att_type=["c2p", "p2c"], share_att_key=True),
    _encoder("xlnet", "XLNetForSequenceClassification", False, **SMALL, d_model=16, n_layer=2,
             n_head=2, d_inner=24, use_mems_eval=False),
    _encoder("xlm", "XLMForSequenceClassification", True, **SMALL, emb_dim=16, n_layers=2,
             n_heads=2, max_position_embeddings=64, pad_index=0, summary_type="first"),
    _encoder("funnel", "FunnelForMaskedLM", **SMALL, d_model=16, block_sizes=[1, 1], n_head=2,
             d_head=8, d_inner=24, num_decoder_layers=1),
    _encoder("t5 encoder", "T5EncoderModel", False, **SMALL, d_model=16, d_kv=8, d_ff=24,
             num_layers=2, num_heads=2),
    hf("fnet", "encoder", "FNetForMaskedLM", whole, class_token=True, **BERT),
)  # fmt: skip
