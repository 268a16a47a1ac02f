"""What a vision-language model needs on top of ar-tuner."""

from ar_vlm.adapter import TextDecoderAdapter, VlmError

__version__ = "0.1.0"

__all__ = ["TextDecoderAdapter", "VlmError"]
