"""Conv-LoRA fine-tuning of a frozen Segment Anything Model (Zhong et al., ICLR 2024, arXiv:2401.17868)."""

IGNORED = 255  # class id of pixels that count for nothing, in losses and in scores
