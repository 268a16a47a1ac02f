"""What a vision-language model needs on top of ar-tuner."""

from ar_vlm.adapter import TextDecoderAdapter
from ar_vlm.errors import VlmError
from ar_vlm.inputs import Inputs, load_processor
from ar_vlm.samples import Message, Picture, Sample, read_samples

__version__ = "0.1.0"

__all__ = [
    "Inputs",
    "Message",
    "Picture",
    "Sample",
    "TextDecoderAdapter",
    "VlmError",
    "load_processor",
    "read_samples",
]
